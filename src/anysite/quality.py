"""What several scores say together: how likely the image is shifted, and what Dice its mask may have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

Signs = Float[np.ndarray, "n d"]
RIDGE = 1e-2  # keeps signs that say the same from cancelling each other
RIDGE_TO_EVEN = (
    3e-2  # keeps the weights that tell shifts near even ones, which so few images hardly can improve on
)


def signs_of(
    scores: Float[np.ndarray, "*n d"], in_dice: Bool[np.ndarray, " d"] | None = None
) -> Float[np.ndarray, "*n d"]:
    """Return scores as the models take them: the usual and below as 0, and far beyond all limits not much more.

    Args:
        scores: Of detectors.
        in_dice: Which of them are in units of Dice: those are taken as they are, since to lose less than usual says as
            much of the Dice to expect as to lose more.
    """
    signs = np.log1p(np.maximum(scores, 0))
    return signs if in_dice is None else np.where(in_dice, scores, signs)


def fit_shift(
    signs: Signs, shifted: Bool[np.ndarray, " n"], usual: Float[np.ndarray, " d"]
) -> Float[np.ndarray, " d"]:
    """Return the weights, none below 0, of a logistic regression that tells shifted images from others.

    Both kinds count alike however many there are.

    Args:
        signs: Of held-out images, and of copies of them under synthetic shifts.
        shifted: Which are such copies.
        usual: The weights that they are held near to.
    """
    from scipy import optimize  # slow to import, which prediction does without

    weight = np.where(shifted, 0.5 / max(1, shifted.sum()), 0.5 / max(1, (~shifted).sum()))
    direction = np.where(shifted, 1.0, -1.0)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        margin = direction * (signs @ values[1:] + values[0])
        pull = -weight * direction * special.expit(-margin)
        apart = values[1:] - usual
        gradient = np.concatenate([[pull.sum()], pull @ signs + RIDGE_TO_EVEN * apart])
        return float(
            -(weight * special.log_expit(margin)).sum() + RIDGE_TO_EVEN / 2 * apart @ apart
        ), gradient

    start = np.concatenate([[0.0], usual])
    bounds = [(None, None)] + [(0, None)] * signs.shape[1]
    found: Any = optimize.minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B")
    return found.x[1:]


def fit_dice(signs: Signs, dice: Float[np.ndarray, " n"]) -> Float[np.ndarray, " _"]:
    """Return the Dice of an image without any sign, and what every sign takes from it, none below 0.

    Args:
        signs: Of images.
        dice: Of their masks, the mean over classes.
    """
    from scipy import optimize  # slow to import, which prediction does without

    count, width = signs.shape
    design = np.concatenate([np.ones((count, 1)), -signs], 1)
    ridge = np.concatenate([np.zeros((width, 1)), math.sqrt(RIDGE * count) * np.eye(width)], 1)
    target = np.concatenate([dice, np.zeros(width)])
    bounds = (np.zeros(width + 1), np.concatenate([[1.0], np.full(width, np.inf)]))
    found: Any = optimize.lsq_linear(np.concatenate([design, ridge]), target, bounds)
    return found.x


def predict_dice(coefficients: Float[np.ndarray, " _"], signs: Signs) -> Float[np.ndarray, " n"]:
    """Return the Dice to expect, between 0 and 1."""
    return np.clip(coefficients[0] - signs @ coefficients[1:], 0, 1)


def expect_left_out(
    signs: Signs, dice: Float[np.ndarray, " n"], patients: Sequence[str]
) -> Float[np.ndarray, " n"]:
    """Return the Dice expected of every image by a model that saw none of its patient."""
    expected = np.empty(len(dice))
    for own in _each(patients):
        expected[own] = predict_dice(fit_dice(signs[~own], dice[~own]), signs[own])
    return expected


def score_left_out(
    signs: Signs, shifted: Bool[np.ndarray, " n"], usual: Float[np.ndarray, " d"], patients: Sequence[str]
) -> Float[np.ndarray, " n"]:
    """Return the combined score of every image by weights that saw none of its patient."""
    scores = np.empty(len(shifted))
    for own in _each(patients):
        scores[own] = signs[own] @ fit_shift(signs[~own], shifted[~own], usual)
    return scores


def _each(patients: Sequence[str]) -> Iterator[Bool[np.ndarray, " n"]]:
    names = np.asarray(patients)
    yield from (names == patient for patient in dict.fromkeys(patients))


def find_margins(
    errors: Float[np.ndarray, " n"], patients: Sequence[str], coverage: float
) -> tuple[float, float]:
    """Return how far below and above what is expected the truth lies, with the stated coverage.

    The wider of two on either side: conformal prediction with both tails alike (Lei et al., 2018,
    https://arxiv.org/abs/1604.04173), from errors of left-out patients as in cross-conformal prediction (Vovk, 2015,
    https://arxiv.org/abs/1208.0806), which takes the images of a patient for independent, and a normal
    distribution's for one image of one patient more (Student's t over patients), which does not.

    Args:
        errors: True minus expected values, of images the model did not see.
        patients: Whose they are, at least two.
        coverage: Share of images like those whose truth lies within.
    """
    ordered, tail = np.sort(errors), (1 + coverage) / 2
    count = len(ordered)
    rank = math.ceil((count + 1) * tail - 1e-9)
    means = [errors[own].mean() for own in _each(patients)]
    middle, among = float(np.mean(means)), len(means)
    variance = (
        np.mean([np.mean((errors[own] - middle) ** 2) for own in _each(patients)]) * among / (among - 1)
    )
    spread = float(special.stdtrit(among - 1, tail) * np.sqrt((1 + 1 / among) * variance))
    below, above = middle - spread, middle + spread
    if rank <= count:
        below, above = min(below, float(ordered[count - rank])), max(above, float(ordered[rank - 1]))
    return below, above
