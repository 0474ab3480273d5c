"""The grid that DICOM slices lie on, refused where they lie on none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anysite.errors import GeometryError

ROUNDING_MM = 2e-3  # of positions written with few digits
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Plane:
    """Where one slice lies, in DICOM's own axes (LPS, mm).

    Attributes:
        position: Of the centre of the first pixel.
        orientation: Unit vectors `(2, 3)` along a row and along a column.
        spacing: Between the centres of adjacent rows, and of adjacent columns.
        thickness: Distance to a next slice where there is none, 0 where it is unknown.
    """

    position: np.ndarray
    orientation: np.ndarray
    spacing: np.ndarray
    thickness: float = 0.0

    @property
    def normal(self) -> np.ndarray:
        """The unit vector `(3,)` that slices are counted along."""
        return np.cross(*self.orientation)

    def affine(self, step: np.ndarray) -> np.ndarray:
        """Return the affine `(4, 4)` from (column, row, slice) to RAS in mm, `step` leading to the next slice."""
        affine = np.eye(4)
        affine[:3, 0] = self.orientation[0] * self.spacing[1]
        affine[:3, 1] = self.orientation[1] * self.spacing[0]
        affine[:3, 2] = step
        affine[:3, 3] = self.position
        return LPS_TO_RAS @ affine


def make_plane(
    position: Sequence[float], orientation: Sequence[float], spacing: Sequence[float], thickness: float = 0.0
) -> Plane:
    """Return a plane from the numbers in a header.

    Raises:
        GeometryError: numbers that are missing or not finite, direction cosines that are not orthonormal, or a
            spacing that is not positive.
    """
    for name, numbers, count in (
        ("position", position, 3),
        ("orientation", orientation, 6),
        ("pixel spacing", spacing, 2),
    ):
        if len(numbers) != count or not np.isfinite(numbers).all():
            raise GeometryError(f"a slice with the {name} {_listed(numbers)}", expected=f"{count} numbers")
    if min(spacing) <= 0:
        raise GeometryError(f"a pixel spacing of {_listed(spacing)} mm", expected="positive numbers")
    if not np.isfinite(thickness) or thickness < 0:
        raise GeometryError(f"a slice spacing of {thickness:g} mm", expected="a positive number")
    row, column = np.reshape(np.asarray(orientation, float), (2, 3))
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1) for length in lengths) > 1e-3:
        raise GeometryError(
            f"direction cosines of length {lengths[0]:.4g} and {lengths[1]:.4g}", expected="unit vectors"
        )
    if abs(row @ column) > 1e-3:
        raise GeometryError("direction cosines that are not orthogonal", expected="a right angle")
    row = row / lengths[0]
    column = column - (column @ row) * row
    axes = np.stack([row, column / np.linalg.norm(column)])
    return Plane(np.asarray(position, float), axes, np.asarray(spacing, float), float(thickness))


def order_slices(planes: Sequence[Plane]) -> tuple[list[int], np.ndarray]:
    """Return the order of the slices along their normal, and the affine `(4, 4)` to RAS of the ordered stack.

    Raises:
        GeometryError: slices that are no stack of parallel, evenly spaced planes without shear.
    """
    first = planes[0]
    for name, attribute, tolerance in (("orientation", "orientation", 1e-4), ("pixel spacing", "spacing", 0)):
        values = np.stack([getattr(plane, attribute) for plane in planes])
        apart = np.abs(values - values[0]).reshape(len(planes), -1).max(axis=1)
        odd = int((apart > (tolerance or 1e-3 * first.spacing.min())).sum())
        if odd:
            raise GeometryError(
                f"{odd} of {len(planes)} slices of another {name} than the first",
                expected="one stack of parallel slices",
                fix="separate them, or convert the series to NIfTI by a tool made for its kind",
            )
    positions = np.stack([plane.position for plane in planes])
    heights = positions @ first.normal
    order = [int(index) for index in np.argsort(heights, kind="stable")]
    if len(planes) == 1:
        if not first.thickness:
            raise GeometryError(
                "one slice of unknown thickness", expected="several slices, or a slice thickness"
            )
        return order, first.affine(first.normal * first.thickness)
    _require_even(heights[order])
    step = (positions[order[-1]] - positions[order[0]]) / (len(planes) - 1)
    _require_straight(positions[order], step, first.normal)
    return order, planes[order[0]].affine(step)


def _require_even(heights: np.ndarray) -> None:
    gaps = np.diff(heights)
    spread = heights[-1] - heights[0]
    apart = gaps[gaps > max(ROUNDING_MM, 1e-6 * spread)]
    if len(apart) < len(gaps):
        places = len(apart) + 1
        fix = "one image a position: separate phases, echoes or repetitions into series of their own"
        if places == 1:
            raise GeometryError(
                f"{len(heights)} slices at one position", expected="different positions", fix=fix
            )
        raise GeometryError(
            f"{len(heights)} slices at {places} positions, some of them more than once",
            expected="one slice a position",
            fix=fix,
        )
    usual = float(np.median(gaps))
    tolerance = 0.01 * usual + ROUNDING_MM
    steps = np.rint(gaps / usual)
    odd = np.flatnonzero(np.abs(gaps - usual) > tolerance)
    if odd.size and (np.abs(gaps - steps * usual) <= tolerance * steps).all():
        raise GeometryError(
            f"a gap of {gaps[odd[0]]:.4g} mm after slice {odd[0] + 1} of {len(heights)}, others being "
            f"{usual:.4g} mm apart: {int(steps[odd].sum()) - odd.size} slices are missing",
            expected="evenly spaced slices",
            fix="copy the whole series again",
        )
    even = np.linspace(heights[0], heights[-1], len(heights))
    if odd.size or np.abs(heights - even).max() > 0.1 * usual + ROUNDING_MM:
        raise GeometryError(
            f"unevenly spaced slices, {gaps.min():.4g} to {gaps.max():.4g} mm apart",
            expected="one spacing within 1 %",
            fix="resample the series to an even spacing",
        )


def _require_straight(positions: np.ndarray, step: np.ndarray, normal: np.ndarray) -> None:
    aside = step - (step @ normal) * normal
    length = np.linalg.norm(step) * (len(positions) - 1)
    if np.linalg.norm(aside) * (len(positions) - 1) > 1e-3 * length + ROUNDING_MM:
        angle = np.degrees(np.arctan2(np.linalg.norm(aside), abs(step @ normal)))
        raise GeometryError(
            f"a sheared stack: slices are shifted by {angle:.2f} degrees (gantry tilt)",
            expected="slices above each other along their normal",
            fix="correct the tilt with a tool that resamples, such as dcm2niix",
        )
    line = positions[0] + np.arange(len(positions))[:, None] * step
    off = positions - line
    sideways = np.linalg.norm(off - (off @ normal)[:, None] * normal, axis=1)
    if sideways.max() > 0.01 * np.linalg.norm(step) + ROUNDING_MM:
        raise GeometryError(
            f"slice {int(sideways.argmax()) + 1} of {len(positions)} is shifted sideways by "
            f"{sideways.max():.4g} mm",
            expected="slices above each other along their normal",
        )


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers) or "missing"
