"""RAM-DSIR's 2-D U-Net: Zhou, Qi, Shi, 2022, https://arxiv.org/abs/2208.03901."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anysite.errors import ConfigError
from anysite.networks import Network, require_counts

LEVELS = 5


class RamDsirUNet(Network):
    """The five-level U-Net of RAM-DSIR, with batch normalisation, for two spatial axes.

    Args:
        width: Channels of the first level; each further level has twice as many. The paper's is 16.

    Raises:
        ConfigError: three spatial axes, or a patch size that is no multiple of 16.
    """

    channels_last = True

    def __init__(self, channels: int, classes: int, patch_size: Sequence[int], *, width: int = 16) -> None:
        super().__init__(channels, classes, patch_size)
        require_counts(width=width)
        if self.dimension != 2:
            raise ConfigError(
                "3 spatial axes",
                where="network ram_dsir_unet",
                expected="2",
                fix="set plan.dimension=2d or plan.dimension=2.5d",
            )
        self.widths = tuple(width * 2**level for level in range(LEVELS))
        self.stride = (2 ** (LEVELS - 1),) * 2
        self._require_patch_size(self.stride)
        self.encoder = nn.ModuleList(
            _encoder_block(inputs, outputs)
            for inputs, outputs in zip((channels, *self.widths), self.widths, strict=False)
        )
        self.decoder = Decoder(self.widths, classes)
        self.pool = nn.MaxPool2d(2)
        self.apply(_initialise)

    def encode(self, image: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Return one feature a level, from full resolution to the bottleneck."""
        features: list[Tensor] = []
        for block in self.encoder:
            image = block(self.pool(image) if features else image)
            features.append(image)
        return features

    def decode(self, features: list[Tensor]) -> Float[Tensor, "b k *s"]:
        """Return the logits at full resolution."""
        return self.decoder(features)


class Decoder(nn.Module):
    """The segmentation decoder: from level to level reduce, up-sample, halve the width, join the skip."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        incoming = list(reversed(widths[1:]))
        self.reduce = nn.ModuleList(
            _block(2 * width, width, 3) if level else nn.Identity() for level, width in enumerate(incoming)
        )
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear")
        self.halve = nn.ModuleList(_block(width, width // 2, 1) for width in incoming)
        self.join = nn.ModuleList(_block(width, width, 3) for width in incoming)
        self.head = nn.Conv2d(incoming[-1], classes, 3, padding=1)

    def forward(self, features: list[Tensor]) -> Float[Tensor, "b k *s"]:
        """Return the logits for the encoder's features."""
        *skips, image = features
        blocks = zip(self.reduce, self.halve, self.join, reversed(skips), strict=True)
        for reduce, halve, join, skip in blocks:
            upper = halve(self.upsample(reduce(image)))
            image = join(torch.cat([upper, skip], dim=1))
        return self.head(image)


def _encoder_block(inputs: int, outputs: int) -> nn.Sequential:
    first = _block(inputs, outputs, 3)[:-1]  # the paper's first convolution has no activation
    return nn.Sequential(first, _block(outputs, outputs, 3), _block(outputs, outputs, 3))


def _block(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
