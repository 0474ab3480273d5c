"""Several methods side by side: means, paired differences, and where each was trained and tested."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from anysite.report.read import Row
from anysite.report.summary import (
    CaseScore,
    MetricSummary,
    estimate,
    of_split,
    score_cases,
    summarise_metrics,
    worst_first,
)
from anysite.statistics import Comparison, Estimate, adjust_holm, compare_paired


@dataclass(frozen=True)
class Cell:
    """The Dice of one set of training sites at one test site."""

    estimate: Estimate
    split: str
    worst: bool


@dataclass(frozen=True)
class Matrix:
    """Training sites by test site; a pair that was not measured has no cell."""

    train_sets: tuple[str, ...]
    domains: tuple[str, ...]
    cells: dict[tuple[str, str], Cell]


@dataclass(frozen=True)
class MethodSummary:
    """One method over all its runs; `comparison` is with the first method, and None for that itself.

    `differences` are those of the cases, `left_out` the cases that only one of both methods defines.
    """

    name: str
    seeds: tuple[str, ...]
    unseen: Estimate | None
    in_domain: Estimate | None
    sites: dict[str, Estimate]
    worst_site: str
    comparison: Comparison | None
    differences: tuple[tuple[str, float], ...]
    left_out: int
    p_adjusted: float | None
    seconds: float | None
    peak_memory_mb: float | None
    metrics: tuple[MetricSummary, ...]
    matrix: Matrix

    @property
    def gap(self) -> float | None:
        """In-domain minus unseen Dice, as a fraction."""
        if self.unseen is None or self.in_domain is None:
            return None
        return self.in_domain.mean - self.unseen.mean


def split_by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by method, adaptation and number of labels; names tell apart what differs."""
    several_labels = len({row.labels for row in rows}) > 1
    methods: dict[str, list[Row]] = {}
    for row in rows:
        name = row.method or "unnamed method"
        if row.adapt and row.adapt != "none":
            name += f" + {row.adapt}"
        if several_labels and row.labels:
            name += f" ({row.labels} labels)"
        methods.setdefault(name, []).append(row)
    return methods


def summarise_methods(methods: dict[str, list[Row]], baseline: str) -> list[MethodSummary]:
    """Summarise every method and compare it with `baseline` over their common unseen cases.

    The p-values of all comparisons are adjusted together (Holm 1979).
    """
    order = [baseline, *(name for name in methods if name != baseline)]
    scores = {name: score_cases(methods[name]) for name in order}
    base = _by_case(of_split(scores[baseline], "unseen"))
    comparisons: dict[str, Comparison] = {}
    differences: dict[str, tuple[tuple[str, float], ...]] = {}
    left_out: dict[str, int] = {}
    for name in order[1:]:
        other = _by_case(of_split(scores[name], "unseen"))
        common = [key for key in base if key in other]
        left_out[name] = len(base.keys() ^ other.keys())
        if common:
            comparisons[name] = compare_paired(
                {key: other[key].value or 0.0 for key in common},
                {key: base[key].value or 0.0 for key in common},
                {key: base[key].patient for key in common},
            )
            differences[name] = tuple(
                (key[1], (other[key].value or 0.0) - (base[key].value or 0.0)) for key in common
            )
    adjusted = dict(
        zip(comparisons, adjust_holm([c.p_value for c in comparisons.values()]), strict=True)
        if comparisons
        else ()
    )
    summaries = []
    for name in order:
        rows = methods[name]
        unseen = of_split(scores[name], "unseen")
        sites = _by_site(unseen)
        summaries.append(
            MethodSummary(
                name=name,
                seeds=tuple(sorted({row.seed for row in rows})),
                unseen=estimate(unseen),
                in_domain=estimate(of_split(scores[name], "in_domain")),
                sites=sites,
                worst_site=min(sites, key=lambda domain: sites[domain].mean, default=""),
                comparison=comparisons.get(name),
                differences=differences.get(name, ()),
                left_out=left_out.get(name, 0),
                p_adjusted=adjusted.get(name),
                seconds=_mean_of_runs(rows, "seconds"),
                peak_memory_mb=_mean_of_runs(rows, "peak_memory_mb"),
                metrics=summarise_metrics([row for row in rows if row.split == "unseen"]),
                matrix=train_by_test(rows),
            )
        )
    return summaries


def train_by_test(rows: Sequence[Row]) -> Matrix:
    """Estimate the Dice for every set of training sites at every test site."""
    domains = tuple(sorted({row.domain for row in rows if row.case}))
    sites = set(domains).union(*(row.train_domains for row in rows))
    train_sets = sorted(
        {row.train_domains for row in rows if row.case}, key=lambda train: name_of_sites(train, sites)
    )
    found: dict[tuple[str, str], tuple[Estimate, str]] = {}
    for train in train_sets:
        scores = score_cases([row for row in rows if row.train_domains == train and row.split != "training"])
        for domain in domains:
            here = [score for score in scores if score.domain == domain]
            mean = estimate(here)
            if mean is not None:
                found[name_of_sites(train, sites), domain] = mean, here[0].split
    unseen = {key: mean.mean for key, (mean, split) in found.items() if split == "unseen"}
    worst = min(unseen, key=lambda key: unseen[key], default=None)
    return Matrix(
        tuple(name_of_sites(train, sites) for train in train_sets),
        domains,
        {key: Cell(mean, split, key == worst) for key, (mean, split) in found.items()},
    )


def name_of_sites(train: Sequence[str], sites: set[str]) -> str:
    """Name a set of training sites briefly: by those left out where they are fewer."""
    rest = sorted(sites - set(train))
    if not train:
        return "not stated"
    if len(train) > 2 and len(rest) == 1:
        return f"all but {rest[0]}"
    return ", ".join(train)


def _by_site(scores: Sequence[CaseScore]) -> dict[str, Estimate]:
    means = {
        domain: estimate([score for score in scores if score.domain == domain])
        for domain in sorted({score.domain for score in scores})
    }
    return {domain: mean for domain, mean in means.items() if mean is not None}


def _by_case(scores: Sequence[CaseScore]) -> dict[tuple[str, str], CaseScore]:
    return {(score.domain, score.case): score for score in worst_first(scores)}


def _mean_of_runs(rows: Sequence[Row], metric: str) -> float | None:
    values = [row.value for row in rows if row.metric == metric and not row.case and row.value is not None]
    return statistics.fmean(values) if values else None
