"""The numbers of a report: scores by case, means by site with intervals, other metrics."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from anysite.judgement import is_judgement
from anysite.report.read import Row
from anysite.statistics import Estimate, estimate_mean

SPLITS = ("in_domain", "unseen", "training", "unknown")
METRICS = ("dice", "iou", "surface_dice", "hd95", "assd", "volume_error", "relative_volume_error")
RUN_METRICS = ("train_seconds", "train_steps", "predict_seconds_per_case", "peak_memory")


@dataclass(frozen=True)
class CaseScore:
    """One metric of one case: `value` is the mean over its defined classes, then over runs."""

    dataset: str
    case: str
    patient: str
    domain: str
    split: str
    value: float | None
    by_class: dict[str, float | None]
    undefined: int

    @property
    def person(self) -> str:
        """The patient, told apart from one of the same id at another site."""
        return person_of(self.domain, self.patient)


@dataclass(frozen=True)
class MetricSummary:
    """One metric over the cases of a site; mean and median are None where no value is defined."""

    metric: str
    unit: str
    mean: float | None
    median: float | None
    values: int
    undefined: int


@dataclass(frozen=True)
class Site:
    """The cases of one site with one role: held out of its training, unseen, or trained on."""

    domain: str
    split: str
    scores: tuple[CaseScore, ...]
    dice: Estimate | None
    classes: dict[str, Estimate | None]
    metrics: tuple[MetricSummary, ...]
    undefined: int = field(default=0)


def person_of(domain: str, patient: str) -> str:
    """Return a name for a patient that no patient of another site has."""
    return repr((domain, patient))


def is_clean(row: Row) -> bool:
    """Tell whether a row was measured on the image as it is, not on a corrupted one."""
    return row.corruption in ("", "none")


def metrics_of(rows: Iterable[Row]) -> list[str]:
    """Return the metrics of cases that occur, the usual ones first."""
    found = dict.fromkeys(
        row.metric
        for row in rows
        if row.case and row.metric not in RUN_METRICS and not is_judgement(row.metric)
    )
    return [m for m in METRICS if m in found] + sorted(m for m in found if m not in METRICS)


def score_cases(rows: Iterable[Row], metric: str = "dice") -> list[CaseScore]:
    """Average the values of `metric` for each case: over classes within a run, then over runs.

    Undefined values are left out of the averages and counted.
    """
    cases: dict[tuple[str, ...], dict[tuple[object, ...], dict[str, float | None]]] = {}
    patients: dict[tuple[str, ...], str] = {}
    for row in rows:
        if row.metric != metric or not row.case:
            continue
        case = (row.dataset, row.case, row.domain, row.split)
        picture = row.corruption, row.severity, row.corruption_version
        run = (row.method, row.adapt, row.seed, row.train_domains, row.labels, row.overrides, *picture)
        cases.setdefault(case, {}).setdefault(run, {})[row.class_name] = row.value
        patients[case] = row.patient or row.case
    scores = []
    for key, runs in cases.items():
        names = dict.fromkeys(name for classes in runs.values() for name in classes)
        values = [value for classes in runs.values() for value in classes.values()]
        scores.append(
            CaseScore(
                dataset=key[0],
                case=key[1],
                domain=key[2],
                split=key[3],
                patient=patients[key],
                value=_mean([_mean(list(classes.values())) for classes in runs.values()]),
                by_class={name: _mean([classes.get(name) for classes in runs.values()]) for name in names},
                undefined=sum(value is None for value in values),
            )
        )
    return scores


def estimate(scores: Iterable[CaseScore], class_name: str | None = None) -> Estimate | None:
    """Estimate the mean over patients, of one class or of all, or None where no value is defined."""
    pairs = [
        (score.value if class_name is None else score.by_class.get(class_name), score.person)
        for score in scores
    ]
    defined = [(value, patient) for value, patient in pairs if value is not None]
    if not defined:
        return None
    return estimate_mean([value for value, _ in defined], [patient for _, patient in defined])


def of_split(scores: Iterable[CaseScore], split: str) -> list[CaseScore]:
    """Return the scores of one split."""
    return [score for score in scores if score.split == split]


def summarise_metrics(rows: Sequence[Row]) -> tuple[MetricSummary, ...]:
    """Summarise every metric over cases: mean and median of the case means, and what is undefined."""
    summaries = []
    for metric in metrics_of(rows):
        scores = score_cases(rows, metric)
        defined = [score.value for score in scores if score.value is not None]
        summaries.append(
            MetricSummary(
                metric=metric,
                unit=next((row.unit for row in rows if row.metric == metric and row.unit), ""),
                mean=_mean(defined),
                median=statistics.median(defined) if defined else None,
                values=sum(row.metric == metric and bool(row.case) for row in rows),
                undefined=sum(score.undefined for score in scores),
            )
        )
    return tuple(summaries)


def summarise_sites(rows: Sequence[Row], class_names: Sequence[str]) -> list[Site]:
    """Summarise every site, held-out cases of training sites first, then unseen sites, then the rest."""
    grouped: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.case:
            grouped[row.domain, row.split].append(row)
    sites = []
    for (domain, split), group in grouped.items():
        scores = score_cases(group)
        sites.append(
            Site(
                domain=domain,
                split=split,
                scores=tuple(scores),
                dice=estimate(scores),
                classes={name: estimate(scores, name) for name in class_names},
                metrics=summarise_metrics(group),
                undefined=sum(score.undefined for score in scores),
            )
        )
    return sorted(sites, key=lambda site: (rank_of(site.split), site.domain))


def mean_of_runs(rows: Iterable[Row], metric: str) -> float | None:
    """Return the mean of what runs cost, such as "train_seconds", or None where no row says it."""
    return _mean([row.value for row in rows if row.metric == metric and not row.case])


def rank_of(split: str) -> int:
    """Return where a split stands in the order of the page."""
    return SPLITS.index(split) if split in SPLITS else len(SPLITS)


def median_case(scores: Iterable[CaseScore]) -> CaseScore | None:
    """Return the case with the median value (the lower of two)."""
    ordered = worst_first(scores)
    return ordered[(len(ordered) - 1) // 2] if ordered else None


def worst_first(scores: Iterable[CaseScore]) -> list[CaseScore]:
    """Return the cases with a defined value, the lowest first."""
    defined = [(score.value, score.case, score) for score in scores if score.value is not None]
    return [score for _, _, score in sorted(defined, key=lambda item: item[:2])]


def _mean(values: Sequence[float | None]) -> float | None:
    if len(values) == 1:  # as of most cases and classes, of which there are many
        return values[0]
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined else None
