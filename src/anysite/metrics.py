"""Segmentation metrics of one case on its native grid, with explicit rules for empty masks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy import ndimage
from scipy.spatial import KDTree

from anysite.errors import GeometryError

METRICS: dict[str, str] = {
    "dice": "2 |P and T| / (|P| + |T|)",
    "iou": "|P and T| / |P or T|",
    "hd95": "larger of the two directed 95th percentiles of the surface distances",
    "assd": "mean of the surface distances of both directions taken together",
    "surface_dice": "share of both surfaces that lies within the tolerance of the other",
    "volume_error": "predicted minus true volume",
    "relative_volume_error": "volume error divided by the true volume",
}
TOLERANCE = 2.0  # of the surface Dice, in mm or px
SURFACE_METRICS = frozenset({"hd95", "assd", "surface_dice"})


@dataclass(frozen=True)
class Score:
    """One metric of one class in one case; `value` is None where the metric is undefined."""

    class_name: str
    metric: str
    value: float | None
    unit: str


def score_case(
    prediction: Integer[np.ndarray, "*s"],
    truth: Integer[np.ndarray, "*_"],
    masks_of: Sequence[tuple[str, tuple[int, ...]]],
    spacing: Sequence[float],
    unit: str,
    tolerance: float = TOLERANCE,
    metrics: Collection[str] = METRICS,
) -> list[Score]:
    """Score every class of two label maps `(*S)` of class indices.

    Args:
        prediction: The predicted class indices `(*S)`.
        truth: The true class indices, of the same shape.
        masks_of: Class names with the class indices that make up each mask; they may overlap.
        spacing: The voxel size along each axis, in `unit`.
        unit: "mm" or "px".
        tolerance: The tolerance of the surface Dice, in `unit`.
        metrics: Those to compute, of `METRICS`.

    Raises:
        GeometryError: the shapes differ, or the spacing does not fit them.
    """
    _check_geometry(prediction, truth, spacing)
    return [
        Score(name, metric, value, unit_of(metric, unit, truth.ndim))
        for name, indices in masks_of
        for metric, value in score_class(
            np.isin(prediction, indices), np.isin(truth, indices), spacing, tolerance, metrics
        ).items()
    ]


def score_class(
    prediction: Bool[np.ndarray, "*s"],
    truth: Bool[np.ndarray, "*_"],
    spacing: Sequence[float],
    tolerance: float = TOLERANCE,
    metrics: Collection[str] = METRICS,
) -> dict[str, float | None]:
    """Compute metrics of `METRICS`, all of them by default, for two masks `(*S)`.

    A surface is the mask without its erosion by the cross-shaped structuring element; outside the image
    lies background, so mask voxels at the border are surface. Distances run between voxel centres, from
    each surface voxel to the nearest one of the other surface. Percentiles interpolate linearly. All this
    equals MONAI's metrics without subvoxels (https://docs.monai.io/en/stable/metrics.html). A volume of a single slice
    is the picture that it shows: as a volume all of its mask would be surface.

    Dice and IoU: Taha and Hanbury 2015 (https://doi.org/10.1186/s12880-015-0068-x). Surface Dice: Nikolov
    et al. 2018 (https://arxiv.org/abs/1809.04430), counting surface voxels instead of areas.

    Empty masks: both empty leave every metric undefined (None, to be left out of means). If only one is
    empty, the overlaps and the surface Dice are 0, and HD95 and ASSD are the diagonal of the image, which
    no true distance reaches. The relative volume error is undefined where the truth is empty.

    Args:
        prediction: The predicted mask `(*S)`.
        truth: The true mask, of the same shape.
        spacing: The voxel size along each axis; distances come in its unit, volumes in its power.
        tolerance: The tolerance of the surface Dice, inclusive, in the unit of the spacing.
        metrics: Those to compute; without those of surfaces it takes a fraction of the time.

    Raises:
        GeometryError: the shapes differ, or the spacing does not fit them.
    """
    _check_geometry(prediction, truth, spacing)
    predicted, true = int(np.count_nonzero(prediction)), int(np.count_nonzero(truth))
    if predicted == true == 0:
        return dict.fromkeys(metrics)
    overlap = int(np.count_nonzero(prediction & truth))
    scores: dict[str, float | None] = {
        "dice": 2 * overlap / (predicted + true),
        "iou": overlap / (predicted + true - overlap),
    }
    if predicted == 0 or true == 0:
        diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
        scores |= {"hd95": diagonal, "assd": diagonal, "surface_dice": 0.0}
    elif not SURFACE_METRICS.isdisjoint(metrics):
        to_truth, to_prediction = _surface_distances(prediction, truth, spacing)
        both = np.concatenate([to_truth, to_prediction])
        scores["hd95"] = float(max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95)))
        scores["assd"] = float(both.mean())
        # A distance such as 3 x 0.1 mm exceeds a tolerance of 0.3 mm by rounding alone.
        scores["surface_dice"] = float((both <= tolerance * (1 + 1e-6)).mean())
    scores["volume_error"] = (predicted - true) * float(np.prod(spacing))
    scores["relative_volume_error"] = (predicted - true) / true if true else None
    return {metric: scores[metric] for metric in metrics}


def unit_of(metric: str, unit: str, dimension: int) -> str:
    """Return the unit of a metric on a grid in `unit`, such as "mm", "mm3" or, for ratios, "1"."""
    if metric in ("hd95", "assd"):
        return unit
    return f"{unit}{dimension}" if metric == "volume_error" else "1"


def _surface_distances(
    prediction: Bool[np.ndarray, "*s"], truth: Bool[np.ndarray, "*s"], spacing: Sequence[float]
) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " t"]]:
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    points = []
    for mask in (prediction, truth):
        if mask.ndim == 3 and 1 in mask.shape:
            slice_axis = mask.shape.index(1)
            points.append(_surface_points(mask[box].squeeze(slice_axis), np.delete(spacing, slice_axis)))
        else:
            points.append(_surface_points(mask[box], spacing))
    # The many points of equal coordinates make a balanced tree slower to build than it saves.
    trees = [KDTree(p, leafsize=32, balanced_tree=False, compact_nodes=False) for p in points]
    return trees[1].query(points[0])[0], trees[0].query(points[1])[0]


def _surface_points(
    mask: Bool[np.ndarray, "*s"], spacing: Sequence[float] | np.ndarray
) -> Float[np.ndarray, "n d"]:
    return np.argwhere(mask & np.logical_not(ndimage.binary_erosion(mask))) * np.asarray(spacing, float)


def _check_geometry(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> None:
    if prediction.shape != truth.shape:
        raise GeometryError(
            f"a prediction of shape {prediction.shape}",
            expected=f"{truth.shape}, the shape of the truth",
            fix="score on the native grid of the label",
        )
    if len(spacing) != truth.ndim or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise GeometryError(f"a spacing of {tuple(spacing)}", expected=f"{truth.ndim} positive lengths")
