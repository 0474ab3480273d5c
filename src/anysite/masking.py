"""Random masks over an image: blocks or tubes of voxels, each sample's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor


def draw_blocks(
    count: int,
    shape: Sequence[int],
    block_voxels: int | Sequence[int],
    ratio: float,
    *,
    tube: bool = False,
    alike: bool = False,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "b *s"]:
    """Return masks in which a random share `ratio` of the blocks is true, exactly as many in every sample.

    Args:
        count: Number of samples.
        shape: Voxels along each axis; blocks at the far ends are cut where they do not fit.
        block_voxels: Side of a block, on all axes or on each; at most the axis.
        ratio: Share of the blocks, rounded, but at least one and not all; of a tube's pattern rounded down, as in
            MedContext (Gani, Naseer, Khan, Khan, 2024, https://github.com/hananshafi/MedContext).
        tube: Blocks run through the whole first axis, as in video (Tong et al., 2022,
            https://arxiv.org/abs/2203.12602); of pictures, through rows.
        alike: All samples get the same mask.
        generator: A CPU generator; none: the global one.
    """
    sides = [block_voxels] * len(shape) if isinstance(block_voxels, int) else block_voxels
    if tube:
        sides = [shape[0], *sides[1:]]
    sides = [min(side, n) for side, n in zip(sides, shape, strict=True)]
    cells = [-(-n // side) for n, side in zip(shape, sides, strict=True)]
    total = math.prod(cells)
    chosen = math.floor(ratio * total) if tube else round(ratio * total)
    chosen = min(max(chosen, 1), max(1, total - 1)) if ratio else 0
    order = torch.rand(1 if alike else count, total, generator=generator).argsort(1)
    mask = (order < chosen).view(-1, *cells).expand(count, *cells)
    for axis, (side, n) in enumerate(zip(sides, shape, strict=True), start=1):
        mask = mask.repeat_interleave(side, dim=axis).narrow(axis, 0, n)
    return mask
