"""Measures of judgement against slow twins and closed forms, and what several scores say together."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from anysite import console, judgement, quality
from anysite.errors import ConfigError, DataError
from anysite.verdicts import PASSED_OVER, REFERRED, refer

Scores = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=12)


@given(Scores, Scores)
def test_auroc_counts_pairs(known: list[float], strange: list[float]) -> None:
    pairs = [(s > k) + 0.5 * (s == k) for k, s in itertools.product(known, strange)]
    assert judgement.area_under_roc(known, strange) == pytest.approx(np.mean(pairs))


@given(Scores, Scores)
def test_the_false_positive_rate_is_that_of_the_best_limit(known: list[float], strange: list[float]) -> None:
    rates = [
        np.mean(np.array(known) >= limit)
        for limit in {*known, *strange}
        if np.mean(np.array(strange) >= limit) >= 0.95
    ]
    assert judgement.false_positive_rate(known, strange) == pytest.approx(min(rates))


def test_one_of_the_strange_may_be_missed_where_twenty_are() -> None:
    known, strange = [1.0] * 10, [0.0, *[2.0] * 19]
    assert judgement.false_positive_rate(known, strange) == 0
    assert judgement.false_positive_rate(known, strange[:-1]) == 1


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=6))
def test_ties_are_taken_in_random_order(cases: list[tuple[float, int]]) -> None:
    risks, scores = [risk for risk, _ in cases], [float(score) for _, score in cases]
    curves = []
    for order in itertools.permutations(range(len(cases))):
        if all(scores[a] <= scores[b] for a, b in itertools.pairwise(order)):
            taken = np.array(risks)[list(order)]
            curves.append(np.cumsum(taken) / np.arange(1, len(taken) + 1))
    selective, generalised = judgement.risk_by_coverage(risks, scores)
    np.testing.assert_allclose(selective, np.mean(curves, 0), atol=1e-12)
    np.testing.assert_allclose(generalised, selective * np.arange(1, len(cases) + 1) / len(cases), atol=1e-12)
    assert judgement.area_under_risk_coverage(risks, scores) == pytest.approx(np.mean(curves), abs=1e-12)
    assert judgement.excess_area_under_risk_coverage(risks, risks) == pytest.approx(0, abs=1e-12)
    assert judgement.excess_area_under_risk_coverage(risks, scores) >= -1e-12


def test_augrc_has_its_closed_form_for_failures(rng: np.random.Generator) -> None:
    """Traub et al., 2024: of risks 0 and 1 it follows from the AUROC of failures and how many there are."""
    failed = rng.random(200) < 0.3
    scores = 0.5 * failed + rng.random(200)
    rate, found = failed.mean(), judgement.area_under_roc(scores[~failed], scores[failed])
    expected = (1 - found) * (1 - rate) * rate + rate**2 / 2
    assert judgement.area_under_generalised_risk_coverage(failed.astype(float), scores) == pytest.approx(
        expected
    )


def test_rank_correlation_is_scipys_and_undefined_of_constants(rng: np.random.Generator) -> None:
    risks, scores = rng.integers(0, 5, 30).astype(float), rng.integers(0, 5, 30).astype(float)
    expected: float = stats.spearmanr(risks, scores)[0]  # pyright: ignore[reportAssignmentType]
    assert judgement.rank_correlation(risks, scores) == pytest.approx(expected)
    assert judgement.rank_correlation([1.0, 1.0], [0.0, 1.0]) is None


def test_exact_intervals_are_those_of_clopper_and_pearson() -> None:
    assert judgement.exact_interval(0, 10) == pytest.approx((0, 1 - 0.025**0.1))
    low, high = judgement.exact_interval(3, 20)
    assert (low, high) == pytest.approx((stats.beta.ppf(0.025, 3, 18), stats.beta.ppf(0.975, 4, 17)))


def test_what_cannot_be_compared_is_said() -> None:
    with pytest.raises(DataError, match="no value"):
        judgement.area_under_roc([], [1.0])
    with pytest.raises(DataError, match="not a number"):
        judgement.area_under_roc([float("nan")], [1.0])
    with pytest.raises(DataError, match="2 scores; expected one for each of 1 risks"):
        judgement.risk_by_coverage([1.0], [1.0, 2.0])
    with pytest.raises(DataError, match="3 of 2"):
        judgement.exact_interval(3, 2)


def test_a_shift_is_told_by_the_signs_that_tell_it(rng: np.random.Generator) -> None:
    shifted = np.arange(200) % 4 > 0
    signs = np.abs(rng.normal(size=(200, 3)))
    signs[shifted, 1] += 2
    signs[:, 2] = -0.5 * signs[:, 1] + 3  # falls where a shift is: no weight below 0
    weights = quality.fit_shift(signs, shifted, np.zeros(3))
    assert (weights >= 0).all()
    assert weights[1] > 10 * max(weights[0], weights[2])
    even = quality.fit_shift(signs, shifted, np.ones(3))
    assert weights[0] < even[0] < 1 < even[1]
    # What is alike in both says nothing, and the weights stay where they were.
    np.testing.assert_allclose(
        quality.fit_shift(np.ones((200, 2)), shifted, np.array([1.0, 0])), [1, 0], atol=1e-4
    )


def test_the_dice_model_is_least_squares_where_nothing_is_at_its_bound(rng: np.random.Generator) -> None:
    signs = np.abs(rng.normal(size=(500, 2)))
    dice = 0.9 - signs @ [0.1, 0.05] + rng.normal(0, 0.01, 500)
    coefficients = quality.fit_dice(signs, dice)
    np.testing.assert_allclose(coefficients, [0.9, 0.1, 0.05], atol=0.005)
    assert quality.fit_dice(signs, 0.5 + 0.1 * signs[:, 0])[1] < 1e-6  # a sign never promises more
    assert quality.predict_dice(coefficients, np.array([[100.0, 0.0]])).tolist() == [0]
    patients = [str(index // 2) for index in range(500)]
    alone = quality.expect_left_out(signs, dice, patients)
    twin = quality.predict_dice(quality.fit_dice(signs[2:], dice[2:]), signs[:2])
    np.testing.assert_array_equal(alone[:2], twin)


def test_what_is_in_units_of_dice_is_taken_as_it_is() -> None:
    scores = np.array([[-2.0, -2.0], [3.0, 3.0]])
    np.testing.assert_allclose(quality.signs_of(scores), [[0, 0], [math.log(4), math.log(4)]])
    found = quality.signs_of(scores, np.array([False, True]))
    np.testing.assert_allclose(found, [[0, -2], [math.log(4), 3]])


def test_the_combined_score_of_an_image_is_by_weights_without_its_patient(rng: np.random.Generator) -> None:
    signs, shifted = np.abs(rng.normal(size=(40, 2))), np.arange(40) % 2 > 0
    signs[shifted] += 1
    patients = [str(index // 4) for index in range(40)]
    usual = np.array([1.0, 0.0])
    alone = quality.score_left_out(signs, shifted, usual, patients)
    np.testing.assert_array_equal(alone[:4], signs[:4] @ quality.fit_shift(signs[4:], shifted[4:], usual))


@pytest.mark.parametrize("patients", [5, 10, 40])
@pytest.mark.parametrize("alike", [0.0, 0.8, 1.0])
def test_the_interval_holds_the_stated_share_however_alike_the_images_of_a_patient(
    patients: int, alike: float, rng: np.random.Generator
) -> None:
    held, whose = [], np.arange(30 + patients) % patients
    names = [str(patient) for patient in whose]
    for _ in range(1500):
        common, own = math.sqrt(alike) * rng.normal(size=patients + 1), rng.normal(size=len(whose) + 1)
        errors = common[whose] + math.sqrt(1 - alike) * own[:-1]
        low, high = quality.find_margins(errors, names, 0.9)
        held.append(low <= common[-1] + math.sqrt(1 - alike) * own[-1] <= high)
    assert 0.87 <= np.mean(held) <= 0.99


def test_the_interval_of_many_patients_is_that_of_conformal_prediction(rng: np.random.Generator) -> None:
    held = []
    for _ in range(800):
        errors = rng.exponential(size=200)
        low, high = quality.find_margins(errors, [str(index) for index in range(200)], 0.9)
        assert high >= np.sort(errors)[math.ceil(201 * 0.95) - 1]
        held.append(rng.exponential() <= high)
    assert 0.94 <= np.mean(held) <= 0.98


def verdicts(*decisions: str) -> dict[str, dict]:
    return {
        f"case {index}": {"verdict": decision, "reasons": [], "scores": {"a": float(index), "b": 0.0}}
        for index, decision in enumerate(decisions)
    }


def test_referral_is_of_the_stated_share_the_worst_first() -> None:
    judged = verdicts("reject", "review", "accept", "accept", "review")
    referred = refer(judged, 0.4)
    assert [v["verdict"] for v in referred.values()] == ["reject", "accept", "accept", "accept", "review"]
    assert referred["case 1"]["reasons"] == [PASSED_OVER]
    more = refer(judged, 0.6)
    assert [v["verdict"] for v in more.values()] == ["reject", "accept", "accept", "review", "review"]
    assert more["case 3"]["reasons"] == [REFERRED]
    assert [v["verdict"] for v in refer(judged, 0).values()].count("reject") == 1
    empty = verdicts("accept", "review", "accept") | {
        "empty": {"verdict": "review", "reasons": [judgement.EMPTY_REASON], "scores": {"ensemble": 0.0}}
    }
    assert [v["verdict"] for v in refer(empty, 0.25).values()] == ["accept", "accept", "accept", "review"]
    unknown = judged | {"odd": {"verdict": "accept", "reasons": [], "scores": {"a": None}}}
    assert refer(unknown, 0.34)["odd"]["verdict"] == "review"
    with pytest.raises(ConfigError, match="--referral: 2; expected 0 to 1"):
        refer(judged, 2)


def test_masks_accepted_for_want_of_room_are_counted_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    judged = verdicts("reject", "review", "accept", "accept", "review")
    for share, said in ((0.4, "of those accepted, 1 would be"), (0.2, "of those accepted, 2 would be")):
        console.show_verdicts(refer(judged, share), len(judged), Path("masks"))
        assert said in capsys.readouterr().out
    for enough in (judged, refer(judged, 1)):
        console.show_verdicts(enough, len(judged), Path("masks"))
        assert "would be" not in capsys.readouterr().out
