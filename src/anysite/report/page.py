"""Putting a report together and writing it as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

import anysite
from anysite import atomic
from anysite.errors import DataError
from anysite.report import format as texts
from anysite.report.adaptation import KINDS as ADAPTED_KINDS
from anysite.report.adaptation import AdaptationResult, describe_adaptations
from anysite.report.charts import Strip, difference_plot, strip_plot
from anysite.report.curves import CorruptionCurves, LabelCurves, describe_corruptions, describe_labels
from anysite.report.evaluation import Evaluation, evaluate
from anysite.report.judging import FAILED, KINDS, OTHER, Judgement, describe_judgement
from anysite.report.methods import MethodSummary, split_by_method, summarise_methods
from anysite.report.pictures import OKABE_ITO
from anysite.report.read import Row, Source, read_sources
from anysite.report.summary import is_clean, of_split, score_cases
from anysite.report.training import MANIFEST, read_training

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Comparing:
    """The section on several methods; `lowest` and `highest` are the extreme means of all matrices."""

    methods: tuple[MethodSummary, ...]
    sites: tuple[str, ...]
    strips: Markup
    differences: tuple[tuple[MethodSummary, Markup], ...]
    lowest: float
    highest: float


@dataclass(frozen=True)
class Chapter:
    """Everything about one dataset; `corrupted` counts rows of corrupted images, which have a section of their own."""

    dataset: str
    comparing: Comparing | None
    labels: LabelCurves | None
    corruptions: CorruptionCurves | None
    evaluations: tuple[Evaluation, ...]
    judgements: tuple[Judgement, ...]
    adaptations: tuple[AdaptationResult, ...]
    corrupted: int


def write_report(paths: Sequence[Path], output: Path, title: str = "") -> Path:
    """Write a page on prediction folders and files of result rows, and return its path.

    The page needs no network and no other file. It names cases and sites, but no folders. Means are over
    patients with 95 % intervals (`anysite.statistics.estimate_mean`), in points (x 100).

    Args:
        paths: Prediction folders, `.jsonl` files of rows, folders that hold such, or run folders.
        output: The `.html` file, replaced atomically.
        title: The page's heading; by default the names of the datasets.

    Raises:
        FileFormatError: a source that is missing or is not what its name says.
        DataError: sources without any case.
    """
    runs = [path for path in map(Path, paths) if (path / MANIFEST).is_file()]
    trainings = [read_training(path) for path in runs]
    sources = read_sources([path for path in map(Path, paths) if path not in runs])
    chapters = [_chapter(name, group) for name, group in _by_dataset(sources).items()]
    if not chapters and not trainings:
        raise DataError("no rows and no predicted cases", where=", ".join(str(path) for path in paths))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update({name: getattr(texts, name) for name in FILTERS})
    page = environment.get_template("page.html").render(
        title=title or texts.join([c.dataset for c in chapters] or [t.name for t in trainings]),
        chapters=chapters,
        trainings=trainings,
        version=anysite.__version__,
        split_names=texts.SPLIT_NAMES,
        colours=len(OKABE_ITO),
        failed_dice=FAILED,
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


FILTERS = (
    "points",
    "number",
    "interval",
    "count",
    "probability",
    "duration",
    "join",
    "metric_name",
    "metric_unit",
    "metric_value",
)


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


def _chapter(dataset: str, sources: Sequence[Source]) -> Chapter:
    rows = list({row.key: row for source in sources for row in source.rows}.values())
    everything, rows = rows, [row for row in rows if row.split != OTHER]
    clean = [row for row in rows if is_clean(row)]
    labels = describe_labels(clean)
    # Side by side stand the methods that learned from all labels; the curves hold the others.
    compared = [row for row in clean if labels is None or row.labels in ("", labels.counts[-1])]
    methods = split_by_method(compared)
    folders = [source for source in sources if source.predictions is not None]
    if not folders and len(methods) == 1:
        folders = [Source(sources[0].path, tuple(compared))]
    return Chapter(
        dataset=dataset,
        comparing=_compare(methods) if len(methods) > 1 else None,
        labels=labels,
        corruptions=describe_corruptions(rows),
        evaluations=tuple(evaluate(source) for source in folders),
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
    means = [cell.estimate.mean for method in summaries for cell in method.matrix.cells.values()]
    return Comparing(
        methods=tuple(summaries),
        sites=tuple(sites),
        strips=strip_plot(strips, "Dice of every unseen case, by site and method"),
        differences=tuple(
            (method, difference_plot(method.differences, limit, f"{method.name} minus {baseline}"))
            for method in summaries
            if method.differences
        ),
        lowest=min(means, default=0.0),
        highest=max(means, default=1.0),
    )
