"""Metrics against MONAI, against pairwise distances, and under properties that define them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice
from monai.metrics.meaniou import compute_iou
from monai.metrics.surface_dice import compute_surface_dice
from monai.metrics.surface_distance import compute_average_surface_distance
from scipy import ndimage

from anysite.errors import GeometryError
from anysite.metrics import METRICS, Score, score_case, score_class, unit_of

pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")

GRIDS = [((40, 31), (0.7, 1.9)), ((20, 25, 7), (0.8, 1.3, 5.0)), ((9, 8, 1), (1.0, 1.0, 8.0))]
UNCHANGED_BY_EXCHANGE = ("dice", "iou", "hd95", "assd", "surface_dice")

shapes = hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=7)
spacings = st.tuples(*[st.sampled_from([0.4, 0.75, 1.0, 2.5, 8.0])] * 3)


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    shape = draw(shapes)
    masks = [draw(hnp.arrays(np.bool_, shape)) for _ in range(2)]
    return masks[0], masks[1], draw(spacings)[: len(shape)]


def score(
    prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...], tolerance: float = 2.0
) -> dict[str, float]:
    """Score two masks that are not empty, where every metric has a value."""
    scores = score_class(prediction, truth, spacing, tolerance)
    return {name: value for name, value in scores.items() if value is not None}


def blob(shape: tuple[int, ...], seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, [min(2.0, n / 8) for n in shape]) > 0.05


def picture_of(mask: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, tuple[float, ...]]:
    """Return what a volume of one slice shows, others as they are."""
    if mask.ndim == 2 or 1 not in mask.shape:
        return mask, spacing
    axis = mask.shape.index(1)
    return mask.squeeze(axis), spacing[:axis] + spacing[axis + 1 :]


def score_by_monai(
    prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...], tolerance: float
) -> dict[str, float]:
    (prediction, _), (truth, spacing) = (picture_of(mask, spacing) for mask in (prediction, truth))
    p, t = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth))
    return {
        "dice": compute_dice(p, t).item(),
        "iou": compute_iou(p, t).item(),
        "hd95": compute_hausdorff_distance(p, t, True, percentile=95, spacing=spacing).item(),
        "assd": compute_average_surface_distance(p, t, True, symmetric=True, spacing=spacing).item(),
        "surface_dice": compute_surface_dice(p, t, [tolerance], True, spacing=spacing).item(),
    }


def score_slowly(
    prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...], tolerance: float
) -> dict[str, float]:
    """Take voxels with a background face neighbour as surface, and every pair of them."""
    surfaces, volume = [], np.prod(spacing)
    (prediction, _), (truth, spacing) = (picture_of(mask, spacing) for mask in (prediction, truth))
    for mask in (prediction, truth):
        padded = np.pad(mask, 1)
        steps = [step for axis in np.eye(mask.ndim, dtype=int) for step in (axis, -axis)]
        surface = [v for v in np.argwhere(padded) if not all(padded[tuple(v + s)] for s in steps)]
        surfaces.append(np.array(surface) * spacing)
    pairs = np.sqrt(((surfaces[0][:, None] - surfaces[1][None]) ** 2).sum(axis=-1))
    directed = [pairs.min(axis=1), pairs.min(axis=0)]
    within = sum((d <= tolerance + 1e-9).sum() for d in directed)
    return {
        "hd95": max(np.percentile(d, 95) for d in directed),
        "assd": sum(d.sum() for d in directed) / sum(map(len, directed)),
        "surface_dice": within / sum(map(len, directed)),
        "volume_error": (prediction.sum() - truth.sum()) * volume,
    }


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
@pytest.mark.parametrize("border", ["touched", "free"])
def test_agrees_with_monai(shape: tuple[int, ...], spacing: tuple[float, ...], border: str) -> None:
    for seed in range(4):
        prediction, truth = blob(shape, 2 * seed), blob(shape, 2 * seed + 1)
        if border == "free":
            prediction, truth = np.pad(prediction, 3), np.pad(truth, 3)
        ours = score(prediction, truth, spacing, 1.5)
        monais = score_by_monai(prediction, truth, spacing, 1.5)
        assert {name: ours[name] for name in monais} == pytest.approx(monais, rel=1e-5)


@settings(deadline=None, max_examples=150)
@given(mask_pairs(), st.sampled_from([0.0, 0.4, 2.0, 5.0]))
def test_agrees_with_all_pairwise_distances(
    masks: tuple[np.ndarray, np.ndarray, tuple[float, ...]], tolerance: float
) -> None:
    prediction, truth, spacing = masks
    if prediction.any() and truth.any():
        slow = score_slowly(prediction, truth, spacing, tolerance)
        ours = score(prediction, truth, spacing, tolerance)
        assert {name: ours[name] for name in slow} == pytest.approx(slow, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(mask_pairs(), st.sampled_from([0.5, 2.0, 4.0]))
def test_exchange_translation_scale_and_bounds(
    masks: tuple[np.ndarray, np.ndarray, tuple[float, ...]], scale: float
) -> None:
    prediction, truth, spacing = masks
    if not (prediction.any() and truth.any()):
        return
    scores = score(prediction, truth, spacing)
    exchanged = score(truth, prediction, spacing)
    assert {k: exchanged[k] for k in UNCHANGED_BY_EXCHANGE} == pytest.approx(
        {k: scores[k] for k in UNCHANGED_BY_EXCHANGE}
    )
    assert exchanged["volume_error"] == -scores["volume_error"]

    # A volume of one slice stays one: with more around it, it is scored as a volume.
    flat = truth.shape.index(1) if truth.ndim == 3 and 1 in truth.shape else None
    margin = [(0, 0) if axis == flat else (3, 1) for axis in range(truth.ndim)]
    assert score(np.pad(prediction, margin), np.pad(truth, margin), spacing) == pytest.approx(scores)

    scaled = score(prediction, truth, tuple(scale * s for s in spacing), 2.0 * scale)
    power = {"hd95": 1, "assd": 1, "volume_error": truth.ndim}
    assert scaled == pytest.approx({k: v * scale ** power.get(k, 0) for k, v in scores.items()})

    diagonal = np.linalg.norm(np.multiply(truth.shape, spacing))
    assert scores["hd95"] < diagonal
    assert scores["assd"] < diagonal
    assert scores["iou"] == pytest.approx(scores["dice"] / (2 - scores["dice"]))


def test_identical_masks_are_perfect() -> None:
    mask = blob((12, 11, 5), 3)
    perfect = dict.fromkeys(METRICS, 0.0) | {"dice": 1.0, "iou": 1.0, "surface_dice": 1.0}
    assert score_class(mask, mask, (1.0, 1.0, 4.0), tolerance=0.0) == perfect


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_of_one_slice_is_scored_as_the_picture_it_shows(axis: int, rng: np.random.Generator) -> None:
    prediction, truth = rng.random((2, 12, 9)) > 0.4
    picture = score_class(prediction, truth, (0.5, 2.0), tolerance=0.7)
    spacing = np.insert([0.5, 2.0], axis, 8.0).tolist()
    volume = score_class(
        np.expand_dims(prediction, axis), np.expand_dims(truth, axis), spacing, tolerance=0.7
    )
    for metric in ("dice", "hd95", "assd", "surface_dice", "relative_volume_error"):
        assert volume[metric] == pytest.approx(picture[metric]), metric


def test_a_distance_equal_to_the_tolerance_is_within_it_despite_rounding() -> None:
    prediction, truth = np.zeros((6, 6), bool), np.zeros((6, 6), bool)
    prediction[0, 0] = truth[3, 0] = True
    assert 3 * 0.1 > 0.3
    assert score_class(prediction, truth, (0.1, 0.1), tolerance=0.3)["surface_dice"] == 1
    assert score_class(prediction, truth, (0.1, 0.1), tolerance=0.299)["surface_dice"] == 0


@pytest.mark.parametrize("metrics", [("dice",), ("volume_error", "hd95"), ("iou", "surface_dice")])
def test_only_the_metrics_asked_for_are_given_and_they_are_the_same(metrics: tuple[str, ...]) -> None:
    prediction, truth = np.random.default_rng(0).random((2, 9, 8)) < 0.5
    every = score_class(prediction, truth, (1.0, 2.0))
    assert score_class(prediction, truth, (1.0, 2.0), metrics=metrics) == {m: every[m] for m in metrics}


def test_empty_masks() -> None:
    empty, full = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    assert score_class(empty, empty, (1.0, 1.0)) == dict.fromkeys(METRICS)
    worst = {"dice": 0.0, "iou": 0.0, "hd95": 10.0, "assd": 10.0, "surface_dice": 0.0}
    assert score_class(empty, full, (2.0, 2.0)) == worst | {
        "volume_error": -48.0,
        "relative_volume_error": -1.0,
    }
    assert score_class(full, empty, (2.0, 2.0)) == worst | {
        "volume_error": 48.0,
        "relative_volume_error": None,
    }


def test_case_scores_classes_and_overlapping_regions_with_units() -> None:
    truth = np.array([[0, 1, 1], [0, 2, 2], [0, 0, 0]], np.uint8)
    prediction = np.array([[0, 1, 1], [0, 0, 1], [0, 0, 0]], np.int32)
    masks = [("core", (2,)), ("whole", (1, 2)), ("absent", (3,))]
    scores = score_case(prediction, truth, masks, (1.0, 3.0), "px")
    assert [(s.class_name, s.metric) for s in scores] == [(name, m) for name, _ in masks for m in METRICS]
    assert Score("core", "dice", 0.0, "1") in scores
    assert Score("core", "volume_error", -6.0, "px2") in scores
    assert Score("whole", "dice", 6 / 7, "1") in scores
    hd95 = next(s for s in scores if (s.class_name, s.metric) == ("whole", "hd95"))
    assert (hd95.value, hd95.unit) == (pytest.approx(0.85), "px")  # of the distances 0, 0, 0, 1
    assert all(s.value is None for s in scores if s.class_name == "absent")
    assert unit_of("volume_error", "mm", 3) == "mm3"
    assert unit_of("assd", "mm", 3) == "mm"


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 0.0), (1.0, np.nan), (1.0, 1.0)])
def test_contradictory_geometry_is_refused(spacing: tuple[float, ...]) -> None:
    other = (4, 5) if spacing == (1.0, 1.0) else (4, 4)
    with pytest.raises(GeometryError, match="expected"):
        score_case(np.zeros(other, int), np.zeros((4, 4), int), [("a", (1,))], spacing, "mm")


def test_importing_metrics_does_not_import_torch() -> None:
    code = "import sys, anysite.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
