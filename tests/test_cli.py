"""The commands: what they print, write and exit with."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from anysite import atomic, cli, commands, console, predict, registry, runs
from anysite.benchmark import Job, JobOutcome
from anysite.data.phantom import write_phantom
from anysite.errors import ConfigError
from anysite.loop import Progress
from anysite.report.read import read_sources
from anysite.rows import ROWS, SUMMARY, read_rows
from conftest import SMALL

TINY = [f"--set={setting}" for setting in (*SMALL, "train.steps=2", "train.validation_cases=0")]


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Result:
    """Run a command in this process, as `anysite ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["anysite", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        cli.main()
    return Result(int(caught.value.code or 0), out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> str:
    result = call(*arguments)
    # A training that is not watched in a terminal writes a line at every tenth of its way.
    expected = ("step ", "warning: too few source patients")
    unexpected = [line for line in result.err.splitlines() if not line.startswith(expected)]
    assert (result.code, unexpected) == (0, [])
    return result.out


@pytest.fixture(scope="module")
def run(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    out = succeed("train", phantom_folder, "--output", path, "--test-domain", "west", *TINY)
    assert "trained 2 steps" in out
    assert f"north, east; 2 held out, 4 of test sites; run folder {path}" in out
    return path


@pytest.fixture(scope="module")
def masks(run: Path, phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("masks") / "masks"
    out = succeed("predict", run, phantom_folder, "--output", path)
    left_out = len(runs.open_run(run).splits["training"])
    assert f"{left_out} cases were trained on and are left out (--include-training keeps them)" in out
    assert f"{12 - left_out} masks written to {path}, 0 were there already, 0 cases failed" in out
    return path


def test_check_lists_sites_and_problems(phantom_folder: Path, tmp_path: Path) -> None:
    out = succeed("check", phantom_folder)
    assert all(site in out for site in ("north", "east", "west"))
    assert "0 errors" in out
    damaged = write_phantom(tmp_path / "phantom", patients_per_site=2, size=32, sites=("north", "east"))
    victim = next(damaged.glob("east/images/*.png"))
    victim.write_bytes(victim.read_bytes()[:99])
    result = call("check", damaged)
    assert (result.code, result.err) == (1, "")
    assert f"{victim.name}: not readable as a picture" in result.out
    assert "1 errors" in result.out
    content = json.loads(call("check", damaged, "--json").out)
    assert [problem["case"] for problem in content["problems"]] == [victim.stem]
    assert {site["domain"]: site["cases"] for site in content["sites"]} == {"north": 2, "east": 2}


def test_check_writes_a_page_that_needs_nothing_else(phantom_folder: Path, tmp_path: Path) -> None:
    out = succeed("check", phantom_folder, "--output", tmp_path / "check.html")
    assert "most different: " in out
    page = (tmp_path / "check.html").read_text(encoding="utf-8")
    assert "None found." in page
    assert page.count("<polyline") == 3
    assert not re.search(r"(src|href)=\"[^#]", page)
    assert str(phantom_folder) not in page
    succeed("check", phantom_folder, "--output", tmp_path / "check.json")
    succeed("report", tmp_path / "check.json", "--output", tmp_path / "report.html")
    assert "Data shift audit" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert call("check", phantom_folder, "--output", tmp_path / "check.txt").code == 2


def test_check_reports_a_contradictory_layout_as_a_problem(tmp_path: Path) -> None:
    (tmp_path / "index.csv").write_text("case,picture\nx,gone.png\n")
    result = call("check", tmp_path, "--json")
    assert (result.code, result.err) == (1, "")
    (problem,) = json.loads(result.out)["problems"]
    assert problem["rule"] == "contradictory layout"
    assert "image" in problem["observed"]
    assert call("check", tmp_path / "gone").code == 2


def test_training_lists_all_errors_and_ignores_those_of_test_sites(tmp_path: Path) -> None:
    damaged = write_phantom(
        tmp_path / "phantom", patients_per_site=3, size=32, sites=("north", "east", "west")
    )
    victims = sorted(damaged.glob("east/images/*.png"))[:2] + sorted(damaged.glob("west/images/*.png"))[:1]
    for victim in victims:
        victim.write_bytes(b"")
    result = call("train", damaged, "--output", tmp_path / "run", "--test-domain", "west")
    assert result.code == 2
    first, *faults = result.err.splitlines()
    assert "2 errors in the cases to learn from" in first
    assert [victim.name in fault for victim, fault in zip(victims, faults, strict=False)] == [True, True]
    assert len(faults) == 2
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_masks_are_those_of_cases_not_trained_on(run: Path, masks: Path, phantom_folder: Path) -> None:
    splits = runs.open_run(run).splits
    manifest = predict.read_manifests(masks)
    assert sorted(manifest["cases"]) == sorted({*splits["held_out"], *splits["test"]})
    assert manifest["dataset"]["name"] == phantom_folder.name
    assert manifest["runs"][0]["preset"] == "robust"


def test_cases_trained_on_are_predicted_when_asked_for(
    run: Path, phantom_folder: Path, tmp_path: Path
) -> None:
    out = succeed("predict", run, phantom_folder, "--output", tmp_path, "--include-training")
    assert "12 masks written" in out
    assert "left out" not in out
    splits = [entry["split"] for entry in predict.read_manifests(tmp_path)["cases"].values()]
    assert {split: splits.count(split) for split in splits}.keys() == {"training", "in_domain", "unseen"}


def test_parts_are_together_complete(run: Path, masks: Path, phantom_folder: Path, tmp_path: Path) -> None:
    written = []
    for i in (1, 2, 3):
        succeed("predict", run, phantom_folder, "--output", tmp_path, "--part", f"{i}/3")
        written.append(len(list(tmp_path.glob("*.png"))))
    assert written == sorted(set(written))
    expected = {path.name: path.read_bytes() for path in masks.glob("*.png")}
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == expected
    assert "Dice" in succeed("evaluate", tmp_path, phantom_folder)


def test_an_ensemble_on_one_image_with_probabilities(run: Path, phantom_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    succeed("train", phantom_folder, "--output", other, "--seed", 4, "--test-domain=west", *TINY)
    image = sorted((phantom_folder / "west" / "images").iterdir())[0]
    options = ("--save-probabilities", "--flips", "--accelerator", "cpu")
    result = call("predict", run, other, image, "--output", tmp_path / "out", *options)
    assert result.code == 1
    assert "1 of 1 masks were rejected" in result.err, "networks that have learned nothing disagree"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(image.name, f"{image.stem}.npz", "predictions.json", "verdicts.json", "verdicts.csv")
    }
    manifest = predict.read_manifests(tmp_path / "out")
    assert [entry["seed"] for entry in manifest["runs"]] == [0, 4]
    assert manifest["settings"]["flips"]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [(["pretrain.steps=1"], 1), (["train.steps=2"], 2), (["pretrain.steps=1", "train.steps=2"], 2)],
)
def test_a_pretraining_heeds_its_own_group_and_before_it_what_is_said_of_training(
    settings: list[str], steps: int, phantom_folder: Path, tmp_path: Path
) -> None:
    given = [f"--set={setting}" for setting in (*SMALL, "train.validation_cases=0", *settings)]
    succeed("pretrain", phantom_folder, "--output", tmp_path / "run", "--preset", "t_ae", *given)
    run = runs.open_run(tmp_path / "run")
    assert (run.manifest["steps"], list(run.config.objectives)) == (steps, ["tile_autoencoder"])


def test_a_finished_run_learns_to_reflect_once(run: Path, phantom_folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    small = ("--set", "width=4", "--set", "prior_width=4", "--steps", 2)
    assert "--adapt refseg" in succeed("reflect", copied, phantom_folder, *small)
    again = call("reflect", copied, phantom_folder, *small)
    assert again.code == 2
    assert "--replace" in again.err
    unknown = call("reflect", copied, phantom_folder, "--set", "depth=4", "--replace")
    assert unknown.code == 2
    assert "depth" in unknown.err


def test_evaluate_prints_a_table_or_json(masks: Path, phantom_folder: Path) -> None:
    out = succeed("evaluate", masks, phantom_folder)
    assert "unseen" in out
    assert "in domain" in out
    assert "labelled cases have no mask here" in out
    content = json.loads(succeed("evaluate", masks, phantom_folder, "--json", "--tolerance", 1))
    assert content == json.loads((masks / SUMMARY).read_text())
    assert {"foreground_mean", "by_domain", "by_split"} <= content.keys()
    rows = read_rows(masks / ROWS)
    assert {row["case"] for row in rows} == {p.stem for p in masks.glob("*.png")}
    assert {row.get("tolerance") for row in rows if row["metric"] == "surface_dice"} == {1.0}
    assert {row.metric for row in read_sources([masks / ROWS])[0].rows} >= {"dice", "surface_dice@1.0"}
    succeed("evaluate", masks, phantom_folder)
    assert not any("tolerance" in row for row in read_rows(masks / ROWS))


def test_a_batch_of_which_one_fails_ends_with_1(run: Path, phantom_folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in (phantom_folder / "west" / "images").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    victim = sorted(images.iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:150])
    result = call("predict", run, images, "--output", tmp_path / "out", "--part", "1/1")
    assert result.code == 1
    failed, error = result.err.splitlines()
    assert failed.startswith(f"failed: {victim.stem}: {victim}: not readable as a picture")
    assert error.startswith("error: 1 of 4 cases failed. The reasons are above")
    assert "predictions.json" in error
    assert not (tmp_path / "out" / victim.name).exists()
    labelled = call("evaluate", tmp_path / "out", phantom_folder)
    assert labelled.code == 1
    assert labelled.err.splitlines()[0].startswith(f"failed: {victim.stem}: {victim.name}: not readable")
    assert labelled.err.splitlines()[1].startswith("error: 1 cases could not be scored")


def test_report_writes_one_page(masks: Path, phantom_folder: Path, tmp_path: Path) -> None:
    succeed("evaluate", masks, phantom_folder)
    page = tmp_path / "page.html"
    assert f"report written to {page}" in succeed("report", masks, "--output", page, "--title", "All of it")
    assert "All of it" in page.read_text()


def test_info_tells_what_a_path_holds(run: Path, masks: Path, phantom_folder: Path) -> None:
    image = sorted((phantom_folder / "west" / "images").iterdir())[0]
    started = runs.open_run(run).path.parent / "started"
    succeed(
        "train",
        phantom_folder,
        "--output",
        started,
        "--test-domain",
        "west",
        f"--set=pretrained={run}",
        *TINY,
    )
    told = json.loads(succeed("info", started, "--json"))["started_from"]
    assert told["run"] == run.name
    assert told["taken"]
    assert not told["skipped"]
    expected = {
        run: {"kind": "run", "train_domains": ["north", "east"], "steps": 2, "finished": True},
        masks: {"kind": "predictions", "cases": {"done": len(list(masks.glob("*.png")))}},
        phantom_folder: {"kind": "dataset", "sites": {"north": 4, "east": 4, "west": 4}, "patients": 9},
        image: {"kind": "image", "shape": [64, 64], "channels": 1, "unit": "px"},
    }
    for path, facts in expected.items():
        content = json.loads(succeed("info", path, "--json"))
        assert facts.items() <= content.items()
        lines = succeed("info", path).splitlines()
        assert [line.split()[0] for line in lines] == list(content)


def test_phantom_writes_a_dataset_without_faults(tmp_path: Path) -> None:
    options = ("--size", 32, "--patients", 4, "--site", "north", "--site", "west")
    out = succeed("phantom", tmp_path / "mine", *options)
    assert out == f"10 cases of north, west written to {tmp_path / 'mine'}\n"
    assert "0 errors, 0 warnings" in succeed("check", tmp_path / "mine")
    again = call("phantom", tmp_path / "mine", *options)
    assert (again.code, "something is already there" in again.err) == (2, True)
    assert "expected 2 or 3" in call("phantom", tmp_path / "other", "--dimension", 4).err


def test_methods_are_listed_with_their_settings() -> None:
    content = json.loads(succeed("methods", "--json"))
    assert {m["name"] for m in content["methods"] if m["kind"] == "network"} == set(registry.NETWORKS)
    assert "baseline" in content["presets"]
    out = succeed("methods")
    assert all(name in out for table in registry.TABLES.values() for name in table)


def test_benchmark_passes_its_options_on_and_ends_with_1_where_a_job_failed(
    phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a job does is tested elsewhere; here it only pretends."""
    asked: list[Job] = []

    def pretend(job: Job, threads: int, keep_runs: Path | None, workers: object) -> JobOutcome:
        asked.append(job)
        if job.seed == 5:
            return JobOutcome(job, [], "no luck")
        place = {"dataset": job.dataset, "method": job.method, "seed": job.seed, "overrides": "train.steps=2"}
        row = {**place, "train_domains": "+".join(job.train_domains), "metric": "dice", "value": 0.25}
        return JobOutcome(job, [{**row, "split": split} for split in ("unseen", "in_domain", "run")])

    monkeypatch.setattr("anysite.benchmark._run_job_apart", pretend)
    output = tmp_path / "rows.jsonl"
    options = ("--seeds", "3,5", "--test-domain=west", "--budget=2m", "--set=train.steps=2")
    result = call("benchmark", phantom_folder, "--output", output, *options)
    assert result.code == 1
    assert [(j.seed, j.budget_s, j.test_domains, j.overrides) for j in asked] == [
        (seed, 120.0, ("west",), ("train.steps=2",)) for seed in (3, 5)
    ]
    assert "2 jobs, 0 of them done before" in result.out
    assert "seed 3  trained on north+east: Dice in domain 25.0, unseen 25.0" in result.out
    failed, error = result.err.splitlines()
    assert failed.startswith("failed: ")
    assert failed.endswith("seed 5  trained on north+east: no luck")
    assert error.startswith("error: 1 of 2 jobs failed. Run the same command again")
    asked.clear()
    assert (
        "2 jobs, 1 of them done before" in call("benchmark", phantom_folder, "--output", output, *options).out
    )
    assert [job.seed for job in asked] == [5]


def test_an_interrupted_training_ends_with_3_and_goes_on(
    phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> object:
        def advance(progress: Progress) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        return contextlib.nullcontext(advance)

    arguments = ("train", phantom_folder, "--output", tmp_path / "run", *TINY)
    with monkeypatch.context() as patched:
        patched.setattr("anysite.console.training_bar", interrupt)
        result = call(*arguments)
    assert result.code == 3
    assert result.err.startswith(f"error: {tmp_path / 'run'}: stopped after step 1 of 2; the state is saved.")
    again = call(*arguments)
    assert again.code == 2
    assert "a run is already there. Add --resume" in again.err
    assert "trained 2 steps" in succeed(*arguments, "--resume")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), (" 1.5 h ", 5400), ("10m", 600), ("2h", 7200), ("0.5s", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert commands.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "-5s", "5 minutes", "1e3", "2d", "h", "1h30m", "nan", "9" * 400]
)
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--budget .*; expected a time such as 90s, 10m or 2h"):
        commands.parse_duration(text)


def test_a_defect_ends_with_a_code_of_its_own(phantom_folder: Path) -> None:
    with mock.patch("anysite.describe.describe", side_effect=KeyError("a defect")):
        result = call("info", phantom_folder)
    assert result.code == 70
    assert "KeyError: 'a defect'" in result.err


def test_help_version_and_no_arguments() -> None:
    for arguments in ([], ["--help"]):
        out = succeed(*arguments)
        assert all(name in out for name in ("demo", "train", "predict", "Exit codes: 0 done, 1 done but"))
    assert succeed("--version").startswith("anysite ")


def test_demo_goes_all_the_way(tmp_path: Path) -> None:
    """On a dataset that is there already, and small."""
    write_phantom(tmp_path / "phantom_2d", patients_per_site=2, size=32)
    out = succeed("demo", "--output", tmp_path, "--budget", "1s")
    commands = [line.split()[2] for line in out.splitlines() if ". anysite " in line]
    assert commands == ["check", "train", "predict", "evaluate", "report"]
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert {"west"} == {
        row["domain"] for row in read_rows(tmp_path / "masks" / ROWS) if row["split"] == "unseen"
    }


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [2, 3])
def test_demo_makes_its_own_data(tmp_path: Path, dimension: int) -> None:
    succeed("demo", "--output", tmp_path, "--budget", "5s", "--dimension", dimension, "--seed", 3)
    assert (tmp_path / "report.html").is_file()


def test_real_processes_exit_with_the_same_codes(phantom_folder: Path, tmp_path: Path) -> None:
    def start(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "anysite", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    trained = start("train", phantom_folder, "--output", tmp_path / "run", *TINY)
    assert trained.returncode == 0
    assert all(line.startswith("step ") for line in trained.stderr.splitlines())
    described = start("info", tmp_path / "run", "--json")
    assert json.loads(described.stdout)["kind"] == "run"
    missing = start("info", tmp_path / "absent")
    assert missing.returncode == 2
    assert missing.stdout == ""
    assert missing.stderr == f"error: {tmp_path / 'absent'}: no such file or folder.\n"


def test_names_are_printed_as_they_are_whatever_they_look_like(
    tmp_path: Path, phantom_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of sites are no markup, and those of files need not be UTF-8."""
    shutil.copytree(phantom_folder, tmp_path / "odd")
    table = (tmp_path / "odd" / "index.csv").read_text()
    odd = re.sub(r"(?m)^([^,]*,[^,]*),north,", r"\1,[/b] north,", table)
    assert odd != table
    (tmp_path / "odd" / "index.csv").write_text(odd)
    assert succeed("check", tmp_path / "odd").count("[/b] north") >= 2
    console.say(f"M{os.fsdecode(bytes([0xFC]))}ller")
    console.complain(ConfigError(f"M{os.fsdecode(bytes([0xFC]))}ller"))
    found = capsys.readouterr()
    assert "M\\udcfcller" in found.out
    assert "M\\udcfcller" in found.err
    atomic.write_text(tmp_path / "names.txt", f"M{os.fsdecode(bytes([0xFC]))}ller")
    assert (tmp_path / "names.txt").read_text() == "M\\udcfcller"
