"""Outlines of label maps as SVG paths."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from markupsafe import Markup


def boundary_loops(mask: np.ndarray) -> list[np.ndarray]:
    """Trace the pixel edges around a mask `(H, W)`: closed loops `(n, 2)` of x, y corners.

    The mask lies to the right of the direction of travel (y points down), so the signed areas of the
    loops add up to the number of its pixels.
    """
    padded = np.pad(mask.astype(bool), 1)
    inside = padded[1:-1, 1:-1]
    edges: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    # (neighbour outside, start corner, end corner) of the four edges of a pixel, clockwise
    for outside, start, end in (
        (~padded[:-2, 1:-1], (0, 0), (1, 0)),
        (~padded[1:-1, 2:], (1, 0), (1, 1)),
        (~padded[2:, 1:-1], (1, 1), (0, 1)),
        (~padded[1:-1, :-2], (0, 1), (0, 0)),
    ):
        for y, x in np.argwhere(inside & outside).tolist():
            edges[x + start[0], y + start[1]].append((x + end[0], y + end[1]))
    loops = []
    while edges:
        first = corner = next(iter(edges))
        loop = [first]
        while True:
            following = edges[corner].pop()
            if not edges[corner]:
                del edges[corner]
            if following == first:
                break
            corner = following
            loop.append(corner)
        loops.append(np.array(loop))
    return loops


def draw_contour(mask: np.ndarray, size: tuple[int, int]) -> Markup:
    """Draw the line through the middles of the boundary's pixel edges, as marching squares does."""
    # Finer than the picture would only make the page larger.
    rows, columns = (_sampled(n, shown) for n, shown in zip(mask.shape, size[::-1], strict=True))
    mask = mask[np.ix_(rows, columns)]
    scale = np.array(size) / mask.shape[::-1]
    parts = []
    for loop in boundary_loops(mask):
        middles = (loop + np.roll(loop, -1, axis=0)) / 2
        before, after = middles - np.roll(middles, 1, axis=0), np.roll(middles, -1, axis=0) - middles
        bends = (before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) != 0
        points = middles[bends] * scale
        parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    path = Markup('<path d="{}"/>').format("".join(parts))
    # The same line twice: a dark casing keeps it visible on bright images.
    return Markup('<g class="casing">{}</g>{}').format(path, path) if parts else Markup("")


def _sampled(length: int, shown: int) -> np.ndarray:
    count = min(length, shown)
    return ((np.arange(count) + 0.5) * length / count).astype(int)
