"""What is kept of a pass through the network for the judge: sums over its layers, and how far views agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from anysite.detectors import Agreement, Layer
from anysite.windows import thin_out

# Of a window that a layer's sums are taken over; of a sixteenth of them chance hides what small structures change.
POSITIONS = 65_536
FULL = 16  # positions a channel that a window gives; of fewer the number of windows would shape the spectrum
BLOCK = 256  # positions whose products are summed in single precision, for the sake of speed


def sum_layers(features: Sequence[Float[Tensor, "b _ ..."]]) -> list[Layer]:
    """Return the sums over the positions of every layer, of a regular grid of 65,536 a window at most.

    Outer products are summed of layers whose windows have at least 16 times as many positions as channels; where there
    is none, of the one that has the most.
    """
    grids = [layer[(..., *thin_out(layer.shape[2:], POSITIONS))].movedim(1, -1) for layer in features]
    positions = [grid.flatten(0, -2) for grid in grids]
    fullness = [grid[0].numel() / grid.shape[-1] ** 2 for grid in grids]
    least = min(FULL, max(fullness))
    return [_sum_up(rows, share >= least) for rows, share in zip(positions, fullness, strict=True)]


def _sum_up(positions: Float[Tensor, "n w"], with_products: bool) -> Layer:
    with torch.autocast(positions.device.type, enabled=False):
        blocks = F.pad(positions.float(), (0, 0, 0, -len(positions) % BLOCK)).unflatten(0, (-1, BLOCK))
        total = blocks.sum(1).double().sum(0).cpu().numpy()
        gram = (blocks.mT @ blocks).double().sum(0).cpu().numpy() if with_products else None
    return Layer(len(positions), total, gram)


def count_agreement(
    views: Sequence[Float[Tensor, "b k *s"]], overlapping: bool, where: Bool[Tensor, "b *s"] | None = None
) -> Agreement:
    """Return how far segmentations of the same windows, given as probabilities, agree.

    Args:
        views: One for every segmentation.
        overlapping: Whether they are of regions; otherwise the likeliest class counts.
        where: Voxels to count; none: all of them.
    """
    if overlapping:
        maps = torch.stack([view > 0.5 for view in views])
    else:
        # Not argmax, which is slow along a first axis.
        labels = torch.stack([view.max(1).indices for view in views])
        maps = torch.stack([labels == index for index in range(1, views[0].shape[1])], 2)
    if where is not None:
        maps &= where[:, None]
    positions = maps.movedim(2, 0).flatten(2).float()
    with torch.autocast(positions.device.type, enabled=False):
        shared = positions @ positions.mT
    return Agreement(shared.permute(1, 2, 0).double().cpu().numpy())


def count_shared(views: Sequence[Bool[np.ndarray, "m *s"]]) -> Float[np.ndarray, "v v m"]:
    """Return how many voxels each two of several segmentations of one image share, for every class or region."""
    shared = [[[(a & b).sum() for a, b in zip(one, other, strict=True)] for other in views] for one in views]
    return np.array(shared, float)
