"""Views of usual intensities and of other sizes, averaged: Wang et al., 2019, https://doi.org/10.1016/j.neucom.2019.01.103."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from anysite.adapters import Adapter
from anysite.errors import ConfigError
from anysite.intensities import measure_shares, standardise

LEAST = 1e-12  # probability; its logarithm is finite
WHOLE = 0.999  # of a voxel inside a view, give or take rounding


class StandardViews(Adapter):
    """Averages the predictions for windows as they are and with intensities as in training, each in several sizes.

    No weight changes. Intensities are brought to those of training by matching histograms (Nyul, Udupa, Zhang, 2000,
    https://doi.org/10.1109/42.836373), as the judge's detector `histogram` has learned them; of a run without it
    there are views of other sizes alone. A view that is enlarged speaks only of what it shows.

    Args:
        sizes: Of the views beside that of the image's own size, as factors.
        intensities: Whether there are views of standardised intensities.

    Raises:
        ConfigError: a size that is not above 0, or is 1.
    """

    def __init__(self, *, sizes: tuple[float, ...] = (0.85, 1.18), intensities: bool = True) -> None:
        if any(not size > 0 or size == 1 for size in sizes):
            raise ConfigError(
                f"{list(sizes)}", where="adapter standard_views.sizes", expected="above 0 and not 1"
            )
        self.sizes, self.intensities, self.averages = (1.0, *sizes), intensities, False
        self.own: Float[np.ndarray, "c k"] | None = None

    def look(self, image: Float[Tensor, "c *s"]) -> None:
        """Count the image's intensities."""
        if self.intensities and self.usual is not None:
            self.own = measure_shares(image.cpu().numpy(), self.usual.shape[1])

    def adapt(self, windows: Float[Tensor, "b c *p"]) -> dict[str, float]:
        """Return how many views there are; nothing is learned."""
        self.averages = True
        return {"views": float(len(self._intensities(windows[:1])) * len(self.sizes)), "kept": 1.0}

    def predict(self, windows: Float[Tensor, "b c *p"]) -> Float[Tensor, "b k *p"]:
        """Return logits of the mean probabilities of all views, once adapted."""
        if not self.averages:
            return self.network(windows)
        total, weight = 0.0, 0.0
        for view in self._intensities(windows):
            for size in self.sizes:
                chances, shown = self._look_at(view, size)
                total, weight = total + shown * chances, weight + shown
        chances = torch.as_tensor(total / weight)
        likely = chances.clamp(min=LEAST).log()
        return likely - (1 - chances).clamp(min=LEAST).log() if self.plan.regions else likely

    def reset(self) -> None:
        """Look at windows as they are again."""
        super().reset()
        self.averages, self.own = False, None

    def _intensities(self, windows: Tensor) -> list[Tensor]:
        if self.own is None or self.usual is None:
            return [windows]
        return [windows, standardise(windows, self.own, self.usual)]

    def _look_at(self, windows: Tensor, size: float) -> tuple[Tensor, Tensor | float]:
        """Return the probabilities for windows shown in a size, and where they show something."""
        if size == 1:
            return self.probabilities(self.network(windows)), 1.0
        view = zoom(windows, size).contiguous(memory_format=self.network.memory_format)
        chances = zoom(self.probabilities(self.network(view)), 1 / size)
        inside = zoom(torch.ones_like(chances[:1, :1]), 1 / size, padding="zeros") > WHOLE
        return chances, inside.float()


def zoom(image: Float[Tensor, "b c *p"], factor: float, padding: Any = "border") -> Float[Tensor, "b c *p"]:
    """Return images enlarged about their centres by a factor, or made smaller, on the same grid."""
    dimension = image.ndim - 2
    scale = torch.eye(dimension, dimension + 1, device=image.device)[None] / factor
    with torch.autocast(image.device.type, enabled=False):  # in bfloat16 places are off by voxels
        grid = F.affine_grid(scale.expand(len(image), -1, -1), list(image.shape), align_corners=False)
        return F.grid_sample(image.float(), grid, "bilinear", padding, align_corners=False)
