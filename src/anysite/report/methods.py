"""Several methods side by side: means, paired differences, and where each was trained and tested."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from anysite.report.format import without_folders
from anysite.report.read import Row
from anysite.report.summary import (
    CaseScore,
    MetricSummary,
    estimate,
    mean_of_runs,
    of_split,
    person_of,
    score_cases,
    summarise_metrics,
)
from anysite.statistics import Comparison, Estimate, adjust_holm, compare_paired

# What makes two values of different methods a pair: training sites, seed, site, case, class.
Pairing = tuple[tuple[str, ...], str, str, str, str]

BATCH_STATISTICS = "predict.normalisation=batch"  # named with every result, even where all of them share it


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
    """One method over all its runs; `comparison` is with the first method at unseen sites, None for that itself.

    `cost` is the same at the training sites, on held-out patients.

    `differences` are those of the cases, over the values that pair up; `left_out` counts the values that only
    this method defines, and those that only the first one does.
    """

    name: str
    rows: tuple[Row, ...] = field(repr=False)
    comparison: Comparison | None
    cost: Comparison | None
    differences: tuple[tuple[str, float], ...]
    left_out: tuple[int, int]
    p_adjusted: float | None

    @property
    def seeds(self) -> tuple[str, ...]:
        """The seeds it was trained with."""
        return tuple(sorted({row.seed for row in self.rows}))

    @cached_property
    def _scores(self) -> tuple[CaseScore, ...]:
        return tuple(score_cases(self.rows))

    @cached_property
    def unseen(self) -> Estimate | None:
        """The Dice at sites that trained nothing."""
        return estimate(of_split(self._scores, "unseen"))

    @cached_property
    def in_domain(self) -> Estimate | None:
        """The Dice on held-out patients of the training sites."""
        return estimate(of_split(self._scores, "in_domain"))

    @cached_property
    def sites(self) -> dict[str, Estimate]:
        """The Dice at each unseen site."""
        return _by_site(of_split(self._scores, "unseen"))

    @property
    def worst_site(self) -> str:
        """The unseen site of the lowest Dice, empty where there is none."""
        return min(self.sites, key=lambda domain: self.sites[domain].mean, default="")

    @property
    def train_seconds(self) -> float | None:
        """What a training took, in the mean."""
        return mean_of_runs(self.rows, "train_seconds")

    @property
    def train_steps(self) -> float | None:
        """The steps of a training, in the mean."""
        return mean_of_runs(self.rows, "train_steps")

    @property
    def peak_memory_mb(self) -> float | None:
        """The largest memory of a job, in the mean."""
        return mean_of_runs(self.rows, "peak_memory")

    @property
    def predict_seconds_per_case(self) -> float | None:
        """What the prediction of a case took, in the mean."""
        return mean_of_runs(self.rows, "predict_seconds_per_case")

    @cached_property
    def metrics(self) -> tuple[MetricSummary, ...]:
        """Every metric at unseen sites."""
        return summarise_metrics([row for row in self.rows if row.split == "unseen"])

    @cached_property
    def matrix(self) -> Matrix:
        """The Dice by training and test sites."""
        return train_by_test(self.rows)

    @property
    def gap(self) -> float | None:
        """In-domain minus unseen Dice, as a fraction; the patients differ, and so may the sites' difficulty."""
        if self.unseen is None or self.in_domain is None:
            return None
        return self.in_domain.mean - self.unseen.mean


def tell_runs_apart(rows: Sequence[Row]) -> list[Row]:
    """Number methods of which several runs or settings of prediction would pass for one another.

    Rows that a benchmark wrote name their settings; those of prediction folders hold a digest alone.
    """
    configs: dict[tuple[object, ...], list[str]] = defaultdict(list)
    alike = [
        None
        if row.job or not row.config
        else (row.dataset, row.method, row.adapt, row.seed, row.train_domains, row.labels, row.overrides)
        for row in rows
    ]
    for row, group in zip(rows, alike, strict=True):
        if group is not None and row.config not in configs[group]:
            configs[group].append(row.config)
    return [
        row
        if group is None or len(configs[group]) == 1
        else row.model_copy(update={"method": f"{row.method} #{configs[group].index(row.config) + 1}"})
        for row, group in zip(rows, alike, strict=True)
    ]


def split_by_method(rows: Sequence[Row], *, by_labels: bool = True) -> dict[str, list[Row]]:
    """Group rows by method, adaptation, overrides and number of labels; names tell apart what differs."""
    variants = {
        method: _name_overrides({row.overrides for row in rows if row.method == method})
        for method in {row.method for row in rows}
    }
    several_labels = by_labels and len({row.labels for row in rows}) > 1
    methods: dict[str, list[Row]] = {}
    for row in rows:
        name = row.method or "unnamed method"
        if row.adapt and row.adapt != "none":
            name += f" + {row.adapt}"
        if several_labels and row.labels:
            name += f" ({row.labels} labels)"
        if variant := variants[row.method][row.overrides]:
            name += f" ({variant})"
        methods.setdefault(name, []).append(row)
    return methods


def summarise_methods(methods: dict[str, list[Row]], baseline: str) -> list[MethodSummary]:
    """Summarise every method and compare it with `baseline` over the unseen values that pair up.

    Values pair up where training sites, seed, site, case and class are the same and both define them. The
    p-values of all comparisons are adjusted together (Holm 1979).
    """
    order = [baseline, *(name for name in methods if name != baseline)]
    base, people = _pairings(methods[baseline])
    base_inside, people_inside = _pairings(methods[baseline], "in_domain")
    costs: dict[str, Comparison] = {}
    comparisons: dict[str, Comparison] = {}
    differences: dict[str, tuple[tuple[str, float], ...]] = {}
    left_out: dict[str, tuple[int, int]] = {}
    for name in order[1:]:
        other, _ = _pairings(methods[name])
        common = [key for key in base if key in other]
        inside, _ = _pairings(methods[name], "in_domain")
        if both := [key for key in base_inside if key in inside]:
            costs[name] = compare_paired(
                {key: inside[key] for key in both}, {key: base_inside[key] for key in both}, people_inside
            )
        left_out[name] = len(other) - len(common), len(base) - len(common)
        if common:
            comparisons[name] = compare_paired(
                {key: other[key] for key in common}, {key: base[key] for key in common}, people
            )
            by_case: dict[tuple[str, str], list[float]] = defaultdict(list)
            for key in common:
                by_case[key[2], key[3]].append(other[key] - base[key])
            differences[name] = tuple(
                (case, statistics.fmean(values)) for (_, case), values in by_case.items()
            )
    adjusted = dict(
        zip(comparisons, adjust_holm([c.p_value for c in comparisons.values()]), strict=True)
        if comparisons
        else ()
    )
    return [
        MethodSummary(
            name=name,
            rows=tuple(methods[name]),
            comparison=comparisons.get(name),
            cost=costs.get(name),
            differences=differences.get(name, ()),
            left_out=left_out.get(name, (0, 0)),
            p_adjusted=adjusted.get(name),
        )
        for name in order
    ]


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


def _pairings(rows: Iterable[Row], split: str = "unseen") -> tuple[dict[Pairing, float], dict[Pairing, str]]:
    """Return the defined Dice values of a split by what they pair up by, and the patients of each."""
    values: dict[Pairing, float] = {}
    people: dict[Pairing, str] = {}
    for row in rows:
        if row.metric == "dice" and row.split == split and row.case and row.value is not None:
            key = row.train_domains, row.seed, row.domain, row.case, row.class_name
            values[key] = row.value
            people[key] = person_of(row.domain, row.patient or row.case)
    return values, people


def _name_overrides(variants: set[str]) -> dict[str, str]:
    """Name each of a method's variants by the overrides that not all of them share."""
    # A value may hold blanks, so that an override ends only where the next name begins.
    settings = {text: re.split(r"\s+(?=[\w.]+\s*=)", text.strip()) for text in variants}
    shared = set.intersection(*map(set, settings.values()))
    names = {
        text: without_folders(" ".join(s for s in found if s not in shared or s == BATCH_STATISTICS))
        for text, found in settings.items()
    }
    if len(set(names.values())) == len(names):
        return names
    # The same settings in another order, or files that only their folders tell apart.
    return {text: f"{names[text]} #{number}".strip() for number, text in enumerate(sorted(variants), 1)}
