"""The page on a check: problems by rule, the sites, and how much they differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from pydantic import TypeAdapter, ValidationError

import anysite
from anysite import atomic
from anysite.data.check import Inspection, Problem, Shift, SiteSummary
from anysite.errors import FileFormatError, describe_invalid
from anysite.report.charts import histogram_plot
from anysite.report.template import render

HEAT = 70  # per cent of tint at the largest distance


@dataclass(frozen=True)
class Group:
    """The problems of one rule; folders are left out, because their names may identify people."""

    severity: str
    rule: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Matrix:
    """Differences between sites in one respect, with the tint of every cell in per cent."""

    title: str
    rows: tuple[tuple[str, tuple[tuple[float, int], ...]], ...]


@dataclass(frozen=True)
class Difference:
    """How much the sites of one dataset differ."""

    shift: Shift
    curves: Markup
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True)
class Audit:
    """What a check found, for its own page and for the report."""

    name: str
    groups: tuple[Group, ...]
    sites: tuple[SiteSummary, ...]
    classes: tuple[str, ...]
    differences: tuple[Difference, ...]

    def count(self, severity: str) -> int:
        """Count the problems of one severity."""
        return sum(len(group.problems) for group in self.groups if group.severity == severity)


def read_audit(path: Path) -> Audit:
    """Read what `anysite check --output FILE.json` wrote.

    Raises:
        FileFormatError: a file that is missing or holds no check.
    """
    expected = "what anysite check --output wrote"
    try:
        return describe_inspection(TypeAdapter(Inspection).validate_python(atomic.read_json(path)), path.stem)
    except ValidationError as error:
        raise FileFormatError(describe_invalid(error), where=path, expected=expected) from None
    except (ValueError, IndexError):  # numbers that do not fit together
        raise FileFormatError(
            "sites and distances that do not fit together", where=path, expected=expected
        ) from None


def describe_inspection(inspection: Inspection, name: str) -> Audit:
    """Arrange what a check found by rule, site and difference."""
    return Audit(
        name=name,
        groups=tuple(_by_rule(inspection)),
        sites=inspection.sites,
        classes=tuple(dict.fromkeys(name for site in inspection.sites for name in site.class_share))[1:],
        differences=tuple(_describe(shift) for shift in inspection.shift),
    )


def write_inspection(inspection: Inspection, output: Path, title: str) -> Path:
    """Write a self-contained page on what a check found, and return its path.

    It names cases, sites and files, but no folders.
    """
    audit = describe_inspection(inspection, title)
    page = render("inspection.html", title=title, audit=audit, version=anysite.__version__)
    atomic.write_text(Path(output), page)
    return Path(output)


def _by_rule(inspection: Inspection) -> list[Group]:
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in inspection.problems:
        groups.setdefault((problem.severity, problem.rule), []).append(problem)
    return [Group(severity, rule, tuple(found)) for (severity, rule), found in groups.items()]


def _describe(shift: Shift) -> Difference:
    kinds = (
        ("Intensity: Wasserstein distance, in standard deviations", shift.intensity, 0.0),
        ("Spacing: times larger, the worst axis", shift.spacing, 1.0),
        ("Voxels along an axis: times more, the worst axis", shift.shape, 1.0),
        ("Classes: share of labelled voxels that would have to change class", shift.classes, 0.0),
    )
    curves = {site.domain: site.histogram for site in shift.sites}
    return Difference(
        shift,
        histogram_plot(shift.edges, curves, "Normalised intensity by site"),
        tuple(
            _matrix(title, shift, values, least)
            for title, values, least in kinds
            if max(value for row in values for value in row) > least  # otherwise there is nothing to show
        ),
    )


def _matrix(title: str, shift: Shift, values: tuple[tuple[float, ...], ...], least: float) -> Matrix:
    most = max(value for row in values for value in row) - least or 1.0
    return Matrix(
        title,
        tuple(
            (site.domain, tuple((value, round(HEAT * max(0.0, value - least) / most)) for value in row))
            for site, row in zip(shift.sites, values, strict=True)
        ),
    )
