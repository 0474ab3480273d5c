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
    """Dice by number of labelled patients, one chart a split, a series a method.

    Attributes:
        alone: Values of cases, or of cases after a training at certain sites, that were not measured with every method
            and number; they are left out wherever there are any that were.
    """

    counts: tuple[str, ...]
    charts: tuple[tuple[str, Markup], ...]
    table: tuple[tuple[str, str, tuple[Estimate | None, ...]], ...]
    alone: int = 0


@dataclass(frozen=True)
class CorruptionResult:
    """One method on corrupted images: Dice over the corruptions and severities of all methods, and the drop of each.

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
    """Dice by severity, one small chart a corruption, a series a method.

    Attributes:
        results: Of what all methods were measured on, or where there is nothing such, of what each was.
        alone: Values of corrupted images that not all methods were measured on, which only the charts count.
        alike: Whether there are any that all were.
    """

    names: tuple[str, ...]
    charts: tuple[tuple[str, Markup], ...]
    results: tuple[CorruptionResult, ...]
    alone: int = 0
    alike: bool = True


def describe_labels(rows: Sequence[Row]) -> LabelCurves | None:
    """Return the curves over numbers of labelled patients, or None where there is one number only."""
    counts = sorted({row.labels for row in rows if row.labels}, key=_as_number)
    if len(counts) < 2:
        return None
    methods = split_by_method(rows, by_labels=False)
    charts, table, alone = [], [], 0
    for split in ("unseen", "in_domain"):
        parts = {
            (name, count): [row for row in found if (row.labels, row.split) == (count, split) and row.case]
            for name, found in methods.items()
            for count in counts
        }
        measured = [{_after_training(row) for row in part} for part in parts.values() if part]
        shared = set.intersection(*measured) if measured else set()
        kept = {
            key: [row for row in part if not shared or _after_training(row) in shared]
            for key, part in parts.items()
        }
        alone += sum(len(part) - len(kept[key]) for key, part in parts.items())
        curves = {name: tuple(_mean(kept[name, count]) for count in counts) for name in methods}
        curves = {name: estimates for name, estimates in curves.items() if any(estimates)}
        if curves:
            title = f"Dice by number of labelled patients, {SPLIT_NAMES[split]}"
            charts.append((SPLIT_NAMES[split], line_plot(counts, curves, title)))
            table += [(SPLIT_NAMES[split], name, estimates) for name, estimates in curves.items()]
    return LabelCurves(tuple(counts), tuple(charts), tuple(table), alone)


def describe_corruptions(rows: Sequence[Row]) -> CorruptionCurves | None:
    """Return the curves over severities of every corruption, or None where no row is of a corrupted image.

    Severity 0 is the clean image; a method's clean Dice is that of the cases that were also corrupted. Means and drops
    are over the corrupted images that all methods were measured on, so that they may stand side by side.
    """
    corrupted = [row for row in rows if not is_clean(row)]
    if not corrupted:
        return None
    if len({row.corruption_version for row in corrupted}) > len({row.corruption for row in corrupted}):
        # Of a corruption that was changed in between, the versions are no measurements of the same thing.
        corrupted = [row.model_copy(update={"corruption": row.corruption_version}) for row in corrupted]
    names = sorted({row.corruption for row in corrupted})
    severities = sorted({row.severity for row in corrupted}, key=_as_number)
    places = {_place(row) for row in corrupted}
    clean = split_by_method([row for row in rows if is_clean(row) and _place(row) in places])
    compared = split_by_method(keep_shared(corrupted))
    by_name: dict[str, dict[str, tuple[Estimate | None, ...]]] = {name: {} for name in names}
    results = []
    for method, found in split_by_method(corrupted).items():
        places = {_place(row) for row in compared[method]}
        unharmed = _mean([row for row in clean.get(method, []) if _place(row) in places])
        drops: dict[str, float] = {}
        for name in names:
            by_name[name][method] = (unharmed, *_curve(found, name, severities))
            known = [estimate.mean for estimate in _curve(compared[method], name, severities) if estimate]
            if unharmed and unharmed.mean and known:
                drops[name] = 1 - sum(known) / len(known) / unharmed.mean
        results.append(CorruptionResult(method, unharmed, _mean(compared[method]), drops))
    charts = tuple(
        (
            name,
            line_plot(
                ("0", *severities), by_name[name], f"Dice by severity of {name}", width=300, legend=False
            ),
        )
        for name in names
    )
    alike = bool(_find_shared(corrupted))
    alone = len(corrupted) - sum(map(len, compared.values()))
    return CorruptionCurves(tuple(names), charts, tuple(results), alone, alike)


def keep_shared(rows: Sequence[Row]) -> list[Row]:
    """Return rows without those of corrupted images that not all methods were measured on, if there are others."""
    shared = _find_shared([row for row in rows if not is_clean(row)])
    return [row for row in rows if is_clean(row) or not shared or _picture(row) in shared]


def _find_shared(corrupted: Sequence[Row]) -> set[tuple[object, ...]]:
    measured = [{_picture(row) for row in found} for found in split_by_method(corrupted).values()]
    return set.intersection(*measured) if measured else set()


def _curve(rows: Sequence[Row], name: str, severities: Sequence[str]) -> tuple[Estimate | None, ...]:
    of_name = [row for row in rows if row.corruption == name]
    return tuple(_mean([row for row in of_name if row.severity == level]) for level in severities)


def _mean(rows: Sequence[Row]) -> Estimate | None:
    return estimate(score_cases(rows))


def _place(row: Row) -> tuple[object, ...]:
    return row.method, row.overrides, row.labels, row.train_domains, row.seed, row.domain, row.case


def _after_training(row: Row) -> tuple[object, ...]:
    return row.dataset, row.train_domains, row.domain, row.case


def _picture(row: Row) -> tuple[object, ...]:
    return *_after_training(row), row.corruption_version or row.corruption, row.severity


def _as_number(text: str) -> float:
    return float(text) if text.isdigit() else float("inf")
