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
    """Give an image the intensities that images usually have: histogram matching, linear from bin to bin.

    In the spirit of Nyul, Udupa, Zhang, 2000, https://doi.org/10.1109/42.836373, with bins in place of landmarks. A
    bin goes to where the middle of its voxels would lie, so that a background of one value goes to the usual one.

    Args:
        windows: Of the image; its channels, or those of neighbouring slices, one slice after the other.
        own: Shares of the image's voxels in every bin.
        usual: Those of training images.
    """
    width = (HIGHEST - LOWEST) / own.shape[1]
    centres = LOWEST + width * (np.arange(own.shape[1]) + 0.5)
    ranks = [(_rank(one), _rank(other)) for one, other in zip(own, usual, strict=True)]
    values = windows.cpu().numpy().astype(np.float32)
    result = values - np.clip(values, centres[0], centres[-1])  # what lies beyond keeps its distance
    for index in range(values.shape[1]):
        before, after = ranks[index % len(ranks)]
        result[:, index] += np.interp(np.interp(values[:, index], centres, before), after, centres)
    return torch.from_numpy(result).to(windows)


def _rank(shares: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Return the share of voxels below the middle of every bin's voxels."""
    least = shares + LEAST_SHARE
    return (np.cumsum(least) - least / 2) / least.sum()
