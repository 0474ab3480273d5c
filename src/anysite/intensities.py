"""How normalised intensities are distributed, and the way from one distribution to another."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LOWEST, HIGHEST = (
    -4.0,
    6.0,
)  # of normalised intensities, in standard deviations; beyond counts in the outer bins
LEAST_SHARE = 1e-6  # of every bin, so that each value has one place in the order of all


def measure_shares(image: Float[np.ndarray, "c *s"], bins: int) -> Float[np.ndarray, "c k"]:
    """Return the share of an image's voxels in every bin, channel by channel."""
    edges = np.linspace(LOWEST, HIGHEST, bins + 1)
    counts = [np.histogram(np.clip(channel, LOWEST, HIGHEST), edges)[0] for channel in image]
    return np.stack(counts) / image[0].size


def standardise(
    windows: Float[Tensor, "b n *p"], own: Float[np.ndarray, "c k"], usual: Float[np.ndarray, "c k"]
) -> Float[Tensor, "b n *p"]:
    """Give an image the intensities that images usually have: histogram matching, linear within a bin.

    In the spirit of Nyul, Udupa, Zhang, 2000, https://doi.org/10.1109/42.836373, with bins in place of landmarks.

    Args:
        windows: Of the image; its channels, or those of neighbouring slices, one slice after the other.
        own: Shares of the image's voxels in every bin.
        usual: Those of training images.
    """
    edges = np.linspace(LOWEST, HIGHEST, own.shape[1] + 1)
    places = [(_accumulate(one), _accumulate(other)) for one, other in zip(own, usual, strict=True)]
    result = windows.cpu().numpy().astype(np.float32)
    for index in range(result.shape[1]):
        before, after = places[index % len(places)]
        result[:, index] = np.interp(np.interp(result[:, index], edges, before), after, edges)
    return torch.from_numpy(result).to(windows)


def _accumulate(shares: Float[np.ndarray, " k"]) -> Float[np.ndarray, " _"]:
    total = np.cumsum([0.0, *(shares + LEAST_SHARE)])
    return total / total[-1]
