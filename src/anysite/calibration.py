"""Calibration: how far confidence is from being right, and the temperature that mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy import ndimage, special

CALIBRATION_METRICS: dict[str, str] = {
    "ece": "mean distance of accuracy from confidence, in 15 bins of equal width weighted by their voxels",
    "ace": "the same in 15 bins of equally many voxels",
    "mce": "largest distance of accuracy from confidence, in 15 bins of equal width",
    "brier": "mean squared distance of the probabilities from the truth, summed over classes",
    "nll": "mean negative logarithm of the probability of the truth",
}
BINS = 15
BAND = 5  # voxels of the smallest spacing around anything predicted or true
LEAST = 1e-12  # probability; its logarithm is finite
COLDEST, HOTTEST = 0.05, 20.0


@dataclass(frozen=True)
class Temperature:
    """What logits are divided by: Guo, Pleiss, Sun, Weinberger, 2017, https://arxiv.org/abs/1706.04599.

    Attributes:
        values: One for all, or one for each class (or region); of classes that of the most likely one counts,
            so that no voxel changes its class.
    """

    values: tuple[float, ...] = (1.0,)

    def apply(self, probabilities: Float[np.ndarray, "k *s"], overlapping: bool) -> Float[np.ndarray, "k *s"]:
        """Return calibrated probabilities; `overlapping` regions are each a probability of its own."""
        if set(self.values) == {1.0}:
            return probabilities
        values = np.asarray(self.values, probabilities.dtype)
        if overlapping:
            values = np.broadcast_to(values, len(probabilities)).reshape(-1, *[1] * (probabilities.ndim - 1))
            own, other = (np.log(np.maximum(p, LEAST)) for p in (probabilities, 1 - probabilities))
            return special.expit((own - other) / values)
        chosen = values[0] if len(values) == 1 else values[find_likeliest(probabilities)]
        return special.softmax(np.log(np.maximum(probabilities, LEAST)) / chosen, axis=0)


def find_likeliest(probabilities: Float[np.ndarray, "k *s"]) -> Integer[np.ndarray, "*s"]:
    """Return the index of every voxel's largest value, the first of equal ones.

    As argmax does, which is slow along a first axis.
    """
    label = np.zeros(probabilities.shape[1:], np.min_scalar_type(len(probabilities)))
    largest = probabilities[0].copy()
    for index, chance in enumerate(probabilities[1:], 1):
        np.copyto(label, index, where=chance > largest)
        np.maximum(largest, chance, out=largest)
    return label


def fit_temperature(
    probabilities: Float[np.ndarray, "k n"],
    truth: Bool[np.ndarray, "k n"],
    *,
    overlapping: bool,
    per_class: bool = False,
    least_voxels: int = 1000,
) -> Temperature:
    """Return the temperature of the smallest negative log-likelihood.

    Args:
        probabilities: Of voxels the network was not trained on.
        truth: For each voxel whether it is of each class; at least one, unless they overlap, and several where a
            label does not tell them apart (`allow_unknown`).
        overlapping: Whether classes overlap.
        per_class: One for each class, by the voxels of which it is the most likely, or for each region; of
            classes with fewer than `least_voxels`, and of regions with fewer inside or outside, the one for all.
    """
    overall = _minimise(probabilities, truth, overlapping)
    if not per_class:
        return Temperature((overall,))
    values = []
    likeliest = find_likeliest(probabilities)
    for index in range(len(probabilities)):
        chosen = np.ones(len(likeliest), bool) if overlapping else likeliest == index
        rows = slice(index, index + 1) if overlapping else slice(None)
        inside = int(truth[index].sum())
        count = min(inside, truth.shape[1] - inside) if overlapping else int(chosen.sum())
        enough = count >= least_voxels
        values.append(
            _minimise(probabilities[rows, chosen], truth[rows, chosen], overlapping) if enough else overall
        )
    return Temperature(tuple(values))


def score_calibration(
    probabilities: Float[np.ndarray, "k n"],
    truth: Bool[np.ndarray, "k n"],
    *,
    overlapping: bool,
    metrics: Sequence[str] = tuple(CALIBRATION_METRICS),
) -> dict[str, float | None]:
    """Compute metrics of `CALIBRATION_METRICS` over voxels.

    Without any voxel, or where a probability is no number, all are undefined (None).

    Confidence is the largest probability; of overlapping classes each is a question of its own, answered with
    the larger of yes and no. Bins hold their upper edge (Guo et al., 2017). Adaptive bins: Nixon et al., 2019,
    https://arxiv.org/abs/1904.01685.

    Args:
        probabilities: Of each class.
        truth: For each voxel whether it is of each class.
        overlapping: Whether classes overlap.
        metrics: Those to compute.
    """
    if not probabilities.size or not np.isfinite(probabilities).all():
        return dict.fromkeys(metrics)
    chances = probabilities.astype(np.float64)
    confidence, right = _answers(chances, truth, overlapping)
    if overlapping:
        brier = np.square(chances - truth).mean()
        of_truth = np.where(truth, chances, 1 - chances)
    else:
        brier = np.square(chances - truth).sum(0).mean()
        of_truth = chances[truth]
    scores: dict[str, float | None] = {
        "brier": float(brier),
        "nll": float(-np.log(np.maximum(of_truth, LEAST)).mean()),
    }
    count, rights, sureness = _bin(confidence, right)
    apart = np.abs(rights - sureness)
    scores["ece"] = float(apart.sum() / count.sum())
    scores["mce"] = float((apart[count > 0] / count[count > 0]).max())
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    distances = [abs(right[part].mean() - confidence[part].mean()) * len(part) for part in parts]
    scores["ace"] = float(sum(distances) / len(order))
    return {metric: scores[metric] for metric in metrics}


def fold_unknown(
    probabilities: Float[np.ndarray, "k *n"], known: Sequence[int], overlapping: bool
) -> Float[np.ndarray, "k *n"]:
    """Return probabilities in which classes that a label does not tell of count as background.

    Where a dataset of several labels background, the structures of the others may be.
    """
    if overlapping or len(known) == len(probabilities):
        return probabilities
    unknown = [index for index in range(len(probabilities)) if index not in known]
    folded = probabilities.copy()
    folded[0] += folded[unknown].sum(0)
    folded[unknown] = 0
    return folded


def allow_unknown(
    truth: Bool[np.ndarray, "k *n"], known: Sequence[int], overlapping: bool
) -> Bool[np.ndarray, "k *n"]:
    """Return the truth in which background may also be any class that a label does not tell of."""
    if overlapping or len(known) == len(truth):
        return truth
    allowed = truth.copy()
    allowed[[index for index in range(len(truth)) if index not in known]] |= truth[0]
    return allowed


def count_reliability(
    probabilities: Float[np.ndarray, "k n"], truth: Bool[np.ndarray, "k n"], *, overlapping: bool
) -> Float[np.ndarray, "3 _"]:
    """Return for each bin of confidence the voxels in it, those that were right, and the sum of their confidence.

    Counts of several images add up to a reliability diagram: DeGroot and Fienberg, 1983,
    https://doi.org/10.2307/2987588.
    """
    return np.stack(_bin(*_answers(probabilities.astype(np.float64), truth, overlapping)))


def _answers(chances: np.ndarray, truth: np.ndarray, overlapping: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return how sure every answer was, and whether it was right."""
    if overlapping:
        return np.maximum(chances, 1 - chances).ravel(), ((chances > 0.5) == truth).ravel()
    return chances.max(0), np.take_along_axis(truth, find_likeliest(chances)[None].astype(np.intp), 0)[0]


def _bin(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # The first bin reaches down to nothing.
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return (
        np.bincount(place, minlength=BINS).astype(float),
        np.bincount(place, right, minlength=BINS),
        np.bincount(place, confidence, minlength=BINS),
    )


def select_band(
    label: Integer[np.ndarray, "*s"], truth: Integer[np.ndarray, "*s"], spacing: Sequence[float]
) -> Bool[np.ndarray, "*s"]:
    """Return the voxels near anything predicted or true: elsewhere every network is right and sure."""
    foreground = (label > 0) | (truth > 0)
    if not foreground.any():
        return foreground
    reach = BAND * min(spacing)
    distance = np.asarray(ndimage.distance_transform_edt(~foreground, sampling=spacing))
    return distance <= reach * (1 + 1e-6)  # five times a spacing exceeds it by rounding alone


def _minimise(probabilities: np.ndarray, truth: np.ndarray, overlapping: bool) -> float:
    """Return the one temperature of the smallest negative log-likelihood; 1 where there is no voxel."""
    from scipy import optimize  # slow to import, which prediction does without

    if not probabilities.size:
        return 1.0
    chances = probabilities.astype(np.float64)
    own = np.log(np.maximum(chances, LEAST))
    logits = own - np.log(np.maximum(1 - chances, LEAST)) if overlapping else own

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        if overlapping:
            return -special.log_expit(np.where(truth, scaled, -scaled)).mean()
        of_truth = np.where(truth, special.log_softmax(scaled, axis=0), -np.inf)
        return -special.logsumexp(of_truth, axis=0).mean()

    limits = np.log([COLDEST, HOTTEST])
    found: Any = optimize.minimize_scalar(loss, bounds=limits, method="bounded")
    return float(np.exp(found.x))
