"""How good a judgement was, once the truth is known: of shifts, of failures, and of what was let through."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from anysite.errors import DataError

Values = Float[np.ndarray, " _"]
Numbers = Sequence[float] | Values
ADAPTED = "adapted"  # rows of whether a mask is that of an adapted network, 0 or 1
UNADAPTED_DICE = "unadapted_dice"  # rows of the mean Dice of the mask that adaptation replaced
VERDICT, SCORE = "verdict", "score_"  # rows of what was said of a mask, and of what each detector gave
PREDICTED = ("predicted_dice_low", "predicted_dice", "predicted_dice_high")
LEAST_DICE = "least_dice"  # rows of the Dice that was asked for
FAILED_DICE = 0.7  # below it a mask counts as failed, unless another Dice was asked for
DECISIONS = ("accept", "review", "reject")  # as 0, 1 and 2 in rows
EMPTY_REASON = "nothing was found, which was so in fewer than one of twenty images known"
ENSEMBLE = "ensemble"  # the score of what several networks disagree about
QUALITY = "quality"  # the score that rises as the Dice to expect falls
SENSITIVITY = 0.95


def is_judgement(metric: str) -> bool:
    """Tell whether a row's metric speaks of how the mask came about, or of the verdict, and not of the mask."""
    named = (VERDICT, LEAST_DICE, ADAPTED, UNADAPTED_DICE, *PREDICTED)
    return metric in named or metric.startswith(SCORE)


def suspicion(scores: Mapping[str, float | None]) -> float:
    """Return how much speaks against a mask, by which referral sorts.

    Its "quality", or, where it is larger, what several networks disagree about (Zenk et al., 2025,
    https://arxiv.org/abs/2406.03323); without either its highest score. A score that is not finite is
    beyond all others.
    """
    values = {name: math.inf if value is None else value for name, value in scores.items()}
    if any(value == math.inf for value in values.values()):
        return math.inf
    telling = [values[name] for name in (ENSEMBLE, QUALITY) if name in values]
    return max(telling or values.values(), default=0.0)


def area_under_roc(known: Numbers, strange: Numbers) -> float:
    """Return the chance that a strange image scores higher than a known one, ties counted as half (AUROC).

    Args:
        known: Scores of images like those of training.
        strange: Scores of others; higher should be stranger.

    Raises:
        DataError: one of the two is empty, or a score is not a number.
    """
    from scipy import stats  # slow to import, which prediction does without

    known_, strange_ = _scores(known), _scores(strange)
    ranks = stats.rankdata(np.concatenate([known_, strange_]))
    above = ranks[len(known_) :].sum() - len(strange_) * (len(strange_) + 1) / 2
    return float(above / (len(known_) * len(strange_)))


def false_positive_rate(known: Numbers, strange: Numbers, sensitivity: float = SENSITIVITY) -> float:
    """Return the share of known images above the highest limit that still finds so many strange ones (FPR95).

    Raises:
        DataError: one of the two is empty, or a score is not a number.
    """
    known_, strange_ = _scores(known), np.sort(_scores(strange))
    needed = int(np.ceil(sensitivity * len(strange_) - 1e-9))
    limit = strange_[len(strange_) - needed]
    return float((known_ >= limit).mean())


def risk_by_coverage(risks: Numbers, scores: Numbers) -> tuple[Values, Values]:
    """Return the mean risk of the least suspicious 1, 2, ... n cases, and the sum of their risks over n.

    Cases of equal score are taken in random order; the values are the expected ones.

    Args:
        risks: How bad each mask is, such as 1 - Dice.
        scores: How suspicious each is; higher is referred first.

    Raises:
        DataError: not one score for each risk, none at all, or one that is not a number.
    """
    risks_, scores_ = _scores(risks), _scores(scores)
    if len(risks_) != len(scores_):
        raise DataError(f"{len(scores_)} scores", expected=f"one for each of {len(risks_)} risks")
    order = np.argsort(scores_, kind="stable")
    _, group, sizes = np.unique(scores_, return_inverse=True, return_counts=True)
    expected = (np.bincount(group, risks_) / sizes)[group[order]]
    total = np.cumsum(expected)
    return total / np.arange(1, len(total) + 1), total / len(total)


def area_under_risk_coverage(risks: Numbers, scores: Numbers) -> float:
    """Return the mean over coverages of the mean risk of what is accepted (AURC); lower is better.

    Geifman, Uziel, El-Yaniv, 2019, https://arxiv.org/abs/1805.08206.
    """
    selective, _ = risk_by_coverage(risks, scores)
    return float(selective.mean())


def excess_area_under_risk_coverage(risks: Numbers, scores: Numbers) -> float:
    """Return how far AURC lies above that of scores in the order of the risks themselves (E-AURC)."""
    return area_under_risk_coverage(risks, scores) - area_under_risk_coverage(risks, risks)


def area_under_generalised_risk_coverage(risks: Numbers, scores: Numbers) -> float:
    """Return the mean over coverages of the risk let through, per case of all (AUGRC); lower is better.

    Unlike AURC it does not weigh the few most trusted cases most. Traub et al., 2024,
    https://arxiv.org/abs/2407.01032.
    """
    _, generalised = risk_by_coverage(risks, scores)
    return float((generalised - generalised[-1] / (2 * len(generalised))).mean())


def rank_correlation(risks: Numbers, scores: Numbers) -> float | None:
    """Return Spearman's correlation of score and risk, none where one of them is constant."""
    from scipy import stats  # slow to import, which prediction does without

    one, other = stats.rankdata(_scores(risks)), stats.rankdata(_scores(scores))
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def exact_interval(count: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a share: Clopper and Pearson, 1934, https://doi.org/10.1093/biomet/26.4.404.

    Raises:
        DataError: not a count out of a positive number.
    """
    from scipy import stats  # slow to import, which prediction does without

    if not 0 <= count <= of or of == 0:
        raise DataError(f"{count} of {of}", expected="a count out of a positive number")
    interval = stats.binomtest(count, of).proportion_ci(level, "exact")
    return float(interval.low), float(interval.high)


def _scores(values: Numbers) -> Values:
    array = np.asarray(values, float)
    if not array.size or np.isnan(array).any():
        raise DataError(
            "no value" if not array.size else "a value that is not a number", expected="numbers to compare"
        )
    return array
