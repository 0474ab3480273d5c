"""Intervals and comparisons over patients, whose values are the only independent ones."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from anysite.errors import ConfigError, DataError

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A mean over patients with its interval; the bounds are None where there is only one patient."""

    mean: float
    low: float | None
    high: float | None
    n_patients: int
    n_values: int


@dataclass(frozen=True)
class Comparison:
    """The paired difference a - b over patients.

    Attributes:
        difference: The mean of the patients' mean differences, with its interval.
        p_value: Of the two-sided Wilcoxon signed-rank test over patients (Pratt's ranks for zeros).
        probability_not_better: The share of resampled mean differences that are zero or less, the
            difference itself counted as one against, which makes it the one-sided sign-flip p-value;
            None where there is only one patient. Where lower is better, exchange a and b.
    """

    difference: Estimate
    p_value: float
    probability_not_better: float | None


def estimate_mean(
    values: Sequence[float],
    patients: Sequence[str],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate the mean over patients of each patient's mean value, with an interval over patients.

    The bounds are quantiles of the means of random subsets of the patients, each in or out by a fair coin
    (the typical values of Hartigan 1969, https://doi.org/10.1080/01621459.1969.10501057), which inverts
    the sign-flip test. Where patients scatter symmetrically, as differences of two equal methods do, the
    level is exact for any scatter from 6 patients on. Comparing equal methods in 20 simulated patients,
    with normal scatter to rare failures, the percentile bootstrap at 95 % found a difference in 7 to 12 %
    of repeats, BCa in 7 to 19 %, bootstrap-t in 5 to 13 %, subset means in 5 %. Unlike Student's interval
    it never leaves the range of the data.

    Below 6 patients at 95 % the interval is at most the range of the patients, and covers less than its
    level: 94 % with 5 patients, 75 % with 3. Skewed values with rare failures are covered less than they
    should be, by this and every other method, while no failure is among the patients.

    The interval speaks of new patients for these trained networks: the values of several seeds enter a
    patient's mean, and how much another training would move all patients together stays outside.

    Args:
        values: Finite values, over any cases, classes and seeds.
        patients: The patient of each value.
        level: The nominal coverage of the interval.
        resamples: The number of subsets; where there are no more, all of them are taken.
        seed: Of the subsets; equal seeds give equal intervals, whatever the order of the values.

    Raises:
        DataError: no values, values that are not finite, or not one patient for each value.
        ConfigError: a level outside (0, 1) or fewer than 100 resamples.
    """
    by_patient = _mean_by_patient(values, patients)
    return _estimate(by_patient, _subset_means(by_patient, resamples, seed), len(values), level)


def compare_paired(
    values_a: Mapping[Key, float],
    values_b: Mapping[Key, float],
    patient_of: Mapping[Key, str],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare two methods by their values at identical keys, such as (patient, case, class, seed).

    Args:
        values_a: The values of the method claimed to be better.
        values_b: The values of the method compared with.
        patient_of: The patient of every key.
        level: As for `estimate_mean`, which documents the interval.
        resamples: As for `estimate_mean`.
        seed: As for `estimate_mean`.

    Raises:
        DataError: keys that one side or `patient_of` lacks, no values, or values that are not finite.
        ConfigError: a level outside (0, 1) or fewer than 100 resamples.
    """
    only_a, only_b = values_a.keys() - values_b.keys(), values_b.keys() - values_a.keys()
    if only_a or only_b:
        raise DataError(
            f"{len(only_a)} values only in the first and {len(only_b)} only in the second method, "
            f"such as {next(iter(only_a or only_b))!r}",
            expected="the same keys in both",
            fix="evaluate both methods on the same cases, classes and seeds",
        )
    if lacking := values_a.keys() - patient_of.keys():
        raise DataError(f"{len(lacking)} keys without a patient", expected="a patient for each key")
    differences = [float(values_a[key]) - float(values_b[key]) for key in values_a]
    by_patient = _mean_by_patient(differences, [patient_of[key] for key in values_a])
    means = _subset_means(by_patient, resamples, seed)
    difference = _estimate(by_patient, means, len(differences), level)
    p_value = _p_value(by_patient)
    if len(by_patient) == 1:
        return Comparison(difference, p_value, None)
    return Comparison(difference, p_value, float((1 + np.sum(means <= 0)) / (1 + len(means))))


def mean_defined(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are there, or None where none is."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for being several (Holm 1979, https://www.jstor.org/stable/4615733), in their order.

    Raises:
        DataError: a value outside [0, 1].
    """
    p = np.asarray(p_values, float)
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError("a p-value outside [0, 1] or not a number")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def _mean_by_patient(values: Sequence[float], patients: Sequence[str]) -> Float[np.ndarray, " n"]:
    if len(values) == 0 or len(values) != len(patients):
        raise DataError(
            f"{len(values)} values for {len(patients)} patients", expected="one patient for each of 1 or more"
        )
    array = np.asarray(values, float)
    if not np.isfinite(array).all():
        raise DataError(
            f"{int((~np.isfinite(array)).sum())} values that are not finite", fix="leave out undefined values"
        )
    _, index = np.unique(np.asarray(patients, str), return_inverse=True)
    return np.bincount(index, array) / np.bincount(index)


def _p_value(differences: Float[np.ndarray, " n"]) -> float:
    from scipy import stats  # slow to import, which prediction does without

    if not differences.any():  # SciPy would divide by zero
        return 1.0
    result: Any = stats.wilcoxon(differences, zero_method="pratt")
    return float(result.pvalue)


def _estimate(
    by_patient: Float[np.ndarray, " n"], subset_means: Float[np.ndarray, " r"], n_values: int, level: float
) -> Estimate:
    if not 0 < level < 1:
        raise ConfigError(f"a level of {level}", expected="one between 0 and 1, such as 0.95")
    n, mean = len(by_patient), float(by_patient.mean())
    if n == 1:
        return Estimate(mean, None, None, n, n_values)
    # Weibull's plotting positions: the true mean falls equally often between any two sorted subset means.
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(subset_means, tails, method="weibull")
    return Estimate(mean, float(low), float(high), n, n_values)


def _subset_means(values: Float[np.ndarray, " n"], resamples: int, seed: int) -> Float[np.ndarray, " r"]:
    if resamples < 100:
        raise ConfigError(f"{resamples} resamples", expected="100 or more")
    n = len(values)
    if 2**n - 1 <= resamples:
        chosen = np.arange(1, 2**n)[:, None] >> np.arange(n) & 1
    else:
        chosen = np.random.default_rng(seed).integers(0, 2, (resamples, n), dtype=np.bool_)
        chosen = chosen[chosen.any(axis=1)]
    chosen = chosen.astype(float)
    return chosen @ values / chosen.sum(axis=1)
