from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from anysite.data import files
from anysite.data.check import check_dataset, inspect_dataset, summarise
from anysite.data.layouts import open_dataset
from anysite.report.inspection import write_inspection

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(array, affine).to_filename(path)


def image_of(seed: int, shape=(10, 9, 4)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def label_of(*values: int, shape=(10, 9, 4)) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    array.flat[: len(values)] = values
    return array


@pytest.fixture
def folder(tmp_path):
    """Two sites of four patients with two channels and the classes 1 and 2."""
    rows = ["case,patient,domain,image,image_1,label"]
    for number in range(8):
        site, case = "XY"[number // 4], f"c{number}"
        for channel in range(2):
            save(tmp_path / f"{case}_{channel}.nii", image_of(2 * number + channel))
        save(tmp_path / f"{case}_label.nii", label_of(1, 2, 2))
        rows.append(f"{case},p{number},{site},{case}_0.nii,{case}_1.nii,{case}_label.nii")
    (tmp_path / "index.csv").write_text("\n".join(rows))
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "one": 1, "two": 2}}')
    return tmp_path


def edit(folder: Path, old: str, new: str) -> None:
    manifest = folder / "index.csv"
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new))


def rules(folder: Path) -> list[tuple[str, str, str]]:
    return sorted((p.severity, p.case, p.rule) for p in check_dataset(folder))


def test_a_clean_dataset_has_no_problem_and_a_summary(folder):
    inspection = inspect_dataset(open_dataset(folder), threads=2)
    assert inspection.problems == ()
    assert inspection.sites == summarise(folder)
    first = json.loads(json.dumps(dataclasses.asdict(inspection.sites[0])))
    assert first == {
        "domain": "X",
        "cases": 4,
        "patients": 4,
        "labelled": 4,
        "dimensions": [3],
        "channels": [2],
        "unit": "mm",
        "shape": [[10, 10], [9, 9], [4, 4]],
        "spacing": [[1, 1], [1, 1], [2, 2]],
        "class_share": {"background": 357 / 360, "one": 1 / 360, "two": 2 / 360},
    }


def test_every_file_is_read_once(folder, monkeypatch):
    read, seen = files.read, []
    monkeypatch.setattr(
        files, "read", lambda path, *options, **named: seen.append(path.name) or read(path, *options, **named)
    )
    (folder / "dataset.json").unlink()
    calls = []
    assert inspect_dataset(folder, progress=lambda: calls.append(1)).problems == ()
    assert sorted(seen) == sorted(p.name for p in folder.glob("*.nii"))
    assert len(calls) == 8


def test_faults_of_files_are_listed_in_one_pass(folder):
    (folder / "c0_0.nii").unlink()
    cut = (folder / "c1_1.nii").read_bytes()[:-1]
    (folder / "c1_1.nii").write_bytes(cut)
    (folder / "c2_label.nii").write_bytes(b"no NIfTI")
    broken = image_of(99)
    broken[1, 1, 1] = np.nan
    save(folder / "c3_0.nii", broken)
    save(folder / "c4_1.nii", image_of(98, (10, 9, 3)))
    save(folder / "c4_label.nii", label_of(1, 2, 7))
    moved = AFFINE.copy()
    moved[0, 3] = 1
    save(folder / "c5_label.nii", label_of(1, 2), moved)
    save(folder / "c6_0.nii", np.full((10, 9, 4), 7.0, np.float32))
    save(folder / "c6_label.nii", label_of(shape=(10, 9, 3)))
    save(folder / "c7_label.nii", label_of(1, 2).astype(np.float32) + 0.5)
    problems = check_dataset(folder)
    assert sorted((p.severity, p.case, p.rule) for p in problems) == [
        ("error", "c0", "missing file"),
        ("error", "c1", "unreadable file"),
        ("error", "c2", "unreadable file"),
        ("error", "c3", "non-finite values"),
        ("error", "c4", "channels on different grids"),
        ("error", "c4", "label values"),
        ("error", "c5", "image and label on different grids"),
        ("error", "c6", "constant image"),
        ("error", "c6", "image and label on different grids"),
        ("error", "c7", "label values"),
        ("warning", "c6", "empty label"),
    ]
    assert [p.severity for p in problems] == ["error"] * 10 + ["warning"]
    found = {(p.case, p.rule): p for p in problems}
    assert Path(found["c1", "unreadable file"].file).name == "c1_1.nii"
    assert (found["c4", "label values"].observed, found["c4", "label values"].expected) == (
        "value 7",
        "only 0, 1, 2",
    )
    assert all(p.observed and p.expected and p.fix for p in problems)


def test_faults_between_cases_are_listed_in_one_pass(folder):
    edit(folder, "c0,p0,X,c0_0.nii,c0_1.nii", "c0,p0,X,c0_0.nii,")
    edit(folder, "c1_label.nii", "")
    save(folder / "c2_1.nii", image_of(2))  # both channels of c1
    save(folder / "c2_0.nii", image_of(3))
    edit(folder, "c2_0.nii,c2_1.nii", "c2_1.nii,c2_0.nii")
    edit(folder, "c4,p4", "c4,p0")
    edit(folder, "c5,p5", "c5,p6")
    for channel in range(2):
        save(folder / f"c6_{channel}.nii", image_of(10 + channel))  # c5, of the same patient
        save(folder / f"c7_{channel}.nii", image_of(14 + channel), np.diag([1.0, 1.0, 6.5, 1.0]))
    save(folder / "c7_label.nii", label_of(1), np.diag([1.0, 1.0, 6.5, 1.0]))
    for case in ("c4", "c5", "c6"):
        save(folder / f"{case}_label.nii", label_of(1))
    edit(folder, "c3,p3,X,c3_0.nii,c3_1.nii,c3_label.nii", "c3,p3,Z,a.png,b.png,l.jpg")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 255, (10, 9)).astype(np.uint8)).save(folder / name)
    label = np.zeros((10, 9), np.uint8)
    label[:8, :8] = 1
    Image.fromarray(label).save(folder / "l.jpg", quality=100)
    assert rules(folder) == [
        ("error", "c0", "channel count"),
        ("error", "c2", "identical images"),
        ("error", "c3", "2-D and 3-D mixed"),
        ("warning", "", "class never present"),
        ("warning", "", "class never present"),
        ("warning", "", "patient at several sites"),
        ("warning", "", "too few patients"),
        ("warning", "c1", "no label"),
        ("warning", "c3", "lossy label"),
        ("warning", "c6", "identical images"),
        ("warning", "c7", "spacing outlier"),
    ]


def test_classes_that_cannot_be_inferred_are_one_problem_among_others(folder):
    (folder / "dataset.json").unlink()
    for case in range(8):
        save(folder / f"c{case}_label.nii", label_of(1, 2, 200))
    (folder / "c1_0.nii").unlink()
    problems = check_dataset(folder)
    assert [(p.case, p.rule) for p in problems] == [("c1", "missing file"), ("", "undeclared classes")]
    assert "200" in problems[1].observed


def test_spacing_is_compared_in_anatomical_axes(folder):
    for thickness, expected in ((2.0, []), (6.5, [("warning", "c0", "spacing outlier")])):
        slices_first = np.diag([1.0, 1.0, thickness, 1.0])[:, [2, 0, 1, 3]]
        for channel in range(2):
            save(folder / f"c0_{channel}.nii", image_of(channel, (4, 10, 9)), slices_first)
        save(folder / "c0_label.nii", label_of(1, 2, shape=(4, 10, 9)), slices_first)
        assert rules(folder) == expected


def test_images_of_nearly_one_value_are_drawn(tmp_path: Path) -> None:
    """Of puncta, which are fewer than what percentiles leave out, nothing is left to compare."""
    for site in ("a", "b"):
        for number in range(3):
            image, label = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)
            image[number, 5:8], label[number, 5:8] = 200, 1
            for kind, array in (("images", image), ("masks", label)):
                (tmp_path / site / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(tmp_path / site / kind / f"{site}{number}.png")
    inspection = inspect_dataset(open_dataset(tmp_path))
    page = write_inspection(inspection, tmp_path / "check.html", "puncta")
    assert "How much the sites differ" in page.read_text(encoding="utf-8")
