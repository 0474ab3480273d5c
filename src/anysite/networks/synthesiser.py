"""Draws an image from a mask alone, by SPADE: Park, Liu, Wang, Zhu, 2019, https://arxiv.org/abs/1903.07291."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anysite.networks.unet import plan_levels

DEPTH = 4


class Synthesiser(nn.Module):
    """From the coarsest scale of a soft mask to an image, every block normalised as the mask says at its scale.

    Args:
        maps: Of the mask: probabilities of classes or regions.
        channels: Of the image.
        patch_size: By whose anisotropy the scales follow.
        width: Channels of the finest scale, doubled a scale.
    """

    def __init__(self, maps: int, channels: int, patch_size: Sequence[int], width: int = 16) -> None:
        super().__init__()
        levels = plan_levels(patch_size)[:DEPTH]
        self.strides = [stride for stride, _ in levels]
        widths = [width * 2**level for level in range(len(levels))]
        convolution = nn.Conv2d if len(patch_size) == 2 else nn.Conv3d
        self.start = convolution(maps, widths[-1], 3, padding=1)
        self.blocks = nn.ModuleList(
            SpadeBlock(inputs, outputs, maps, convolution)
            for inputs, outputs in zip([widths[-1], *widths[:0:-1]], widths[::-1], strict=True)
        )
        self.head = convolution(widths[0], channels, 3, padding=1)

    def forward(self, mask: Float[Tensor, "b k *s"]) -> Float[Tensor, "b c *s"]:
        """Return an image from -1 to 1."""
        scales = [mask]
        for stride in self.strides[1:]:
            size = [n // step for n, step in zip(scales[-1].shape[2:], stride, strict=True)]
            scales.append(F.interpolate(scales[-1], size, mode="area"))
        image = self.start(scales[-1])
        for block, scale in zip(self.blocks, scales[::-1], strict=True):
            if image.shape[2:] != scale.shape[2:]:
                image = F.interpolate(image, scale.shape[2:], mode="nearest")
            image = block(image, scale)
        return torch.tanh(self.head(F.leaky_relu(image, 0.2)).float())


class SpadeBlock(nn.Module):
    """Two convolutions, before each a normalisation whose scale and shift are drawn from the mask.

    What the mask looks like around a voxel is computed once a block, and not once a scale and shift as in the paper,
    which would take most of the time.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        maps: int,
        convolution: type[nn.Conv2d | nn.Conv3d],
        hidden: int = 16,
    ) -> None:
        super().__init__()
        self.surroundings = convolution(maps, hidden, 3, padding=1)
        self.norms = nn.ModuleList(Spade(width, hidden, convolution) for width in (inputs, outputs))
        self.convolutions = nn.ModuleList(
            convolution(width, outputs, 3, padding=1) for width in (inputs, outputs)
        )
        self.shortcut = convolution(inputs, outputs, 1)

    def forward(
        self, image: Float[Tensor, "b w *s"], mask: Float[Tensor, "b k *s"]
    ) -> Float[Tensor, "b v *s"]:
        """Return the features `(b, outputs, *s)`."""
        features, surroundings = image, F.relu(self.surroundings(mask))
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            features = convolution(F.leaky_relu(norm(features, surroundings), 0.2))
        return features + self.shortcut(image)


class Spade(nn.Module):
    """Instance normalisation whose scale and shift at every voxel follow from what the mask is like around it."""

    def __init__(self, width: int, hidden: int, convolution: type[nn.Conv2d | nn.Conv3d]) -> None:
        super().__init__()
        self.scale = convolution(hidden, width, 1)
        self.shift = convolution(hidden, width, 1)

    def forward(
        self, features: Float[Tensor, "b w *s"], surroundings: Float[Tensor, "b h *s"]
    ) -> Float[Tensor, "b w *s"]:
        """Return the features normalised, scaled and shifted."""
        return F.instance_norm(features) * (1 + self.scale(surroundings)) + self.shift(surroundings)
