"""Images as a random shallow network sees them: other contrasts and textures, the same anatomy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LAYERS, CHANNELS, SIDES = 4, 2, (1, 3)


@torch.no_grad()
def convolve_at_random(
    image: Float[Tensor, "b c *s"],
    share: Float[Tensor, "b"],
    axes: Sequence[int],
    channelwise: bool,
    generator: torch.Generator,
) -> Float[Tensor, "b c *s"]:
    """Blend each sample with what a random network of four layers makes of it, at the mean and deviation it had.

    The global intensity non-linear augmentation of Ouyang, Chen, Li, Li, Qin, Bai, Rueckert, 2023,
    https://arxiv.org/abs/2111.12525: two channels, sides of one or three voxels, normal weights and shifts,
    leaky rectifiers between. There the blend gets the norm of the image; here both what is blended and the
    blend get its mean and deviation, which normalised images have in common. A constant image stays.

    Args:
        image: Intensities of any range.
        share: Weight of what the network makes, 0 to 1; 0 changes nothing.
        axes: Spatial axes that may be mixed.
        channelwise: Another network for every channel of a sample, instead of one for all of them.
        generator: A CPU generator, of weights and sides.
    """
    alike = image.flatten(0, 1)[:, None, None] if channelwise else image[:, :, None]
    blended = torch.empty_like(alike)
    of_each = share.repeat_interleave(len(alike) // len(image)).tolist()
    for row, (channels, weight) in enumerate(zip(alike, of_each, strict=True)):
        made = _apply_random_network(channels, axes, generator)
        blended[row] = _restore(channels + weight * (_restore(made, channels) - channels), channels)
    return blended.view(image.shape)


def _apply_random_network(
    image: Float[Tensor, "n 1 *s"], axes: Sequence[int], generator: torch.Generator
) -> Float[Tensor, "n 1 *s"]:
    dimension = image.dim() - 2
    convolve = F.conv2d if dimension == 2 else F.conv3d
    for layer in range(LAYERS):
        side = SIDES[int(torch.randint(len(SIDES), (), generator=generator))]
        size = [side if axis in axes else 1 for axis in range(dimension)]
        outputs = 1 if layer == LAYERS - 1 else CHANNELS
        weight = torch.randn((outputs, image.shape[1], *size), generator=generator).to(image.device)
        shift = torch.randn(outputs, generator=generator).to(image.device)
        margin = [n // 2 for n in reversed(size) for _ in range(2)]
        image = convolve(F.pad(image, margin, mode="replicate"), weight, shift)
        image = F.leaky_relu(image) if layer < LAYERS - 1 else image
    return image


def _restore(image: Tensor, like: Tensor) -> Tensor:
    """Return an image with the mean and the deviation of another, all channels together."""
    deviation = image.std(correction=0)
    scale = like.std(correction=0) / deviation.clamp(min=torch.finfo(image.dtype).tiny)
    told_apart = deviation > 1e-5 * image.abs().amax()  # and not rounding alone
    return (image - image.mean()) * torch.where(told_apart, scale, 0.0) + like.mean()
