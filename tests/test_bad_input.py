"""Bad input through the command line: one line that names the place, the documented exit code, no mask."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from anysite import atomic
from test_cli import TINY, call

Prepare = Callable[[Path, Path], list[object]]

CASES: list = []


def bad(message: str, failed: str = "") -> Callable[[Prepare], Prepare]:
    """Enter a function that prepares a folder and returns the command; `failed` matches the lines of cases."""

    def enter(prepare: Prepare) -> Prepare:
        CASES.append(pytest.param(prepare, message, failed, id=prepare.__name__))
        return prepare

    return enter


@pytest.fixture(scope="module")
def run(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert call("train", phantom_folder, "--output", path, *TINY, "--test-domain=west").code == 0
    return path


def grey(seed: int = 0, shape: tuple[int, ...] = (32, 32)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)


def square(shape: tuple[int, ...] = (32, 32)) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(n // 4, n // 2) for n in shape)] = 1
    return label


def write(path: Path, array: np.ndarray, spacing: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".nii" in path.name:
        nibabel.save(nibabel.Nifti1Image(array, np.diag([spacing, 1, 1, 1])), path)
    else:
        Image.fromarray(array).save(path)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def dataset(tmp: Path, suffix: str = ".png") -> Path:
    """Write two sites of two cases; `north/images/a` and its label are there to be spoilt."""
    shape = (32, 32) if suffix == ".png" else (16, 16, 16)
    for site, names in (("north", "ab"), ("east", "cd")):
        for name in names:
            write(tmp / "data" / site / "images" / f"{name}{suffix}", grey(ord(name), shape))
            write(tmp / "data" / site / "masks" / f"{name}{suffix}", square(shape))
    atomic.write_json(tmp / "data" / "dataset.json", {"labels": {"background": 0, "organ": 1}})
    return tmp / "data"


def image_of(data: Path, suffix: str = ".png") -> Path:
    return data / "north" / "images" / f"a{suffix}"


def label_of(data: Path, suffix: str = ".png") -> Path:
    return data / "north" / "masks" / f"a{suffix}"


def train(tmp: Path, data: Path, *more: str) -> list[object]:
    return ["train", data, "--output", tmp / "out", *TINY, "--set=train.validation_fraction=0", *more]


def predict(tmp: Path, run: object, source: Path, *more: str) -> list[object]:
    return ["predict", run, source, "--output", tmp / "out", *more]


def benchmark(tmp: Path, *more: str) -> list[object]:
    return ["benchmark", dataset(tmp), "--output", tmp / "rows.jsonl", *more]


def copy_of(run: Path, tmp: Path) -> Path:
    return Path(shutil.copytree(run, tmp / "run"))


# Files that are missing or damaged


@bad(r"absent\.png: no such file or folder; expected ")
def image_missing(tmp: Path, run: Path) -> list[object]:
    return predict(tmp, run, tmp / "absent.png")


@bad(r"absent: no such file or folder")
def dataset_missing(tmp: Path, run: Path) -> list[object]:
    return train(tmp, tmp / "absent")


@bad(r"absent\.jsonl: no such file")
def rows_missing(tmp: Path, run: Path) -> list[object]:
    return ["report", tmp / "absent.jsonl", "--output", tmp / "page.html"]


@bad(r"absent: no such folder; expected a folder of masks")
def predictions_missing(tmp: Path, run: Path) -> list[object]:
    return ["evaluate", tmp / "absent", dataset(tmp)]


@bad("1 of 1 cases failed", failed=r"x: .*gone\.png: no such file")
def listed_image_missing(tmp: Path, run: Path) -> list[object]:
    (tmp / "index.csv").write_text("case,image\nx,gone.png\n")
    return predict(tmp, run, tmp / "index.csv")


@bad(r"north/images/a\.png: not readable as a picture")
def png_truncated_in_training(tmp: Path, run: Path) -> list[object]:
    data = dataset(tmp)
    cut(image_of(data))
    return train(tmp, data)


@bad("1 of 1 cases failed", failed=r"a: .*/a\.png: not readable as a picture")
def png_truncated(tmp: Path, run: Path) -> list[object]:
    return predict(tmp, run, cut(write(tmp / "a.png", grey())))


@bad("1 of 1 cases failed", failed=r"a: .*/a\.png: not readable as a picture \(cannot identify")
def png_of_text(tmp: Path, run: Path) -> list[object]:
    (tmp / "a.png").write_text("dear colleague,\nplease find")
    return predict(tmp, run, tmp / "a.png")


@bad("1 of 1 cases failed", failed=r"v: .*/v\.nii\.gz: (not readable as NIfTI|\d+ bytes)")
def nifti_truncated(tmp: Path, run: Path) -> list[object]:
    return predict(tmp, run, cut(write(tmp / "v.nii.gz", grey(shape=(16, 16, 16)))))


@bad(r"north/images/a\.nii: 2965 bytes; expected exactly 4448 by its header. The file is truncated")
def nifti_truncated_in_training(tmp: Path, run: Path) -> list[object]:
    data = dataset(tmp, ".nii")
    cut(image_of(data, ".nii"))
    return train(tmp, data)


@bad("1 of 1 cases failed", failed=r"v: .*/v\.nii: 3 voxels that are NaN or infinite")
def nan_voxels(tmp: Path, run: Path) -> list[object]:
    array = grey(shape=(16, 16, 16)).astype(np.float32)
    array[0, 0, :2], array[1, 1, 1] = np.nan, np.inf
    return predict(tmp, run, write(tmp / "v.nii", array))


@bad(r"north/images/a\.nii: 1 voxels that are NaN")
def nan_voxels_in_training(tmp: Path, run: Path) -> list[object]:
    data = dataset(tmp, ".nii")
    array = grey(shape=(16, 16, 16)).astype(np.float32)
    array[3, 3, 3] = np.nan
    write(image_of(data, ".nii"), array)
    return train(tmp, data)


@bad("1 of 1 cases failed", failed=r"a: .*/a\.png: every voxel is 7; expected contrast")
def constant_image(tmp: Path, run: Path) -> list[object]:
    return predict(tmp, run, write(tmp / "a.png", np.full((32, 32), 7, np.uint8)))


# Images and labels that do not fit


@bad(r"masks/a\.png: shape \(32, 31\).*expected shape \(32, 32\)")
def label_of_other_shape(tmp: Path, run: Path) -> list[object]:
    data = dataset(tmp)
    write(label_of(data), square((32, 31)))
    return train(tmp, data)


@bad(r"masks/a\.nii\.gz: shape \(16, 16, 16\), spacing 2 x 1 x 1 mm.*; expected .* spacing 1 x 1 x 1")
def label_of_other_spacing(tmp: Path, run: Path) -> list[object]:
    data = dataset(tmp, ".nii.gz")
    write(label_of(data, ".nii.gz"), square((16, 16, 16)), spacing=2.0)
    return train(tmp, data)


@bad(r"north/masks/a\.png: value 9; expected only 0, 1")
def label_value_undeclared(tmp: Path, run: Path) -> list[object]:
    data = dataset(tmp)
    write(label_of(data), square() * 9)
    return train(tmp, data)


@bad("1 cases could not be scored", failed=r"a: a\.png: label value 9")
def label_value_undeclared_in_evaluation(tmp: Path, run: Path) -> list[object]:
    data = dataset(tmp)
    write(label_of(data), square() * 9)
    return ["evaluate", write(tmp / "masks" / "a.png", square()).parent, data]


@bad("1 of 1 cases failed", failed=r"a: an image with 2 spatial axes and 3 channels; expected 2 .* and 1 ")
def too_many_channels(tmp: Path, run: Path) -> list[object]:
    return predict(tmp, run, write(tmp / "a.png", grey(shape=(32, 32, 3))))


@bad("1 of 1 cases failed", failed=r"v: an image with 3 spatial axes and 1 channels; expected 2 ")
def volume_for_a_run_of_pictures(tmp: Path, run: Path) -> list[object]:
    return predict(tmp, run, write(tmp / "v.nii.gz", grey(shape=(16, 16, 16))))


@bad(r"images/[abcd]\.png: \d channels; expected \d channels as ")
def channels_that_differ(tmp: Path, run: Path) -> list[object]:
    data = dataset(tmp)
    write(image_of(data), grey(shape=(32, 32, 3)))
    return train(tmp, data)


# Datasets


@bad(r"empty: no dataset: the folder holds nothing; expected a CSV manifest")
def dataset_empty(tmp: Path, run: Path) -> list[object]:
    (tmp / "empty").mkdir()
    return train(tmp, tmp / "empty")


@bad(r"empty: no images: the folder holds nothing")
def images_empty(tmp: Path, run: Path) -> list[object]:
    (tmp / "empty").mkdir()
    return predict(tmp, run, tmp / "empty")


@bad(r"data: no labelled cases to train on")
def labels_missing_in_training(tmp: Path, run: Path) -> list[object]:
    data = dataset(tmp)
    for site in ("north", "east"):
        shutil.rmtree(data / site / "masks")
    return train(tmp, data)


@bad(r"data: no label files and no declared classes\. Add dataset\.json")
def classes_missing(tmp: Path, run: Path) -> list[object]:
    data = dataset(tmp)
    for site in ("north", "east"):
        shutil.rmtree(data / site / "masks")
    (data / "dataset.json").unlink()
    return train(tmp, data)


@bad(r"data: no case with a label\. Score on a dataset that has labels")
def labels_missing_in_evaluation(tmp: Path, run: Path) -> list[object]:
    data = dataset(tmp)
    for site in ("north", "east"):
        shutil.rmtree(data / site / "masks")
    return ["evaluate", write(tmp / "masks" / "a.png", square()).parent, data]


@bad(r"masks: no mask for any labelled case; expected masks named after cases of data")
def masks_of_other_cases(tmp: Path, run: Path) -> list[object]:
    return ["evaluate", write(tmp / "masks" / "zebra.png", square()).parent, dataset(tmp)]


@bad(r"index\.csv: no column 'image' among case, picture; expected the columns case and image")
def csv_without_images(tmp: Path, run: Path) -> list[object]:
    (tmp / "index.csv").write_text("case,picture\nx,gone.png\n")
    return ["info", tmp]


@bad(r"dataset\.json: not readable as JSON")
def declaration_garbled(tmp: Path, run: Path) -> list[object]:
    data = dataset(tmp)
    (data / "dataset.json").write_text('{"labels": ')
    return ["info", data]


# Run folders and manifests


@bad(r"run/weights\.safetensors: no such file\. Restore the run folder")
def run_without_weights(tmp: Path, run: Path) -> list[object]:
    (copy_of(run, tmp) / "weights.safetensors").unlink()
    return predict(tmp, tmp / "run", write(tmp / "a.png", grey()))


@bad(r"run/weights\.safetensors: a file altered since training")
def run_with_altered_weights(tmp: Path, run: Path) -> list[object]:
    weights = copy_of(run, tmp) / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return predict(tmp, tmp / "run", write(tmp / "a.png", grey()))


@bad(r"run/plan\.json: a file altered since training")
def run_with_altered_plan(tmp: Path, run: Path) -> list[object]:
    plan = copy_of(run, tmp) / "plan.json"
    plan.write_text(plan.read_text().replace('"patch_size"', '"patch_sise"'))
    return predict(tmp, tmp / "run", write(tmp / "a.png", grey()))


def reseal(run: Path, name: str, text: str) -> Path:
    """Replace a file of a run, and its digest too, as somebody with a purpose might."""
    (run / name).write_text(text)
    manifest = atomic.read_json(run / "run.json")
    manifest["files"][name] = atomic.sha256(run / name)
    atomic.write_json(run / "run.json", manifest)
    return run


@bad(r"run/config\.json: not readable as JSON")
def run_with_garbled_configuration(tmp: Path, run: Path) -> list[object]:
    reseal(copy_of(run, tmp), "config.json", "{")
    return predict(tmp, tmp / "run", write(tmp / "a.png", grey()))


@bad(r"run/plan\.json: dimension: Field required")
def run_with_an_empty_plan(tmp: Path, run: Path) -> list[object]:
    reseal(copy_of(run, tmp), "plan.json", "{}")
    return predict(tmp, tmp / "run", write(tmp / "a.png", grey()))


@bad(r"run/splits\.json: not readable as JSON")
def run_with_garbled_splits(tmp: Path, run: Path) -> list[object]:
    reseal(copy_of(run, tmp), "splits.json", "]")
    return predict(tmp, tmp / "run", write(tmp / "a.png", grey()))


@bad(r"weights\.safetensors: \d+ tensors that do not fit, such as ")
def run_with_the_configuration_of_another(tmp: Path, run: Path) -> list[object]:
    content = atomic.read_json(run / "config.json")
    content["network"]["width"] = 8
    reseal(copy_of(run, tmp), "config.json", json.dumps(content))
    return predict(tmp, tmp / "run", write(tmp / "a.png", grey()))


@bad(r"network 'evil:Payload' lies outside anysite\. Pass --plugin evil:Payload if you trust its code")
def run_that_names_code(tmp: Path, run: Path) -> list[object]:
    content = atomic.read_json(run / "config.json")
    content["network"] = {"name": "evil:Payload"}
    reseal(copy_of(run, tmp), "config.json", json.dumps(content))
    return predict(tmp, tmp / "run", write(tmp / "a.png", grey()))


@bad(r"run/run\.json: not readable as JSON")
def run_with_garbled_manifest(tmp: Path, run: Path) -> list[object]:
    (copy_of(run, tmp) / "run.json").write_text("{'anysite': 1}")
    return predict(tmp, tmp / "run", write(tmp / "a.png", grey()))


@bad(r"run/run\.json: not a run's manifest")
def run_with_a_list_as_manifest(tmp: Path, run: Path) -> list[object]:
    (copy_of(run, tmp) / "run.json").write_text("[]")
    return predict(tmp, tmp / "run", write(tmp / "a.png", grey()))


@bad(r"run/plan\.json: not a JSON object")
def run_with_a_list_as_plan_described(tmp: Path, run: Path) -> list[object]:
    (copy_of(run, tmp) / "plan.json").write_text("[]")
    return ["info", tmp / "run"]


@bad(r"run/splits\.json: not a list of names")
def run_with_a_number_as_split_described(tmp: Path, run: Path) -> list[object]:
    (copy_of(run, tmp) / "splits.json").write_text('{"training": 3}')
    return ["info", tmp / "run"]


@bad(r"predictions\.json: not a JSON object")
def predictions_with_a_list_of_cases_described(tmp: Path, run: Path) -> list[object]:
    (tmp / "predictions.json").write_text('{"cases": [1, 2]}')
    return ["info", tmp]


@bad(r"--format nifti for an image in pixels, with no place in a patient; expected --format auto")
def pictures_predicted_as_nifti(tmp: Path, run: Path) -> list[object]:
    return predict(tmp, run, write(tmp / "a.png", grey()), "--format", "nifti")


@bad(r"--format dicom_seg for an image that is not DICOM; expected --format auto")
def pictures_predicted_as_dicom(tmp: Path, run: Path) -> list[object]:
    return predict(tmp, run, write(tmp / "a.png", grey()), "--format", "dicom_seg")


@bad(r"data: no run\.json; expected a run folder written by anysite train")
def run_that_is_a_dataset(tmp: Path, run: Path) -> list[object]:
    return predict(tmp, dataset(tmp), write(tmp / "a.png", grey()))


@bad(r"run: training that has not finished\. Continue it with anysite train --resume")
def run_unfinished(tmp: Path, run: Path) -> list[object]:
    manifest = atomic.read_json(copy_of(run, tmp) / "run.json")
    atomic.write_json(tmp / "run" / "run.json", manifest | {"finished": False})
    return predict(tmp, tmp / "run", write(tmp / "a.png", grey()))


@bad(r"run: a run is already there\. Add --resume, or choose another --output")
def run_already_there(tmp: Path, run: Path) -> list[object]:
    return ["train", dataset(tmp), "--output", run, *TINY]


@bad(r"out/predictions\.json: not readable as JSON")
def predictions_garbled(tmp: Path, run: Path) -> list[object]:
    (tmp / "out").mkdir()
    (tmp / "out" / "predictions.json").write_text("{")
    return predict(tmp, run, write(tmp / "a.png", grey()))


@bad(r"masks/predictions\.json: not a manifest of predictions")
def predictions_of_another_kind(tmp: Path, run: Path) -> list[object]:
    (tmp / "masks").mkdir()
    (tmp / "masks" / "predictions.json").write_text('{"cases": [1, 2]}')
    return ["evaluate", tmp / "masks", dataset(tmp)]


# Places that cannot be written


@bad(r"out: File exists\. Check the path")
def output_of_training_is_a_file(tmp: Path, run: Path) -> list[object]:
    (tmp / "out").write_text("")
    return train(tmp, dataset(tmp))


@bad(r"out/predictions\.json: cannot be written \((File exists|Not a directory)\)")
def output_of_prediction_is_a_file(tmp: Path, run: Path) -> list[object]:
    (tmp / "out").write_text("")
    return predict(tmp, run, write(tmp / "a.png", grey()))


@bad(r"file: no such folder")
def predictions_are_a_file(tmp: Path, run: Path) -> list[object]:
    (tmp / "file").write_text("")
    return ["evaluate", tmp / "file", dataset(tmp)]


@bad(r"file/page\.html: cannot be written \((File exists|Not a directory)\)")
def report_inside_a_file(tmp: Path, run: Path) -> list[object]:
    (tmp / "file").write_text("")
    row = {"dataset": "d", "method": "m", "domain": "x", "case": "c", "patient": "p", "class": "o"}
    (tmp / "rows.jsonl").write_text(json.dumps(row | {"metric": "dice", "value": 0.5, "split": "unseen"}))
    return ["report", tmp / "rows.jsonl", "--output", tmp / "file" / "page.html"]


@bad(r"images: the mask of case 'a' would replace a\.png\. Choose another output folder")
def output_among_the_images(tmp: Path, run: Path) -> list[object]:
    image = write(tmp / "images" / "a.png", grey())
    return ["predict", run, image, "--output", image.parent]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path, run: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    image = write(tmp_path / "a.png", grey())
    for command in (
        ["predict", run, image, "--output", tmp_path / "locked"],
        ["train", dataset(tmp_path), "--output", tmp_path / "locked" / "run", *TINY],
    ):
        result = call(*command)
        assert result.code == 2
        assert re.fullmatch(r"error: .*locked.*Permission denied.*\n", result.err)


# Names and options


@bad(r"train\.stepz: unknown setting\. Did you mean 'train\.steps'\?")
def setting_unknown(tmp: Path, run: Path) -> list[object]:
    return train(tmp, dataset(tmp), "--set=train.stepz=3")


@bad(r"train\.steps: 'many'; expected .*integer")
def setting_of_wrong_type(tmp: Path, run: Path) -> list[object]:
    return train(tmp, dataset(tmp), "--set=train.steps=many")


@bad(r"--set train\.steps; expected name=value, such as train\.steps=500")
def setting_without_value(tmp: Path, run: Path) -> list[object]:
    return train(tmp, dataset(tmp), "--set=train.steps")


@bad(r"unknown preset 'base'; expected one of .*baseline")
def preset_unknown(tmp: Path, run: Path) -> list[object]:
    return train(tmp, dataset(tmp), "--preset=base")


@bad(r"mine\.toml: no such file")
def preset_file_missing(tmp: Path, run: Path) -> list[object]:
    return train(tmp, dataset(tmp), f"--preset={tmp / 'mine.toml'}")


@bad(r"unknown network 'unett'; expected one of unet, .* \(did you mean 'unet'\?\)")
def network_unknown(tmp: Path, run: Path) -> list[object]:
    return train(tmp, dataset(tmp), "--set=network.name=unett")


@bad(r"network 'unet' has no setting 'widht'; expected .*did you mean 'width'")
def network_setting_unknown(tmp: Path, run: Path) -> list[object]:
    return train(tmp, dataset(tmp), "--set=network.widht=3")


@bad(r"unknown objective 'magic'")
def objective_unknown(tmp: Path, run: Path) -> list[object]:
    return train(tmp, dataset(tmp), "--set=objectives.magic={}")


@bad(r"data: no site named 'mars'; expected one of east, north")
def site_unknown(tmp: Path, run: Path) -> list[object]:
    return train(tmp, dataset(tmp), "--test-domain=mars")


@bad(r"plug-in 'os'; expected module:Class")
def plugin_malformed(tmp: Path, run: Path) -> list[object]:
    return train(tmp, dataset(tmp), "--plugin=os")


@bad(r"--budget soon; expected a time such as 90s, 10m or 2h")
def budget_malformed(tmp: Path, run: Path) -> list[object]:
    return train(tmp, dataset(tmp), "--budget=soon")


@bad(r"--part 4/3; expected I/N with 1 <= I <= N")
def part_malformed(tmp: Path, run: Path) -> list[object]:
    return predict(tmp, run, write(tmp / "a.png", grey()), "--part=4/3")


@bad(r"one path; expected one or more run folders, then the input")
def input_forgotten(tmp: Path, run: Path) -> list[object]:
    return ["predict", run, "--output", tmp / "out"]


@bad(r"No such option: --quick.*See anysite train --help")
def option_unknown(tmp: Path, run: Path) -> list[object]:
    return train(tmp, dataset(tmp), "--quick")


@bad(r"Missing option '--output'.*See anysite train --help")
def option_missing(tmp: Path, run: Path) -> list[object]:
    return ["train", dataset(tmp)]


@bad(r"Invalid value for '--seed': .*integer.*See anysite train --help")
def option_of_wrong_type(tmp: Path, run: Path) -> list[object]:
    return train(tmp, dataset(tmp), "--seed=x")


@bad(r"No such command 'trian'")
def command_unknown(tmp: Path, run: Path) -> list[object]:
    return ["trian"]


@bad(r"--dimension 4; expected 2 or 3")
def dimension_unknown(tmp: Path, run: Path) -> list[object]:
    return ["demo", "--dimension", 4, "--output", tmp / "demo"]


@bad(r"--seeds 1,two; expected whole numbers separated by commas")
def seeds_malformed(tmp: Path, run: Path) -> list[object]:
    return benchmark(tmp, "--seeds=1,two")


@bad(r"protocol 'leave-two-out'; expected leave-one-out, train-on-one or pooled")
def protocol_unknown(tmp: Path, run: Path) -> list[object]:
    return benchmark(tmp, "--protocol=leave-two-out")


@bad(r"rows\.jsonl: line 1 is not JSON")
def rows_garbled(tmp: Path, run: Path) -> list[object]:
    (tmp / "rows.jsonl").write_text("dice 0.9\ndice 0.8\n")
    return benchmark(tmp)


@pytest.mark.parametrize(("prepare", "message", "failed"), CASES)
def test_bad_input_is_named_in_one_line(
    tmp_path: Path, run: Path, prepare: Prepare, message: str, failed: str
) -> None:
    result = call(*prepare(tmp_path, run))
    *before, last = result.err.splitlines()
    assert last.startswith("error: ")
    assert re.search(message, last), last
    assert result.code == (1 if failed else 2)
    assert bool(before) == bool(failed)
    for line in before:
        assert line.startswith("failed: ")
        assert re.search(failed, line), line
    masks = [p for p in tmp_path.glob("out/**/*") if p.suffix in (".png", ".gz", ".nii", ".npz")]
    assert not masks
    assert not list(tmp_path.rglob(".*partial*"))
