"""One method at every site: its numbers, pictures, worst cases and what it was made with."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from anysite.judgement import DECISIONS, FAILED_DICE, UNADAPTED_DICE
from anysite.report.cases import CaseLine, list_cases
from anysite.report.charts import Strip, line_plot, strip_plot
from anysite.report.configuration import Entries, RunFacts, describe_rows, describe_run
from anysite.report.format import SPLIT_NAMES, image_folders, join, without_folders
from anysite.report.gallery import Gallery
from anysite.report.methods import split_by_method
from anysite.report.pictures import Picture
from anysite.report.previews import Preview
from anysite.report.read import PredictedCase, PredictedVerdict, Predictions, Row, Source
from anysite.report.summary import (
    CaseScore,
    Site,
    estimate,
    is_clean,
    median_case,
    of_split,
    rank_of,
    score_cases,
    summarise_sites,
    worst_first,
)
from anysite.statistics import Estimate

WORST = 8


@dataclass(frozen=True)
class Shown:
    """A case with its picture; `site` is the mean at its site, `score` None where it has no truth."""

    case: str
    domain: str
    split: str
    picture: Picture
    score: CaseScore | None = None
    site: Estimate | None = None
    verdict: PredictedVerdict | None = None


@dataclass(frozen=True)
class Adapted:
    """A case whose mask is that of an adapted network, before and after.

    Attributes:
        drawings: What is drawn from its mask before and after, where the method draws anything.
        facts: What the method observed.
        change: Of Dice, where there is a truth.
    """

    before: Shown
    after: Shown
    method: str
    changed_share: float
    drawings: Preview | None
    facts: dict[str, float]
    dice_before: float | None
    change: float | None


@dataclass(frozen=True)
class Judged:
    """The cases of one role and verdict: how many, their Dice, how many failed, and a middling one as a picture."""

    split: str
    decision: str
    cases: int
    dice: Estimate | None
    failed: int
    scored: int
    example: Shown | None


@dataclass(frozen=True)
class Evaluation:
    """All that the page shows of one method."""

    name: str
    train_domains: tuple[str, ...]
    tested: dict[str, tuple[str, ...]]
    classes: tuple[str, ...]
    in_domain: Estimate | None
    unseen: Estimate | None
    cases: dict[str, int]
    seeds: tuple[str, ...]
    failures: tuple[tuple[str, str], ...]
    unpredicted: tuple[str, ...]
    outdated: bool
    sites: tuple[Site, ...]
    totals: tuple[tuple[str, Estimate | None, dict[str, Estimate | None]], ...]
    pictures: tuple[Shown, ...]
    worst: tuple[Shown, ...]
    strips: Markup
    judged: tuple[Judged, ...]
    reliability: Markup
    adapted: tuple[Adapted, ...]
    not_adapted: tuple[tuple[str, int], ...]
    lines: tuple[CaseLine, ...]
    volumes_left_out: int
    hd95_unit: str
    undefined: int
    facts: Entries
    runs: tuple[RunFacts, ...]
    created: str

    @property
    def gap(self) -> float | None:
        """In-domain minus unseen Dice, as a fraction; the patients differ, and so may the sites' difficulty."""
        if self.unseen is None or self.in_domain is None:
            return None
        return self.in_domain.mean - self.unseen.mean


def evaluate(source: Source, *, pictures: int, volumes: int) -> Evaluation:
    """Gather everything about one prediction folder, or about rows of one method without pictures.

    Args:
        source: Where the rows come from.
        pictures: At most so many cases of the list have one.
        volumes: At most so many cases are embedded for the viewer: the middle one of every site, then the lowest.
    """
    rows = [row for row in source.rows if is_clean(row)]
    predictions = source.predictions or Predictions()
    scores = score_cases(rows)
    declared = tuple(predictions.dataset.classes[1:])
    classes = declared + tuple(
        dict.fromkeys(r.class_name for r in rows if r.metric == "dice" and r.class_name not in declared)
    )
    sites = summarise_sites(rows, classes)
    runs = predictions.runs
    trained = {domain for row in rows for domain in row.train_domains}
    trained.update(str(domain) for run in runs for domain in run.get("train_domains") or ())
    gallery = Gallery(source, volumes)
    shown = tuple(_site_pictures(gallery, sites))  # first, so that every site has a volume
    failures = dict(source.unscored)
    for case_id, case in predictions.cases.items():
        if case.status == "failed":
            failures[case_id] = without_folders(case.error or "no reason given", image_folders(case.images))
    lines = list_cases(rows, scores, gallery, pictures)
    return Evaluation(
        name=join(split_by_method(rows)) or join({describe_run(run).name: None for run in runs}),
        train_domains=tuple(sorted(trained)),
        tested={
            split: tuple(sorted({line.domain for line in lines if line.split == split}))
            for split in SPLIT_NAMES
            if any(line.split == split for line in lines)
        },
        classes=classes,
        in_domain=estimate(of_split(scores, "in_domain")),
        unseen=estimate(of_split(scores, "unseen")),
        cases={split: sum(s.value is not None for s in of_split(scores, split)) for split in SPLIT_NAMES},
        seeds=tuple(sorted({row.seed for row in rows})),
        failures=tuple(failures.items()),
        unpredicted=source.unpredicted,
        outdated=source.outdated,
        sites=tuple(sites),
        totals=tuple(
            (split, mean, {name: estimate(of_split(scores, split), name) for name in classes})
            for split in ("in_domain", "unseen")
            if sum(site.split == split for site in sites) > 1
            and (mean := estimate(of_split(scores, split))) is not None
        ),
        pictures=shown,
        worst=tuple(_worst(gallery, scores)),
        strips=strip_plot([_strip(site) for site in sites], "Dice of every case, by site"),
        judged=tuple(_judged(gallery, scores)),
        reliability=_draw_reliability(source),
        adapted=tuple(_adapted(source.rows, gallery, scores)),
        not_adapted=_count_reasons(predictions),
        lines=lines,
        volumes_left_out=gallery.left_out,
        hd95_unit=next((row.unit for row in rows if row.metric == "hd95" and row.unit), ""),
        undefined=sum(score.undefined for score in scores),
        facts=describe_rows(rows),
        runs=tuple(describe_run(run) for run in runs),
        created=predictions.created,
    )


def _site_pictures(gallery: Gallery, sites: Sequence[Site]) -> Iterable[Shown]:
    """Show the median case of each site, or its first where nothing is scored."""
    cases = gallery.predictions.cases
    chosen: dict[str, Shown] = {}
    for site in sites:
        score = median_case(s for s in site.scores if s.case in cases and cases[s.case].mask)
        if score is not None and site.domain not in chosen:
            picture = gallery.draw(score.case)
            chosen[site.domain] = Shown(score.case, site.domain, site.split, picture, score, site.dice)
    for case_id, case in cases.items():
        if case.mask and case.domain not in chosen:
            chosen[case.domain] = Shown(case_id, case.domain, case.split, gallery.draw(case_id))
    return sorted(chosen.values(), key=lambda shown: rank_of(shown.split))


def _adapted(rows: Sequence[Row], gallery: Gallery, scores: Sequence[CaseScore]) -> list[Adapted]:
    """Return the adapted cases, those that lost most first."""
    by_case = {score.case: score for score in scores}
    before = {row.case: row.value for row in rows if row.metric == UNADAPTED_DICE}
    found = []
    for name, case in gallery.predictions.cases.items():
        kept = [adaptation for adaptation in case.adaptation if adaptation.kept]
        if not kept or not case.mask:
            continue
        score, old = by_case.get(name), before.get(name)
        change = None if score is None or score.value is None or old is None else score.value - old
        found.append((change, name, case, kept[0], score, old))
    found.sort(key=lambda item: (item[0] is None, item[0] or 0.0, item[1]))
    return [
        Adapted(
            Shown(name, case.domain, case.split, gallery.draw_other(name, _unadapted(case))),
            Shown(name, case.domain, case.split, gallery.draw(name), score),
            adaptation.method,
            adaptation.changed_share or 0.0,
            gallery.read_drawings(case),
            adaptation.facts,
            old,
            change,
        )
        for change, name, case, adaptation, score, old in found[:WORST]
    ]


def _unadapted(case: PredictedCase) -> PredictedCase:
    return case.model_copy(update={"mask": f"unadapted/{case.mask}"})


def _count_reasons(predictions: Predictions) -> tuple[tuple[str, int], ...]:
    """Count why cases were left without adaptation, the most frequent reason first."""
    reasons = Counter(
        case.adaptation[0].reason
        for case in predictions.cases.values()
        if case.adaptation and not any(adaptation.kept for adaptation in case.adaptation)
    )
    return tuple(reasons.most_common())


def _draw_reliability(source: Source) -> Markup:
    """Draw how often voxels were right by how sure the network was, with what it said itself."""
    counted = source.reliability
    if not counted:
        return Markup("")
    voxels = [sum(bins) for bins in zip(*(r.voxels for r in counted.values()), strict=True)]
    shown = [index for index, count in enumerate(voxels) if count > 0]
    ticks = [f"{100 * (index + 1) / len(voxels):.0f}" for index in shown]
    said = [sum(r.confidence[i] for r in counted.values()) / voxels[i] for i in shown]
    curves: dict[str, list[Estimate | None]] = {"said": [Estimate(value, None, None, 1, 1) for value in said]}
    for split, r in counted.items():
        rights = [r.right[i] / r.voxels[i] if r.voxels[i] else None for i in shown]
        curves[SPLIT_NAMES.get(split, split)] = [
            None if right is None else Estimate(right, None, None, 1, 1) for right in rights
        ]
    return line_plot(ticks, curves, "Voxels that were right, in percent, by confidence in percent")


def _worst(gallery: Gallery, scores: Sequence[CaseScore]) -> Iterable[Shown]:
    cases = gallery.predictions.cases
    candidates = [score for score in worst_first(scores) if score.split != "training" and score.case in cases]
    for score in candidates[:WORST]:
        picture = gallery.draw(score.case)
        verdict = cases[score.case].verdict
        yield Shown(score.case, score.domain, score.split, picture, score, verdict=verdict)


def _judged(gallery: Gallery, scores: Sequence[CaseScore]) -> Iterable[Judged]:
    """Group cases by their role and verdict; the failed masks that were accepted are what counts.

    Held-out cases stand apart, because limits are set by such cases.
    """
    cases = gallery.predictions.cases
    by_case = {score.case: score for score in scores}
    shown: set[str] = set()
    for split, decision in itertools.product(("unseen", "in_domain", "unknown"), DECISIONS):
        chosen = {
            name: case
            for name, case in cases.items()
            if case.split == split and case.verdict and case.verdict.decision == decision
        }
        if not chosen:
            continue
        found = [by_case[name] for name in chosen if name in by_case]
        values = [score.value for score in found if score.value is not None]
        middle = median_case(s for s in found if cases[s.case].mask)
        name = middle.case if middle else next((name for name, case in chosen.items() if case.mask), None)
        example = None
        if name is not None and decision not in shown:
            shown.add(decision)
            case = cases[name]
            picture = gallery.draw(name)
            example = Shown(name, case.domain, case.split, picture, middle, verdict=case.verdict)
        least = {name: case.verdict.least_dice for name, case in chosen.items() if case.verdict}
        failed = sum(s.value < (least[s.case] or FAILED_DICE) for s in found if s.value is not None)
        yield Judged(split, decision, len(chosen), estimate(found), failed, len(values), example)


def _strip(site: Site) -> Strip:
    values = tuple((score.case, score.value) for score in site.scores if score.value is not None)
    role = SPLIT_NAMES.get(site.split, site.split)
    mean = site.dice.mean if site.dice else None
    return Strip(site.domain or "unnamed site", role, site.split, mean, values)
