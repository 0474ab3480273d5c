"""The charts of a report as inline SVG; colours come from the style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from anysite.report.format import count, points

WIDTH, LEFT, RIGHT, ROW, TOP = 940, 190, 64, 44, 12
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Strip:
    """One row of a strip plot: its names, the mean over patients, and a fraction for every case."""

    label: str
    note: str
    split: str
    mean: float | None
    values: tuple[tuple[str, float], ...]


def strip_plot(strips: Sequence[Strip], title: str) -> Markup:
    """Draw every case as a mark on a common axis of Dice points, with box, median and mean."""
    strips = [strip for strip in strips if strip.values]
    if not strips:
        return Markup("")
    lowest = min(value for strip in strips for _, value in strip.values)
    step = 5 if lowest >= 0.7 else 10 if lowest >= 0.4 else 20
    start = min(80, max(0, math.floor(100 * lowest / step) * step))

    def x(value: float) -> float:
        return LEFT + (100 * value - start) / (100 - start) * (WIDTH - LEFT - RIGHT)

    bottom = TOP + ROW * len(strips)
    parts = [_axis(x, start, step, bottom)]
    for index, strip in enumerate(strips):
        y = TOP + ROW * (index + 0.5)
        repeated = index > 0 and strip.label == strips[index - 1].label
        parts.append(_strip(strip, x, y, "" if repeated else _short(strip.label)))
    described = "; ".join(
        f"{strip.label} ({strip.note}): median {points(float(np.median([v for _, v in strip.values])))} of "
        f"{count(len(strip.values), 'case')}"
        for strip in strips
    )
    return _svg(WIDTH, bottom + 40, title, described, parts)


def difference_plot(differences: Sequence[tuple[str, float]], limit: float, title: str) -> Markup:
    """Draw paired differences, one bar a case, sorted from the largest gain to the largest loss."""
    width, height, left, top = 360, 190, 46, 12
    middle, half = top + (height - 2 * top) / 2, (height - 2 * top) / 2
    ordered = sorted(differences, key=lambda item: -item[1])
    slot = (width - left - 8) / max(1, len(ordered))
    parts = []
    for value in (limit, limit / 2, 0.0, -limit / 2, -limit):
        y = middle - value / limit * half
        parts.append(
            Markup(
                '<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(
                "zero" if value == 0 else "grid",
                left,
                width - 8,
                y,
                y,
                left - 6,
                y + 4,
                points(value, signed=True),
            )
        )
    for index, (case, value) in enumerate(ordered):
        extent = abs(value) / limit * half
        parts.append(
            Markup(
                '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
                "<title>{}: {}</title></rect>"
            ).format(
                "gain" if value >= 0 else "loss",
                left + index * slot,
                middle - extent if value >= 0 else middle,
                max(0.5, min(16.0, slot * 0.8)),
                max(0.5, extent),
                case,
                points(value, signed=True),
            )
        )
    better = sum(value > 0 for _, value in ordered)
    return _svg(width, height, title, f"Better on {better} of {count(len(ordered), 'case')}.", parts)


def _axis(x: Callable[[float], float], start: int, step: int, bottom: int) -> Markup:
    parts = []
    for tick in range(start, 101, step):
        at = x(tick / 100)
        parts.append(
            Markup(
                '<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
                '<text class="tick" x="{0:.1f}" y="{3}" text-anchor="middle">{4}</text>'
            ).format(at, TOP, bottom, bottom + 16, tick)
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    label = Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>')
    parts.append(label.format(middle, bottom + 34, "middle", "Dice (points), mean of classes"))
    parts.append(label.format(WIDTH - 4, bottom + 16, "end", "mean"))
    return Markup("").join(parts)


def _strip(strip: Strip, x: Callable[[float], float], y: float, label: str) -> Markup:
    values = np.array([value for _, value in strip.values])
    quarter, median, three_quarters = np.percentile(values, (25, 50, 75))
    spread = three_quarters - quarter
    low = min(quarter, values[values >= quarter - 1.5 * spread].min())
    high = max(three_quarters, values[values <= three_quarters + 1.5 * spread].max())
    marks = [
        _mark(strip.split, x(value), y + ((index * GOLDEN) % 1 - 0.5) * 24, f"{case}: {points(value)}")
        for index, (case, value) in enumerate(strip.values)
    ]
    return Markup(
        '<g class="strip {split}"><text class="name" x="{left}" y="{name_y}" text-anchor="end">{label}</text>'
        '<text class="tick" x="{left}" y="{note_y}" text-anchor="end">{note}</text>'
        '<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
        '<rect class="box" x="{q1:.1f}" y="{box_y}" width="{box:.1f}" height="22" rx="3"/>{marks}'
        '<line class="median" x1="{median:.1f}" x2="{median:.1f}" y1="{top}" y2="{bottom}"/>'
        '<text class="name" x="{right}" y="{value_y}" text-anchor="end">{mean}</text></g>'
    ).format(
        split=strip.split,
        left=LEFT - 16,
        name_y=y - 2,
        note_y=y + 14 if label else y + 5,
        label=label,
        note=_short(strip.note, 28),
        low=x(low),
        high=x(high),
        y=y,
        q1=x(quarter),
        box_y=y - 11,
        box=max(1.0, x(three_quarters) - x(quarter)),
        marks=Markup("").join(marks),
        median=x(median),
        top=y - 14,
        bottom=y + 14,
        right=WIDTH - 4,
        value_y=y + 5,
        mean=points(strip.mean),
    )


def _mark(split: str, x: float, y: float, title: str) -> Markup:
    if split == "unseen":  # a diamond: the shape tells what the colour tells
        shape = Markup('<path class="mark" d="M{:.1f} {:.1f}l4.2 4.2-4.2 4.2-4.2-4.2Z">').format(x, y - 4.2)
        return shape + Markup("<title>{}</title></path>").format(title)
    shape = Markup('<circle class="mark" cx="{:.1f}" cy="{:.1f}" r="3.2">').format(x, y)
    return shape + Markup("<title>{}</title></circle>").format(title)


def _short(text: str, limit: int = 20) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _svg(width: int, height: int, title: str, description: str, parts: list[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(width, height, title, description, Markup("").join(parts))
