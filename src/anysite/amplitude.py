"""Random amplitude mixup: the low-frequency amplitudes of an image mixed with those of another site's."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anysite.axes import mixed_axes
from anysite.settings import Range


def mix_with_partners(
    image: Float[Tensor, "b c *s"],
    domain: Int[Tensor, "b"] | None,
    own_share: Range | Float[Tensor, "b"],
    window: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b c *s"]:
    """Return each sample with the amplitudes of a sample of another site mixed in: random amplitude mixup.

    Zhou, Qi, Shi, 2022, https://arxiv.org/abs/2208.03901. The weight of its own amplitude is
    given, or drawn uniformly from a range.
    """
    domain = torch.zeros(len(image), dtype=torch.long) if domain is None else domain.cpu()
    partner = choose_partners(domain, generator).to(image.device)
    if not isinstance(own_share, Tensor):
        own_share = torch.empty(len(image)).uniform_(*own_share, generator=generator)
    return mix_amplitude(image, image[partner], own_share.to(image.device), window)


def choose_partners(domain: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Int[Tensor, "b"]:
    """Return the index of a partner for every sample: a site other than its own, then a sample of that site.

    Where the batch holds one site only, any other sample; the sample itself where it is alone.
    """
    other_site = domain[:, None] != domain
    per_site = (domain[:, None] == domain).sum(0)
    anything_else = ~torch.eye(len(domain), dtype=torch.bool)
    chance = torch.where(other_site.any(1, keepdim=True), other_site / per_site, anything_else.float())
    if len(domain) == 1:
        chance = torch.ones(1, 1)
    return torch.multinomial(chance, 1, generator=generator)[:, 0]


def mix_amplitude(
    image: Float[Tensor, "b c *s"],
    partner: Float[Tensor, "b c *s"],
    own_share: Float[Tensor, "b"],
    window: float,
) -> Float[Tensor, "b c *s"]:
    """Mix the low-frequency amplitudes of two batches and keep the phases of the first, clamped to both ranges.

    Args:
        image: Intensities; the frequencies are those of its mixed axes, each channel by itself.
        partner: Another image a sample, whose amplitudes are mixed in.
        own_share: Weight of the image's own amplitude, 0 to 1; 1 changes nothing.
        window: Half the side of the centred square or cube of frequencies, as a share of the shortest axis.
    """
    axes = [2 + axis for axis in mixed_axes(image.shape[2:])]
    size = [image.shape[axis] for axis in axes]
    precision = torch.promote_types(image.dtype, torch.float32)
    own, other = (torch.fft.rfftn(x.to(precision), dim=axes) for x in (image, partner))
    radius = int(window * min(size))
    low: list[slice | Tensor] = [slice(None)] * image.dim()
    for axis, n in zip(axes, size, strict=True):
        frequency = torch.fft.fftfreq(n, 1 / n, device=image.device).round()[: own.shape[axis]]
        low[axis] = (frequency.abs() <= radius).nonzero()[:, 0]
    # Index tensors on several axes have to span a grid.
    for position, axis in enumerate(axes):
        index = low[axis]
        assert isinstance(index, Tensor)
        low[axis] = index.view(-1, *[1] * (len(axes) - 1 - position))
    block = own[tuple(low)]
    share = own_share.view(-1, *[1] * (image.dim() - 1))
    amplitude = share * block.abs() + (1 - share) * other[tuple(low)].abs()
    own[tuple(low)] = torch.polar(amplitude, block.angle())
    mixed = torch.fft.irfftn(own, size, dim=axes)
    spatial = tuple(range(2, image.dim()))
    lowest = torch.minimum(image.amin(spatial, keepdim=True), partner.amin(spatial, keepdim=True))
    highest = torch.maximum(image.amax(spatial, keepdim=True), partner.amax(spatial, keepdim=True))
    return mixed.to(image.dtype).clamp(lowest, highest)
