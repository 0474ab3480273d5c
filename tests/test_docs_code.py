"""Every block of the documentation: commands are read by the program itself, code runs, files are opened."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from anysite import config, registry
from anysite.benchmark import list_jobs
from anysite.commands import parse_duration
from anysite.data.case import Case, Dataset
from anysite.data.check import inspect_dataset
from anysite.data.layouts import open_dataset
from anysite.judge import COMBINED, COMBINED_REASON, QUALITY, QUALITY_REASON
from anysite.judgement import DECISIONS
from anysite.learner import build_network
from anysite.normalisation import Normalisation
from anysite.plan import Plan
from anysite.predict import read_manifests
from pages import DOCS, PAGES, ROOT, Block, arguments_of, find_blocks, parse, read_blocks, read_commands
from test_cli import Result, call

COMMANDS = find_blocks("")
PLAN = Plan(
    dimension=2, image_dimension=2, spacing=(1.0, 1.0), unit="px", channels=1, normalisation=(Normalisation(),),
    patch_size=(64, 64), classes=("background", "organ"), label_values=(0, 1),
)  # fmt: skip
# What stands for the reader's own in commands that are read and not run.
PLACEHOLDERS = {"FILE.toml": "benchmarks/ram_dsir/ram.toml", "my_objective": "auxiliary_reconstruction"}


def substitute(text: str) -> str:
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    return text


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.name)
def test_every_line_is_a_command_that_its_program_takes(block: Block) -> None:
    for words in read_commands(block):
        arguments = arguments_of([substitute(word) for word in words])
        if arguments is None:
            check_other_program(words)
        else:
            check_settings(arguments[0], parse(arguments))


def check_other_program(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert [word for word in rest if "=" not in word][0] in targets, words
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), words
    else:
        assert program in ("git", "pip"), words


def check_settings(verb: str, values: dict[str, object]) -> None:
    """Let the program refuse presets, settings, methods, metrics and times before anything would be read."""
    if budget := values.get("budget"):
        parse_duration(str(budget))
    overrides = [str(item) for item in listed(values.get("set_"))]
    if verb in ("train", "pretrain") and not values["plugin"]:
        check_configuration(config.load(preset_path(str(values["preset"])), overrides))
    if verb == "pretrain":
        assert not registry.find("objective", str(values["method"])).needs_label
    if verb == "predict" and values["adapt"] not in (None, "none", "auto"):
        registry.build("adapter", str(values["adapt"]).partition(":")[0])
    if verb == "benchmark":
        check_benchmark(values, overrides)


def check_benchmark(values: dict[str, object], overrides: list[str]) -> None:
    sites = [*map(str, listed(values["test_domain"])), "first", "second"]
    cases = tuple(Case(site, site, site, (Path(site),), Path(site)) for site in sites)
    methods = [preset_path(method) for method in str(values["methods"]).split(",")]
    corruptions = str(values["corruptions"])
    jobs = list_jobs(
        Dataset("made up", cases, ("background", "organ"), (0, 1)), Path("DATASET"), methods, [0],
        str(values["protocol"]), overrides, test_domains=sites[:-2], metrics=str(values["metrics"]).split(","),
        corruptions=corruptions.split(",") if corruptions else [], adapt=str(values["adapt"]).split(","),
    )  # fmt: skip
    assert jobs
    for method in methods:
        check_configuration(config.load(method, overrides))
    for part in (*str(values["seeds"]).split(","), *str(values["labels"]).split(",")):
        assert part == "all" or int(part) >= 0


def check_configuration(settings: config.Config) -> None:
    # A network of that size is checked without taking time and memory; MONAI's Swin UNETR reads numbers as it is built.
    with torch.device("cpu" if settings.network.name == "swin_unetr" else "meta"):
        build_network(settings, PLAN)
    for name, arguments in (settings.objectives | settings.pretrain.objectives).items():
        registry.build("objective", name, **arguments)
    for name, arguments in settings.judge.detectors.items():
        registry.build("detector", name, **arguments)
    adapt = settings.predict.adapt
    if adapt.method not in ("none", "auto"):
        registry.build("adapter", adapt.method, **adapt.settings)


def preset_path(preset: str) -> str:
    return str(ROOT / preset) if preset.endswith(".toml") else preset


def listed(value: object) -> list[object]:
    return list(value) if isinstance(value, Iterable) else []


FAST = [
    f"--set={setting}"
    for setting in (
        *("network.width=4", "plan.patch_size=[32,32]", "train.batch_size=2", "train.steps=2"),
        *("train.threads=1", "train.precision=32-true", "train.validation_cases=0"),
        *("predict.flips=false", "predict.precision=32-true", "judge.shifted_copies=0", "judge.cases=5"),
    )
]


def run(arguments: list[str], settings: list[str]) -> Result:
    """Run a command in this process; `settings` of a training yield to those on its own line."""
    if "--budget" in arguments:
        place = arguments.index("--budget")
        arguments = arguments[:place] + arguments[place + 2 :]
    chosen = settings if arguments[0] in ("train", "pretrain") else []
    result = call(arguments[0], *chosen, *arguments[1:])
    # Masks of a network that has learned nothing may well be rejected; all of them are written.
    rejected = arguments[0] in ("predict", "judge") and "masks were rejected" in result.err
    assert result.code == 0 or rejected, (arguments, result.err)
    return result


def run_page(page: Path, settings: list[str], substitutes: dict[str, str]) -> None:
    for block in read_blocks(page):
        if block.language == "":
            for words in read_commands(block):
                arguments = arguments_of([substitutes.get(word, word) for word in words])
                if arguments is not None:
                    run(arguments, settings)


def test_the_commands_of_the_start_page_run(
    tmp_path: Path, phantom_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(phantom_folder, "demo/phantom_2d")
    for site, hospital in (("north", "london"), ("west", "lyon")):
        shutil.copytree(phantom_folder / site, f"mydata/{hospital}")
    shutil.copy(phantom_folder / "dataset.json", "mydata")
    shutil.copytree(phantom_folder / "east" / "images", "new_images")
    run_page(DOCS / "start.md", FAST, {})
    assert Path("demo/report.html").stat().st_size > 10_000
    assert sorted(path.name for path in Path("masks").glob("*.png")) == sorted(
        path.name for path in Path("new_images").iterdir()
    )
    assert Path("masks/predictions.json").is_file()


def test_the_python_of_the_docs_runs_and_its_classes_work_as_plugins(
    tmp_path: Path, phantom_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_plugins", set())
    page = DOCS / "adding_a_method.md"
    assert {block.page for block in find_blocks("python")} == {page}
    modules = re.findall(
        r"`(my_\w+)\.py`:\n\n```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL
    )
    for name, source in modules:
        Path(f"{name}.py").write_text(source)
    assert [name for name, _ in modules] == ["my_net", "my_objective", "my_detector", "my_adapter"]
    others = [block for block in find_blocks("python") if not block.text.startswith('"""')]
    assert len(others) + len(modules) == len(find_blocks("python"))
    for block in others:
        exec(compile(block.text, block.name, "exec"), {})
    names = {"DATASET": str(phantom_folder), "IMAGES": str(phantom_folder / "west" / "images")}
    for block in read_blocks(page):
        for words in read_commands(block) if block.language == "" else []:
            if "--plugin" in words:
                arguments = arguments_of([names.get(word, word) for word in words])
                assert arguments is not None
                run(arguments, FAST)
    entries = read_manifests(Path("MASKS"))["cases"].values()
    assert {entry["adaptation"][0]["method"] for entry in entries} == {"my_adapter:MyAdapter"}
    for name, _ in modules:
        sys.modules.pop(name, None)


def write_volumes(folder: Path, names: Iterable[str], values: Iterable[int]) -> None:
    """Write images, or labels of these values, where a document says that they lie."""
    array = np.resize(np.array(list(values), np.uint8), (12, 12, 12))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / name)


def blocks_of(page: str, language: str) -> list[str]:
    return [block.text for block in read_blocks(DOCS / page) if block.language == language]


def test_the_manifest_of_the_data_page_opens(tmp_path: Path) -> None:
    (text,) = blocks_of("data.md", "csv")
    (tmp_path / "index.csv").write_text(text)
    files = [field for line in text.splitlines()[1:] for field in line.split(",")[3:] if field]
    write_volumes(tmp_path, (name for name in files if "images" in name), range(9))
    write_volumes(tmp_path, (name for name in files if "masks" in name), (0, 1))
    dataset = open_dataset(tmp_path)
    assert [(case.patient, case.domain) for case in dataset.cases] == [("n001", "north")] * 2 + [
        ("s001", "south")
    ]
    assert len(dataset.labelled) == 2


def test_the_json_of_the_data_page_opens(tmp_path: Path) -> None:
    datalist, joint, declaration = blocks_of("data.md", "json")
    for name, text in (("list", datalist), ("declared", declaration)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text(text)
    entries = json.loads(datalist)["training"]
    write_volumes(tmp_path / "list", (name for entry in entries for name in entry["image"]), range(9))
    write_volumes(tmp_path / "list", (entry["label"] for entry in entries), (0, 1))
    dataset = open_dataset(tmp_path / "list")
    assert [case.patient for case in dataset.cases] == ["p1", "b_seg"]
    assert not [
        problem for problem in inspect_dataset(tmp_path / "list").problems if problem.rule == "channel count"
    ]

    write_volumes(tmp_path / "declared", ["a/images/x.nii.gz"], range(9))
    write_volumes(tmp_path / "declared", ["a/masks/x.nii.gz"], (0, 85, 255))
    dataset = open_dataset(tmp_path / "declared")
    assert (dataset.classes, dataset.label_values) == (("background", "ventricle", "scar"), (0, 85, 255))

    (tmp_path / "organs.json").write_text(joint)
    for entry in json.loads(joint)["datasets"].values():
        groups = entry.get("labels", {"ventricle": [1]})
        values = {f"label_{value}": value for group in groups.values() for value in group}
        declared = {"labels": {"background": 0, **(values if "labels" in entry else {"ventricle": 1})}}
        write_volumes(tmp_path / entry["path"], ["a/images/x.nii.gz"], range(9))
        write_volumes(tmp_path / entry["path"], ["a/masks/x.nii.gz"], (0, *values.values()))
        (tmp_path / entry["path"] / "dataset.json").write_text(json.dumps(declared))
    assert open_dataset(tmp_path / "organs.json").classes == (
        "background",
        "ventricle",
        "hippocampus",
        "thalamus",
    )


def test_the_verdict_of_the_judging_page_is_one() -> None:
    (text,) = blocks_of("judging.md", "json")
    for verdict in json.loads(text)["cases"].values():
        assert verdict["verdict"] in DECISIONS
        assert {"verdict", "reasons", "predicted_dice", "scores", "least_dice"} == verdict.keys()
        joint = {COMBINED: COMBINED_REASON, QUALITY: QUALITY_REASON}
        known = {
            name: joint.get(name) or registry.find("detector", name).reason for name in verdict["scores"]
        }
        assert set(verdict["reasons"]) <= {
            known[name] for name, score in verdict["scores"].items() if score > 1
        }


def test_every_kind_of_block_is_checked_somewhere() -> None:
    """So that a new language, or JSON on another page, gets a test of its own."""
    found = {
        (block.language, block.page.name) for page in PAGES for block in read_blocks(page) if block.language
    }
    expected = {
        ("python", "adding_a_method.md"),
        ("csv", "data.md"),
        ("json", "data.md"),
        ("json", "judging.md"),
    }
    assert {pair for pair in found if pair[0] not in ("text", "toml")} == expected
    for block in find_blocks("toml"):
        check_configuration(config.parse(tomllib.loads(block.text)))


def shape_of(line: str) -> str:
    """Return a printed line with cases, times and numbers left open, and what is cut short cut off."""
    line = line.split("...")[0]
    line = re.sub(r"\b[a-z]+-\d{3}-[ab]\b", "CASE", line)
    line = re.sub(r"(\d+ h )?(\d+ min )?\d+ s\b", "TIME", line)
    return " ".join(re.sub(r"-?\d+(\.\d+)?", "0", line).split())


# Whether any is rejected or reviewed depends on the network, which learns next to nothing here.
OPTIONAL = ("reject:", "review:", "error:")


@pytest.mark.slow
def test_the_tutorial_runs_and_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller pictures, fewer steps and one seed; the lines are those of the page but for numbers."""
    monkeypatch.chdir(tmp_path)
    smaller = {"64": "32", "train.steps=400": "train.steps=20", "0,1,2": "0"}
    one_site = ["--test-domain", "west", "--parallel", "0", "--set", "judge.detectors={}"]
    printed: list[str] = []
    compared = 0
    for before, block in pairwise([None, *read_blocks(DOCS / "tutorial.md")]):
        assert block is not None
        if block.language == "":
            printed = []
            for words in read_commands(block):
                arguments = arguments_of([smaller.get(word, word) for word in words])
                assert arguments is not None
                result = run(
                    arguments + (one_site if arguments[0] == "benchmark" else []), ["--set=train.threads=1"]
                )
                printed += (result.out + result.err).splitlines()
        elif before is not None and before.language == "":
            shapes = [shape_of(line) for line in printed]
            for line in map(shape_of, block.text.splitlines()):
                if not line.startswith(OPTIONAL):
                    assert any(shape.startswith(line) for shape in shapes), f"{line!r} is not in {shapes}"
                    compared += 1
    assert compared > 30
    for name in ("report.html", "adapted.html", "comparison.html"):
        assert Path(name).stat().st_size > 10_000
