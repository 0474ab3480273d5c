"""Four made-up scanners: how the phantom's tissues look at each site."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace
from typing import Literal

import numpy as np
from nibabel.orientations import axcodes2ornt
from scipy import ndimage

Noise = Literal["gaussian", "rician", "speckle", "poisson"]
Texture = Literal["none", "stripes", "herringbone", "grain"]

FIELD_OF_VIEW_MM = (192.0, 192.0, 160.0)
DEFAULT_SIZE = {2: 128, 3: 48}


@dataclass(frozen=True)
class Signal:
    """The mean signal of each tissue, 0 for black and 1 for the brightest."""

    air: float
    fat: float
    muscle: float
    lung: float
    liver: float
    vessel: float
    bowel_wall: float
    bowel: float
    crescent: float
    shell: float
    cavity: float
    nodule: float


TISSUES = tuple(field.name for field in fields(Signal))


@dataclass(frozen=True)
class Site:
    """The scanner of one site.

    Attributes:
        gamma: Exponent of the display curve.
        noise_level: Standard deviation of the noise at full signal.
        bias: Standard deviation of the logarithm of the smooth multiplicative field.
        blur_mm: Full width at half maximum of the in-plane point spread.
        acquired_mm: In-plane spacing at which the scanner samples before it interpolates.
        texture_level: Standard deviation of the vendor's pattern.
        texture_mm: Period of stripes, or width of grains.
        spacing_mm: Voxel size along the array axes of 3-D images; the last is the slice thickness.
        orientation: Anatomical directions of the array axes of 3-D images.
        centre_mm: Where the middle of the body lies in the world (RAS).
        scale: Raw units of full signal in 3-D images.
        offset: Raw units of no signal in 3-D images.
    """

    signal: Signal
    gamma: float
    noise: Noise
    noise_level: float
    bias: float
    blur_mm: float
    acquired_mm: float
    texture: Texture
    texture_level: float
    texture_mm: float
    spacing_mm: tuple[float, float, float]
    orientation: str
    centre_mm: tuple[float, float, float]
    scale: float
    offset: float


SITES = {
    "north": Site(  # bright blood, sharp
        Signal(
            air=0.02, fat=0.80, muscle=0.36, lung=0.10, liver=0.50, vessel=0.74, bowel_wall=0.32, bowel=0.70,
            crescent=0.72, shell=0.28, cavity=0.78, nodule=0.88,
        ),
        gamma=1.0, noise="rician", noise_level=0.03, bias=0.10, blur_mm=2.0, acquired_mm=1.5,
        texture="none", texture_level=0.0, texture_mm=6.0,
        spacing_mm=(4.0, 4.0, 4.0), orientation="RAS", centre_mm=(0.0, 0.0, 0.0), scale=1200.0, offset=0.0,
    ),
    "east": Site(  # bright blood of less contrast, blurred, strong coil shading
        Signal(
            air=0.05, fat=0.55, muscle=0.38, lung=0.16, liver=0.46, vessel=0.80, bowel_wall=0.44, bowel=0.74,
            crescent=0.68, shell=0.44, cavity=0.76, nodule=0.90,
        ),
        gamma=0.8, noise="gaussian", noise_level=0.035, bias=0.20, blur_mm=3.5, acquired_mm=2.2,
        texture="stripes", texture_level=0.015, texture_mm=7.0,
        spacing_mm=(3.5, 3.5, 5.0), orientation="LPS", centre_mm=(-12.0, 30.0, 45.0), scale=600.0, offset=40.0,
    ),
    "south": Site(  # dark fat, shell brighter than muscle, grainy
        Signal(
            air=0.02, fat=0.22, muscle=0.44, lung=0.06, liver=0.62, vessel=0.86, bowel_wall=0.50, bowel=0.78,
            crescent=0.84, shell=0.58, cavity=0.80, nodule=0.96,
        ),
        gamma=1.2, noise="poisson", noise_level=0.04, bias=0.06, blur_mm=3.0, acquired_mm=1.8,
        texture="grain", texture_level=0.02, texture_mm=5.0,
        spacing_mm=(4.4, 4.4, 3.6), orientation="LAS", centre_mm=(20.0, -8.0, -60.0), scale=2400.0, offset=-1000.0,
    ),
    "west": Site(  # strong shading, nothing quite black, cavity darker than crescent
        Signal(
            air=0.32, fat=0.95, muscle=0.50, lung=0.38, liver=0.62, vessel=0.66, bowel_wall=0.40, bowel=0.66,
            crescent=0.76, shell=0.30, cavity=0.66, nodule=0.90,
        ),
        gamma=0.75, noise="speckle", noise_level=0.06, bias=0.21, blur_mm=3.5, acquired_mm=2.2,
        texture="herringbone", texture_level=0.03, texture_mm=8.0,
        spacing_mm=(3.8, 3.8, 6.0), orientation="PLS", centre_mm=(5.0, 60.0, 10.0), scale=3000.0, offset=200.0,
    ),
}  # fmt: skip


def jittered(site: Site, rng: np.random.Generator) -> Site:
    """Return `site` as it was set for one examination: contrast, gamma, noise, shading and pattern vary."""
    factor = np.exp(rng.normal(0, 0.05, len(TISSUES)))
    gamma, noise, bias, blur, texture = np.exp(rng.normal(0, [0.08, 0.15, 0.2, 0.1, 0.2]))
    return replace(
        site,
        signal=Signal(*(float(s) for s in np.clip(np.array(astuple(site.signal)) * factor, 0, 1))),
        gamma=site.gamma * float(gamma),
        noise_level=site.noise_level * float(noise),
        bias=site.bias * float(bias),
        blur_mm=site.blur_mm * float(blur),
        texture_level=site.texture_level * float(texture),
    )


def grid(site: Site, dimension: int, size: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the affine from voxel index to mm, and the shape, that cover the field of view at the site.

    Pictures have `size` rows and columns, the rows along y; volumes have the site's spacing and
    orientation where `size` is the default one, and a spacing scaled by default / size elsewhere.
    """
    field_mm = np.array(FIELD_OF_VIEW_MM)[:dimension]
    if dimension == 2:
        axes, centre_mm = np.array([[0.0, 1.0], [1.0, 0.0]]), np.zeros(2)
        spacing = field_mm / size
    else:
        axes, centre_mm = np.zeros((3, 3)), np.array(site.centre_mm)
        world_axis, sign = axcodes2ornt(site.orientation).astype(int).T
        axes[world_axis, range(3)] = sign
        spacing = np.array(site.spacing_mm) * DEFAULT_SIZE[3] / size
    shape = np.rint(np.abs(axes).T @ field_mm / spacing)
    affine = np.eye(dimension + 1)
    affine[:-1, :-1] = axes * spacing
    affine[:-1, -1] = centre_mm - affine[:-1, :-1] @ ((shape - 1) / 2)
    return affine, tuple(int(n) for n in shape)


def acquire(
    tissue: np.ndarray, fine: int, spacing_mm: tuple[float, ...], site: Site, rng: np.random.Generator
) -> np.ndarray:
    """Image a map of tissue indices as the site's scanner would.

    Args:
        tissue: Indices into `TISSUES` on a grid `fine` times finer than the image along every axis.
        fine: Fine samples per voxel along an axis; a voxel averages over them (partial volume).
        spacing_mm: Voxel size of the image; a third axis is the slice direction, which is not blurred.
        site: The scanner.
        rng: Draws shading, pattern and noise.

    Returns:
        The signal, 0 to about 1, with `tissue.shape / fine` voxels.
    """
    shape = tuple(n // fine for n in tissue.shape)
    in_plane = np.array([True, True, False][: tissue.ndim])
    image = np.array(astuple(site.signal), np.float32)[tissue]
    sigma = site.blur_mm / 2.355 / np.array(spacing_mm) * fine * in_plane
    image = block_means(ndimage.gaussian_filter(image, sigma, mode="nearest"), fine)

    coarser = np.where(in_plane, np.maximum(1, site.acquired_mm / np.array(spacing_mm)), 1)
    image = _zoomed(image, tuple(int(n) for n in np.maximum(1, np.rint(shape / coarser))))
    shading = _smooth_noise(image.shape, np.array(image.shape) / 4, rng)
    image = _noisy(image * np.exp(site.bias * shading), site.noise, site.noise_level, rng)
    image = _zoomed(image, shape)

    image = image + site.texture_level * _pattern(site, shape, spacing_mm, rng)
    return np.maximum(image, 0) ** site.gamma


def block_means(fine_image: np.ndarray, fine: int) -> np.ndarray:
    """Average over blocks of `fine` samples along every axis."""
    blocks = [part for n in fine_image.shape for part in (n // fine, fine)]
    return fine_image.reshape(blocks).mean(axis=tuple(range(1, len(blocks), 2)), dtype=np.float32)


def _noisy(image: np.ndarray, kind: Noise, level: float, rng: np.random.Generator) -> np.ndarray:
    if kind == "poisson":
        return rng.poisson(np.maximum(image, 0) / level**2) * level**2
    noise = level * rng.standard_normal(image.shape)
    if kind == "rician":
        return np.hypot(image + noise, level * rng.standard_normal(image.shape))
    return image * (1 + noise) if kind == "speckle" else image + noise


def _pattern(
    site: Site, shape: tuple[int, ...], spacing_mm: tuple[float, ...], rng: np.random.Generator
) -> np.ndarray:
    """Return the vendor's pattern with about unit standard deviation."""
    if site.texture == "none":
        return np.zeros(shape)
    if site.texture == "grain":
        return _smooth_noise(shape, site.texture_mm / 2.355 / np.array(spacing_mm), rng)
    first, second = np.meshgrid(
        *(np.arange(n) * s for n, s in zip(shape[:2], spacing_mm, strict=False)), indexing="ij"
    )
    if site.texture == "herringbone":
        first = first + np.abs((second / (4 * site.texture_mm)) % 2 - 1) * 2 * site.texture_mm
    phase = 2 * np.pi * (first + 0.3 * second) / site.texture_mm + rng.uniform(0, 2 * np.pi)
    stripes = np.sqrt(2) * np.sin(phase)
    return stripes.reshape(stripes.shape + (1,) * (len(shape) - 2))


def _smooth_noise(shape: tuple[int, ...], sigma: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="reflect")
    return (noise - noise.mean()) / max(float(noise.std()), 1e-6)


def _zoomed(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if shape == image.shape:
        return image
    zoom = np.array(shape) / image.shape
    return np.asarray(ndimage.zoom(image, zoom, order=1, mode="nearest", grid_mode=True))
