"""Putting a report together and writing it as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

import anysite
from anysite import atomic
from anysite.errors import DataError
from anysite.judgement import FAILED_DICE
from anysite.report import format as texts
from anysite.report.adaptation import KINDS as ADAPTED_KINDS
from anysite.report.adaptation import AdaptationResult, describe_adaptations
from anysite.report.charts import Strip, difference_plot, strip_plot
from anysite.report.curves import CorruptionCurves, LabelCurves, describe_corruptions, describe_labels
from anysite.report.evaluation import Evaluation, evaluate
from anysite.report.inspection import read_audit
from anysite.report.judging import KINDS, OTHER, Judgement, describe_judgement
from anysite.report.methods import (
    Matrix,
    MethodSummary,
    split_by_method,
    summarise_methods,
    tell_runs_apart,
    train_by_test,
)
from anysite.report.pictures import OKABE_ITO
from anysite.report.read import Row, Source, read_sources
from anysite.report.summary import is_clean, of_split, score_cases
from anysite.report.template import render
from anysite.report.training import MANIFEST, read_training
from anysite.report.viewer import read_viewer


@dataclass(frozen=True)
class Limits:
    """How many cases of one prediction folder have a picture in the list, and a volume in the viewer."""

    pictures: int
    volumes: int


@dataclass(frozen=True)
class Comparing:
    """The section on several methods."""

    methods: tuple[MethodSummary, ...]
    sites: tuple[str, ...]
    strips: Markup
    differences: tuple[tuple[MethodSummary, Markup], ...]


@dataclass(frozen=True)
class Matrices:
    """Training sites by test site, by method; `lowest` and `highest` are the extreme means of them all."""

    named: tuple[tuple[str, Matrix], ...]
    lowest: float
    highest: float


@dataclass(frozen=True)
class Chapter:
    """Everything about one dataset; `corrupted` counts rows of corrupted images, which have a section of their own."""

    dataset: str
    comparing: Comparing | None
    matrices: Matrices | None
    labels: LabelCurves | None
    corruptions: CorruptionCurves | None
    evaluations: tuple[Evaluation, ...]
    judgements: tuple[Judgement, ...]
    adaptations: tuple[AdaptationResult, ...]
    corrupted: int


PICTURES, VOLUMES = 200, 24  # cases of a page that have one


def write_report(
    paths: Sequence[Path], output: Path, title: str = "", *, pictures: int = PICTURES, volumes: int = VOLUMES
) -> Path:
    """Write a page on prediction folders and files of result rows, and return its path.

    The page needs no network and no other file. It names cases and sites, but no folders. Means are over
    patients with 95 % intervals (`anysite.statistics.estimate_mean`), in points (x 100).

    Args:
        paths: Prediction folders, `.jsonl` files of rows, folders that hold such, run folders, or `.json` files of
            checks.
        output: The `.html` file, replaced atomically.
        title: The page's heading; by default the names of the datasets.
        pictures: At most so many cases have a picture in the list of cases, shared between prediction folders.
        volumes: At most so many cases are in the 3-D viewer, shared likewise.

    Raises:
        FileFormatError: a source that is missing or is not what its name says.
        DataError: sources without any case.
    """
    paths = [Path(path) for path in paths]
    runs = [path for path in paths if (path / MANIFEST).is_file()]
    checks = [path for path in paths if path.suffix == ".json" and not path.is_dir()]
    trainings = [read_training(path) for path in runs]
    audits = [read_audit(path) for path in checks]
    sources = read_sources([path for path in paths if path not in (*runs, *checks)])
    folders = max(1, sum(source.predictions is not None for source in sources))
    limits = Limits(-(-pictures // folders), -(-volumes // folders))
    chapters = [_chapter(name, group, limits) for name, group in _by_dataset(sources).items()]
    if not chapters and not trainings and not audits:
        raise DataError("no rows and no predicted cases", where=", ".join(str(path) for path in paths))
    lines = [line for chapter in chapters for result in chapter.evaluations for line in result.lines]
    names = [chapter.dataset for chapter in chapters] or [training.name for training in trainings]
    page = render(
        "page.html",
        title=title or texts.join(names or [audit.name for audit in audits]),
        chapters=chapters,
        trainings=trainings,
        audits=audits,
        viewer=read_viewer() if any(line.volume for line in lines) else None,
        stepping=bool(lines),
        version=anysite.__version__,
        split_names=texts.SPLIT_NAMES,
        colours=len(OKABE_ITO),
        failed_dice=FAILED_DICE,
        adapted_kinds=ADAPTED_KINDS,
        kinds=KINDS
        | {
            "in_domain": texts.SPLIT_NAMES["in_domain"],
            "unknown": texts.SPLIT_NAMES["unknown"],
            "all": "all",
        },
    )
    atomic.write_text(Path(output), page)
    return Path(output)


def _by_dataset(sources: Sequence[Source]) -> dict[str, list[Source]]:
    datasets: dict[str, list[Source]] = {}
    for source in sources:
        if source.predictions is not None:
            name = source.predictions.dataset.name or "unnamed dataset"
            if source.predictions.cases or source.rows:
                datasets.setdefault(name, []).append(source)
            continue
        groups: dict[str, list[Row]] = {}
        for row in source.rows:
            groups.setdefault(row.dataset or "unnamed dataset", []).append(row)
        for name, rows in groups.items():
            datasets.setdefault(name, []).append(Source(source.path, tuple(rows)))
    return datasets


def _chapter(dataset: str, sources: Sequence[Source], limits: Limits) -> Chapter:
    every = tell_runs_apart([row for source in sources for row in source.rows])
    rows = list({row.key: row for row in every}.values())
    everything, rows = rows, [row for row in rows if row.split != OTHER]
    clean = [row for row in rows if is_clean(row)]
    labels = describe_labels(clean)
    # Side by side stand the methods that learned from all labels; the curves hold the others.
    compared = [row for row in clean if labels is None or row.labels in ("", labels.counts[-1])]
    methods = split_by_method(compared)
    folders = [source for source in sources if source.predictions is not None]
    if not folders and len(methods) == 1:
        folders = [Source(sources[0].path, tuple(compared))]
    comparing = _compare(methods) if len(methods) > 1 else None
    return Chapter(
        dataset=dataset,
        comparing=comparing,
        matrices=_cross(
            [(method.name, method.matrix) for method in comparing.methods]
            if comparing
            else [(name, train_by_test(rows)) for name, rows in methods.items()]
        ),
        labels=labels,
        corruptions=describe_corruptions(rows),
        evaluations=tuple(
            evaluate(source, pictures=limits.pictures, volumes=limits.volumes) for source in folders
        ),
        judgements=tuple(
            judgement
            for name, found in split_by_method(everything).items()
            if (judgement := describe_judgement(name, found)) is not None
        ),
        adaptations=describe_adaptations(rows),
        corrupted=len(rows) - len(clean),
    )


def _compare(methods: dict[str, list[Row]]) -> Comparing:
    # The plain one, or else the first of its variants, or else the first method of all.
    baseline = min(
        methods, key=lambda n: (n.lower() != "baseline", methods[n][0].method.lower() != "baseline")
    )
    summaries = summarise_methods(methods, baseline)
    sites = sorted({domain for method in summaries for domain in method.sites})
    strips = []
    for site in sites:
        for method in summaries:
            scores = [s for s in of_split(score_cases(methods[method.name]), "unseen") if s.domain == site]
            values = tuple((score.case, score.value) for score in scores if score.value is not None)
            mean = method.sites[site].mean if site in method.sites else None
            strips.append(Strip(site, method.name, "unseen", mean, values))
    limit = max((abs(v) for method in summaries for _, v in method.differences), default=0) or 0.01
    return Comparing(
        methods=tuple(summaries),
        sites=tuple(sites),
        strips=strip_plot(strips, "Dice of every unseen case, by site and method"),
        differences=tuple(
            (method, difference_plot(method.differences, limit, f"{method.name} minus {baseline}"))
            for method in summaries
            if method.differences
        ),
    )


def _cross(matrices: Sequence[tuple[str, Matrix]]) -> Matrices | None:
    """Cross training with test sites, where there is more to see than the sites of one training."""
    if len(matrices) < 2 and all(len(matrix.train_sets) < 2 for _, matrix in matrices):
        return None
    means = [cell.estimate.mean for _, matrix in matrices for cell in matrix.cells.values()]
    return Matrices(tuple(matrices), min(means), max(means)) if means else None
