"""Patches cut out of an image, and sliding windows merged by a Gaussian."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from anysite.plan import Plan

COMPARED = 16_384  # voxels of a window that are compared with others, of a regular grid
COUNTS = 0.01  # of a window's greatest weight, above which what it says of a voxel is compared with others


def cut_patch(
    image: Tensor, start: Sequence[int], size: Sequence[int], context_slices: int | None = None
) -> Tensor:
    """Return the patch of `size` at `start` from `(C, *S)`, with zeros outside the image.

    With `context_slices` not None the first axis of `size` must be 1: it is dropped, and as many neighbouring
    slices on each side join the channels, slice by slice, the outermost slice repeated beyond the end.
    """
    if context_slices is not None:
        last = image.shape[1] - 1
        wanted = [
            min(max(start[0] + offset, 0), last) for offset in range(-context_slices, context_slices + 1)
        ]
        image = torch.cat([image[:, z] for z in wanted])
        start, size = start[1:], size[1:]
    inside, padding = [slice(None)], []
    for begin, length, available in zip(start, size, image.shape[1:], strict=True):
        low, high = max(begin, 0), min(begin + length, available)
        inside.append(slice(low, high))
        padding = [low - begin, begin + length - high, *padding]
    patch = image[tuple(inside)]
    return F.pad(patch, padding) if any(padding) else patch


def place_windows(shape: Sequence[int], size: Sequence[int], overlap: float) -> list[tuple[int, ...]]:
    """Return the start of every window: evenly spread, overlapping by at least `overlap` of their size."""
    starts = []
    for length, window in zip(shape, size, strict=True):
        if length <= window:
            starts.append([-((window - length) // 2)])
            continue
        stride = max(1, int(window * (1 - overlap)))
        count = int(np.ceil((length - window) / stride)) + 1
        starts.append([int(s) for s in np.rint(np.linspace(0, length - window, count))])
    return list(itertools.product(*starts))


def gaussian_weight(size: Sequence[int], sigma_fraction: float = 0.125) -> Tensor:
    """Return the weight of each voxel of a window: a Gaussian about its centre, never quite zero.

    The same form as in nnU-Net (Isensee et al., 2021, https://doi.org/10.1038/s41592-020-01008-z).
    """
    weight = torch.ones(())
    for length in size:
        position = torch.arange(length) - (length - 1) / 2
        axis = torch.exp(-0.5 * (position / (sigma_fraction * length)) ** 2) if length > 1 else torch.ones(1)
        weight = weight[..., None] * axis
    return weight.clamp_min(1e-3 * float(weight.max()))


def thin_out(shape: Sequence[int], most: int) -> tuple[slice, ...]:
    """Return every n-th place along each axis, with the least n of which there are at most `most`."""
    step = 1
    while math.prod(math.ceil(length / step) for length in shape) > most:
        step += 1
    return (slice(None, None, step),) * len(shape)


def slide(
    image: Float[Tensor, "c *s"],
    predict: Callable[[Float[Tensor, "b c2 *p"]], Float[Tensor, "b k *p"]],
    plan: Plan,
    overlap: float,
    batch_size: int,
    on_overlap: Callable[[Float[Tensor, "k *g"], Float[Tensor, "k *g"], Bool[Tensor, "*g"]], None]
    | None = None,
) -> Float[Tensor, "k *s"]:
    """Predict every window of an image on the plan's grid and merge the values by Gaussian weights.

    Windows of one value alone, as beside a body whose surroundings were cut off, show nothing: they count as
    background and are not predicted, unless there are no others.

    Args:
        on_overlap: Is given, for every window, what the windows before it made together of its voxels, of a regular
            grid of 16,384 at most, what it makes of them, and which of them it shares with the others; not where a
            window hardly counts, near its border.
    """
    size = (1, *plan.patch_size) if plan.slice_wise else plan.patch_size
    context = plan.context_slices if plan.slice_wise else None
    starts = place_windows(image.shape[1:], size, overlap)
    weight = gaussian_weight(size).to(image.device)
    least = COUNTS * float(weight.max())
    merged = image.new_zeros((plan.outputs, *image.shape[1:]))
    total = image.new_zeros(image.shape[1:])
    empty = {start: _is_constant(cut_patch(image, start, size, context)) for start in starts}
    if all(empty.values()):
        empty = dict.fromkeys(starts, False)
    for start in (start for start in starts if empty[start]):
        to_image, from_window = _overlap(start, size, image.shape[1:])
        if not plan.regions:
            merged[(0, *to_image)] += weight[from_window]
        total[to_image] += weight[from_window]
    for group in _grouped([start for start in starts if not empty[start]], batch_size):
        values = predict(torch.stack([cut_patch(image, start, size, context) for start in group]))
        if context is not None:
            values = values[:, :, None]
        for value, start in zip(values, group, strict=True):
            to_image, from_window = _overlap(start, size, image.shape[1:])
            inside, own, before = value[(slice(None), *from_window)], weight[from_window], total[to_image]
            if on_overlap is not None:
                grid = thin_out(own.shape, COMPARED)
                shared = (before[grid] >= least) & (own[grid] >= least)
                if shared.any():
                    known = merged[(slice(None), *to_image)][(..., *grid)] / before[grid].clamp_min(least)
                    on_overlap(known, inside[(..., *grid)], shared)
            merged[(slice(None), *to_image)] += inside * own
            total[to_image] += own
    return merged.div_(total)


def _is_constant(window: Tensor) -> bool:
    return bool(window.amin() == window.amax())


def _overlap(
    start: Sequence[int], size: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    to_image, from_window = [], []
    for begin, window, length in zip(start, size, shape, strict=True):
        low, high = max(begin, 0), min(begin + window, length)
        to_image.append(slice(low, high))
        from_window.append(slice(low - begin, high - begin))
    return tuple(to_image), tuple(from_window)


def _grouped(items: list[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
