"""Scoring predictions against labels, on the grid of the labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from anysite import atomic
from anysite.calibration import (
    CALIBRATION_METRICS,
    count_reliability,
    fold_unknown,
    score_calibration,
    select_band,
)
from anysite.data import files
from anysite.data.case import Case, Dataset
from anysite.data.probabilities import read_probabilities
from anysite.data.volume import Volume
from anysite.errors import (
    CASE_ERRORS,
    ConfigError,
    DataError,
    FileFormatError,
    GeometryError,
    LabelError,
    describe_error,
)
from anysite.judgement import UNADAPTED_DICE
from anysite.manifest import MANIFESTS, mask_suffix, probabilities_name, read_manifests, unadapted_name
from anysite.metrics import METRICS, TOLERANCE, Score, score_case
from anysite.rows import (
    ALL_CLASSES,
    ROWS,
    SUMMARY,
    Row,
    describe_adaptation,
    describe_verdict,
    join_sites,
    name_adapter,
    read_rows,
    rows_of,
    summarise,
    write_rows,
)
from anysite.statistics import mean_defined

RELIABILITY = "reliability.json"


@dataclass(frozen=True)
class Evaluation:
    """Rows of every scored case, and the cases that could not be scored with the reason."""

    rows: list[Row]
    failed: dict[str, str]
    unpredicted: tuple[str, ...]


def evaluate(
    predictions: Path,
    dataset: Dataset,
    *,
    tolerance: float = TOLERANCE,
    context: Row | None = None,
    on_case: Callable[[str], None] = lambda case: None,
    threads: int = 2,
) -> Evaluation:
    """Score every mask in a folder against the dataset's labels, and write rows and summary beside the masks.

    Masks are compared on the label's own grid, in mm where the spacing is known, in pixels elsewhere. Masks of
    other programs are found by case id and hold the dataset's label values; what their model was trained on is
    unknown.

    Args:
        tolerance: Of the surface Dice, in mm or px.
        context: Fields to add to every row, such as the method's name.

    Raises:
        DataError: no case of the dataset has a label, none of those has a mask in the folder, or the masks
            are of other classes.
        ConfigError: rows or a summary would replace a file that is not ours, such as nnU-Net's summary.json.
        FileFormatError: there is no such folder, or its manifest cannot be read.
    """
    folder = Path(predictions)
    if not folder.is_dir():
        raise FileFormatError("no such folder", where=folder, expected="a folder of masks named after cases")
    _require_own(folder)
    if not dataset.labelled:
        raise DataError("no case with a label", where=dataset.name, fix="score on a dataset that has labels")
    manifest = (
        read_manifests(folder) if any(folder.glob(MANIFESTS)) else {"cases": {}, "runs": [], "files": {}}
    )
    _require_same_classes(manifest, dataset, folder)
    common = _describe(manifest, dataset) | (context or {})
    # Of other classes than the dataset's, masks can be scored but not probabilities.
    plan = manifest["runs"][0].get("plan", {}) if manifest["runs"] else {}
    scored_alike = _groups_of(dataset) == _groups_of_plan(plan)
    found = [
        (case, path) for case in dataset.labelled if (path := _find_mask(folder, case, manifest)) is not None
    ]
    failed = {
        name: entry["error"] for name, entry in manifest["cases"].items() if entry["status"] == "failed"
    }
    if not found and not failed:
        raise DataError(
            "no mask for any labelled case",
            where=folder,
            expected=f"masks named after cases of {dataset.name}",
        )

    def score(pair: tuple[Case, Path]) -> tuple[Case, list[Score] | str, np.ndarray | None]:
        case, path = pair
        counts = None
        try:
            label = dataset.label_of(case)
            mask = _read_mask(case, path, dataset, label, bool(manifest["runs"]))
            result: list[Score] | str = score_volume(mask, label, dataset, case, tolerance)
            saved = folder / probabilities_name(case)
            if (digest := manifest["files"].get(saved.name)) and scored_alike:
                scores, counts = _score_saved(saved, digest, mask, label, dataset, case)
                result += scores
            entry = manifest["cases"].get(case.id, {})
            result += describe_verdict(entry.get("verdict")) + describe_adaptation(entry.get("adaptation"))
            if (unadapted := unadapted_name(path.name)) in manifest["files"]:
                result += _score_unadapted(case, folder / unadapted, dataset, label)
        except CASE_ERRORS as error:
            result = case.without_folders(describe_error(error))
            if folder.name:  # of "." nothing is to be hidden
                result = result.replace(f"{folder}/", "").replace(str(folder), folder.name)
        on_case(case.id)
        return case, result, counts

    with ThreadPoolExecutor(threads) as pool:
        outcomes = list(pool.map(score, found))
    rows: list[Row] = []
    reliability: dict[str, np.ndarray] = {}
    for case, result, counts in outcomes:
        if isinstance(result, str):
            failed[case.id] = result
            continue
        entry = manifest["cases"].get(case.id, {})
        split = entry.get("split", "unknown")
        learned = {"judge_learned": True} if entry.get("judge_learned") is True else {}
        rows += rows_of(result, case, split, common | learned, tolerance)
        if counts is not None:
            reliability[split] = reliability.get(split, 0) + counts
    scored = {case.id for case, _ in found} | failed.keys()
    unpredicted = tuple(case.id for case in dataset.labelled if case.id not in scored)
    with atomic.locked(folder / ROWS, wait=True):
        atomic.sweep(folder, (SUMMARY, RELIABILITY))
        write_rows(folder / ROWS, rows)
        atomic.write_json(folder / SUMMARY, summarise(rows, failed, unpredicted))
        if reliability:
            names = ("voxels", "right", "confidence")
            told = {s: dict(zip(names, counts.tolist(), strict=True)) for s, counts in reliability.items()}
            atomic.write_json(folder / RELIABILITY, told)
        else:
            (folder / RELIABILITY).unlink(missing_ok=True)  # of other masks
    return Evaluation(rows, failed, unpredicted)


def _require_own(folder: Path) -> None:
    """Refuse to replace files that are called as ours and were written by another program."""

    def is_own(path: Path) -> bool:
        try:
            if path.name == ROWS:
                return all("metric" in row and "split" in row for row in read_rows(path))
            content = atomic.read_json(path)
        except FileFormatError:
            return False
        if path.name == SUMMARY:
            return isinstance(content, dict) and {"by_split", "undefined", "failed"} <= content.keys()
        splits = content.values() if isinstance(content, dict) else [None]
        return all(isinstance(counts, dict) and "confidence" in counts for counts in splits)

    for path in (folder / ROWS, folder / SUMMARY, folder / RELIABILITY):
        if path.exists() and not is_own(path):
            raise ConfigError(
                f"{path.name} would be replaced, but anysite evaluate did not write it", where=folder,
                fix="copy the masks to a folder of their own, or move that file away",
            )  # fmt: skip


def score_volume(
    mask: Volume,
    label: Volume,
    dataset: Dataset,
    case: Case,
    tolerance: float = TOLERANCE,
    metrics: Collection[str] = METRICS,
) -> list[Score]:
    """Score a label map of class indices against another one on the same grid, class by class or by region.

    Of several datasets in one, only the classes that the case's own labels.
    """
    known = dataset.known_to(case)
    names = dataset.region_names or [dataset.classes[index] for index in known[1:]]
    groups = dataset.regions or [(index,) for index in known[1:]]
    masks_of = [(name, tuple(group)) for name, group in zip(names, groups, strict=True)]
    return score_case(mask.array[0], label.array[0], masks_of, label.spacing, label.unit, tolerance, metrics)


def score_probabilities(
    probabilities: Float[np.ndarray, "k *s"],
    mask: Volume,
    label: Volume,
    dataset: Dataset,
    case: Case,
    metrics: Collection[str] = CALIBRATION_METRICS,
    where: object = "",
) -> list[Score]:
    """Score the calibration near anything predicted or true, of what the case's label tells of.

    Raises:
        GeometryError: the probabilities are of another shape than the label, or of other classes.
    """
    near = _near_structures(probabilities, mask, label, dataset, case, where)
    return _score_near(*near, dataset, [metric for metric in CALIBRATION_METRICS if metric in metrics])


def _score_near(
    chances: np.ndarray, truth: np.ndarray, dataset: Dataset, metrics: Sequence[str]
) -> list[Score]:
    scores = score_calibration(chances, truth, overlapping=bool(dataset.regions), metrics=metrics)
    return [Score(ALL_CLASSES, metric, value, "1") for metric, value in scores.items()]


def _near_structures(
    probabilities: Float[np.ndarray, "k *s"],
    mask: Volume,
    label: Volume,
    dataset: Dataset,
    case: Case,
    where: object,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities `(K, N)` and the truth of the voxels near anything predicted or true."""
    groups, known = _groups_of(dataset), dataset.known_to(case)
    if probabilities.shape != (len(groups), *label.shape):
        raise GeometryError(
            f"probabilities of shape {probabilities.shape}",
            where=where,
            expected=f"{(len(groups), *label.shape)}",
        )
    found = np.where(np.isin(mask.array[0], known), mask.array[0], 0)
    band = select_band(found, label.array[0], label.spacing)
    truth = np.stack([np.isin(label.array[0][band], group) for group in groups])
    return fold_unknown(probabilities[:, band], known, bool(dataset.regions)), truth


def _read_mask(case: Case, path: Path, dataset: Dataset, label: Volume, ours: bool) -> Volume:
    mask = files.read_label(path, case.image_paths[0])
    if not mask.same_grid(label):
        raise GeometryError(
            f"a mask of shape {mask.shape} and spacing {_listed(mask.spacing)}",
            where=path,
            expected=f"the label's shape {label.shape} and spacing {_listed(label.spacing)}, at the same place",
        )
    if not ours:
        mask = as_class_indices(mask, path, dataset, case)
    beyond = int(mask.array.max())
    if beyond >= len(dataset.classes):
        raise DataError(f"class index {beyond}", where=path, expected=f"0 to {len(dataset.classes) - 1}")
    return mask


def _score_unadapted(case: Case, path: Path, dataset: Dataset, label: Volume) -> list[Score]:
    if not path.is_file():
        return []
    mask = files.read_label(path, case.image_paths[0])
    scores = score_volume(mask, label, dataset, case, metrics=["dice"])
    return [Score(ALL_CLASSES, UNADAPTED_DICE, mean_defined([score.value for score in scores]), "1")]


def _score_saved(
    path: Path, digest: str, mask: Volume, label: Volume, dataset: Dataset, case: Case
) -> tuple[list[Score], np.ndarray | None]:
    """Score the probabilities saved with a mask, unless they were altered or deleted since, and count their bins."""
    if not path.is_file() or atomic.sha256(path) != digest:
        return [], None
    chances, truth = _near_structures(read_probabilities(path), mask, label, dataset, case, path)
    counts = count_reliability(chances, truth, overlapping=bool(dataset.regions))
    return _score_near(chances, truth, dataset, tuple(CALIBRATION_METRICS)), counts


def _groups_of(dataset: Dataset) -> list[tuple[int, ...]]:
    """Return the class indices that each map of probabilities is about."""
    return [tuple(g) for g in dataset.regions or [(index,) for index in range(len(dataset.classes))]]


def _groups_of_plan(plan: dict[str, Any]) -> list[tuple[int, ...]]:
    return [
        tuple(g) for g in plan.get("regions") or [(index,) for index in range(len(plan.get("classes", ())))]
    ]


def as_class_indices(mask: Volume, path: Path, dataset: Dataset, case: Case) -> Volume:
    """Return the mask of another program, which holds the label values of the case's dataset, as class indices.

    Raises:
        LabelError: a value that stands for no class, or masks that seem to hold class indices.
    """
    if case.task in dataset.tasks:
        return dataset.indices_of(mask, case, where=path)
    if dataset.label_values == tuple(range(len(dataset.classes))):
        return mask
    found = set(np.unique(mask.array).tolist())
    if found <= set(range(len(dataset.classes))) and not found <= set(dataset.label_values):
        raise LabelError(
            f"values {', '.join(map(str, sorted(found)))}, which look like class indices",
            where=path,
            expected=f"the dataset's label values {', '.join(map(str, dataset.label_values))}",
            fix="write masks of other programs with the label values of the dataset",
        )
    return dataset.class_indices(mask, where=path)


def _require_same_classes(manifest: dict[str, Any], dataset: Dataset, folder: Path) -> None:
    plan = manifest["runs"][0].get("plan", {}) if manifest["runs"] else {}
    classes, regions = plan.get("classes"), plan.get("region_names", [])
    if not classes:  # masks of another program
        return
    automatic = _is_automatic(classes) and not regions
    if automatic or (_is_automatic(dataset.classes) and not dataset.regions):
        if len(classes) > len(dataset.classes):
            raise DataError(
                f"{len(classes)} classes ({', '.join(classes)})", where=folder,
                expected=f"at most the {len(dataset.classes)} of {dataset.name} ({', '.join(dataset.classes)})",
                fix="score on a dataset of the same classes",
            )  # fmt: skip
        values = tuple(plan.get("label_values", ()))
        if len(classes) < len(dataset.classes) and values != dataset.label_values[: len(values)]:
            raise DataError(
                f"masks of the label values {', '.join(map(str, values))}", where=folder,
                expected=f"{', '.join(map(str, dataset.label_values))} as in {dataset.name}",
                fix="declare the dataset's classes in dataset.json beside the data",
            )  # fmt: skip
        return
    found = _list_targets(classes, regions, plan.get("regions", []))
    expected = _list_targets(dataset.classes, dataset.region_names, dataset.regions)
    if found != expected:
        raise DataError(
            f"masks of {', '.join(found)}",
            where=folder,
            expected=f"{', '.join(expected)} in this order, as {dataset.name} has them",
            fix="score on a dataset of the same classes, or put those of its dataset.json in the order of the run",
        )


def _is_automatic(classes: Sequence[str]) -> bool:
    """Tell whether nobody declared the names, as `infer_classes` gives them."""
    return list(classes[1:]) == ["foreground"] or all(re.fullmatch(r"class_\d+", c) for c in classes[1:])


def _list_targets(
    classes: Sequence[str], region_names: Sequence[str], regions: Sequence[Sequence[int]]
) -> list[str]:
    members = [f"{name} ({'+'.join(map(str, r))})" for name, r in zip(region_names, regions, strict=True)]
    return members or list(classes[1:])


def _find_mask(folder: Path, case: Case, manifest: dict[str, Any]) -> Path | None:
    if manifest["runs"]:  # other masks that lie there are not theirs
        entry = manifest["cases"].get(case.id, {})
        return folder / entry["mask"] if entry.get("status") == "done" else None
    suffixes = dict.fromkeys((mask_suffix(case), *files.FORMATS, files.DICOM))
    return next((p for suffix in suffixes if (p := folder / f"{case.id}{suffix}").is_file()), None)


def _describe(manifest: dict[str, Any], dataset: Dataset) -> Row:
    known = manifest["runs"]
    first = known[0] if known else {}
    labelled = first.get("config", {}).get("train", {}).get("labelled_patients")
    return {
        "dataset": dataset.name,
        "method": first.get("preset", "unknown"),
        "adapt": name_adapter(manifest.get("settings", {}).get("adapt", {})),
        "seed": "+".join(str(run["seed"]) for run in known) if len(known) > 1 else first.get("seed"),
        "train_domains": join_sites(first.get("train_domains", ())),
        "corruption": "none",
        "severity": 0,
        "labels": str(labelled or "all"),
        "commit": first.get("commit", ""),
        "config": manifest.get("origin", ""),
    }


def _listed(spacing: Sequence[float]) -> str:
    return " x ".join(f"{s:.4g}" for s in spacing)
