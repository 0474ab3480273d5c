"""The standard augmentation: geometry in one resampling, and intensity, on the batch's device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anysite.amplitude import mix_with_partners
from anysite.axes import choose_flip_axes, mixed_axes
from anysite.random_convolution import convolve_at_random
from anysite.settings import AugmentSettings, Range

CELLS = 4  # control-point spacings along the longest axis of a smooth random field


@torch.no_grad()
def augment(
    image: Float[Tensor, "b c *s"],
    label: Int[Tensor, "b *s"],
    settings: AugmentSettings,
    generator: torch.Generator,
    domain: Int[Tensor, "b"] | None = None,
) -> tuple[Float[Tensor, "b c *s"], Int[Tensor, "b *s"]]:
    """Return a randomly altered copy of a batch; label values are only moved, never mixed.

    Every sample draws each transform by itself, in the order and with about the strengths of nnU-Net
    (Isensee et al. 2021, https://doi.org/10.1038/s41592-020-01008-z), with elastic deformation and bias
    field added. A 3-D patch whose first axis is shorter than half its longest has thick slices: only its
    in-plane axes are then mixed, alike in all slices.

    Args:
        image: Intensities of any range, two or three spatial axes; computed on in float32.
        label: Class indices.
        settings: Probabilities and ranges.
        generator: A CPU generator; the result depends on nothing else but the batch.
        domain: Index of each sample's site, by which amplitude mixing chooses partners; none: one site.

    Raises:
        ConfigError: `settings.flip_axes` names an axis that the patch does not have.
    """
    if not settings.enabled:
        return image, label
    altered = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    label = label.clone()
    with torch.autocast(image.device.type, enabled=False):
        _draw_geometry(altered, label, settings, generator)
        _draw_intensity(altered, settings, generator)
        rows = _draw_rows(settings.amplitude_mixing, altered, generator)
        if len(rows):
            mixed = mix_with_partners(
                altered, domain, settings.amplitude_own_share, settings.amplitude_window, generator
            )
            altered[rows] = mixed[rows]
        rows = _draw_rows(settings.random_convolution, altered, generator)
        if len(rows):
            share = _uniform((len(rows),), settings.random_convolution_share, generator)
            axes = mixed_axes(altered.shape[2:])
            altered[rows] = convolve_at_random(altered[rows], share, axes, settings.channelwise, generator)
    return altered.to(image.dtype), label


def rotation(angles: Float[Tensor, "b n"]) -> Float[Tensor, "b d d"]:
    """Return rotation matrices from one angle (2-D), or three, in radians, a plane of two axes each."""
    dimension = 2 if angles.shape[1] == 1 else 3
    result = torch.eye(dimension).repeat(len(angles), 1, 1)
    for (i, j), angle in zip(itertools.combinations(range(dimension), 2), angles.unbind(1), strict=True):
        plane = torch.eye(dimension).repeat(len(angles), 1, 1)
        plane[:, i, i] = plane[:, j, j] = angle.cos()
        plane[:, j, i] = angle.sin()
        plane[:, i, j] = -angle.sin()
        result = result @ plane
    return result


def smooth_field(coefficients: Float[Tensor, "b c *k"], shape: Sequence[int]) -> Float[Tensor, "b c *s"]:
    """Expand coefficients, three more than cells along each axis, to a cubic B-spline on a grid `shape`."""
    operators = []
    for points, size in zip(coefficients.shape[2:], shape, strict=True):
        position = (torch.arange(size) + 0.5) * ((points - 3) / size)
        distance = (position[:, None] - (torch.arange(points) - 1)).abs()
        inner = 2 / 3 - distance**2 + distance**3 / 2
        outer = (2 - distance).clamp(min=0) ** 3 / 6
        operators.append(torch.where(distance < 1, inner, outer).expand(len(coefficients), -1, -1))
    return _apply_along_axes(coefficients, operators, range(len(shape)))


def warp(
    image: Float[Tensor, "b c *s"],
    label: Int[Tensor, "b *s"],
    matrix: Float[Tensor, "b d d"],
    displacement: Float[Tensor, "b d *k"] | None = None,
) -> tuple[Float[Tensor, "b c *s"], Int[Tensor, "b *s"]]:
    """Sample image (linearly) and label (nearest) at `matrix @ (p + displacement(p))`, mirrored at borders.

    Args:
        image: Intensities.
        label: Class indices.
        matrix: From an offset from the patch's centre to the offset sampled there, in voxels. With 2x2
            matrices the slices of a 3-D patch are warped in their plane, all alike.
        displacement: In voxels, on the `d` warped axes.
    """
    dimension = matrix.shape[-1]
    size = image.shape[-dimension:]
    offsets = []
    for axis, n in enumerate(size):
        offset = torch.arange(n, device=image.device, dtype=torch.float32) - (n - 1) / 2
        offset = offset.view(-1, *[1] * (dimension - 1 - axis))
        offsets.append(offset if displacement is None else offset + displacement[:, axis])
    coordinates = []
    for axis, n in enumerate(size):
        weights = (2 / n * matrix[:, axis]).to(image.device).view(-1, dimension, *[1] * dimension).unbind(1)
        terms = [weight * offset for weight, offset in zip(weights, offsets, strict=True)]
        coordinate = sum(terms, start=image.new_ones(()))
        # Mirrored here because grid_sample's own reflection takes twice the time on a CPU.
        coordinates.append(1 - (coordinate.remainder(4) - 2).abs())
    grid = torch.stack(coordinates[::-1], -1)  # grid_sample names the last axis first
    planes = image.reshape(len(image), -1, *size)
    classes = label.reshape(len(label), -1, *size).to(torch.float32)
    planes = F.grid_sample(planes, grid, "bilinear", "border", align_corners=False)
    classes = F.grid_sample(classes, grid, "nearest", "border", align_corners=False)
    return planes.reshape(image.shape), classes.reshape(label.shape).to(label.dtype)


def apply_bias_field(
    image: Float[Tensor, "b c *s"], coefficients: Float[Tensor, "b 1 *k"]
) -> Float[Tensor, "b c *s"]:
    """Multiply the intensity above each channel's minimum by the exponential of a smooth field."""
    low = image.flatten(2).amin(2).view(_per_channel(image))
    factor = smooth_field(coefficients.to(image.device), image.shape[2:]).exp()
    return (image - low) * factor + low


def add_noise(
    image: Float[Tensor, "b c *s"], sigma: Float[Tensor, "b"], generator: torch.Generator
) -> Float[Tensor, "b c *s"]:
    """Add Gaussian noise of `sigma` standard deviations of each channel."""
    seed = int(torch.randint(2**62, (), generator=generator))
    on_device = torch.Generator(image.device).manual_seed(seed)
    noise = torch.randn(image.shape, generator=on_device, device=image.device)
    _, deviation = _mean_and_deviation(image.flatten(2))
    scale = deviation * sigma.to(image.device)[:, None, None]
    return torch.addcmul(image, noise, scale.view(_per_channel(image)))


def blur(image: Float[Tensor, "b c *s"], sigma_voxels: Float[Tensor, "b"]) -> Float[Tensor, "b c *s"]:
    """Filter with a Gaussian of `sigma_voxels`, mirrored at borders, along the mixed axes."""
    axes = mixed_axes(image.shape[2:])
    operators = []
    for axis in axes:
        size = image.shape[2 + axis]
        distance = torch.arange(2 * size) / sigma_voxels[:, None]
        weight = torch.where(distance < 6, (-0.5 * distance**2).exp(), 0.0)
        both_sides = torch.cat([weight[:, 1:size].flip(1), weight[:, :size]], 1)
        operator = both_sides.unfold(1, size, 1).flip(1)
        for mirrored in (weight[:, 1:], weight.flip(1)[:, :-1]):  # beyond the first voxel, beyond the last
            operator += mirrored.unfold(1, size, 1)
        operators.append(operator / operator.sum(2, keepdim=True))
    return _apply_along_axes(image, operators, axes)


def lower_resolution(image: Float[Tensor, "b c *s"], factor: Float[Tensor, "b"]) -> Float[Tensor, "b c *s"]:
    """Keep the share `factor` of the voxels along each mixed axis, and interpolate linearly between."""
    shape = image.shape[2:]
    axes = mixed_axes(shape)
    lowered = torch.empty_like(image)
    for sample, share in enumerate(factor.tolist()):
        size = [max(1, round(n * share)) if axis in axes else n for axis, n in enumerate(shape)]
        kept = F.interpolate(image[sample, None], size, mode="nearest-exact")
        lowered[sample] = F.interpolate(kept, shape, mode="bilinear" if len(shape) == 2 else "trilinear")[0]
    return lowered


def change_brightness(
    image: Float[Tensor, "b c *s"], factor: Float[Tensor, "b #c"]
) -> Float[Tensor, "b c *s"]:
    """Multiply each channel by `factor`."""
    return (image.flatten(2) * factor.to(image.device)[..., None]).view(image.shape)


def change_contrast(image: Float[Tensor, "b c *s"], factor: Float[Tensor, "b #c"]) -> Float[Tensor, "b c *s"]:
    """Stretch each channel about its mean by `factor`, clamped to the range it had."""
    flat = image.flatten(2)
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    mean = flat.mean(2, keepdim=True)
    return ((flat - mean) * factor.to(image.device)[..., None] + mean).clamp(low, high).view(image.shape)


def change_gamma(
    image: Float[Tensor, "b c *s"], exponent: Float[Tensor, "b #c"], inverted: Bool[Tensor, "b #c"]
) -> Float[Tensor, "b c *s"]:
    """Raise each channel, scaled to 0..1, to `exponent`, keeping its mean and standard deviation.

    Args:
        image: Intensities.
        exponent: One for every channel, or one for all.
        inverted: Where the negative is raised instead.
    """
    inverted, exponent = inverted.to(image.device)[..., None], exponent.to(image.device)[..., None]
    flat = image.flatten(2)
    mean, deviation = _mean_and_deviation(flat)
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    direction = torch.where(inverted, -1, 1)
    extent = (high - low).clamp(min=torch.finfo(torch.float32).tiny) * direction
    bent = (flat - torch.where(inverted, high, low)).div_(extent).clamp_(0, 1).pow_(exponent)
    bent_mean, bent_deviation = _mean_and_deviation(bent)
    scale = deviation / bent_deviation.clamp(min=1e-6) * direction
    return bent.mul_(scale).add_(mean - bent_mean * scale).view(image.shape)


def _draw_geometry(
    image: Tensor, label: Tensor, settings: AugmentSettings, generator: torch.Generator
) -> None:
    count, shape = len(image), image.shape[2:]
    affine = torch.rand(count, generator=generator) < settings.affine
    elastic = torch.rand(count, generator=generator) < settings.elastic
    moved = (affine | elastic).nonzero()[:, 0]
    if len(moved):
        affine, elastic = affine[moved], elastic[moved]
        size = tuple(shape[axis] for axis in mixed_axes(shape))
        limit = math.radians(settings.rotation_degrees)
        angles = _uniform((len(moved), math.comb(len(size), 2)), (-limit, limit), generator)
        scale = _log_uniform((len(moved),), settings.scale, generator)
        matrix = rotation(angles * affine[:, None]) / torch.where(affine, scale, 1.0)[:, None, None]
        displacement = None
        if elastic.any():
            strength = _uniform((len(moved),), settings.elastic_strength, generator) * elastic
            coefficients = _draw_coefficients(strength, len(size), size, generator)
            displacement = smooth_field(coefficients.to(image.device), size)
            spacing = [n / (k - 3) for n, k in zip(size, coefficients.shape[2:], strict=True)]
            displacement *= torch.tensor(spacing, device=image.device).view(-1, *[1] * len(size))
        rows = moved.to(image.device)
        image[rows], label[rows] = warp(image[rows], label[rows], matrix, displacement)
    axes = choose_flip_axes(settings, len(shape))
    mirrored = torch.rand((count, len(axes)), generator=generator) < settings.flip
    for sample, row in enumerate(mirrored.tolist()):
        # Counted from the end, an axis has one name in image and label.
        flipped = [axis - len(shape) for axis, drawn in zip(axes, row, strict=True) if drawn]
        if flipped:
            image[sample], label[sample] = image[sample].flip(flipped), label[sample].flip(flipped)


def _draw_intensity(image: Tensor, settings: AugmentSettings, generator: torch.Generator) -> None:
    def sample(x: Tensor, limits: Range) -> Tensor:
        return _uniform((len(x),), limits, generator)

    def channel(x: Tensor, limits: Range) -> Tensor:
        return _log_uniform((len(x), x.shape[1] if settings.channelwise else 1), limits, generator)

    def bias_field(x: Tensor) -> Tensor:
        strength = torch.full((len(x),), settings.bias_field_strength)
        return apply_bias_field(x, _draw_coefficients(strength, 1, x.shape[2:], generator))

    def gamma(x: Tensor) -> Tensor:
        exponent = channel(x, settings.gamma_exponent)
        inverted = torch.rand(exponent.shape, generator=generator) < 0.5
        return change_gamma(x, exponent, inverted)

    for probability, change in (
        (settings.bias_field, bias_field),
        (settings.noise, lambda x: add_noise(x, sample(x, settings.noise_sigma), generator)),
        (settings.blur, lambda x: blur(x, sample(x, settings.blur_sigma_voxels))),
        (settings.brightness, lambda x: change_brightness(x, channel(x, settings.brightness_factor))),
        (settings.contrast, lambda x: change_contrast(x, channel(x, settings.contrast_factor))),
        (settings.low_resolution, lambda x: lower_resolution(x, sample(x, settings.low_resolution_factor))),
        (settings.gamma, gamma),
    ):
        rows = _draw_rows(probability, image, generator)
        if len(rows):
            image[rows] = change(image[rows])


def _draw_rows(probability: float, image: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(len(image), generator=generator) < probability).nonzero()[:, 0].to(image.device)


def _draw_coefficients(
    strength: Tensor, channels: int, size: Sequence[int], generator: torch.Generator
) -> Tensor:
    spacing = max(size) / CELLS
    cells = [max(1, round(n / spacing)) for n in size]
    coefficients = _uniform((len(strength), channels, *(n + 3 for n in cells)), (-1.0, 1.0), generator)
    return coefficients * strength.view(-1, *[1] * (1 + len(size)))


def _uniform(shape: tuple[int, ...], limits: Range, generator: torch.Generator | None) -> Tensor:
    return torch.empty(shape, dtype=torch.float32).uniform_(*limits, generator=generator)


def _log_uniform(shape: tuple[int, ...], limits: Range, generator: torch.Generator) -> Tensor:
    return _uniform(shape, (math.log(limits[0]), math.log(limits[1])), generator).exp()


def _apply_along_axes(image: Tensor, operators: list[Tensor], axes: Sequence[int]) -> Tensor:
    """Multiply each spatial axis of `axes` by its matrix, one a sample."""
    for operator, axis in zip(operators, axes, strict=True):
        moved = image.movedim(2 + axis, 2)
        image = torch.einsum("nij,ncj...->nci...", operator.to(image.device), moved).movedim(2, 2 + axis)
    return image


def _per_channel(image: Tensor) -> tuple[int, ...]:
    return (*image.shape[:2], *[1] * (image.dim() - 2))


def _mean_and_deviation(flat: Tensor) -> tuple[Tensor, Tensor]:
    # On a CPU quicker than torch.var_mean.
    mean = flat.mean(2, keepdim=True)
    return mean, torch.linalg.vector_norm(flat - mean, dim=2, keepdim=True) / math.sqrt(flat.shape[2])
