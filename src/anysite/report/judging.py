"""How good the verdicts are: which shifts the scores tell, which failures, and what was let through."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from markupsafe import Markup

from anysite.judgement import (
    DECISIONS,
    FAILED_DICE,
    LEAST_DICE,
    PREDICTED,
    SCORE,
    VERDICT,
    area_under_generalised_risk_coverage,
    area_under_risk_coverage,
    area_under_roc,
    exact_interval,
    excess_area_under_risk_coverage,
    false_positive_rate,
    rank_correlation,
    risk_by_coverage,
    suspicion,
)
from anysite.report.charts import line_plot
from anysite.report.read import Row
from anysite.report.summary import is_clean, person_of
from anysite.statistics import Estimate

REFERRED = 0.2  # share that a person looks at
REFERRAL = "referral"  # by what `anysite predict --referral` sorts
OTHER = "other"
KINDS = {OTHER: "another dataset", "corrupted": "corrupted", "unseen": "unseen site"}


@dataclass
class Judged:
    """What was said of one image by one run, and the Dice of its mask where the truth is known."""

    run: tuple[object, ...]
    kind: str
    shift: str
    person: str
    scores: dict[str, float] = field(default_factory=dict)
    dice: list[float] = field(default_factory=list)
    expected: dict[str, float] = field(default_factory=dict)
    decision: str = ""
    least_dice: float = FAILED_DICE

    @property
    def mean_dice(self) -> float | None:
        """The mean over classes, none where none is defined."""
        return fmean(self.dice) if self.dice else None

    @property
    def is_beyond(self) -> bool:
        """Whether a score is beyond its limit, or not finite."""
        return any(not score <= 1 for name, score in self.scores.items() if name != REFERRAL)


@dataclass(frozen=True)
class Shift:
    """How well every score tells one kind of image from held-out ones: AUROC, and FPR at 95 % sensitivity."""

    kind: str
    name: str
    images: int
    scores: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class FailureRanking:
    """How well one score sorts masks by how bad they are; `caught` of the failures are in the fifth referred."""

    score: str
    aurc: float
    excess_aurc: float
    augrc: float
    correlation: float | None
    caught: float | None


@dataclass(frozen=True)
class Passed:
    """What became of one kind of image; `silent` are accepted failures, or accepted images of another dataset.

    `beyond` have a score beyond its limit: of known images as many as the stated rate of false alarms allows.

    `silent_patients` counts those with a silent failure among those with an accepted mask; the interval is of that
    share, since images of one patient, and seeds, are not independent.
    """

    kind: str
    images: int
    refused: int
    decisions: dict[str, int]
    beyond: int
    failed: int
    silent: int
    silent_patients: tuple[int, int]
    silent_interval: tuple[float, float] | None
    predicted: int
    within: int


@dataclass(frozen=True)
class Judgement:
    """The section on the judgement of one method."""

    method: str
    runs: int
    scores: tuple[str, ...]
    shifts: tuple[Shift, ...]
    means: tuple[Shift, ...]
    rankings: tuple[tuple[str, int, int, tuple[FailureRanking, ...]], ...]
    passed: tuple[Passed, ...]
    curves: Markup


def describe_judgement(method: str, rows: Sequence[Row]) -> Judgement | None:
    """Return what the rows of one method say about its judgement, none where they hold no verdicts."""
    judged = _gather(rows)
    if not judged:
        return None
    for one in judged:
        one.scores[REFERRAL] = suspicion(one.scores)
    scores = tuple(dict.fromkeys(name for one in judged for name in one.scores if name != REFERRAL))
    scores = (*scores, REFERRAL)
    shifts = tuple(_measure_shifts(judged, scores))
    kinds = dict.fromkeys(shift.kind for shift in shifts)
    means = [_average(kind, [s for s in shifts if s.kind == kind], scores) for kind in kinds]
    if len(kinds) > 1:
        means.append(_average("all", shifts, scores))
    harmed = [one for one in judged if one.dice]
    real = [one for one in harmed if one.kind != "corrupted"]
    groups = [("clean images", real)] + ([("with corrupted ones", harmed)] if len(harmed) > len(real) else [])
    return Judgement(
        method=method,
        runs=len({one.run for one in judged}),
        scores=scores,
        shifts=shifts,
        means=tuple(means),
        rankings=tuple(
            (name, len(chosen), sum(_is_failed(one) for one in chosen), tuple(_rank(chosen, scores)))
            for name, chosen in groups
            if len(chosen) > 1
        ),
        passed=tuple(_count(judged)),
        curves=_draw(groups[-1][1], scores) if len(groups[-1][1]) > 1 else Markup(""),
    )


def _gather(rows: Sequence[Row]) -> list[Judged]:
    """Join the rows of every image by every run; of images without a verdict, and of those that limits were learned
    from, nothing is kept.
    """
    found: dict[tuple[object, ...], Judged] = {}
    for row in rows:
        if not row.case or row.split == "training" or row.judge_learned:
            continue
        run = (row.dataset, row.seed, row.train_domains, row.labels, row.overrides, row.adapt)
        kind = row.split if is_clean(row) else "corrupted"
        shift = {OTHER: row.other, "corrupted": row.corruption}.get(kind, row.domain)
        person = person_of(f"{row.other}/{row.domain}", row.patient or row.case)
        key = (run, kind, shift, row.corruption_version, row.severity, row.domain, row.case)
        one = found.setdefault(key, Judged(run, kind, shift, person))
        if row.metric == "dice" and row.value is not None:
            one.dice.append(row.value)
        elif row.metric == VERDICT:
            one.decision = dict(enumerate(DECISIONS)).get(
                -1 if row.value is None else int(row.value), "refused"
            )
        elif row.metric == LEAST_DICE and row.value is not None:
            one.least_dice = row.value
        elif row.metric in PREDICTED and row.value is not None:
            one.expected[row.metric] = row.value
        elif row.metric.startswith(SCORE):
            name = row.metric.removeprefix(SCORE)
            one.scores[name] = math.inf if row.value is None else row.value
    return [one for one in found.values() if one.decision]


def _measure_shifts(judged: Sequence[Judged], scores: Sequence[str]) -> Iterable[Shift]:
    """Compare every shift with the held-out images of the same run, and average over runs."""
    known: dict[tuple[object, ...], list[Judged]] = defaultdict(list)
    strange: dict[tuple[str, str], dict[tuple[object, ...], list[Judged]]] = {}
    for one in judged:
        if one.kind == "in_domain":
            known[one.run].append(one)
        elif one.kind in KINDS and one.decision != "refused":
            strange.setdefault((one.kind, one.shift), defaultdict(list))[one.run].append(one)
    for kind, name in sorted(strange, key=lambda key: (list(KINDS).index(key[0]), key[1])):
        by_run = {run: images for run, images in strange[kind, name].items() if known[run]}
        found: dict[str, tuple[float, float]] = {}
        for score in scores:
            pairs = [(_values(known[run], score), _values(images, score)) for run, images in by_run.items()]
            pairs = [(usual, others) for usual, others in pairs if usual and others]
            if pairs:
                found[score] = (
                    fmean(area_under_roc(usual, others) for usual, others in pairs),
                    fmean(false_positive_rate(usual, others) for usual, others in pairs),
                )
        if found:
            yield Shift(kind, name, sum(map(len, by_run.values())), found)


def _average(kind: str, shifts: Sequence[Shift], scores: Sequence[str]) -> Shift:
    measured = {
        score: tuple(zip(*(s.scores[score] for s in shifts if score in s.scores), strict=True))
        for score in scores
    }
    means = {score: (fmean(both[0]), fmean(both[1])) for score, both in measured.items() if both}
    return Shift(kind, f"mean of {len(shifts)}", sum(s.images for s in shifts), means)


def _rank(judged: Sequence[Judged], scores: Sequence[str]) -> Iterable[FailureRanking]:
    """Measure every score within each run, and average over runs; one that an image lacks speaks against its mask."""
    runs: dict[tuple[object, ...], list[Judged]] = defaultdict(list)
    for one in judged:
        runs[one.run].append(one)
    for score in scores:
        parts = [part for part in runs.values() if any(score in one.scores for one in part)]
        pairs = [([_risk(one) for one in part], _suspect(part, score)) for part in parts if len(part) > 1]
        if not pairs:
            continue

        def mean(measure: Callable[[list[float], list[float]], float], pairs: list = pairs) -> float:
            return fmean(measure(risks, values) for risks, values in pairs)

        correlations = [c for risks, values in pairs if (c := rank_correlation(risks, values)) is not None]
        caught = [c for part in parts if (c := _share_caught(part, score)) is not None]
        yield FailureRanking(
            score,
            mean(area_under_risk_coverage),
            mean(excess_area_under_risk_coverage),
            mean(area_under_generalised_risk_coverage),
            fmean(correlations) if correlations else None,
            fmean(caught) if caught else None,
        )


def _share_caught(judged: Sequence[Judged], score: str) -> float | None:
    """Return the share of failed masks in the fifth of highest score, of as many as that fifth can hold.

    Cases of equal score are taken in random order, and the share is the expected one; none without a failure.
    """
    failed = [float(_is_failed(one)) for one in judged]
    seen = math.floor(REFERRED * len(judged))
    if not sum(failed) or not seen:
        return None
    _, let_through = risk_by_coverage(failed, _suspect(judged, score))
    missed = float(let_through[len(judged) - seen - 1]) * len(judged)
    return (sum(failed) - missed) / min(sum(failed), seen)


def _count(judged: Sequence[Judged]) -> Iterable[Passed]:
    for kind in ("in_domain", "unseen", "unknown", "corrupted", OTHER):
        chosen = [one for one in judged if one.kind == kind]
        if not chosen:
            continue
        decisions = {name: sum(one.decision == name for one in chosen) for name in DECISIONS}
        bad = [one for one in chosen if kind == OTHER or _is_failed(one)]
        silent = sum(one.decision == "accept" for one in bad)
        trusted = {one.person for one in chosen if one.decision == "accept"}
        betrayed = {one.person for one in bad if one.decision == "accept"}
        told = [(one.mean_dice, one.expected) for one in chosen if len(one.expected) == len(PREDICTED)]
        known = [(dice, bounds) for dice, bounds in told if dice is not None]
        yield Passed(
            kind=kind,
            images=len(chosen),
            refused=sum(one.decision == "refused" for one in chosen),
            decisions=decisions,
            beyond=sum(one.is_beyond for one in chosen),
            failed=len(bad),
            silent=silent,
            silent_patients=(len(betrayed), len(trusted)),
            silent_interval=exact_interval(len(betrayed), len(trusted)) if trusted else None,
            predicted=len(known),
            within=sum(
                bounds[PREDICTED[0]] - 1e-6 <= dice <= bounds[PREDICTED[2]] + 1e-6 for dice, bounds in known
            ),
        )


def _draw(judged: Sequence[Judged], scores: Sequence[str]) -> Markup:
    """Draw the mean Dice of the share that each score trusts most, within each run and averaged over runs."""
    shares = range(10, 101, 10)
    runs = [[one for one in judged if one.run == run] for run in dict.fromkeys(one.run for one in judged)]
    curves: dict[str, tuple[Estimate | None, ...]] = {}
    for score in scores:
        found = []
        for part in runs:
            if len(part) < len(shares) or not any(score in one.scores for one in part):
                continue
            selective, _ = risk_by_coverage([_risk(one) for one in part], _suspect(part, score))
            found.append([1 - selective[math.ceil(len(part) * share / 100) - 1] for share in shares])
        if found:
            means = [fmean(values) for values in zip(*found, strict=True)]
            curves[score] = tuple(Estimate(mean, None, None, 1, 1) for mean in means)
    if not curves:
        return Markup("")
    ticks = [f"{share} %" for share in shares]
    return line_plot(ticks, curves, "Mean Dice of the share of masks that each score trusts most")


def _values(judged: Iterable[Judged], score: str) -> list[float]:
    return [one.scores[score] for one in judged if score in one.scores]


def _suspect(judged: Iterable[Judged], score: str) -> list[float]:
    """Return a score of every image, beyond all others where it has none: nothing can be said of it."""
    return [one.scores.get(score, math.inf) for one in judged]


def _risk(one: Judged) -> float:
    return 1 - (one.mean_dice or 0.0)


def _is_failed(one: Judged) -> bool:
    return one.mean_dice is not None and one.mean_dice < one.least_dice
