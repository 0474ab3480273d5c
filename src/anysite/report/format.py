"""How a report writes numbers and texts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

from anysite.report.summary import MetricSummary
from anysite.statistics import Estimate

NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "surface_dice": "Surface Dice",
    "hd95": "HD95",
    "assd": "ASSD",
    "volume_error": "Volume error",
    "relative_volume_error": "Relative volume error",
}
SPLIT_NAMES = {
    "in_domain": "trained on, other patients",
    "unseen": "unseen",
    "training": "training cases",
    "unknown": "role unknown",
}
FRACTIONS = ("dice", "iou", "surface_dice", "relative_volume_error")
# An absolute path of at least one folder, up to its last component.
_FOLDERS = re.compile(r"""(?<![\w.:/\\-])(?:[A-Za-z]:)?[\\/]+(?:[^\\/:*?"'<>|,;\s]+[\\/]+)+""")


def points(value: float | None, signed: bool = False) -> str:
    """Write a fraction in points (x 100) with one decimal."""
    return number(None if value is None else 100 * value, signed)


def number(value: float | None, signed: bool = False) -> str:
    """Write a number with one decimal, a true minus sign, and a dash for None."""
    if value is None:
        return "–"
    text = f"{value:+.1f}" if signed else f"{value:.1f}"
    return text.replace("-", "−") if float(text) else "0.0"


def interval(estimate: Estimate | None, signed: bool = False) -> str:
    """Write the 95 % interval in points, or that one patient gives none."""
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return "no interval"
    return f"{points(estimate.low, signed)} to {points(estimate.high, signed)}"


def count(n: int, noun: str) -> str:
    """Write a count with its noun."""
    return f"{n} {noun if n == 1 else noun + 's'}"


def probability(value: float | None) -> str:
    """Write a p value or probability with two digits that matter."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    """Write a duration in the largest fitting unit."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def metric_name(metric: str) -> str:
    """Return the name of a metric for people."""
    return NAMES.get(metric, metric.replace("_", " "))


def metric_unit(summary: MetricSummary) -> str:
    """Return the unit in which `metric_value` writes a metric."""
    if summary.metric.partition("@")[0] in FRACTIONS and summary.unit != "%":
        return "%" if summary.metric == "relative_volume_error" else "points"
    return summary.unit


def metric_value(summary: MetricSummary, value: float | None) -> str:
    """Write a value of a metric in its unit."""
    if summary.metric.partition("@")[0] in FRACTIONS and summary.unit != "%":
        return points(value)
    if value is None or abs(value) >= 1:
        return number(value)
    return f"{value:.2f}".replace("-", "−")


def join(names: Iterable[str], limit: int = 12) -> str:
    """Join names by commas, and count those beyond `limit`."""
    listed = [name or "unnamed" for name in names]
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")


def without_folders(text: str, folders: Iterable[str] = ()) -> str:
    """Remove the folders of absolute paths, which may name people or places, and keep file names."""
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(folder.rstrip("/\\") + "/", "").replace(folder.rstrip("/\\") + "\\", "")
    if re.match(r"(?:[A-Za-z]:)?[\\/]", text) and ": " not in text:  # a path as a whole, blanks included
        return PureWindowsPath(text).name or text
    return _FOLDERS.sub("", text)


def image_folders(images: Iterable[str]) -> set[str]:
    """Return the absolute folders of files."""
    return {str(Path(image).parent) for image in images if Path(image).is_absolute()}
