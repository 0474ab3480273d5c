"""Image corruptions by name, each in five severities: what a model may meet and was not trained on."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import io
import math
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.random import Generator
from PIL import Image
from scipy import ndimage, special

from anysite.data.volume import Volume
from anysite.errors import ConfigError

VERSION = 1  # raise it when a result changes for a reason that the source below does not show

# Channels, slices, rows, columns; 0 and 1 are the ends of the image's own range. A picture is one slice.
Slices = Float[np.ndarray, "c z h w"]


@dataclass(frozen=True)
class Corruption:
    """One way in which an image goes wrong.

    Attributes:
        apply: From clean slices, a strength and a generator to corrupted slices.
        strengths: Of severity 1, just visible, to 5, severe with the anatomy still recognisable. Lengths
            are shares of a slice's shorter side, so that one table fits all matrix sizes.
        meaning: What happens, and what the strength is, in one line.
        family: What it belongs to: a source of noise, a modality, a step of the acquisition.
    """

    apply: Callable[[Slices, float, Generator], Slices]
    strengths: tuple[float, float, float, float, float]
    meaning: str
    family: Literal["noise", "blur", "MR", "CT", "contrast", "sampling"]


def corrupt(image: Volume, name: str, severity: int, seed: int = 0) -> Volume:
    """Return a corrupted copy of an image, on the same grid and of the same type.

    Names and five severities are in the manner of Hendrycks & Dietterich 2019
    (https://arxiv.org/abs/1903.12261). Nothing moves, so a label stays valid. Intensities are measured
    by each channel's 0.5th to 99.5th percentile (in CT from air to bone, over 1000 HU), those of a colour
    picture (two spatial axes, three channels) by all channels together; a channel without any range comes
    back as it is. Noise and shading act in three dimensions, blur and artefacts slice by slice. The slice
    axis has the largest spacing; of equal ones the last (NIfTI), or in pixel units the first (TIFF).

    Args:
        image: Finite intensities; integers are rounded and clipped to what their type holds.
        name: One of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Any whole number from 0. What is drawn depends on it and the name alone, not on the severity.

    Raises:
        ConfigError: an unknown name or severity.
    """
    corruption = _find(name)
    if severity not in range(1, 6):
        raise ConfigError(f"severity {severity}", where=f"corruption {name!r}", expected="1, 2, 3, 4 or 5")
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    array = image.array if image.dimension == 3 else image.array[:, None]
    axis = _slice_axis(image)
    slices = np.moveaxis(array, axis, 1).astype(np.promote_types(array.dtype, np.float32))
    low, extent = _robust_range(slices)
    clean = (slices - low) / np.where(extent > 0, extent, 1)
    change = corruption.apply(clean, corruption.strengths[severity - 1], generator) - clean
    corrupted = slices + change * extent
    if np.issubdtype(array.dtype, np.integer):
        limits = np.iinfo(array.dtype)
        corrupted = np.clip(np.rint(corrupted), limits.min, limits.max)
    corrupted = np.moveaxis(corrupted, 1, axis).astype(array.dtype, order="C")
    return image.with_array(corrupted.reshape(image.array.shape))


def fingerprint(name: str) -> str:
    """Return 12 hexadecimal digits that change whenever the corruption `name` may give other images.

    They cover its strengths, its source and what all corruptions share, so that rows of two versions never mix.
    """
    corruption = _find(name)
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    shared = [function for label, function in functions if label.startswith("_")]
    sources = [inspect.getsource(function) for function in (corrupt, corruption.apply, *shared)]
    text = "\n".join([str(VERSION), name, repr(corruption.strengths), *sources])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def add_gaussian_noise(image: Slices, deviation: float, generator: Generator) -> Slices:
    """Add white noise."""
    return image + deviation * generator.standard_normal(image.shape, np.float32)


def add_rician_noise(image: Slices, deviation: float, generator: Generator) -> Slices:
    """Take the magnitude after white noise in the real and the imaginary part: that of MR.

    Gudbjartsson & Patz 1995, https://doi.org/10.1002/mrm.1910340618.
    """
    real, imaginary = deviation * generator.standard_normal((2, *image.shape), np.float32)
    return np.hypot(image + real, imaginary)


def multiply_speckle(image: Slices, deviation: float, generator: Generator) -> Slices:
    """Multiply by white noise of mean 1, as where echoes or coherent light interfere."""
    return image * (1 + deviation * generator.standard_normal(image.shape, np.float32))


def count_quanta(image: Slices, counts: float, generator: Generator) -> Slices:
    """Draw each voxel from the Poisson distribution of a signal of which 1 is `counts` quanta."""
    signal = np.maximum(image, 0)
    return image - signal + (generator.poisson(signal * counts) / counts).astype(image.dtype)


def add_impulses(image: Slices, share: float, generator: Generator) -> Slices:
    """Set a share of the voxels to 0 or 1, half of them each; a higher share contains a lower one."""
    drawn = generator.random(image.shape, np.float32)
    return np.where(drawn < share / 2, 0, np.where(drawn > 1 - share / 2, 1, image)).astype(image.dtype)


def blur_evenly(image: Slices, sigma_sides: float, generator: Generator) -> Slices:
    """Filter every slice with the discrete Gaussian of Lindeberg 1990, https://doi.org/10.1109/34.49051."""
    sigma_voxels = sigma_sides * min(image.shape[2:])
    reach = 1 + math.ceil(5 * sigma_voxels)
    weights = special.ive(np.arange(-reach, reach + 1), sigma_voxels**2)
    for axis in (2, 3):
        image = ndimage.convolve1d(image, weights, axis, mode="reflect")
    return image


def blur_along_line(image: Slices, length_sides: float, generator: Generator) -> Slices:
    """Average every slice over a line about each voxel, in a random direction."""
    angle = generator.uniform(0, np.pi)
    half_voxels = length_sides * min(image.shape[2:]) / 2
    reach = math.ceil(half_voxels)
    steps = np.linspace(-half_voxels, half_voxels, 8 * reach + 1)
    offsets = np.arange(-reach, reach + 1)
    rows, columns = (np.maximum(0, 1 - np.abs(offsets[:, None] - steps * f(angle))) for f in (np.sin, np.cos))
    return ndimage.convolve(image, (rows @ columns.T / len(steps))[None, None], mode="reflect")


def displace_lines(image: Slices, deviation_sides: float, generator: Generator) -> Slices:
    """Move the object between the phase-encoding lines of k-space; the central lines stay.

    As the central lines hold the contrast, edges ripple and the anatomy stays in place. Each slice moves by
    itself. In the manner of Shaw et al. 2019, https://proceedings.mlr.press/v102/shaw19a.html.
    """
    axis = 2 + int(generator.integers(2))
    lines = np.fft.fftfreq(image.shape[axis])
    trace = generator.standard_normal((image.shape[1], 1, len(lines)))
    trace = ndimage.gaussian_filter1d(trace, 1, mode="wrap") * (np.abs(lines) > 0.03)
    shift_voxels = trace / max(trace.std(), 1e-12) * deviation_sides * min(image.shape[2:])
    spectrum = np.fft.fft(np.moveaxis(image, axis, -1)) * np.exp(-2j * np.pi * lines * shift_voxels)
    return np.moveaxis(np.abs(np.fft.ifft(spectrum)), -1, axis).astype(image.dtype)


def add_ghosts(image: Slices, level: float, generator: Generator) -> Slices:
    """Add copies displaced both ways along the phase-encoding axis, as periodic motion does.

    A phase that oscillates once in n lines of k-space gives, to first order, copies an n-th of the field of
    view away (ghosts of breathing: Wood & Henkelman 1986, https://doi.org/10.1118/1.595851).
    """
    axis = 2 + int(generator.integers(2))
    phase = np.exp(1j * generator.uniform(0, 2 * np.pi))
    shift = image.shape[axis] // int(generator.integers(3, 7))
    ghosts = phase * np.roll(image, shift, axis) - phase.conj() * np.roll(image, -shift, axis)
    return np.abs(image + level * ghosts).astype(image.dtype)


def add_spikes(image: Slices, level: float, generator: Generator) -> Slices:
    """Add three plane waves to every slice, the image of three corrupt points of its k-space: herringbone."""
    angle, phase = generator.uniform(0, 2 * np.pi, (2, 3, image.shape[1], 1, 1))
    radius = generator.uniform(0.04, 0.25, angle.shape)
    rows, columns = np.ogrid[: image.shape[2], : image.shape[3]]
    cycles = radius * (np.sin(angle) * rows + np.cos(angle) * columns)
    return image + level * np.cos(2 * np.pi * cycles + phase).sum(0).astype(image.dtype)


def truncate_spectrum(image: Slices, share: float, generator: Generator) -> Slices:
    """Set all but the lowest share of the frequencies along both axes of every slice to zero."""
    rows, columns = _frequencies(image)
    kept = (np.abs(rows) <= share / 2) & (np.abs(columns) <= share / 2)
    return np.fft.ifft2(np.fft.fft2(image) * kept).real


def shade(image: Slices, log_gain: float, generator: Generator) -> Slices:
    """Multiply by a smooth field within `exp(-log_gain)` to `exp(log_gain)`, one for all channels.

    Its logarithm is a random sum of cosines of at most one period along each axis, where Van Leemput et al.
    1999 (https://doi.org/10.1109/42.811268) take polynomials.
    """
    coefficients = generator.standard_normal((3, 3, 3))
    coefficients[0, 0, 0] = 0
    waves = [np.cos(np.pi * np.outer(range(3), (np.arange(n) + 0.5) / n)) for n in image.shape[1:]]
    field = np.einsum("abc,az,bh,cw->zhw", coefficients, *waves, optimize=True)
    field *= log_gain / max(np.abs(field).max(), 1e-12)
    return image * np.exp(field).astype(image.dtype)


def lower_dose(image: Slices, deviation: float, generator: Generator) -> Slices:
    """Add noise that looks like that of filtered back-projection from few photons.

    Its power rises with frequency up to a Hann window (Kijewski & Judy 1987,
    https://doi.org/10.1088/0031-9155/32/5/003). The rays along each of two axes are noisier the more
    tissue they cross; the attenuation by a field full of the brightest one, 6, is that of 30 cm of water.
    """
    rows, columns = _frequencies(image)
    radius = np.hypot(rows, columns)
    window = np.cos(np.pi * np.minimum(radius, 0.5)) ** 2
    spectrum = np.fft.fft2(generator.standard_normal(image.shape, np.float32)) * np.sqrt(radius) * window
    noise = np.zeros_like(image)
    for frequency, ray_axis in ((rows, 3), (columns, 2)):
        part = np.fft.ifft2(spectrum * np.abs(frequency) / np.maximum(radius, 1e-6)).real
        noise += part * np.exp(6 / 2 * image.mean(ray_axis, keepdims=True))
    spread = noise.std((1, 2, 3), keepdims=True)
    return image + deviation * noise / np.maximum(spread, 1e-12)


def keep_few_views(image: Slices, views_sides: float, generator: Generator) -> Slices:
    """Reconstruct every slice from few projections: streaks.

    By the Fourier slice theorem a projection is a spoke of the spectrum. What lies between the spokes is
    lost, and as the ramp filter has it they weigh by their distance; the angle of the first is drawn.
    """
    side_voxels = min(image.shape[2:])
    views = max(1, round(views_sides * side_voxels))
    rows, columns = _frequencies(image)
    turn = (np.arctan2(rows, columns) / np.pi + generator.uniform()) * views
    apart_lines = np.pi * np.hypot(rows, columns) * side_voxels / views
    to_spoke_lines = np.abs(turn - np.rint(turn)) * apart_lines
    weight = np.where(apart_lines <= 1, 1, apart_lines * np.maximum(0, 1 - to_spoke_lines))
    return np.fft.ifft2(np.fft.fft2(image) * weight.astype(image.dtype)).real


def stretch_contrast(image: Slices, factor: float, generator: Generator) -> Slices:
    """Multiply the difference to each channel's mean."""
    return factor * image + (1 - factor) * image.mean((1, 2, 3), keepdims=True)


def bend_contrast(image: Slices, exponent: float, generator: Generator) -> Slices:
    """Raise the range 0 to 1 to a power and leave what lies outside."""
    inside = np.clip(image, 0, 1)
    return inside**exponent + image - inside


def shift_brightness(image: Slices, shift: float, generator: Generator) -> Slices:
    """Add to the intensity."""
    return image + shift


def lower_resolution(image: Slices, share: float, generator: Generator) -> Slices:
    """Average over larger pixels in every slice, and interpolate between them."""
    return _coarsened(_coarsened(image, share, 2), share, 3)


def thicken_slices(image: Slices, share: float, generator: Generator) -> Slices:
    """Average over thicker slices, or higher rows of a single slice, and interpolate between them."""
    return _coarsened(image, share, 1 if image.shape[1] > 1 else 2)


def cut_borders(image: Slices, share: float, generator: Generator) -> Slices:
    """Set a border, a share of each side wide, to the channel's minimum."""
    to_border = [np.minimum(np.arange(n), np.arange(n)[::-1]) for n in image.shape[2:]]
    rows, columns = (near < share * n for near, n in zip(to_border, image.shape[2:], strict=True))
    return np.where(rows[:, None] | columns, image.min((1, 2, 3), keepdims=True), image)


def compress(image: Slices, quality: float, generator: Generator) -> Slices:
    """Store the range 0 to 1 in 8 bits as JPEG, slice by slice, and read it back."""
    inside = np.clip(image, 0, 1)
    pictures = np.rint(255 * inside).astype(np.uint8)
    pictures = np.moveaxis(pictures, 0, -1) if _is_colour(image) else pictures.reshape(-1, *image.shape[2:])
    decoded = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=int(quality))
        decoded.append(np.asarray(Image.open(file), image.dtype) / 255)
    stack = np.stack(decoded)
    return (np.moveaxis(stack, -1, 0) if _is_colour(image) else stack.reshape(image.shape)) + image - inside


def quantise(image: Slices, levels: float, generator: Generator) -> Slices:
    """Round to evenly spaced levels from 0 to 1."""
    return np.rint(np.clip(image, 0, 1) * (levels - 1)) / (levels - 1)


def _find(name: str) -> Corruption:
    if name in CORRUPTIONS:
        return CORRUPTIONS[name]
    close = difflib.get_close_matches(name, CORRUPTIONS, n=1)
    fix = f"did you mean {close[0]!r}?" if close else ""
    known = f"one of {', '.join(CORRUPTIONS)}"
    raise ConfigError(f"unknown name {name!r}", where="corruption", expected=known, fix=fix)


def _slice_axis(image: Volume) -> int:
    if image.dimension == 2:
        return 1  # the one slice that a picture is
    spacing = np.array(image.spacing)
    largest = np.flatnonzero(spacing > 0.99 * spacing.max())
    return 1 + int(largest[0 if image.unit == "px" else -1])


def _is_colour(slices: np.ndarray) -> bool:
    return slices.shape[:2] == (3, 1)


def _robust_range(slices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the low end and the extent, 0 for a constant, of each channel's intensities."""
    axes = (0, 1, 2, 3) if _is_colour(slices) else (1, 2, 3)
    low, high = np.percentile(slices, (0.5, 99.5), axes, keepdims=True).astype(slices.dtype)
    empty = low == high  # nearly all voxels are alike
    low = np.where(empty, slices.min(axes, keepdims=True), low)
    high = np.where(empty, slices.max(axes, keepdims=True), high)
    return low, high - low


def _frequencies(image: Slices) -> tuple[np.ndarray, np.ndarray]:
    """Return the frequencies of rows and columns in cycles per voxel, to be broadcast."""
    rows, columns = (np.fft.fftfreq(n).astype(image.dtype) for n in image.shape[2:])
    return rows[:, None], columns[None]


def _coarsened(image: Slices, share: float, axis: int) -> Slices:
    """Keep a share of the voxels along an axis: means over each one's extent, linear in between."""
    size = image.shape[axis]
    kept = max(1, round(share * size))
    voxels, edges = np.arange(size), np.arange(kept + 1) * (size / kept)
    overlap = np.minimum(edges[1:, None], voxels + 1) - np.maximum(edges[:-1, None], voxels)
    means = np.maximum(overlap, 0) * (kept / size)
    position = np.clip((voxels + 0.5) * kept / size - 0.5, 0, kept - 1)
    between = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(kept)))
    operator = (between @ means).astype(image.dtype)
    return np.moveaxis(np.moveaxis(image, axis, -1) @ operator.T, -1, axis)


# fmt: off
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(add_gaussian_noise, (0.02, 0.04, 0.07, 0.11, 0.16),
        "white noise, by its standard deviation", "noise"),
    "rician_noise": Corruption(add_rician_noise, (0.02, 0.04, 0.07, 0.11, 0.16),
        "white noise before the magnitude of MR, by its standard deviation", "noise"),
    "speckle_noise": Corruption(multiply_speckle, (0.06, 0.11, 0.17, 0.25, 0.36),
        "multiplied white noise as in ultrasound, by its standard deviation", "noise"),
    "poisson_noise": Corruption(count_quanta, (500, 200, 90, 40, 18),
        "few quanta, by their count where the image is brightest", "noise"),
    "impulse_noise": Corruption(add_impulses, (0.005, 0.015, 0.035, 0.07, 0.12),
        "black and white voxels, by their share", "noise"),
    "gaussian_blur": Corruption(blur_evenly, (0.004, 0.007, 0.01, 0.014, 0.019),
        "out of focus, by the deviation in shares of the shorter side", "blur"),
    "motion_blur": Corruption(blur_along_line, (0.015, 0.027, 0.042, 0.06, 0.085),
        "moved while exposed, by the way in shares of the shorter side", "blur"),
    "motion_ghosting": Corruption(displace_lines, (0.003, 0.005, 0.008, 0.012, 0.017),
        "moved between lines of k-space, by the deviation in shares of the shorter side", "MR"),
    "ghosting": Corruption(add_ghosts, (0.06, 0.1, 0.15, 0.22, 0.3),
        "displaced copies from periodic motion, by their level", "MR"),
    "spike": Corruption(add_spikes, (0.015, 0.03, 0.05, 0.08, 0.12),
        "plane waves from corrupt points of k-space, by the amplitude of each", "MR"),
    "gibbs_ringing": Corruption(truncate_spectrum, (0.65, 0.5, 0.4, 0.31, 0.25),
        "ripples at edges from a truncated k-space, by the share of frequencies left on each axis", "MR"),
    "bias_field": Corruption(shade, (0.2, 0.35, 0.5, 0.7, 0.95),
        "shading by the coil, by the logarithm of its largest factor", "MR"),
    "low_dose": Corruption(lower_dose, (0.01, 0.02, 0.035, 0.055, 0.08),
        "grain and streaks from few photons, by their standard deviation", "CT"),
    "streaks": Corruption(keep_few_views, (0.6, 0.45, 0.32, 0.23, 0.16),
        "few projections, by their number in shares of the shorter side in voxels", "CT"),
    "low_contrast": Corruption(stretch_contrast, (0.8, 0.65, 0.5, 0.4, 0.3),
        "all closer to the mean, by the factor", "contrast"),
    "high_contrast": Corruption(stretch_contrast, (1.2, 1.4, 1.7, 2.1, 2.6),
        "all further from the mean, by the factor", "contrast"),
    "gamma_dark": Corruption(bend_contrast, (1.2, 1.4, 1.7, 2, 2.5),
        "mid-tones darker, by the exponent", "contrast"),
    "gamma_bright": Corruption(bend_contrast, (0.83, 0.71, 0.59, 0.5, 0.4),
        "mid-tones brighter, by the exponent", "contrast"),
    "brightness_up": Corruption(shift_brightness, (0.05, 0.1, 0.15, 0.21, 0.28),
        "all brighter, by the shift", "contrast"),
    "brightness_down": Corruption(shift_brightness, (-0.05, -0.1, -0.15, -0.21, -0.28),
        "all darker, by the shift", "contrast"),
    "low_resolution": Corruption(lower_resolution, (0.7, 0.5, 0.4, 0.31, 0.25),
        "larger pixels, by the share kept along rows and columns", "sampling"),
    "anisotropy": Corruption(thicken_slices, (0.7, 0.5, 0.36, 0.26, 0.18),
        "thicker slices, in a picture higher rows, by the share kept", "sampling"),
    "field_of_view": Corruption(cut_borders, (0.03, 0.05, 0.08, 0.12, 0.16),
        "borders cut off, by the width of each in shares of the side", "sampling"),
    "jpeg": Corruption(compress, (40, 25, 16, 11, 7),
        "lossy compression, by JPEG's quality", "sampling"),
    "quantisation": Corruption(quantise, (28, 18, 12, 8, 6),
        "few gray levels, by their number", "sampling"),
}
# fmt: on
