"""Milliseconds of SSIM with its gradient, as anysite computes it and by MONAI, taking turns on the same images.

Run as `python benchmarks/similarity.py [--threads 1] [--rounds 15] [--output benchmarks/similarity.json]`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.metrics.regression import compute_ssim_and_cs
from torch import Tensor

from anysite.similarity import compare
from side_by_side import report_dimensions

SHAPES = {2: (4, 1, 128, 128), 3: (4, 1, 32, 32, 32)}
WINDOWS = {2: 11, 3: 7}


def by_monai(one: Tensor, other: Tensor) -> Tensor:
    """Return MONAI's map, without the borders, which anysite pads."""
    dimension = one.ndim - 2
    sizes, sigmas = [WINDOWS[dimension]] * dimension, [1.5] * dimension
    return compute_ssim_and_cs(one, other, dimension, sizes, sigmas, data_range=2.0)[1]


def milliseconds(measure: Callable[[Tensor, Tensor], Tensor], one: Tensor, other: Tensor) -> float:
    """Return the time of one map and its gradient."""
    began = time.perf_counter()
    torch.autograd.grad(measure(one, other).mean(), one)
    return 1000 * (time.perf_counter() - began)


def time_both(dimension: int, rounds: int) -> dict[str, Any]:
    """Return the medians of both, and their ratio."""
    torch.manual_seed(0)
    one, other = (2 * torch.rand(SHAPES[dimension]) - 1 for _ in range(2))
    one.requires_grad_()
    sides = {"anysite": partial(compare, "contrast"), "monai": by_monai}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            times[name].append(milliseconds(measure, one, other))
    ours, theirs = (statistics.median(times[name]) for name in sides)
    return {
        "dimension": dimension,
        "anysite_milliseconds": round(ours, 2),
        "monai_milliseconds": round(theirs, 2),
        "ratio": round(theirs / ours, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report_dimensions(
        lambda dimension: time_both(dimension, arguments.rounds), arguments.output, threads=arguments.threads
    )


if __name__ == "__main__":
    main()
