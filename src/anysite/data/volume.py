"""An image or label map with its place in the world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from nibabel.orientations import (
    aff2axcodes,
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from scipy import ndimage

from anysite.errors import GeometryError

Interpolation = Literal["linear", "cubic", "label"]
TIE_BREAK = 1e-4
BLOCK_VOXELS = 2**24
LEAST_WEIGHT = 1e-9  # less changes no float32, and the least of them would be subnormal, which are slow
SPACING_MM = (1e-4, 1e4)  # anything beyond is a damaged header
COSINE_OF_SHEAR = 0.02  # axes that meet at 90 degrees give or take one


@dataclass(frozen=True, eq=False)
class Volume:
    """An array `(C, *S)` with two or three spatial axes, and the affine from voxel index to world.

    Attributes:
        array: Channels first; a label map has one channel and integers.
        affine: `(D+1, D+1)`; for three axes it maps to RAS in mm, for two axes to pixels.
        unit: "mm", or "px" where the file knows no physical size.

    Raises:
        GeometryError: array and affine do not fit together, or the affine is singular or not finite.
    """

    array: np.ndarray
    affine: np.ndarray
    unit: Literal["mm", "px"] = "mm"

    def __post_init__(self) -> None:
        dimension = self.array.ndim - 1
        if dimension not in (2, 3) or 0 in self.array.shape:
            raise GeometryError(
                f"an array of shape {self.array.shape}",
                expected="(channels, *space) with 2 or 3 spatial axes",
            )
        if self.affine.shape != (dimension + 1, dimension + 1):
            raise GeometryError(
                f"an affine of shape {self.affine.shape} for {dimension} spatial axes",
                expected=f"{(dimension + 1, dimension + 1)}",
            )
        if not np.isfinite(self.affine).all() or abs(np.linalg.det(self.affine[:-1, :-1])) < 1e-12:
            raise GeometryError("an affine that is singular or not finite", expected="an invertible affine")
        if self.unit == "mm" and max(self.spacing) > SPACING_MM[1]:
            raise GeometryError(
                f"voxels of {max(self.spacing):g} mm", expected=f"at most {SPACING_MM[1]:g} mm a voxel"
            )

    @classmethod
    def of_pixels(cls, array: np.ndarray) -> Volume:
        """Wrap a `(C, H, W)` array whose physical size is unknown."""
        return cls(array, np.eye(array.ndim), "px")

    @property
    def dimension(self) -> int:
        """The number of spatial axes, 2 or 3."""
        return self.array.ndim - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The spatial shape in voxels."""
        return self.array.shape[1:]

    @property
    def spacing(self) -> tuple[float, ...]:
        """The voxel size along each array axis, in `unit`."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:-1, :-1], axis=0))

    @property
    def axes(self) -> str:
        """The anatomical direction of each array axis, such as "RAS"; empty for two spatial axes."""
        return "".join(aff2axcodes(self.affine)) if self.dimension == 3 else ""

    def with_array(self, array: np.ndarray) -> Volume:
        """Return `array` `(C, *S)` on this volume's grid.

        Raises:
            GeometryError: the spatial shapes differ.
        """
        if array.shape[1:] != self.shape:
            raise GeometryError(f"an array of spatial shape {array.shape[1:]}", expected=f"{self.shape}")
        return replace(self, array=array)

    def without_voxels(self) -> Volume:
        """Return the grid alone: one broadcast zero has the shape and takes no memory."""
        return self.with_array(np.broadcast_to(np.uint8(0), (1, *self.shape)))

    def same_grid(self, other: Volume, tolerance_voxels: float = 0.02) -> bool:
        """Tell whether both lie on one grid: equal shape, and corners apart by a rounded header's error at most."""
        if self.shape != other.shape or self.unit != other.unit:
            return False
        corners = np.stack([*np.eye(self.dimension + 1) * [*self.shape, 1]], axis=1)
        corners[-1] = 1
        return bool(
            np.allclose(
                self.affine @ corners,
                other.affine @ corners,
                rtol=0,
                atol=tolerance_voxels * min(self.spacing),
            )
        )

    def oriented(self, axes: str = "RAS") -> Volume:
        """Return the volume with its axes flipped and permuted to the nearest `axes`; no interpolation.

        Images with two spatial axes have no anatomical axes and come back unchanged.
        """
        if self.dimension == 2:
            return self
        transform = ornt_transform(io_orientation(self.affine), axcodes2ornt(axes))
        # nibabel orients the leading axes, so the channel axis waits at the end.
        array = np.moveaxis(apply_orientation(np.moveaxis(self.array, 0, -1), transform), -1, 0)
        return replace(self, array=array, affine=self.affine @ inv_ornt_aff(transform, self.shape))

    def resampled(self, spacing: Sequence[float], interpolation: Interpolation = "linear") -> Volume:
        """Return the volume on a grid of about `spacing` over exactly the same extent.

        The number of voxels is rounded, so the new spacing is the extent divided by it. Labels are
        interpolated class by class and take the largest, so no class is invented.
        """
        extent = np.array(self.shape) * self.spacing
        shape = tuple(int(n) for n in np.maximum(1, np.rint(extent / np.asarray(spacing, float))))
        return self.resampled_to(shape, interpolation)

    def resampled_to(self, shape: Sequence[int], interpolation: Interpolation = "linear") -> Volume:
        """Return the volume with `shape` voxels over exactly the same extent."""
        shape = tuple(shape)
        if shape == self.shape:
            return self
        if interpolation == "label":
            array = np.zeros((1, *shape), self.array.dtype)
            best = np.zeros((1, *shape), np.float32)
            nearest = interpolate(self.array[0], shape, 0)
            for value in np.unique(self.array):
                score = interpolate(self.array[0] == value, shape, 1)[None]
                # Halfway between two voxels all ties would fall to the lower value, and organs would shrink.
                score += TIE_BREAK * (nearest == value)
                array[score > best] = value
                np.maximum(best, score, out=best)
        else:
            order = 3 if interpolation == "cubic" else 1
            array = np.stack([interpolate(channel, shape, order) for channel in self.array])
        zoom = np.array(shape) / np.array(self.shape)
        # Voxel centres: index i of the new grid lies at (i + 1/2) / zoom - 1/2 of the old one.
        to_old = np.diag([*(1 / zoom), 1.0])
        to_old[:-1, -1] = (1 / zoom - 1) / 2
        return replace(self, array=array, affine=self.affine @ to_old)


def require_usable(affine: np.ndarray) -> None:
    """Refuse an affine `(4, 4)` in mm that is no grid with right angles and voxels of a credible size.

    Raises:
        GeometryError: voxels of no size, beyond all sizes or not finite, or axes over a degree from right angles.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and SPACING_MM[0] <= spacing.min() <= spacing.max() <= SPACING_MM[1]):
        sizes = " x ".join(f"{size:g}" for size in spacing)
        raise GeometryError(f"voxels of {sizes} mm", expected="voxel sizes above 0", fix="mend the header")
    directions = affine[:3, :3] / spacing
    cosine = abs(directions.T @ directions - np.eye(3)).max()
    if cosine > COSINE_OF_SHEAR:
        raise GeometryError(
            f"axes that meet at {np.degrees(np.arccos(min(1.0, cosine))):.1f} degrees",
            expected="a grid with right angles",
            fix="resample the image and its label to one",
        )


def interpolate(array: np.ndarray, shape: Sequence[int], order: int) -> np.ndarray:
    """Return an array in float32 with `shape` over the same extent: nearest, linear or cubic B-spline interpolation.

    What `scipy.ndimage.zoom` does, axis by axis with the one first that shrinks most, and in blocks, so that a
    large volume needs little more memory than what comes out.
    """
    for axis in sorted(range(array.ndim), key=lambda axis: shape[axis] / array.shape[axis]):
        if shape[axis] != array.shape[axis]:
            array = _apply_along(interpolation_matrix(array.shape[axis], shape[axis], order), array, axis)
    return array.astype(np.float32, copy=False)


def in_order(array: np.ndarray) -> np.ndarray:
    """Return an array `(C, *S)` with its last axis innermost in memory, itself where it is so already.

    Files hold their first axis innermost. Plane by plane a copy stays within the cache.
    """
    if array.flags.c_contiguous or array.ndim < 4:
        return np.ascontiguousarray(array)
    ordered = np.empty(array.shape, array.dtype)
    for channel, source in zip(ordered, array, strict=True):
        for middle in range(source.shape[1]):
            channel[:, middle] = source[:, middle]
    return ordered


@lru_cache(maxsize=32)
def interpolation_matrix(size: int, new_size: int, order: int) -> np.ndarray:
    """Return the weights `(new_size, size)` of the old voxels in the new ones; outermost values go on outside."""
    result = np.empty((new_size, size))
    unit_vectors = np.eye(size)
    ndimage.zoom(
        unit_vectors, (new_size / size, 1), output=result, order=order, mode="nearest", grid_mode=True
    )
    result[abs(result) < LEAST_WEIGHT] = 0
    return result.astype(np.float32)


def _apply_along(matrix: np.ndarray, array: np.ndarray, axis: int) -> np.ndarray:
    moved = np.moveaxis(array, axis, 0)
    result = np.empty((len(matrix), *moved.shape[1:]), np.float32)
    step = max(1, BLOCK_VOXELS * moved.shape[1] // moved.size) if moved.ndim > 1 else 1
    for start in range(0, moved.shape[1], step):
        block = np.ascontiguousarray(moved[:, start : start + step], np.float32)
        result[:, start : start + step] = np.tensordot(matrix, block, 1)
    return np.moveaxis(result, 0, axis)
