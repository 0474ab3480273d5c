"""U-Net with nnU-Net's levels: Ronneberger, Fischer, Brox, 2015, https://arxiv.org/abs/1505.04597.

The rule for strides and kernels follows nnU-Net: Isensee, Jaeger, Kohl, Petersen, Maier-Hein, 2021,
https://doi.org/10.1038/s41592-020-01008-z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anysite.errors import ConfigError
from anysite.networks import Network, require_counts, require_fractions

MAX_DEPTH = 6

NORMS = ("instance", "batch", "group")
Steps = tuple[int, ...]


class UNet(Network):
    """A U-Net whose levels follow the anisotropy of the patch size.

    Args:
        width: Channels of the first level; each further level has twice as many, up to `max_width`.
        blocks_per_level: Convolution, normalisation and activation, so many times a level.
        residual: Add a shortcut around the blocks of every level.
        norm: Normalisation: instance, batch or group.
        dropout: Probability of dropping a channel after each convolution.
        depth: Number of levels, at most 6; none: as many as the patch size allows.
        deep_supervision: Segment at every scale of the decoder while training (Lee et al., 2015,
            https://arxiv.org/abs/1409.5185).

    Raises:
        ConfigError: a setting out of range, or a patch size too small for `depth`.
    """

    channels_last = True

    def __init__(
        self,
        channels: int,
        classes: int,
        patch_size: Sequence[int],
        *,
        width: int = 16,
        max_width: int = 256,
        blocks_per_level: int = 2,
        residual: bool = False,
        norm: str = "instance",
        dropout: float = 0.0,
        depth: int | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(channels, classes, patch_size)
        require_counts(width=width, max_width=max_width, blocks_per_level=blocks_per_level)
        require_fractions(dropout=dropout)
        if norm not in NORMS:
            raise ConfigError(f"{norm!r}", where="network.norm", expected=f"one of {', '.join(NORMS)}")
        levels = plan_levels(self.patch_size, depth)
        self.widths = tuple(min(width * 2**level, max_width) for level in range(len(levels)))
        self.stride = tuple(math.prod(steps) for steps in zip(*(stride for stride, _ in levels), strict=True))

        def level(inputs: int, outputs: int, kernel: Steps, stride: Steps) -> Level:
            return Level(inputs, outputs, kernel, stride, blocks_per_level, residual, norm, dropout)

        def up(inputs: int, outputs: int, stride: Steps) -> nn.Module:
            return _layer("ConvTranspose", self.dimension)(inputs, outputs, stride, stride, bias=False)

        same = (1,) * self.dimension
        inputs = (channels, *self.widths)
        self.encoder = nn.ModuleList(
            level(inputs[i], self.widths[i], kernel, stride) for i, (stride, kernel) in enumerate(levels)
        )
        upwards = range(len(levels) - 2, -1, -1)
        self.ups = nn.ModuleList(up(self.widths[i + 1], self.widths[i], levels[i + 1][0]) for i in upwards)
        self.decoder = nn.ModuleList(
            level(2 * self.widths[i], self.widths[i], levels[i][1], same) for i in upwards
        )
        self.head = _layer("Conv", self.dimension)(self.widths[0], classes, 1)
        deep_widths = self.widths[1:-1] if deep_supervision else ()
        self.deep_heads = nn.ModuleList(_layer("Conv", self.dimension)(w, classes, 1) for w in deep_widths)
        self.apply(_initialise)

    def encode(self, image: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Return one feature a level, from full resolution to the bottleneck."""
        features = []
        for level in self.encoder:
            image = level(image)
            features.append(image)
        return features

    def decode(self, features: list[Tensor]) -> Float[Tensor, "b k *s"]:
        """Return the logits at full resolution."""
        return self.head(self._decode_levels(features)[0])

    def decode_scales(self, features: list[Tensor]) -> list[Tensor]:
        """Return the logits at full resolution and, with deep supervision, of every coarser level."""
        finest, *coarser = self._decode_levels(features)
        deep = zip(self.deep_heads, coarser, strict=bool(self.deep_heads))
        return [self.head(finest), *(head(image) for head, image in deep)]

    def _decode_levels(self, features: list[Tensor]) -> list[Tensor]:
        *skips, image = features
        levels = [] if skips else [image]
        for up, level, skip in zip(self.ups, self.decoder, reversed(skips), strict=True):
            image = level(torch.cat([up(image), skip], dim=1))
            levels.append(image)
        return levels[::-1]


class Level(nn.Module):
    """The blocks of one resolution, the first of them with `stride`; optionally with a shortcut."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: Steps,
        stride: Steps,
        blocks: int,
        residual: bool,
        norm: str,
        dropout: float,
    ) -> None:
        super().__init__()
        dimension = len(kernel)
        layers: list[nn.Module] = []
        for block in range(blocks):
            first = block == 0
            layers.append(
                _layer("Conv", dimension)(
                    inputs if first else outputs,
                    outputs,
                    kernel,
                    stride if first else 1,
                    padding=tuple(size // 2 for size in kernel),
                    bias=False,
                )
            )
            if dropout:
                layers.append(_layer("Dropout", dimension)(dropout))
            layers += [_norm(norm, outputs, dimension), nn.LeakyReLU(0.01, inplace=True)]
        self.activation = layers.pop()
        self.blocks = nn.Sequential(*layers)
        self.shortcut = _shortcut(inputs, outputs, stride, norm) if residual else None

    def forward(self, image: Float[Tensor, "b c *s"]) -> Float[Tensor, "b w *t"]:
        """Return the features `(b, outputs, *s / stride)`."""
        features = self.blocks(image)
        if self.shortcut is not None:
            features = features + self.shortcut(image)
        return self.activation(features)


class InstanceNorm(nn.Module):
    """Instance normalisation: Ulyanov, Vedaldi, Lempitsky, 2016, https://arxiv.org/abs/1607.08022.

    On CPU, batch normalisation of one sample at a time gives the same values and, unlike PyTorch's instance
    normalisation, keeps channels_last.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, image: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        """Return every channel of every sample with mean 0 and variance 1, scaled and shifted."""
        if image.device.type != "cpu" or torch.compiler.is_compiling():
            return F.instance_norm(image, weight=self.weight, bias=self.bias)
        samples = image.split(1)
        return torch.cat([F.batch_norm(s, None, None, self.weight, self.bias, True) for s in samples])


def plan_levels(patch_size: Sequence[int], depth: int | None = None) -> list[tuple[Steps, Steps]]:
    """Return (stride, kernel) of each level, full resolution first, as nnU-Net's rule gives them.

    An axis is halved while its size is even, at least 8 and at least half of the largest; axes smaller
    than half of the largest are not convolved along.

    Raises:
        ConfigError: `depth` is not within 1 to 6, or is more than the patch size allows.
    """
    size = tuple(patch_size)
    stride = (1,) * len(size)
    levels: list[tuple[Steps, Steps]] = []
    while len(levels) < (depth or MAX_DEPTH):
        size = tuple(n // step for n, step in zip(size, stride, strict=True))
        coarse = [2 * n < max(size) for n in size]
        # A strided kernel of 1 would skip voxels.
        kernel = tuple(1 if c and step == 1 else 3 for c, step in zip(coarse, stride, strict=True))
        levels.append((stride, kernel))
        stride = tuple(2 if n % 2 == 0 and n >= 8 and not c else 1 for n, c in zip(size, coarse, strict=True))
        if max(stride) == 1:
            break
    if depth is not None and not 1 <= depth == len(levels) <= MAX_DEPTH:
        raise ConfigError(
            f"{depth} levels for patches of {list(patch_size)}",
            where="network.depth",
            expected=f"1 to {len(plan_levels(patch_size))}",
            fix="leave network.depth out, or enlarge plan.patch_size",
        )
    return levels


def _shortcut(inputs: int, outputs: int, stride: Steps, norm: str) -> nn.Sequential:
    dimension = len(stride)
    layers: list[nn.Module] = [_layer("AvgPool", dimension)(stride)] if max(stride) > 1 else []
    if inputs != outputs:
        layers += [
            _layer("Conv", dimension)(inputs, outputs, 1, bias=False),
            _norm(norm, outputs, dimension),
        ]
    return nn.Sequential(*layers)


def _norm(norm: str, channels: int, dimension: int) -> nn.Module:
    if norm == "instance":
        return InstanceNorm(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    return _layer("BatchNorm", dimension)(channels)


def _layer(name: str, dimension: int) -> Any:
    return getattr(nn, f"{name}{dimension}d")


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
