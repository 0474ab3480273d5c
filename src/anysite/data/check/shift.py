"""How much the sites differ: intensities, spacing, shape, classes; and which site differs most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from anysite.data.case import Dataset
from anysite.data.check.reading import Reading
from anysite.data.limits import HOUNSFIELD_BELOW

BINS = 48
LEAST_EXTENT = 0.01  # of intensities that are drawn: of images of nearly one value there is none


@dataclass(frozen=True)
class SiteShift:
    """A site beside the others.

    Attributes:
        histogram: The share of voxels in each bin of normalised intensity, of the first channel, mean of cases.
        distance: The mean of the distances in intensity to the other sites.
        spacing: The median voxel size along the axes, of volumes in the order RAS.
        shape: The median voxels along the same axes.
    """

    domain: str
    cases: int
    histogram: tuple[float, ...]
    distance: float
    spacing: tuple[float, ...]
    shape: tuple[float, ...]


@dataclass(frozen=True)
class Shift:
    """Differences between sites, the most different site first.

    Attributes:
        sites: By their mean distance to the others, the largest first.
        edges: Of the histograms' bins, in standard deviations around the mean.
        normalisation: "case", each image by its own mean and deviation, or "dataset", all alike (Hounsfield units).
        intensity: Wasserstein distances between the intensities of two sites, in the order of `sites`.
        spacing: How many times larger the spacing of one is than the other's, the worst axis.
        shape: As `spacing`, of the number of voxels.
        classes: Half the sum of the differences in the classes' shares of labelled voxels, 0 to 1.
    """

    sites: tuple[SiteShift, ...]
    edges: tuple[float, ...]
    normalisation: str
    intensity: tuple[tuple[float, ...], ...]
    spacing: tuple[tuple[float, ...], ...]
    shape: tuple[tuple[float, ...], ...]
    classes: tuple[tuple[float, ...], ...]


def measure_shift(dataset: Dataset, readings: Sequence[Reading]) -> Shift | None:
    """Return how much the sites of a dataset differ, or None where no two can be compared."""
    sites: dict[str, list[Reading]] = {domain: [] for domain in dataset.domains}
    for reading in readings:
        if reading.intensities and not reading.constant and reading.grid is not None:
            sites[reading.case.domain].append(reading)
    sites = {domain: site for domain, site in sites.items() if site}
    kinds = {(len(r.intensities), r.grid.dimension) for site in sites.values() for r in site if r.grid}
    if len(sites) < 2 or len(kinds) > 1:
        return None
    values, shared = _normalised(sites)
    intensity = _between(list(values.values()), _distance)
    order = np.argsort(-intensity.sum(axis=1), kind="stable")
    names = [list(sites)[index] for index in order]
    intensity = intensity[np.ix_(order, order)]
    first = [values[name][0].ravel() for name in names]
    low, high = min(v.min() for v in first), max(v.max() for v in first)
    edges = np.linspace(low, max(high + 1e-6, low + LEAST_EXTENT), BINS + 1)
    grids = [[r.grid.oriented() for r in sites[name] if r.grid is not None] for name in names]
    spacing = [np.median([grid.spacing for grid in group], axis=0) for group in grids]
    shape = [np.median([grid.shape for grid in group], axis=0) for group in grids]
    return Shift(
        sites=tuple(
            SiteShift(
                name,
                len(sites[name]),
                _rounded(np.histogram(own, edges)[0] / own.size),
                round(float(row.sum()) / (len(names) - 1), 4),
                _rounded(s),
                _rounded(n),
            )
            for name, own, row, s, n in zip(names, first, intensity, spacing, shape, strict=True)
        ),
        edges=_rounded(edges),
        normalisation="dataset" if shared else "case",
        intensity=tuple(map(_rounded, intensity)),
        spacing=tuple(map(_rounded, _between(spacing, _factor))),
        shape=tuple(map(_rounded, _between(shape, _factor))),
        classes=tuple(
            map(_rounded, _between([_class_shares(dataset, sites[name]) for name in names], _variation))
        ),
    )


def _normalised(sites: dict[str, list[Reading]]) -> tuple[dict[str, np.ndarray], bool]:
    """Return the quantiles of all cases by site, `(channels, cases, levels)`, and whether by what all share."""
    curves = {
        name: np.stack([[channel.quantiles for channel in reading.intensities] for reading in site], axis=1)
        for name, site in sites.items()
    }
    every = np.concatenate(list(curves.values()), axis=1)
    lowest = [reading.intensities[0].minimum for site in sites.values() for reading in site]
    shared = float(np.median(lowest)) <= HOUNSFIELD_BELOW
    result = {}
    for name, own in curves.items():
        source, axes = (every, (1, 2)) if shared else (own, (2,))
        deviation = source.std(axis=axes, keepdims=True)
        result[name] = (own - source.mean(axis=axes, keepdims=True)) / np.maximum(deviation, 1e-6)
    return result, shared


def _between(sites: Sequence[np.ndarray], distance: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
    result = np.zeros((len(sites), len(sites)))
    for (i, one), (j, other) in combinations(enumerate(sites), 2):
        result[i, j] = result[j, i] = distance(one, other)
    return result


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(
        np.mean([stats.wasserstein_distance(a.ravel(), b.ravel()) for a, b in zip(one, other, strict=True)])
    )


def _factor(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.exp(np.abs(np.log(one / other)).max()))


def _class_shares(dataset: Dataset, site: Sequence[Reading]) -> np.ndarray:
    counts = sum((Counter(reading.values) for reading in site), Counter[int]())
    found = np.array([counts[value] for value in dataset.label_values or (0,)], float)
    return found / max(1.0, found.sum())


def _variation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).sum() / 2)


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)
