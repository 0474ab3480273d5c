"""Judging masks of other programs: folders of masks, of several models, and nnU-Net's probabilities."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from anysite import atomic, cli
from anysite.data import files
from anysite.data.case import Case, Dataset
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.data.volume import Volume
from anysite.errors import DataError
from anysite.foreign import JudgedMask, MaskJudge

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def keep(label: np.ndarray, chooser: np.random.Generator) -> np.ndarray:
    return label


def wobble(label: np.ndarray, chooser: np.random.Generator) -> np.ndarray:
    """Move a mask by up to a voxel, as another model of the same quality might."""
    return np.roll(label, int(chooser.integers(2)), axis=-1)


def shatter(label: np.ndarray, chooser: np.random.Generator) -> np.ndarray:
    return np.where(chooser.random(label.shape) < 0.2, label, 0).astype(label.dtype)


def write_masks(folder: Path, dataset: Dataset, change: Change, seed: int = 0, bad: int = 0) -> Path:
    """Write a mask a case, of which the first `bad` are shattered."""
    folder.mkdir(parents=True)
    chooser = np.random.default_rng(seed)
    for number, case in enumerate(dataset.cases):
        label = case.label()
        array = (shatter if number < bad else change)(label.array, chooser)
        files.write_label(label.with_array(array), folder / f"{case.id}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    """Reference images and images to judge, of the same two sites."""
    folder = tmp_path_factory.mktemp("foreign")
    reference = write_phantom(folder / "reference", patients_per_site=8, size=64, sites=("north", "east"))
    judged = write_phantom(folder / "judged", patients_per_site=4, size=64, sites=("north", "east"), seed=9)
    return open_dataset(reference), open_dataset(judged)


def decisions(outcomes: list[JudgedMask]) -> list[str]:
    return [outcome.verdict["decision"] if outcome.verdict else "failed" for outcome in outcomes]


def test_masks_of_one_model_are_judged_by_image_and_shape(
    sets: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    reference, judged = sets
    masks = write_masks(tmp_path / "masks", judged, keep, bad=2)
    judge = MaskJudge(reference, [], 1)
    assert set(judge.judge.detectors) == {"histogram", "power_spectrum", "shading", "shape"}
    outcomes = list(judge.judge_folders([masks], judged.cases))
    assert "accept" not in decisions(outcomes)[:2]
    assert outcomes[0].verdict is not None
    assert "shape" in outcomes[0].verdict["reasons"][0]
    assert decisions(outcomes)[2:].count("accept") >= len(outcomes) - 4


def test_several_models_are_judged_by_how_far_they_agree(
    sets: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    reference, judged = sets
    known = [write_masks(tmp_path / f"known{i}", reference, wobble, seed=i) for i in range(2)]
    fresh = [write_masks(tmp_path / f"fresh{i}", judged, wobble, seed=i, bad=i) for i in range(2)]
    judge = MaskJudge(reference, known, 2)
    assert "pairwise_dice" in judge.judge.detectors
    outcomes = list(judge.judge_folders(fresh, judged.cases))
    assert outcomes[0].verdict is not None
    assert (outcomes[0].verdict["scores"]["pairwise_dice"] or 0) > 1
    assert decisions(outcomes)[1:].count("accept") >= len(outcomes) - 3
    with pytest.raises(DataError, match="1 folders of reference masks; expected one for each of 2"):
        MaskJudge(reference, known[:1], 2)


def test_a_missing_or_unfitting_mask_is_named_and_the_rest_judged(
    sets: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    reference, judged = sets
    masks = write_masks(tmp_path / "masks", judged, keep)
    first, second = judged.cases[:2]
    (masks / f"{first.id}.png").unlink()
    smaller = Volume(second.label().array[:, :32], np.eye(3), "px")
    files.write_label(smaller, masks / f"{second.id}.png")
    outcomes = list(MaskJudge(reference, [], 1).judge_folders([masks], judged.cases))
    assert decisions(outcomes)[:2] == ["failed", "failed"]
    assert "no mask" in outcomes[0].error
    assert not any(str(tmp_path) in outcome.error for outcome in outcomes)  # folders may name people
    assert "expected the grid of the image" in outcomes[1].error
    assert "failed" not in decisions(outcomes)[2:]
    files.write_label(Volume(first.label().array * 9, np.eye(3), "px"), masks / f"{first.id}.png")
    outcomes = list(MaskJudge(reference, [], 1).judge_folders([masks], judged.cases[:1]))
    assert "stands for no class" in outcomes[0].error or "class index" in outcomes[0].error
    with pytest.raises(DataError, match="no mask of any case"):
        list(MaskJudge(reference, [], 1).judge_folders([tmp_path], judged.cases))
    few = reference.with_cases(reference.cases[:2])
    with pytest.raises(DataError, match="expected cases of 5 patients or more"):
        MaskJudge(few, [], 1)


@pytest.mark.parametrize("reverse", [False, True], ids=["ours", "nnU-Net"])
def test_probabilities_tell_how_sure_a_model_was(reverse: bool, tmp_path: Path) -> None:
    def draw(name: str, patients: int, seed: int) -> Dataset:
        folder = tmp_path / name
        return open_dataset(
            write_phantom(
                folder, dimension=3, size=24, patients_per_site=patients, sites=("north",), seed=seed
            )
        )

    reference, judged = draw("reference", 6, 0), draw("judged", 3, 9)

    def write(folder: Path, dataset: Dataset, sharpness: float) -> Path:
        folder.mkdir()
        for case in dataset.cases:
            label = dataset.class_indices(case.label())
            soft = [
                ndimage.gaussian_filter((label.array[0] == k).astype(float), 0.5)
                for k in range(len(dataset.classes))
            ]
            chances = np.stack(soft) ** sharpness + 1e-6
            chances /= chances.sum(0)
            files.write_label(
                label.with_array(chances.argmax(0)[None].astype(np.uint8)), folder / f"{case.id}.nii.gz"
            )
            stored = chances.transpose(0, 3, 2, 1) if reverse else chances
            np.savez_compressed(folder / f"{case.id}.npz", probabilities=stored.astype(np.float16))
        return folder

    judge = MaskJudge(reference, [write(tmp_path / "known", reference, 3.0)], 1)
    assert "entropy" in judge.judge.detectors
    sure, unsure = (
        write(tmp_path / name, judged, sharpness) for name, sharpness in (("sure", 3.0), ("unsure", 0.3))
    )

    def scores(folder: Path) -> list[float]:
        found = list(judge.judge_folders([folder], judged.cases))
        return [outcome.verdict["scores"]["entropy"] for outcome in found if outcome.verdict]

    assert len(scores(sure)) == len(judged.cases)
    assert max(scores(sure)) < 3 < min(scores(unsure))
    first, other, third = judged.cases[:3]
    (sure / f"{first.id}.npz").write_bytes(b"broken")
    assert decisions(list(judge.judge_folders([sure], [first]))) == ["failed"]
    np.savez_compressed(sure / f"{first.id}.npz", probabilities=np.float32(0.5))
    assert "an array of shape ()" in next(iter(judge.judge_folders([sure], [first]))).error
    np.savez_compressed(sure / f"{first.id}.npz", probabilities=np.full((2, 3), 0.5))
    assert "that do not give the mask" in next(iter(judge.judge_folders([sure], [first]))).error
    (sure / f"{first.id}.npz").unlink()
    assert "no probabilities" in next(iter(judge.judge_folders([sure], [first]))).error
    empty = third.label()
    files.write_label(empty.with_array(np.zeros_like(empty.array)), sure / f"{third.id}.nii.gz")
    assert "that do not give the mask" in next(iter(judge.judge_folders([sure], [third]))).error
    with np.load(unsure / f"{other.id}.npz") as content:
        np.savez_compressed(sure / f"{other.id}.npz", probabilities=content["probabilities"][::-1])
    assert "that do not give the mask" in next(iter(judge.judge_folders([sure], [other]))).error


def run(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["anysite", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_the_command_writes_verdicts_and_its_code_says_what_they_are(
    sets: tuple[Dataset, Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference, judged = (dataset.cases[0].image_paths[0].parents[2] for dataset in sets)
    masks = write_masks(tmp_path / "masks", sets[1], keep, bad=1)
    noise = tmp_path / "images"
    noise.mkdir()
    for case in sets[1].cases:
        shutil.copy(case.image_paths[0], noise)
    output = tmp_path / "verdicts"
    code = run(
        ["judge", masks, noise, "--reference", reference, "--output", output, "--referral", "0.25"],
        monkeypatch,
    )
    verdicts = atomic.read_json(output / "verdicts.json")["cases"]
    assert set(verdicts) == {case.id for case in sets[1].cases}
    assert code == int(any(v["verdict"] == "reject" for v in verdicts.values()))
    assert sum(v["verdict"] != "accept" for v in verdicts.values()) == 2
    assert f"verdicts: {len(verdicts) - 2} accept" in capsys.readouterr().out
    assert sorted(path.name for path in masks.iterdir()) == sorted(f"{case.id}.png" for case in sets[1].cases)

    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "verdicts.csv").write_text("mine")
    (masks / f"{sets[1].cases[3].id}.png").unlink()
    code = run(["judge", masks, noise, "--reference", reference, "--output", output, "--json"], monkeypatch)
    printed = capsys.readouterr()
    assert code == 1
    assert set(json.loads(printed.out)["failed"]) == {sets[1].cases[3].id}
    assert sets[1].cases[3].id in printed.err
    for wrong, message in (
        ([masks, noise], "2 paths without --reference"),
        ([masks, noise, "--reference", reference], "no --output"),
        ([masks, "--reference", reference, "--output", output], "one path with --reference"),
        ([masks], "predictions"),
        ([masks, "--output", output], "without --reference"),
        (
            [masks, noise, "--reference", reference, "--output", output, "--false-alarms", "1"],
            "--false-alarms",
        ),
        ([masks, noise, "--reference", reference, "--output", taken], "verdicts.csv would be replaced"),
        ([masks, noise, "--reference", tmp_path / "nowhere", "--output", output], "nowhere"),
    ):
        assert run(["judge", *wrong], monkeypatch) == 2
        assert message in capsys.readouterr().err


def test_a_volume_is_an_image_of_its_own(sets: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    """An image of other axes than the reference is named, not judged."""
    reference, _ = sets
    path = tmp_path / "volume.nii.gz"
    files.write_label(Volume((np.arange(512) % 4).astype(np.uint8).reshape(1, 8, 8, 8), np.eye(4)), path)
    case = Case("volume", "p", "north", (path,), None)
    masks = tmp_path / "masks"
    masks.mkdir()
    shutil.copy(path, masks / "volume.nii.gz")
    (outcome,) = MaskJudge(reference, [], 1).judge_folders([masks], [case])
    assert outcome.verdict is None
    assert "2 spatial axes" in outcome.error
    assert str(tmp_path) not in outcome.error


def test_masks_of_anysite_hold_class_indices_and_others_label_values(
    sets: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    """Of a dataset whose label values are not 0, 1, 2, ... masks of both kinds mean the same."""
    reference, judged = (replace(d, label_values=(0, *(10 * v for v in d.label_values[1:]))) for d in sets)

    def ten_times(dataset: Dataset, name: str) -> Dataset:
        cases = []
        for case in dataset.cases:
            label, path = files.read_label(case.label_path or Path()), tmp_path / name / f"{case.id}.png"
            path.parent.mkdir(exist_ok=True)
            files.write_label(label.with_array(10 * label.array), path)
            cases.append(replace(case, label_path=path))
        return dataset.with_cases(cases)

    reference, judged = ten_times(reference, "known"), ten_times(judged, "others")
    judge = MaskJudge(reference, [], 1)
    indices = write_masks(tmp_path / "indices", sets[1], keep)
    assert "look like class indices" in next(iter(judge.judge_folders([indices], judged.cases[:1]))).error
    atomic.write_json(indices / "predictions.json", {"cases": {}, "files": {}})
    one, other = (
        [outcome.verdict for outcome in judge.judge_folders([folder], judged.cases)]
        for folder in (indices, tmp_path / "others")
    )
    assert one == other
    assert None not in one
