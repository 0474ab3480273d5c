"""Checking a dataset: every file read once, every problem listed at once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anysite.data.case import Dataset
from anysite.data.check import labels
from anysite.data.check.copies import find_copies, find_near_copies
from anysite.data.check.geometry import check_counts, check_geometry
from anysite.data.check.intensities import check_intensities
from anysite.data.check.patients import check_patients, check_site, check_splits
from anysite.data.check.problems import RULES, Problem, of_dataset
from anysite.data.check.reading import Reading, read_case
from anysite.data.check.shift import Shift, measure_shift
from anysite.data.layouts import find_cases
from anysite.errors import DataError, FaultyDataError

__all__ = [
    "RULES", "Inspection", "Problem", "Shift", "SiteSummary", "check_dataset", "inspect_dataset", "require_sound",
    "summarise",
]  # fmt: skip


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
    """All problems of a dataset, a summary of each site and how they differ, for `dataclasses.asdict` and JSON.

    `shift` has the differences of a dataset's sites, or of each of several datasets in one; none where there is
    only one site, or the sites cannot be compared.
    """

    problems: tuple[Problem, ...]
    sites: tuple[SiteSummary, ...]
    shift: tuple[Shift, ...] = ()


def check_dataset(dataset: Path | Dataset) -> list[Problem]:
    """List every problem of a dataset, errors first.

    Raises:
        DataError: nothing at the path is known as a dataset.
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
    """Read every file of a dataset once, and return its problems, the summary of its sites and their differences.

    `progress` is called after each case.

    Raises:
        DataError: as for `check_dataset`.
    """
    named: list[Problem] = []
    if not isinstance(dataset, Dataset):
        path = Path(dataset)
        try:
            dataset = find_cases(path)
            named = [*check_site(dataset, path), *check_splits(dataset, path)]
        except DataError as error:
            if not path.exists() or error.found.startswith("no dataset"):
                raise
            problem = of_dataset(
                "contradictory layout", error.found, error.expected or "one meaning", error.fix or "mend it",
                error.where,
            )  # fmt: skip
            return Inspection((problem,), ())
    parts = _parts_of(dataset)
    by_part = [_read(part, threads, progress) for part in parts]
    inspected = [_inspect(part, readings) for part, readings in zip(parts, by_part, strict=True)]
    # Of several datasets in one an image may also be in two.
    everything = [reading for readings in by_part for reading in readings]
    copies = [*find_copies(everything), *find_near_copies(everything)]
    problems = [problem for part in inspected for problem in part.problems]
    return Inspection(
        problems=_ordered([*problems, *copies, *named]),
        sites=tuple(site for part in inspected for site in part.sites),
        shift=tuple(shift for part in inspected for shift in part.shift),
    )


def require_sound(dataset: Dataset, threads: int | None = None) -> None:
    """Read every file of a dataset and refuse it if there are errors, all of which are told at once.

    Raises:
        FaultyDataError: there are errors, as `check_dataset` would list them.
    """
    errors: list[Problem] = []
    everything: list[Reading] = []
    for part in _parts_of(dataset):
        readings = _read(part, threads, measured=False)
        part, undeclared = _with_classes(part, readings)
        errors += [problem for reading in readings for problem in reading.problems]
        errors += [*undeclared, *check_counts(readings), *labels.check_values(part, readings)]
        everything += readings
    errors += find_copies(everything)
    errors = [problem for problem in errors if problem.severity == "error"]
    if errors:
        raise FaultyDataError([_as_line(problem) for problem in errors], where=dataset.name)


def _parts_of(dataset: Dataset) -> list[Dataset]:
    return [dataset.of_task(name) for name in dataset.tasks] if dataset.tasks else [dataset]


def _inspect(dataset: Dataset, readings: Sequence[Reading]) -> Inspection:
    """Return what is wrong with one dataset, beside images that are there twice, and its sites."""
    dataset, undeclared = _with_classes(dataset, readings)
    problems = (
        *(problem for reading in readings for problem in reading.problems),
        *undeclared,
        *check_geometry(readings),
        *check_intensities(readings),
        *labels.check_values(dataset, readings),
        *labels.check_labels(dataset, readings),
        *check_patients(dataset),
    )
    shift = measure_shift(dataset, readings)
    summaries = tuple(_summary(dataset, readings, domain) for domain in dataset.domains)
    return Inspection(problems, summaries, () if shift is None else (shift,))


def _as_line(problem: Problem) -> str:
    place = problem.file or problem.case
    return str(DataError(problem.observed, where=place, expected=problem.expected, fix=problem.fix)).rstrip(
        "."
    )


def _read(
    dataset: Dataset,
    threads: int | None,
    progress: Callable[[], object] = lambda: None,
    measured: bool = True,
) -> list[Reading]:
    background = dataset.label_values[0] if dataset.label_values else 0
    readings = []
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for reading in pool.map(partial(read_case, background=background, measured=measured), dataset.cases):
            readings.append(reading)
            progress()
    return readings


def _with_classes(dataset: Dataset, readings: Sequence[Reading]) -> tuple[Dataset, list[Problem]]:
    return (dataset, []) if dataset.classes else labels.infer(dataset, readings)


def _ordered(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    return tuple(sorted(problems, key=lambda problem: problem.severity))


def _summary(dataset: Dataset, readings: Iterable[Reading], domain: str) -> SiteSummary:
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
