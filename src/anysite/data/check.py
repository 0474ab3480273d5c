"""Checking a dataset: every file read once, every problem listed at once."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from anysite.data import files
from anysite.data.case import Case, Dataset
from anysite.data.classes import count_values, infer_classes
from anysite.data.layouts import find_cases
from anysite.data.volume import Volume
from anysite.errors import DataError, FileFormatError, LabelError

SPACING_FACTOR = 3.0


@dataclass(frozen=True)
class Problem:
    """One finding about a case, a file, or (both empty) a site or the dataset."""

    severity: Literal["error", "warning"]
    case: str
    file: str
    rule: str
    observed: str
    expected: str
    fix: str


@dataclass(frozen=True)
class SiteSummary:
    """The cases of a site; shapes and spacings along the array axes, as (smallest, largest) of each axis."""

    domain: str
    cases: int
    patients: int
    labelled: int
    dimensions: tuple[int, ...]
    channels: tuple[int, ...]
    shape: tuple[tuple[int, int], ...]
    spacing: tuple[tuple[float, float], ...]
    unit: str
    class_share: dict[str, float]


@dataclass(frozen=True)
class Inspection:
    """All problems of a dataset and a summary of each site, for `dataclasses.asdict` and JSON."""

    problems: tuple[Problem, ...]
    sites: tuple[SiteSummary, ...]


@dataclass
class _Reading:
    """What is kept of a case once its voxels are let go."""

    case: Case
    problems: list[Problem] = field(default_factory=list)
    grid: Volume | None = None
    channels: int = 0
    digest: str = ""  # empty where a file of the image could not be read
    constant: bool = False
    values: dict[int, int] = field(default_factory=dict)

    def add(self, rule: str, file: Path, observed: str, expected: str, fix: str) -> None:
        self.problems.append(Problem("error", self.case.id, str(file), rule, observed, expected, fix))


def check_dataset(dataset: Path | Dataset) -> list[Problem]:
    """List every problem of a dataset, errors first.

    Raises:
        DataError: there is no dataset, or its layout contradicts itself, so that no case can be listed.
    """
    return list(inspect_dataset(dataset).problems)


def summarise(dataset: Path | Dataset) -> tuple[SiteSummary, ...]:
    """Summarise every site of a dataset; files that cannot be read are left out.

    Raises:
        DataError: as for `check_dataset`.
    """
    return inspect_dataset(dataset).sites


def inspect_dataset(
    dataset: Path | Dataset, threads: int | None = None, progress: Callable[[], object] = lambda: None
) -> Inspection:
    """Read every file of a dataset once, and return its problems and the summary of its sites.

    `progress` is called after each case.

    Raises:
        DataError: as for `check_dataset`.
    """
    if not isinstance(dataset, Dataset):
        dataset = find_cases(dataset)
    if dataset.tasks:
        parts = [inspect_dataset(dataset.of_task(name), threads, progress) for name in dataset.tasks]
        found = sorted((p for part in parts for p in part.problems), key=lambda problem: problem.severity)
        return Inspection(tuple(found), tuple(site for part in parts for site in part.sites))
    readings = []
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for reading in pool.map(_read, dataset.cases):
            readings.append(reading)
            progress()
    problems = [problem for reading in readings for problem in reading.problems]
    if not dataset.classes:
        values = {value for reading in readings for value in reading.values}
        try:
            dataset = _with_classes_of(dataset, values or {0})
        except LabelError as error:
            problems.append(
                Problem("error", "", "", "undeclared classes", error.found, error.expected, error.fix)
            )
    for rule in (_grids, _copies, _labels, _classes, _patients, _spacings):
        problems += rule(dataset, readings)
    problems.sort(key=lambda problem: problem.severity)
    return Inspection(tuple(problems), tuple(_summary(dataset, readings, d) for d in dataset.domains))


def _with_classes_of(dataset: Dataset, values: set[int]) -> Dataset:
    """Infer the classes, without those between that no label has."""
    named = [(c, v) for c, v in zip(*infer_classes(values), strict=True) if v in values or v == 0]
    return replace(dataset, classes=tuple(c for c, _ in named), label_values=tuple(v for _, v in named))


def _read(case: Case) -> _Reading:
    reading = _Reading(case)
    content, unread = hashlib.sha256(), len(case.image_paths)
    for path in case.image_paths:
        image = _read_file(reading, path, files.read)
        if image is None:
            continue
        unread -= 1
        reading.channels += image.array.shape[0]
        if image.array.min() == image.array.max():
            reading.constant = True
            reading.add(
                "constant image", path, f"every voxel is {image.array.flat[0]}", "contrast", "exclude it"
            )
        content.update(repr((image.array.shape, image.array.dtype.str)).encode())
        content.update(np.ascontiguousarray(image.array).data)
        if reading.grid is None:
            reading.grid = _without_voxels(image)
        elif not image.same_grid(reading.grid):
            expected = f"{_grid(reading.grid)} as {case.image_paths[0].name}"
            reading.add(
                "channels on different grids", path, _grid(image), expected, "resample it to the first"
            )
    reading.digest = "" if unread else content.hexdigest()
    if case.label_path is not None:
        label = _read_file(
            reading, case.label_path, partial(files.read_label, image_path=case.image_paths[0])
        )
        if label is not None:
            reading.values = count_values(label.array)
            if reading.grid is not None and not label.same_grid(reading.grid):
                reading.add(
                    "image and label on different grids",
                    case.label_path,
                    _grid(label),
                    f"{_grid(reading.grid)} as the image",
                    "resample the label to its image, or copy the header if only that is wrong",
                )
    return reading


def _read_file(reading: _Reading, path: Path, read: Callable[[Path], Volume]) -> Volume | None:
    try:
        return read(path)
    except LabelError as error:
        rule = "label values"
        found = error
    except DataError as error:
        rule = "unreadable file" if isinstance(error, FileFormatError) else "unusable geometry"
        if not files.exists(path):
            rule = "missing file"
        elif "NaN" in error.found:
            rule = "non-finite values"
        found = error
    reading.add(
        rule, path, found.found, found.expected or "a file that can be read", found.fix or "replace the file"
    )
    return None


def _grids(dataset: Dataset, readings: Sequence[_Reading]) -> Iterator[Problem]:
    read = [reading for reading in readings if reading.digest and reading.grid is not None]
    for rule, unit, count in (
        ("channel count", "channels", lambda r: r.channels),
        ("2-D and 3-D mixed", "spatial axes", lambda r: r.grid.dimension),
    ):
        usual = Counter(map(count, read)).most_common(1)
        for reading in read:
            if count(reading) != usual[0][0]:
                yield _of_case(
                    "error",
                    reading.case,
                    reading.case.image_paths[0],
                    rule,
                    f"{count(reading)} {unit}",
                    f"{usual[0][0]} {unit} as {usual[0][1]} of {len(read)} cases have",
                    "convert the case or exclude it",
                )


def _copies(dataset: Dataset, readings: Sequence[_Reading]) -> Iterator[Problem]:
    first: dict[str, Case] = {}
    for reading in readings:
        if not reading.digest or reading.constant:
            continue
        case, other = reading.case, first.setdefault(reading.digest, reading.case)
        if other is not case:
            crossing = case.patient != other.patient
            yield _of_case(
                "error" if crossing else "warning",
                case,
                case.image_paths[0],
                "identical images",
                f"the same voxels as case {other.id}" + (f" of patient {other.patient}" if crossing else ""),
                "every image once",
                "remove one, or give both the same patient",
            )


def _labels(dataset: Dataset, readings: Sequence[_Reading]) -> Iterator[Problem]:
    background = dataset.label_values[0] if dataset.label_values else 0
    declared = ", ".join(map(str, dataset.label_values[:20])) + (
        ", ..." if len(dataset.label_values) > 20 else ""
    )
    for reading in readings:
        case = reading.case
        if case.label_path is None:
            if dataset.labelled:
                file = case.image_paths[0]
                yield _of_case("warning", case, file, "no label", "none", "a label as others have", "add it")
            continue
        if case.label_path.suffix.lower() in (".jpg", ".jpeg"):
            yield _of_case(
                "warning",
                case,
                case.label_path,
                "lossy label",
                "a JPEG, which alters values at edges",
                "PNG, TIFF or NIfTI",
                "export the label again from its source",
            )
        unknown = sorted(set(reading.values) - set(dataset.label_values)) if dataset.classes else []
        if unknown:
            yield _of_case(
                "error",
                case,
                case.label_path,
                "label values",
                f"{', '.join(map(str, unknown[:10]))}{', ...' if len(unknown) > 10 else ''}",
                f"only {declared}",
                "declare the classes in dataset.json or mend the label",
            )
        if set(reading.values) == {background}:
            yield _of_case(
                "warning",
                case,
                case.label_path,
                "empty label",
                "only background",
                "at least one class",
                "confirm that nothing is to be found there",
            )


def _classes(dataset: Dataset, readings: Sequence[_Reading]) -> Iterator[Problem]:
    for domain in dataset.domains:
        present = {value for r in readings if r.case.domain == domain for value in r.values}
        pairs = list(zip(dataset.classes, dataset.label_values, strict=True))[1:]
        absent = [name for name, value in pairs if value not in present]
        if present and absent:
            yield _of_site(
                "class never present",
                f"site {domain}: no voxel of {', '.join(absent[:10])}{', ...' if len(absent) > 10 else ''}",
                "every declared class at every site",
                "check that the site labels these classes; otherwise leave it out of training for them",
            )


def _patients(dataset: Dataset, readings: Sequence[_Reading]) -> Iterator[Problem]:
    patients, sites = defaultdict(set), defaultdict(set)
    for case in dataset.cases:
        patients[case.domain].add(case.patient)
        sites[case.patient].add(case.domain)
    for patient, domains in sites.items():
        if len(domains) > 1:
            yield _of_site(
                "patient at several sites",
                f"patient {patient} at {', '.join(sorted(domains))}",
                "one site",
                "rename the patients if they are different people",
            )
    for domain, names in patients.items():
        if len(names) < 2:
            yield _of_site(
                "too few patients",
                f"site {domain}: one patient",
                "two or more, so that one can be held out",
                "merge the site with another or add patients",
            )


def _spacings(dataset: Dataset, readings: Sequence[_Reading]) -> Iterator[Problem]:
    for domain in dataset.domains:
        physical = [
            (reading.case, reading.grid.oriented().spacing)
            for reading in readings
            if reading.case.domain == domain and reading.grid is not None and reading.grid.unit == "mm"
        ]
        for dimension in {len(spacing) for _, spacing in physical}:
            alike = [(case, spacing) for case, spacing in physical if len(spacing) == dimension]
            usual = [median(axis) for axis in zip(*(spacing for _, spacing in alike), strict=True)]
            for case, spacing in alike:
                factors = [s / m for s, m in zip(spacing, usual, strict=True)]
                if max(factors) > SPACING_FACTOR or min(factors) < 1 / SPACING_FACTOR:
                    yield _of_case(
                        "warning",
                        case,
                        case.image_paths[0],
                        "spacing outlier",
                        f"{_numbers(spacing)} mm",
                        f"about {_numbers(usual)} mm, the median of site {domain}",
                        "check the header",
                    )


def _summary(dataset: Dataset, readings: Iterable[_Reading], domain: str) -> SiteSummary:
    here = [reading for reading in readings if reading.case.domain == domain]
    grids = [reading.grid for reading in here if reading.grid is not None]
    dimensions = sorted({grid.dimension for grid in grids})
    alike = len(dimensions) == 1
    counts = Counter[int]()
    for reading in here:
        counts.update(reading.values)
    total = sum(counts.values())
    return SiteSummary(
        domain,
        cases=len(here),
        patients=len({reading.case.patient for reading in here}),
        labelled=sum(reading.case.label_path is not None for reading in here),
        dimensions=tuple(dimensions),
        channels=tuple(sorted({reading.channels for reading in here if reading.channels})),
        shape=tuple((min(a), max(a)) for a in zip(*(g.shape for g in grids), strict=True)) if alike else (),
        spacing=tuple((min(a), max(a)) for a in zip(*(g.spacing for g in grids), strict=True))
        if alike
        else (),
        unit=grids[0].unit if grids else "",
        class_share={
            name: counts[value] / total
            for name, value in zip(dataset.classes, dataset.label_values, strict=True)
            if total
        },
    )


def _of_case(
    severity: Literal["error", "warning"],
    case: Case,
    file: Path,
    rule: str,
    observed: str,
    expected: str,
    fix: str,
) -> Problem:
    return Problem(severity, case.id, str(file), rule, observed, expected, fix)


def _of_site(rule: str, observed: str, expected: str, fix: str) -> Problem:
    return Problem("warning", "", "", rule, observed, expected, fix)


def _without_voxels(volume: Volume) -> Volume:
    """Keep the grid and let the voxels go: a broadcast zero has the shape and no memory."""
    return volume.with_array(np.broadcast_to(np.uint8(0), (1, *volume.shape)))


def _grid(volume: Volume) -> str:
    corner = f", first voxel at {_numbers(volume.affine[:-1, -1])}" if volume.unit == "mm" else ""
    return f"shape {volume.shape}, spacing {_numbers(volume.spacing)} {volume.unit}{corner}"


def _numbers(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
