"""Dice against how many labels were learned from, and against how severely images were corrupted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from anysite.report.charts import line_plot
from anysite.report.format import SPLIT_NAMES
from anysite.report.methods import split_by_method
from anysite.report.read import Row
from anysite.report.summary import estimate, is_clean, score_cases
from anysite.statistics import Estimate


@dataclass(frozen=True)
class LabelCurves:
    """Dice by number of labelled patients, one chart a split, a series a method."""

    counts: tuple[str, ...]
    charts: tuple[tuple[str, Markup], ...]
    table: tuple[tuple[str, str, tuple[Estimate | None, ...]], ...]


@dataclass(frozen=True)
class CorruptionResult:
    """One method on corrupted images: Dice over all corruptions and severities, and the drop of each.

    `drops` are relative to the clean Dice of the same cases, averaged over severities.
    """

    method: str
    clean: Estimate | None
    corrupted: Estimate | None
    drops: dict[str, float]

    @property
    def gap(self) -> float | None:
        """Clean minus corrupted Dice."""
        if self.clean is None or self.corrupted is None:
            return None
        return self.clean.mean - self.corrupted.mean


@dataclass(frozen=True)
class CorruptionCurves:
    """Dice by severity, one small chart a corruption, a series a method."""

    names: tuple[str, ...]
    charts: tuple[tuple[str, Markup], ...]
    results: tuple[CorruptionResult, ...]


def describe_labels(rows: Sequence[Row]) -> LabelCurves | None:
    """Return the curves over numbers of labelled patients, or None where there is one number only."""
    counts = sorted({row.labels for row in rows if row.labels}, key=_as_number)
    if len(counts) < 2:
        return None
    methods = split_by_method(rows, by_labels=False)
    charts, table = [], []
    for split in ("unseen", "in_domain"):
        curves = {
            name: tuple(_mean([row for row in found if row.labels == count], split) for count in counts)
            for name, found in methods.items()
        }
        curves = {name: estimates for name, estimates in curves.items() if any(estimates)}
        if curves:
            title = f"Dice by number of labelled patients, {SPLIT_NAMES[split]}"
            charts.append((SPLIT_NAMES[split], line_plot(counts, curves, title)))
            table += [(SPLIT_NAMES[split], name, estimates) for name, estimates in curves.items()]
    return LabelCurves(tuple(counts), tuple(charts), tuple(table))


def describe_corruptions(rows: Sequence[Row]) -> CorruptionCurves | None:
    """Return the curves over severities of every corruption, or None where no row is of a corrupted image.

    Severity 0 is the clean image; a method's clean Dice is that of the cases that were also corrupted.
    """
    corrupted = [row for row in rows if not is_clean(row)]
    if not corrupted:
        return None
    places = {_place(row) for row in corrupted}
    clean = [row for row in rows if is_clean(row) and _place(row) in places]
    methods, clean_by_method = split_by_method(corrupted), split_by_method(clean)
    if len({row.corruption_version for row in corrupted}) > len({row.corruption for row in corrupted}):
        # Of a corruption that was changed in between, the versions are no measurements of the same thing.
        corrupted = [row.model_copy(update={"corruption": row.corruption_version}) for row in corrupted]
    names = sorted({row.corruption for row in corrupted})
    severities = sorted({row.severity for row in corrupted}, key=_as_number)
    by_name: dict[str, dict[str, tuple[Estimate | None, ...]]] = {name: {} for name in names}
    results = []
    for method, found in methods.items():
        unharmed = _mean(clean_by_method.get(method, []))
        drops: dict[str, float] = {}
        for name in names:
            of_name = [row for row in found if row.corruption == name]
            curve = tuple(_mean([row for row in of_name if row.severity == level]) for level in severities)
            by_name[name][method] = (unharmed, *curve)
            known = [estimate.mean for estimate in curve if estimate]
            if unharmed and unharmed.mean and known:
                drops[name] = 1 - sum(known) / len(known) / unharmed.mean
        results.append(CorruptionResult(method, unharmed, _mean(found), drops))
    charts = tuple(
        (
            name,
            line_plot(
                ("0", *severities), by_name[name], f"Dice by severity of {name}", width=300, legend=False
            ),
        )
        for name in names
    )
    return CorruptionCurves(tuple(names), charts, tuple(results))


def _mean(rows: Sequence[Row], split: str = "") -> Estimate | None:
    return estimate([score for score in score_cases(rows) if split in ("", score.split)])


def _place(row: Row) -> tuple[object, ...]:
    return row.method, row.overrides, row.labels, row.train_domains, row.seed, row.domain, row.case


def _as_number(text: str) -> float:
    return float(text) if text.isdigit() else float("inf")
