"""What the check may find: every rule by name, and the form in which a finding is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anysite.data.case import Case

Severity = Literal["error", "warning"]

RULES: dict[str, Severity] = {
    # files
    "contradictory layout": "error",
    "missing file": "error",
    "unreadable file": "error",
    "unusable geometry": "error",
    "non-finite values": "error",
    # geometry
    "channel count": "error",
    "2-D and 3-D mixed": "error",
    "channels on different grids": "error",
    "image and label on different grids": "error",
    "tiny image": "warning",
    "implausible spacing": "warning",
    "spacing outlier": "warning",
    "slice axis": "warning",
    "orientation": "warning",
    "extent outlier": "warning",
    # intensities
    "constant image": "error",
    "constant channel": "error",
    "nearly constant image": "warning",
    "extreme voxels": "warning",
    "saturated image": "warning",
    "intensity scale": "warning",
    "missing Hounsfield offset": "warning",
    "inverted intensities": "warning",
    "channel order": "warning",
    # labels
    "label values": "error",
    "undeclared classes": "error",
    "grey label": "error",
    "label is the image": "error",
    "no label": "warning",
    "empty label": "warning",
    "lossy label": "warning",
    "class never present": "warning",
    "identical labels": "warning",
    "full label": "warning",
    "inverted label": "warning",
    "tiny islands": "warning",
    # copies
    "identical images": "error",
    "nearly identical images": "warning",
    # patients, sites, splits
    "patient at several sites": "warning",
    "too few patients": "warning",
    "patients unknown": "warning",
    "site unknown": "warning",
    "patient in two splits": "error",
    "unknown case in splits": "warning",
}


@dataclass(frozen=True)
class Problem:
    """One finding about a case, a file, or (both empty) a site or the dataset."""

    severity: Severity
    case: str
    file: str
    rule: str
    observed: str
    expected: str
    fix: str


def of_case(
    rule: str,
    case: Case,
    file: Path,
    observed: str,
    expected: str,
    fix: str,
    severity: Severity | None = None,
) -> Problem:
    """Return a finding about a case, of the rule's own severity if no other is given."""
    return Problem(severity or RULES[rule], case.id, str(file), rule, observed, expected, fix)


def of_dataset(rule: str, observed: str, expected: str, fix: str, file: Path | str = "") -> Problem:
    """Return a finding about a site or the whole dataset."""
    return Problem(RULES[rule], "", str(file), rule, observed, expected, fix)
