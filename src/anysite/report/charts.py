"""The charts of a report as inline SVG; colours come from the style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from anysite.report.format import count, points
from anysite.statistics import Estimate

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


def line_plot(
    ticks: Sequence[str],
    curves: Mapping[str, Sequence[Estimate | None]],
    title: str,
    *,
    width: int = 620,
    legend: bool = True,
) -> Markup:
    """Draw one line a name through its estimates at equally spaced ticks, with their intervals as bars.

    Args:
        ticks: What stands below the points.
        curves: By name, one estimate a tick, None where nothing was measured.
        title: Read out by screen readers.
        width: In pixels.
        legend: Name the lines beside their ends.
    """
    left, top, height, right = 40, 12, round(0.62 * width), 170 if legend else 12
    known = [e for estimates in curves.values() for e in estimates if e is not None]
    lows = [e.mean if e.low is None else e.low for e in known]
    step = 10 if min(lows, default=0.0) >= 0.5 else 20
    start = max(0, math.floor(100 * min(lows, default=0.0) / step) * step)
    bottom = height - 30

    def x(index: int, shift: float = 0.0) -> float:
        return left + (width - left - right) * (index + 0.5) / len(ticks) + shift

    def y(value: float) -> float:
        return bottom - (100 * value - start) / max(1, 100 - start) * (bottom - top)

    tick = Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    grid = Markup('<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>')
    bar = Markup('<line x1="{x:.1f}" x2="{x:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    circle = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3"><title>{}: {}</title></circle>')
    parts = [tick.format(x(index), bottom + 18, "middle", text) for index, text in enumerate(ticks)]
    for value in range(start, 101, step):
        parts.append(grid.format(left, width - right, y=y(value / 100)))
        parts.append(tick.format(left - 6, y(value / 100) + 4, "end", value))
    for number, (name, estimates) in enumerate(curves.items()):
        shift = 3.0 * (number - (len(curves) - 1) / 2)  # so that intervals stand side by side
        at = [(x(index, shift), e) for index, e in enumerate(estimates) if e is not None]
        path = " ".join(f"{px:.1f},{y(e.mean):.1f}" for px, e in at)
        marks = [Markup('<polyline points="{}"/>').format(path)]
        for px, e in at:
            if e.low is not None and e.high is not None:
                marks.append(bar.format(y(e.low), y(e.high), x=px))
            marks.append(circle.format(px, y(e.mean), name, points(e.mean)))
        if legend and at:
            # The names stand in their order, not at the ends of the lines, where they might cover each other.
            marks.append(
                Markup('<circle cx="{}" cy="{}" r="4"/><text class="name" x="{}" y="{}">{}</text>').format(
                    width - right + 14,
                    top + 8 + 18 * number,
                    width - right + 24,
                    top + 12 + 18 * number,
                    _short(name),
                )
            )
        parts.append(Markup('<g class="line line{}">{}</g>').format(number % 8, Markup("").join(marks)))
    described = "; ".join(
        f"{name}: {', '.join(f'{t} {points(e.mean)}' for t, e in zip(ticks, es, strict=True) if e)}"
        for name, es in curves.items()
    )
    return _svg(width, height, title, described, parts)


def trace_plot(values: Sequence[tuple[float, float]], title: str) -> Markup:
    """Draw a value over steps, averaged over blocks of steps where there are many."""
    width, height, left, top, bottom = 300, 170, 52, 12, 142
    blocks = np.array_split(np.array(values, float), min(len(values), 100))
    means = [(float(block[:, 0].mean()), float(block[:, 1].mean())) for block in blocks]
    low, high = min(v for _, v in means), max(v for _, v in means)
    low = min(0.0, low) if low < 0 or low < high / 2 else low
    extent, last = (high - low) or 1.0, max(s for s, _ in values)
    tick = Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="{}">{}</text>')
    grid = Markup('<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts = []
    for value in (low, (low + high) / 2, high):
        y = bottom - (value - low) / extent * (bottom - top)
        parts += [grid.format(left, width - 8, y=y), tick.format(left - 6, y + 4, "end", f"{value:.3g}")]
    parts += [
        tick.format(width - 8, bottom + 18, "end", round(last)),
        tick.format(left, bottom + 18, "start", 0),
    ]
    path = " ".join(
        f"{left + s / last * (width - 8 - left):.1f},{bottom - (v - low) / extent * (bottom - top):.1f}"
        for s, v in means
    )
    parts.append(Markup('<g class="line line1"><polyline points="{}"/></g>').format(path))
    return _svg(width, height, title, f"From {means[0][1]:.3g} to {means[-1][1]:.3g}.", parts)


def histogram_plot(edges: Sequence[float], curves: Mapping[str, Sequence[float]], title: str) -> Markup:
    """Draw one outline a name through the shares of its bins, which lie between `edges`."""
    longest = max((len(_short(name)) for name in curves), default=0)
    width, height, left, top, right = 940, 300, 16, 12, 40 + 8 * longest
    bottom = height - 44
    low, high = edges[0], edges[-1]
    peak = max((max(shares) for shares in curves.values()), default=0.0) or 1.0

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    tick = Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    grid = Markup('<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>')
    step = max(1, math.ceil((high - low) / 12))
    parts = []
    for value in range(math.ceil(low / step) * step, math.floor(high) + 1, step):
        parts += [
            grid.format(top, bottom, x=x(value)),
            tick.format(x(value), bottom + 16, "middle", str(value).replace("-", "\u2212")),
        ]
    middle = (left + width - right) / 2
    parts.append(
        tick.format(middle, bottom + 36, "middle", "intensity, in standard deviations from the mean")
    )
    for number, (name, shares) in enumerate(curves.items()):
        corners = [(edges[0], 0.0)]
        for start, end, share in zip(edges, edges[1:], shares, strict=False):
            corners.append(((start + end) / 2, share))
        corners.append((edges[-1], 0.0))
        path = " ".join(f"{x(v):.1f},{bottom - share / peak * (bottom - top):.1f}" for v, share in corners)
        key = Markup('<circle cx="{}" cy="{}" r="4"/><text class="name" x="{}" y="{}">{}</text>').format(
            width - right + 14,
            top + 8 + 18 * number,
            width - right + 24,
            top + 12 + 18 * number,
            _short(name),
        )
        parts.append(
            Markup('<g class="line line{}"><polyline points="{}"><title>{}</title></polyline>{}</g>').format(
                number % 8, path, name, key
            )
        )
    return _svg(width, height, title, f"One outline for each of {', '.join(curves)}.", parts)


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
