"""Intervals against SciPy, exact enumeration and simulated truth; Holm against its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from anysite.errors import AnysiteError, ConfigError
from anysite.statistics import Estimate, adjust_holm, compare_paired, estimate_mean

REPEATS = 1000


def names(n: int) -> list[str]:
    return [f"patient {i:03d}" for i in range(n)]


def bounds(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def draw_dice(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw Dice values that are skewed, with a failure in 8 % of them."""
    return np.where(rng.random(shape) < 0.08, rng.beta(1, 3, shape), rng.beta(20, 2.5, shape))


def test_agrees_with_the_bootstrap_of_scipy_for_many_patients() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.1, 300)
    low, high = bounds(estimate_mean(values.tolist(), names(300), resamples=5000))
    for method in ("percentile", "BCa"):
        scipys = stats.bootstrap((values,), np.mean, n_resamples=5000, method=method, rng=0)
        assert (low, high) == pytest.approx(tuple(scipys.confidence_interval), abs=0.06 * (high - low))


def test_agrees_with_the_exact_sign_flip_test() -> None:
    rng = np.random.default_rng(1)
    excluded = 0
    for _ in range(60):
        values = rng.normal(0.7, 1, 9)
        low, high = bounds(estimate_mean(values.tolist(), names(9)))
        sums = [np.dot(signs, values) for signs in itertools.product([1, -1], repeat=9)]
        p = np.mean(np.abs(sums) >= abs(values.sum()) - 1e-12)
        excluded += not low <= 0 <= high
        # Of 512 sign vectors the interval cuts off 12.8 in each tail, by interpolation.
        assert (p <= 24 / 512) <= (not low <= 0 <= high) <= (p <= 26 / 512)
    assert 10 < excluded < 50


def test_patients_count_once_however_many_values_they_have() -> None:
    values, patients = [0.9, 0.7, 0.5, 0.5, 0.2], ["a", "a", "b", "b", "c"]
    estimate = estimate_mean(values, patients)
    assert estimate.mean == pytest.approx((0.8 + 0.5 + 0.2) / 3)
    assert (estimate.n_patients, estimate.n_values) == (3, 5)
    once = estimate_mean([0.8, 0.5, 0.2], ["a", "b", "c"])
    assert bounds(estimate) == pytest.approx(bounds(once))
    assert bounds(once) == (0.2, 0.8)  # with so few patients, their range
    assert estimate_mean([0.5, 0.7], ["a", "a"]) == Estimate(0.6, None, None, 1, 2)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_interval_ignores_order_holds_the_seed_and_stays_in_range(values: list[float], random) -> None:
    patients = names(len(values))
    estimate = estimate_mean(values, patients, seed=5)
    assert estimate == estimate_mean(values, patients, seed=5)
    order = random.sample(range(len(values)), len(values))
    assert estimate == estimate_mean([values[i] for i in order], [patients[i] for i in order], seed=5)
    low, high = bounds(estimate)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    wider = bounds(estimate_mean(values, patients, seed=5, level=0.99))
    assert wider[0] <= low
    assert high <= wider[1]


def test_other_seeds_change_the_interval_little() -> None:
    values = np.random.default_rng(0).normal(size=40).tolist()
    intervals = {bounds(estimate_mean(values, names(40), seed=s)) for s in range(5)}
    assert len(intervals) == 5
    assert np.ptp(np.array(list(intervals)), axis=0).max() < 0.1


@pytest.mark.parametrize(
    ("n_patients", "scatter"),
    [
        (20, "normal"),
        pytest.param(45, "normal", marks=pytest.mark.slow),
        pytest.param(20, "dice with failures", marks=pytest.mark.slow),
        (45, "rare failures"),
    ],
)
def test_two_arms_of_one_method_differ_in_five_percent(n_patients: int, scatter: str) -> None:
    rng = np.random.default_rng(n_patients)
    shape = (REPEATS, 2, n_patients)
    if scatter == "normal":
        arms = rng.normal(0.8, 0.1, (REPEATS, 1, n_patients)) + rng.normal(0, 0.05, shape)
    elif scatter == "dice with failures":
        arms = draw_dice(rng, shape)
    else:
        arms = rng.normal(0.8, 0.02, shape) - (rng.random(shape) < 0.03) * rng.uniform(0.2, 0.8, shape)
    keys = names(n_patients)
    patient_of = dict(zip(keys, keys, strict=True))
    results = [
        compare_paired(
            dict(zip(keys, a.tolist(), strict=True)), dict(zip(keys, b.tolist(), strict=True)), patient_of
        )
        for a, b in arms
    ]
    lows, highs = np.array([bounds(r.difference) for r in results]).T
    assert np.mean((lows > 0) | (highs < 0)) == pytest.approx(0.05, abs=0.014)
    # The discrete p-values stay a little below their level; 0.021 are three standard errors.
    assert np.mean([r.p_value <= 0.05 for r in results]) == pytest.approx(0.05, abs=0.021)
    one_sided = [r.probability_not_better for r in results if r.probability_not_better is not None]
    assert np.mean(np.array(one_sided) <= 0.05) == pytest.approx(0.05, abs=0.021)


@pytest.mark.parametrize(("n_patients", "level"), [(6, 0.95), (12, 0.95), (45, 0.8)])
def test_interval_covers_the_true_mean_as_often_as_it_says(n_patients: int, level: float) -> None:
    values = np.random.default_rng(7).normal(0.8, 0.1, (REPEATS, n_patients))
    intervals = [bounds(estimate_mean(v.tolist(), names(n_patients), level=level)) for v in values]
    covered = np.mean([low <= 0.8 <= high for low, high in intervals])
    assert covered == pytest.approx(level, abs=2 * np.sqrt(level * (1 - level) / REPEATS))


def test_skewed_means_are_covered_almost_as_often() -> None:
    rng = np.random.default_rng(8)
    intervals = [bounds(estimate_mean(v.tolist(), names(45))) for v in rng.beta(20, 2.5, (REPEATS, 45))]
    assert 0.92 < np.mean([low <= 20 / 22.5 <= high for low, high in intervals]) < 0.965


def test_a_clear_difference_is_found_pairwise() -> None:
    rng = np.random.default_rng(2)
    keys = [(p, case, seed) for p in names(12) for case in "xy" for seed in range(3)]
    patient_of = {key: key[0] for key in keys}
    b = {key: float(v) for key, v in zip(keys, draw_dice(rng, (len(keys),)), strict=True)}
    a = {key: b[key] + 0.02 + 0.01 * float(rng.normal()) for key in reversed(keys)}
    result = compare_paired(a, b, patient_of)
    assert bounds(result.difference)[0] > 0.01
    assert (result.difference.n_patients, result.difference.n_values) == (12, 72)
    by_patient = [np.mean([a[k] - b[k] for k in keys if k[0] == p]) for p in names(12)]
    assert result.p_value == pytest.approx(2 / 2**12)  # all 12 of one sign
    assert result.difference.mean == pytest.approx(np.mean(by_patient))
    assert result.probability_not_better == pytest.approx(1 / 2001, rel=1e-3)
    reverse = compare_paired(b, a, patient_of)
    assert reverse.probability_not_better == 1
    assert bounds(reverse.difference) == pytest.approx([-x for x in reversed(bounds(result.difference))])


@pytest.mark.parametrize("n_patients", [1, 2, 5, 30])
def test_equal_methods_are_not_better(n_patients: int) -> None:
    values = dict.fromkeys(names(n_patients), 0.5)
    result = compare_paired(values, values, {key: key for key in values})
    assert result.p_value == 1
    assert result.probability_not_better == (None if n_patients == 1 else 1)
    assert result.difference.low == result.difference.high == (None if n_patients == 1 else 0)


def test_unusable_values_are_refused() -> None:
    with pytest.raises(AnysiteError, match="1 values only in the first and 2 only in the second"):
        compare_paired({"a": 1.0, "b": 1.0}, {"b": 1.0, "c": 1.0, "d": 1.0}, {})
    with pytest.raises(AnysiteError, match="2 keys without a patient"):
        compare_paired({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, {})
    with pytest.raises(AnysiteError, match="0 values"):
        estimate_mean([], [])
    with pytest.raises(AnysiteError, match="not finite"):
        estimate_mean([0.5, float("nan")], ["a", "b"])
    with pytest.raises(AnysiteError, match="2 values for 1 patients"):
        estimate_mean([0.5, 0.6], ["a"])
    with pytest.raises(ConfigError, match="level"):
        estimate_mean([0.5, 0.6], ["a", "b"], level=95.0)
    with pytest.raises(ConfigError, match="10 resamples"):
        estimate_mean([0.5, 0.6], ["a", "b"], resamples=10)
    with pytest.raises(AnysiteError, match="p-value"):
        adjust_holm([0.1, float("nan")])


def test_holm_of_a_worked_example() -> None:
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, then 0.04 raised to the one before it.
    assert adjust_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_holm([0.6, 0.5]) == [1, 1]
    assert adjust_holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_rejects_what_the_closed_bonferroni_tests_reject(p_values: list[float]) -> None:
    """Holm is the closure of Bonferroni: reject i if every subset that holds i is rejected as a whole."""
    n = len(p_values)
    subsets = [s for size in range(1, n + 1) for s in itertools.combinations(range(n), size)]
    bonferroni = {s: min(1, len(s) * min(p_values[i] for i in s)) for s in subsets}
    slow = [max(p for s, p in bonferroni.items() if i in s) for i in range(n)]
    assert adjust_holm(p_values) == pytest.approx(slow)
