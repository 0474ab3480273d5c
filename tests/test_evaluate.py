"""Evaluation: rows against metrics computed by hand, the summary, and masks that cannot be scored."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from anysite import evaluate as scoring
from anysite.data.case import Case, Dataset
from anysite.data.volume import Volume
from anysite.errors import ConfigError, DataError, FileFormatError
from anysite.evaluate import evaluate
from anysite.manifest import manifest_path
from anysite.metrics import METRICS
from anysite.report.read import Row as ReportRow
from anysite.report.read import read_sources
from anysite.rows import ROWS, SUMMARY, join_sites, read_rows, split_sites, summarise, write_rows

SPACING = (0.5, 2.0, 3.0)
AFFINE = np.diag([*SPACING, 1.0])
PLACE = {"domain": "north", "split": "unseen", "class": "organ"}


def write_array(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.ndim == 2:
        Image.fromarray(array.astype(np.uint8)).save(path)
    else:
        nibabel.save(nibabel.Nifti1Image(array.astype(np.uint8), affine), path)
    return path


def boxes(shift: int = 0) -> np.ndarray:
    """Two classes; only the first moves with `shift`."""
    array = np.zeros((12, 10, 8), np.uint8)
    array[2 + shift : 6 + shift, 3:7, 2:6] = 1
    array[9:11, 2:8, 1:7] = 2
    return array


def dataset_of(folder: Path, labels: dict[str, np.ndarray], **facts) -> Dataset:
    """Write labels as files; the images are never read by an evaluation."""
    cases = []
    for name, array in labels.items():
        suffix = ".png" if array.ndim == 2 else ".nii.gz"
        path = write_array(folder / "labels" / f"{name}{suffix}", array)
        image = folder / "images" / f"{name}{suffix}"
        cases.append(Case(name, f"p-{name}", "north" if name < "c" else "east", (image,), path))
    settings = {"classes": ("background", "organ", "tumour"), "label_values": (0, 1, 2)} | facts
    return Dataset("made-up", tuple(cases), **settings)


def manifest_of(folder: Path, entries: dict[str, dict], **plan) -> None:
    run = {"preset": "baseline", "seed": 3, "train_domains": ["south", "west"], "commit": "abc", "plan": plan}
    content = {"origin": "0123", "runs": [run], "cases": entries}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.json").write_text(json.dumps(content))


def done(name: str, split: str = "unseen") -> dict[str, str]:
    return {"status": "done", "mask": f"{name}.nii.gz", "split": split}


def by_hand(predicted: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Every metric, by comparing every surface voxel with every other."""

    def surface(mask: np.ndarray) -> np.ndarray:
        return np.argwhere(mask & np.logical_not(ndimage.binary_erosion(mask))) * SPACING

    ours, theirs = surface(predicted), surface(true)
    between = np.linalg.norm(ours[:, None] - theirs[None], axis=-1)
    both = np.concatenate([between.min(1), between.min(0)])
    overlap, either = (predicted & true).sum(), (predicted | true).sum()
    difference = int(predicted.sum()) - int(true.sum())
    return {
        "dice": 2 * overlap / (predicted.sum() + true.sum()),
        "iou": overlap / either,
        "hd95": max(np.percentile(between.min(1), 95), np.percentile(between.min(0), 95)),
        "assd": both.mean(),
        "surface_dice": (both <= 2.0).mean(),
        "volume_error": difference * np.prod(SPACING),
        "relative_volume_error": difference / true.sum(),
    }


@given(st.lists(st.text(min_size=1).filter(lambda name: name == name.strip()), unique=True))
def test_sites_of_any_name_are_told_apart_in_rows(sites: list[str]) -> None:
    assert split_sites(join_sites(sites)) == sites
    row = ReportRow.model_validate({"metric": "dice", "value": 1, "train_domains": join_sites(sites)})
    assert row.train_domains == tuple(sorted(sites))


def test_names_of_ordinary_sites_are_written_as_they_are() -> None:
    assert join_sites(["lyon", "A&B 2", "Kraków"]) == "lyon+A&B 2+Kraków"
    assert split_sites("lyon+50%") == ["lyon", "50%"]  # as rows of before have it


def test_rows_equal_metrics_computed_by_hand(tmp_path: Path) -> None:
    truth, predicted = boxes(), boxes(2)
    predicted[9] = 0  # the second class loses half
    dataset = dataset_of(tmp_path, {"a": truth})
    write_array(tmp_path / "masks" / "a.nii.gz", predicted)
    manifest_of(tmp_path / "masks", {"a": done("a")})
    result = evaluate(tmp_path / "masks", dataset, context={"overrides": "x=1"})
    assert {(r["class"], r["metric"]) for r in result.rows} == {
        (name, metric) for name in ("organ", "tumour") for metric in METRICS
    }
    for index, name in enumerate(("organ", "tumour"), start=1):
        expected = by_hand(predicted == index, truth == index)
        found = {r["metric"]: r["value"] for r in result.rows if r["class"] == name}
        assert found == pytest.approx(expected, rel=1e-5)
    units = {r["metric"]: r["unit"] for r in result.rows}
    assert (units["dice"], units["hd95"], units["volume_error"]) == ("1", "mm", "mm3")
    common = {
        "dataset": "made-up",
        "method": "baseline",
        "adapt": "none",
        "seed": 3,
        "overrides": "x=1",
        "domain": "north",
        "split": "unseen",
        "patient": "p-a",
        "case": "a",
        "corruption": "none",
        "severity": 0,
        "labels": "all",
        "commit": "abc",
        "config": "0123",
        "train_domains": "south+west",
    }
    assert all(common.items() <= row.items() for row in result.rows)
    assert read_rows(tmp_path / "masks" / ROWS) == result.rows


def test_the_summary_has_the_keys_of_nnunet_and_the_means_by_site_and_split(tmp_path: Path) -> None:
    empty = np.zeros_like(boxes())
    labels = {"a": boxes(), "b": np.where(boxes() == 1, 1, 0), "c": boxes()}
    dataset = dataset_of(tmp_path, labels)
    for name, mask in {"a": boxes(), "b": boxes(1) * (boxes(1) == 1), "c": empty}.items():
        write_array(tmp_path / "masks" / f"{name}.nii.gz", mask)
    manifest_of(tmp_path / "masks", {"a": done("a", "in_domain"), "b": done("b"), "c": done("c")})
    result = evaluate(tmp_path / "masks", dataset)
    summary = json.loads((tmp_path / "masks" / SUMMARY).read_text())
    assert {"foreground_mean", "mean", "metric_per_case"} <= summary.keys()
    moved = by_hand(boxes(1) == 1, boxes() == 1)["dice"]
    # Of the second class, "b" has neither label nor mask: undefined, and left out of every mean.
    assert summary["mean"]["organ"]["dice"] == pytest.approx((1 + moved + 0) / 3, rel=1e-5)
    assert summary["mean"]["tumour"]["dice"] == pytest.approx((1 + 0) / 2)
    assert summary["foreground_mean"]["dice"] == pytest.approx(((1 + moved) / 3 + 0.5) / 2, rel=1e-5)
    assert summary["undefined"]["dice"] == 1
    assert [entry["case"] for entry in summary["metric_per_case"]] == ["a", "b", "c"]
    assert summary["metric_per_case"][1]["metrics"]["tumour"] == dict.fromkeys(METRICS)
    assert summary["by_domain"]["north"]["dice"] == pytest.approx((1 + 1 + moved) / 3, rel=1e-5)
    assert summary["by_domain"]["east"]["dice"] == 0
    assert summary["by_split"]["in_domain"]["dice"] == 1
    undefined = [r for r in result.rows if r["value"] is None]
    assert {(r["case"], r["class"]) for r in undefined} == {("b", "tumour")}
    diagonal = float(np.linalg.norm(np.multiply(empty.shape, SPACING)))
    hd95 = next(r["value"] for r in result.rows if (r["case"], r["metric"]) == ("c", "hd95"))
    assert hd95 == pytest.approx(diagonal, rel=1e-5)


def test_failed_and_unpredicted_cases_are_named(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {name: boxes() for name in "abcd"})
    for name in "abd":
        write_array(tmp_path / "masks" / f"{name}.nii.gz", boxes())
    (tmp_path / "masks" / "b.nii.gz").unlink()
    failed = {"status": "failed", "error": "c.nii.gz: truncated", "split": "unseen"}
    manifest_of(tmp_path / "masks", {"a": done("a"), "b": done("b"), "c": failed})
    result = evaluate(tmp_path / "masks", dataset)
    assert {row["case"] for row in result.rows} == {"a"}
    assert result.failed["c"] == "c.nii.gz: truncated"
    assert "no such file" in result.failed["b"]
    assert result.unpredicted == ("d",)  # its mask lies there, but is not of these runs
    assert json.loads((tmp_path / "masks" / SUMMARY).read_text())["failed"] == result.failed


def test_masks_of_another_program_need_no_manifest(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {"a": boxes(), "b": boxes(), "c": boxes()[0]})
    write_array(tmp_path / "masks" / "a.nii", boxes())  # a suffix of its own
    write_array(tmp_path / "masks" / "c.png", boxes()[0])
    result = evaluate(tmp_path / "masks", dataset)
    assert {(r["case"], r["split"], r["method"], r["seed"]) for r in result.rows} == {
        ("a", "unknown", "unknown", None), ("c", "unknown", "unknown", None)
    }  # fmt: skip
    assert {r["unit"] for r in result.rows if r["case"] == "c"} == {"1", "px", "px2"}
    assert result.unpredicted == ("b",)
    assert all(r["value"] == 1 for r in result.rows if r["metric"] == "dice" and r["value"] is not None)


def test_files_of_labels_may_use_other_values_than_masks(tmp_path: Path) -> None:
    truth = np.zeros((9, 11), np.uint8)
    truth[2:6, 3:8] = 255
    dataset = dataset_of(tmp_path, {"a": truth}, classes=("background", "organ"), label_values=(0, 255))
    ours, others = tmp_path / "ours", tmp_path / "others"
    manifest_of(ours, {"a": done("a") | {"mask": "a.png"}})
    for folder, array in ((ours, truth // 255), (others, truth)):
        write_array(folder / "a.png", array)
        rows = evaluate(folder, dataset).rows
        assert [r["value"] for r in rows if r["metric"] == "dice"] == [1.0]
    for folder, array, message in (
        (ours, truth, "class index 255; expected 0 to 1"),
        (others, truth // 255, "values 0, 1, which look like class indices; expected .* label values 0, 255"),
        (others, truth // 2, "label value 127; expected only 0, 255"),
    ):
        write_array(folder / "a.png", array)
        assert re.search(message, evaluate(folder, dataset).failed["a"])


CLASSES = ["background", "organ", "tumour"]
WHOLE = {"regions": [[1, 2], [2]], "region_names": ["whole", "core"], "region_classes": [1, 2]}
UNNAMED = ["background", "class_1", "class_2"]


@pytest.mark.parametrize(
    ("plan", "facts", "message"),
    [
        ({"classes": CLASSES}, {}, ""),
        ({"classes": ["nothing", *CLASSES[1:]]}, {}, ""),
        (
            {"classes": ["background", "tumour", "organ"]},
            {},
            "masks of tumour, organ; expected organ, tumour in",
        ),
        ({"classes": ["background", "organ"]}, {}, "masks of organ; expected organ, tumour"),
        ({"classes": UNNAMED}, {}, ""),
        ({"classes": UNNAMED[:2]}, {}, ""),
        ({"classes": [*UNNAMED, "class_3"]}, {}, r"4 classes \(.*\); expected at most the 3 of made-up"),
        ({"classes": [*CLASSES, "vessel"]}, {"classes": tuple(UNNAMED)}, "4 classes"),
        (
            {"classes": ["background", "tumour"], "label_values": [0, 2]},
            {"classes": tuple(UNNAMED)},
            "masks of the label values 0, 2; expected 0, 1, 2",
        ),
        ({"classes": UNNAMED, **WHOLE}, {"classes": tuple(UNNAMED), **WHOLE}, ""),
        ({"classes": UNNAMED, **WHOLE}, {"classes": tuple(CLASSES)}, r"masks of whole \(1\+2\), core \(2\);"),
        (
            {"classes": UNNAMED, **WHOLE, "regions": [[1, 2], [1]]},
            {"classes": tuple(UNNAMED), **WHOLE},
            r"core \(1\); expected whole \(1\+2\), core \(2\)",
        ),
    ],
)
def test_masks_of_other_classes_are_refused_before_any_is_scored(
    tmp_path: Path, plan: dict, facts: dict, message: str
) -> None:
    facts = {k: tuple(tuple(x) if isinstance(x, list) else x for x in v) for k, v in facts.items()}
    dataset = dataset_of(tmp_path, {"a": boxes()}, **facts)
    write_array(tmp_path / "masks" / "a.nii.gz", boxes())
    manifest_of(tmp_path / "masks", {"a": done("a")}, **plan)
    if not message:
        assert not evaluate(tmp_path / "masks", dataset).failed
        return
    with pytest.raises(DataError, match=message):
        evaluate(tmp_path / "masks", dataset)
    assert not (tmp_path / "masks" / ROWS).exists()


def test_scoring_needs_no_torch() -> None:
    command = "import sys, anysite.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


@pytest.mark.parametrize(
    ("mask", "affine", "message"),
    [
        (boxes()[:-1], AFFINE, r"a mask of shape \(11, 10, 8\).*expected the label's shape \(12, 10, 8\)"),
        (boxes(), np.diag([1, 2, 3, 1.0]), r"spacing 1 x 2 x 3; expected .* spacing 0.5 x 2 x 3"),
        (boxes(), AFFINE + np.eye(4, k=3) * 5, "at the same place"),
        (boxes() * 2, AFFINE, r"class index 4; expected 0 to 2"),
    ],
    ids=["shape", "spacing", "place", "class"],
)
def test_masks_that_do_not_fit_are_named_and_the_rest_is_scored(
    tmp_path: Path, mask: np.ndarray, affine: np.ndarray, message: str
) -> None:
    dataset = dataset_of(tmp_path, {"a": boxes(), "b": boxes()})
    write_array(tmp_path / "masks" / "a.nii.gz", mask, affine)
    write_array(tmp_path / "masks" / "b.nii.gz", boxes())
    result = evaluate(tmp_path / "masks", dataset)
    assert {row["case"] for row in result.rows} == {"b"}
    assert re.search(rf"a\.nii\.gz: .*{message}", result.failed["a"])
    assert str(tmp_path) not in (tmp_path / "masks" / SUMMARY).read_text()


def test_masks_in_the_current_folder_fail_in_readable_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_of(tmp_path, {"a": boxes()})
    write_array(tmp_path / "masks" / "a.nii.gz", boxes()[:-1])
    monkeypatch.chdir(tmp_path / "masks")
    assert evaluate(Path(), dataset).failed["a"].startswith("a.nii.gz: ")


def test_whatever_one_case_raises_is_named_without_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_of(tmp_path, {"a": boxes(), "b": boxes()})
    for name in "ab":
        write_array(tmp_path / "masks" / f"{name}.nii.gz", boxes())
    damaged = dataset.cases[0].label_path
    assert damaged is not None
    damaged.write_bytes(damaged.read_bytes()[:80])
    result = evaluate(tmp_path / "masks", dataset)
    assert set(result.failed) == {"a"}
    assert "a.nii.gz" in result.failed["a"]
    assert str(tmp_path) not in result.failed["a"]
    write_array(damaged, boxes())
    score = scoring.score_volume

    def exhaust(mask: Volume, label: Volume, dataset: Dataset, case: Case, tolerance: float) -> Any:
        if case.id == "a":
            raise MemoryError("too large")
        return score(mask, label, dataset, case, tolerance)

    monkeypatch.setattr(scoring, "score_volume", exhaust)
    assert evaluate(tmp_path / "masks", dataset).failed == {"a": "MemoryError: too large"}


def test_regions_are_scored_instead_of_classes(tmp_path: Path) -> None:
    facts = {"regions": ((1, 2), (2,)), "region_names": ("whole", "core"), "region_classes": (1, 2)}
    dataset = dataset_of(tmp_path, {"a": boxes()}, **facts)
    write_array(tmp_path / "masks" / "a.nii.gz", np.minimum(boxes(), 1))
    result = evaluate(tmp_path / "masks", dataset)
    dice = {r["class"]: r["value"] for r in result.rows if r["metric"] == "dice"}
    assert dice == {"whole": 1.0, "core": 0.0}


def test_nothing_to_score_is_an_error(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {"a": boxes()})
    with pytest.raises(FileFormatError, match="no such folder"):
        evaluate(tmp_path / "masks", dataset)
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="no mask for any labelled case; expected .* cases of made-up"):
        evaluate(tmp_path / "masks", dataset)
    unlabelled = dataset.with_cases(replace(case, label_path=None) for case in dataset.cases)
    with pytest.raises(DataError, match="no case with a label"):
        evaluate(tmp_path / "masks", unlabelled)
    assert not list((tmp_path / "masks").iterdir())


def test_shares_of_several_machines_are_scored_together(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {name: boxes() for name in "ab"})
    folder = tmp_path / "masks"
    for number, name in enumerate("ab", start=1):
        write_array(folder / f"{name}.nii.gz", boxes())
        manifest_of(folder, {name: done(name)})
        (folder / "predictions.json").rename(manifest_path(folder, f"{number}/2"))
    assert {row["case"] for row in evaluate(folder, dataset).rows} == {"a", "b"}


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.none() | st.floats(0, 1)),
        min_size=1,
        max_size=9,
        unique_by=lambda pair: pair[0],
    )
)
def test_undefined_values_never_count_in_means(values: list[tuple[str, float | None]]) -> None:
    rows = [{**PLACE, "case": case, "metric": "dice", "value": value} for case, value in values]
    summary = summarise(rows, {})
    defined = [value for _, value in values if value is not None]
    expected = pytest.approx(sum(defined) / len(defined)) if defined else None
    for mean in (summary["foreground_mean"], summary["mean"]["organ"], summary["by_domain"]["north"]):
        assert mean["dice"] == expected
    assert summary["undefined"]["dice"] == len(values) - len(defined)


def test_what_rows_share_can_be_said_once(tmp_path: Path) -> None:
    rows = [
        {
            "dataset": "d",
            "method": m,
            "seed": s,
            "case": c,
            "class": "x",
            "metric": "dice",
            "value": 0.5,
            "labels": "all",
        }
        for m, s, c in (("a", 0, "1"), ("a", 0, "2"), ("b", 0, "1"), ("a", 0, "3"))
    ]
    rows.append(
        {"dataset": "d", "metric": "dice", "value": None, "case": "4", "class": "x"}
    )  # knows no method
    write_rows(tmp_path / "flat.jsonl", rows)
    write_rows(tmp_path / "short.jsonl", rows, shared=True)
    assert read_rows(tmp_path / "short.jsonl") == read_rows(tmp_path / "flat.jsonl") == rows
    lines = (tmp_path / "short.jsonl").read_text().splitlines()
    assert [line.startswith('{"shared"') for line in lines] == [1, 0, 0, 1, 0, 1, 0, 1, 0]
    read = [source.rows for source in read_sources([tmp_path / "short.jsonl", tmp_path / "flat.jsonl"])]
    assert read[0] == read[1]
    assert [row.method for row in read[0]] == ["a", "a", "b", "a", ""]


def test_rows_survive_a_cut_last_line_and_no_other_damage(tmp_path: Path) -> None:
    rows = [{"metric": "dice", "value": i / 7, "case": "ä\u2028b"} for i in range(3)]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    whole = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(whole[:-10])
    assert read_rows(tmp_path / "rows.jsonl") == rows[:2]
    for text, message in (("{\n" + whole, "line 1 is not JSON"), (whole + "3\n", "line 4 is not a row")):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(FileFormatError, match=message):
            read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(FileFormatError, match="not readable"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="Out of range float"):
        write_rows(tmp_path / "rows.jsonl", [{"value": float("nan")}])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (SUMMARY, '{"foreground_mean": {"Dice": 0.9}, "mean": {}, "metric_per_case": []}'),  # nnU-Net's
        (SUMMARY, "not JSON"),
        (SUMMARY, "[1]"),
        (ROWS, '{"patient": "p", "age": 70}\n'),
        (scoring.RELIABILITY, '{"bins": 3}'),
    ],
)
def test_files_of_other_programs_are_not_replaced(tmp_path: Path, name: str, content: str) -> None:
    dataset = dataset_of(tmp_path, {"a": boxes()})
    folder = tmp_path / "masks"
    write_array(folder / "a.nii", boxes())
    (folder / name).write_text(content)
    before = sorted(folder.iterdir())
    with pytest.raises(ConfigError, match=f"{name} would be replaced, but anysite evaluate did not write it"):
        evaluate(folder, dataset)
    assert (folder / name).read_text() == content
    assert sorted(folder.iterdir()) == before
    (folder / name).unlink()
    rows = evaluate(folder, dataset).rows
    assert evaluate(folder, dataset).rows == rows  # over its own
