"""What is kept of a pass through the network for the judge: sums over its layers, and how far views agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from anysite.detectors import Agreement, Layer

# Of a window that a layer's sums are taken over; of a sixteenth of them chance hides what small structures change.
POSITIONS = 65_536


def sum_layer(features: Float[Tensor, "b w *t"]) -> Layer:
    """Return the sums over a layer's positions, of a regular grid of 65,536 a window at most."""
    step = max(1, math.ceil((math.prod(features.shape[2:]) / POSITIONS) ** (1 / (features.ndim - 2))))
    places = (slice(None), slice(None), *[slice(None, None, step)] * (features.ndim - 2))
    positions = features[places].movedim(1, -1).flatten(0, -2)
    with torch.autocast(features.device.type, enabled=False):
        positions = positions.double()
        gram, total = positions.T @ positions, positions.sum(0)
    count = len(positions)
    return Layer(count, count // len(features), total.cpu().numpy(), gram.cpu().numpy())


def count_agreement(views: Sequence[Float[Tensor, "b k *s"]], overlapping: bool) -> Agreement:
    """Return how far segmentations of the same windows, given as probabilities, agree."""
    if overlapping:
        maps = torch.stack([view > 0.5 for view in views])
    else:
        labels = torch.stack([view.argmax(1) for view in views])
        maps = torch.stack([labels == index for index in range(1, views[0].shape[1])], 2)
    positions = maps.movedim(2, 0).flatten(2).float()
    with torch.autocast(positions.device.type, enabled=False):
        shared = positions @ positions.mT
    return Agreement(shared.permute(1, 2, 0).double().cpu().numpy())


def count_shared(views: Sequence[Bool[np.ndarray, "m *s"]]) -> Float[np.ndarray, "v v m"]:
    """Return how many voxels each two of several segmentations of one image share, for every class or region."""
    shared = [[[(a & b).sum() for a, b in zip(one, other, strict=True)] for other in views] for one in views]
    return np.array(shared, float)
