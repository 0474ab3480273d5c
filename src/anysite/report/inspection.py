"""The page on a check: problems by rule, the sites, and how much they differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

import anysite
from anysite import atomic
from anysite.data.check import Inspection, Problem, Shift
from anysite.report import format as texts
from anysite.report.charts import histogram_plot

HERE = Path(__file__).parent
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


def write_inspection(inspection: Inspection, output: Path, title: str) -> Path:
    """Write a self-contained page on what a check found, and return its path.

    It names cases, sites and files, but no folders.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(count=texts.count)
    page = environment.get_template("inspection.html").render(
        title=title,
        groups=_by_rule(inspection),
        errors=sum(problem.severity == "error" for problem in inspection.problems),
        warnings=sum(problem.severity == "warning" for problem in inspection.problems),
        sites=inspection.sites,
        classes=list(dict.fromkeys(name for site in inspection.sites for name in site.class_share))[1:],
        differences=[_describe(shift) for shift in inspection.shift],
        version=anysite.__version__,
    )
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
