"""Views of other intensities, averaged: Wang et al., 2019, https://doi.org/10.1016/j.neucom.2019.01.103."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from anysite.adapters import Adapter
from anysite.augment import blur, change_gamma
from anysite.errors import ConfigError

LEAST = 1e-12  # probability; its logarithm is finite


class IntensityViews(Adapter):
    """Averages the predictions for a window as it is, brighter and darker between its extremes, and smoothed.

    Scanners differ in exactly that, and no weight changes. The published method averages over random transformations,
    flips and noise among them; here the views are fixed, so that an image has one mask, and mirrored views are
    averaged in any case.

    Args:
        gamma: The exponent of one view; another has its inverse.
        blur_voxels: Standard deviation of the smoothed view; 0 for none.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(self, *, gamma: float = 1.5, blur_voxels: float = 0.7) -> None:
        if gamma <= 1:
            raise ConfigError(f"{gamma}", where="adapter intensity_views.gamma", expected="above 1")
        if blur_voxels < 0:
            raise ConfigError(
                f"{blur_voxels}", where="adapter intensity_views.blur_voxels", expected="0 or above"
            )
        self.gamma, self.blur_voxels, self.averages = gamma, blur_voxels, False

    def adapt(self, windows: Float[Tensor, "b c *p"]) -> dict[str, float]:
        """Return how many views there are; nothing is learned."""
        self.averages = True
        return {"views": float(len(self.views(windows[:1]))), "kept": 1.0}

    def predict(self, windows: Float[Tensor, "b c *p"]) -> Float[Tensor, "b k *p"]:
        """Return logits of the mean probabilities of all views, once adapted."""
        if not self.averages:
            return self.network(windows)
        chances = torch.stack([self.probabilities(self.network(view)) for view in self.views(windows)]).mean(
            0
        )
        likely = chances.clamp(min=LEAST).log()
        return likely - (1 - chances).clamp(min=LEAST).log() if self.plan.regions else likely

    def reset(self) -> None:
        """Look at windows as they are again."""
        super().reset()
        self.averages = False

    def views(self, windows: Float[Tensor, "b c *p"]) -> list[Float[Tensor, "b c *p"]]:
        """Return the windows as they are, and altered."""
        usual = torch.zeros(len(windows), 1, dtype=torch.bool)
        found = [windows]
        for exponent in (self.gamma, 1 / self.gamma):
            found.append(change_gamma(windows, torch.full((len(windows), 1), exponent), usual))
        if self.blur_voxels:
            found.append(blur(windows, torch.full((len(windows),), self.blur_voxels)))
        return [view.to(windows.dtype).contiguous(memory_format=self.network.memory_format) for view in found]
