"""A decoder from the bottleneck to the image, as in DSIR: Zhou, Qi, Shi, 2022, https://arxiv.org/abs/2208.03901."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class RestorationDecoder(nn.Module):
    """Draws an image from the bottleneck alone: without skips, so that the bottleneck must know the image.

    One block for every doubling of resolution halves the width: convolution, up-sampling, two convolutions,
    each followed by the site's own batch normalisation; then a convolution and tanh. On the encoder of
    RAM-DSIR it has the official number of parameters. Training alone needs it.

    Args:
        width: Channels of the bottleneck.
        stride: Down-sampling of the bottleneck along each axis, powers of two.
        channels: Channels of the image.
        domains: Number of sites with statistics of their own; 1: all sites share them.
    """

    def __init__(self, width: int, stride: Sequence[int], channels: int, domains: int = 1) -> None:
        super().__init__()
        self.domains = domains
        scales = list_scales(stride)
        widths = [max(1, width // 2**level) for level in range(len(scales) + 1)]
        self.blocks = nn.ModuleList(
            _Block(inputs, outputs, scale, domains)
            for inputs, outputs, scale in zip(widths, widths[1:], scales, strict=False)
        )
        self.head = _convolution(len(stride))(widths[-1], channels, 3, padding=1)
        self.apply(_initialise)

    def forward(
        self, bottleneck: Float[Tensor, "b w *t"], domain: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c *s"]:
        """Return the image in [-1, 1] at full resolution; `domain` is the index of each sample's site."""
        # In the order of their sites the samples of each are neighbours, which saves every norm a gathering.
        order = domain.argsort(stable=True)
        counts = (
            torch.bincount(domain, minlength=self.domains).tolist() if self.domains > 1 else [len(domain)]
        )
        features = bottleneck[order]
        for block in self.blocks:
            features = block(features, counts)
        return torch.tanh(self.head(features).float())[order.argsort()]


class DomainNorm(nn.Module):
    """One batch normalisation a site: Chang, You, Seo, Kwak, Han, 2019, https://arxiv.org/abs/1906.03950."""

    def __init__(self, width: int, domains: int, dimension: int) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if dimension == 2 else nn.BatchNorm3d
        self.norms = nn.ModuleList(norm(width) for _ in range(domains))

    def forward(self, features: Float[Tensor, "b c *s"], counts: list[int]) -> Float[Tensor, "b c *s"]:
        """Normalise samples in the order of their sites, of which `counts` holds how many each has."""
        sites = zip(self.norms, features.split(counts), strict=True)
        return torch.cat([norm(samples) for norm, samples in sites if len(samples)])


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, scale: tuple[int, ...], domains: int) -> None:
        super().__init__()
        self.scale = [float(step) for step in scale]
        convolution = _convolution(len(scale))
        self.convolutions = nn.ModuleList(
            [
                convolution(inputs, outputs, 3, padding=1),
                convolution(outputs, outputs, 1),
                convolution(outputs, outputs, 3, padding=1),
            ]
        )
        self.norms = nn.ModuleList(DomainNorm(outputs, domains, len(scale)) for _ in self.convolutions)

    def forward(self, features: Float[Tensor, "b w *t"], counts: list[int]) -> Float[Tensor, "b v *s"]:
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            features = F.relu(norm(convolution(features), counts))
            if index == 0:
                mode = "bilinear" if len(self.scale) == 2 else "trilinear"
                features = F.interpolate(features, scale_factor=self.scale, mode=mode)
        return features


def list_scales(stride: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the up-sampling steps from the bottleneck to the image, which undo the encoder's in reverse.

    An axis of thick slices, halved less often than the others, is halved last, and so doubled first.
    """
    halvings = [round(math.log2(step)) for step in stride]
    return [tuple(2 if level < count else 1 for count in halvings) for level in range(max(halvings))]


def scale_to_unit(image: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
    """Return every channel of every sample from its minimum to its maximum as -1 to 1."""
    flat = image.float().flatten(2)
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    extent = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return ((flat - low) / extent * 2 - 1).view(image.shape)


def _convolution(dimension: int) -> type[nn.Conv2d | nn.Conv3d]:
    return nn.Conv2d if dimension == 2 else nn.Conv3d


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
