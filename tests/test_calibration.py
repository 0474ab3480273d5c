"""Calibration against a slow oracle, closed forms, and the promise that no voxel changes."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import special

from anysite import atomic, runs
from anysite.calibrate import calibrate
from anysite.calibration import (
    CALIBRATION_METRICS,
    Temperature,
    allow_unknown,
    find_likeliest,
    fit_temperature,
    fold_unknown,
    score_calibration,
    select_band,
)
from anysite.console import show_run
from anysite.data import files
from anysite.data.case import Dataset
from anysite.data.probabilities import read_probabilities
from anysite.errors import FileFormatError, RunError
from anysite.evaluate import evaluate
from anysite.predict import predict
from anysite.report.page import write_report
from anysite.rows import ALL_CLASSES
from anysite.runs import Run
from anysite.segment import Segmenter
from anysite.settings import CalibrationSettings
from anysite.train import train
from conftest import small_config


def draw(seed: int, classes: int, voxels: int, overlapping: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities of a network that is right about as often as it says, and the truth."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (classes, voxels))
    if overlapping:
        probabilities = special.expit(logits)
        return probabilities, rng.random(probabilities.shape) < probabilities
    probabilities = special.softmax(logits, axis=0)
    drawn = (probabilities.cumsum(0) > rng.random(voxels)).argmax(0)
    return probabilities, np.arange(classes)[:, None] == drawn


def oracle(probabilities: np.ndarray, truth: np.ndarray, overlapping: bool) -> dict[str, float]:
    """Voxel by voxel, bin by bin."""
    answers: list[tuple[float, float]] = []
    brier = nll = 0.0
    questions = 0
    for voxel in range(probabilities.shape[1]):
        column, true = probabilities[:, voxel].tolist(), truth[:, voxel].tolist()
        if overlapping:
            for p, t in zip(column, true, strict=True):
                answers.append((max(p, 1 - p), float((p > 0.5) == t)))
                brier += (p - t) ** 2
                nll -= math.log(p if t else 1 - p)
                questions += 1
        else:
            best = max(range(len(column)), key=lambda k: column[k])
            answers.append((column[best], float(true[best])))
            brier += sum((p - t) ** 2 for p, t in zip(column, true, strict=True))
            nll -= math.log(column[true.index(True)])
            questions += 1
    ece, mce = 0.0, 0.0
    for b in range(15):
        inside = [(c, r) for c, r in answers if b / 15 < c <= (b + 1) / 15]
        if inside:
            distance = abs(sum(r for _, r in inside) - sum(c for c, _ in inside)) / len(inside)
            ece += distance * len(inside) / len(answers)
            mce = max(mce, distance)
    answers.sort(key=lambda answer: answer[0])
    sizes = [len(answers) // 15 + (b < len(answers) % 15) for b in range(15)]
    ace, begin = 0.0, 0
    for size in sizes:
        part = answers[begin : begin + size]
        begin += size
        if part:
            ace += abs(sum(r for _, r in part) - sum(c for c, _ in part)) / len(answers)
    return {"ece": ece, "ace": ace, "mce": mce, "brier": brier / questions, "nll": nll / questions}


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize(("classes", "voxels"), [(2, 500), (5, 501), (3, 7)])
def test_every_metric_equals_the_oracle(classes: int, voxels: int, overlapping: bool) -> None:
    probabilities, truth = draw(0, classes, voxels, overlapping)
    scores = score_calibration(probabilities, truth, overlapping=overlapping)
    assert list(scores) == list(CALIBRATION_METRICS)
    for metric, expected in oracle(probabilities, truth, overlapping).items():
        assert scores[metric] == pytest.approx(expected, abs=1e-10), metric


def test_only_the_metrics_asked_for_and_none_without_voxels() -> None:
    probabilities, truth = draw(0, 3, 50, False)
    assert list(score_calibration(probabilities, truth, overlapping=False, metrics=["nll"])) == ["nll"]
    empty = score_calibration(probabilities[:, :0], truth[:, :0], overlapping=False)
    assert empty == dict.fromkeys(CALIBRATION_METRICS)
    probabilities[1, 7] = np.nan
    broken = score_calibration(probabilities, truth, overlapping=False)
    assert broken == dict.fromkeys(CALIBRATION_METRICS)


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("sharpened", [0.4, 1.0, 3.0])
def test_the_temperature_that_was_taken_away_is_found(sharpened: float, overlapping: bool) -> None:
    """Probabilities that are right by construction, sharpened by a known factor."""
    probabilities, truth = draw(1, 4, 60_000, overlapping)
    wrong = Temperature((1 / sharpened,)).apply(probabilities, overlapping)
    fitted = fit_temperature(wrong, truth, overlapping=overlapping)
    assert fitted.values[0] == pytest.approx(sharpened, rel=0.03)
    mended = fitted.apply(wrong, overlapping)
    np.testing.assert_allclose(mended, probabilities, atol=0.02)
    if sharpened != 1.0:
        before, after = (score_calibration(p, truth, overlapping=overlapping)["ece"] for p in (wrong, mended))
        assert before is not None
        assert after is not None
        assert after < 0.2 * before


def test_the_temperature_is_found_where_a_label_does_not_tell_classes_apart() -> None:
    """Dividing the logits of the folded classes instead would find another: a sum of two is not sharpened alike."""
    probabilities, truth = draw(3, 4, 60_000, False)
    wrong = Temperature((2.0,)).apply(probabilities, False)
    seen = np.zeros_like(truth)
    seen[:2] = truth[:2]
    seen[0] |= truth[2] | truth[3]  # classes 2 and 3 are not labelled, and stand as background
    allowed = allow_unknown(seen, (0, 1), overlapping=False)
    assert (allowed.sum(0) == np.where(seen[0], 3, 1)).all()
    fitted = fit_temperature(wrong, allowed, overlapping=False)
    assert fitted.values[0] == pytest.approx(0.5, rel=0.03)
    of_folded = fit_temperature(fold_unknown(wrong, (0, 1), False)[:2], seen[:2], overlapping=False)
    assert abs(of_folded.values[0] - 0.5) > 0.05
    assert allow_unknown(truth, (0, 1, 2, 3), overlapping=False) is truth
    assert allow_unknown(truth, (0, 1), overlapping=True) is truth


def test_every_class_may_have_a_temperature_of_its_own() -> None:
    probabilities, truth = draw(2, 3, 90_000, False)
    likeliest = probabilities.argmax(0)
    wrong = Temperature((0.5, 1.0, 2.0)).apply(probabilities, False)
    assert (wrong.argmax(0) == likeliest).all()
    fitted = fit_temperature(wrong, truth, overlapping=False, per_class=True)
    np.testing.assert_allclose(fitted.values, (2.0, 1.0, 0.5), rtol=0.08)
    scarce = fit_temperature(wrong, truth, overlapping=False, per_class=True, least_voxels=10**6)
    assert len(set(scarce.values)) == 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    values=st.lists(st.floats(0.05, 20), min_size=3, max_size=3),
    overlapping=st.booleans(),
    each=st.booleans(),
)
def test_no_voxel_changes_and_probabilities_stay_so(
    seed: int, values: list[float], overlapping: bool, each: bool
) -> None:
    probabilities, _ = draw(seed, 3, 200, overlapping)
    temperature = Temperature(tuple(values) if each else (values[0],))
    calibrated = temperature.apply(probabilities, overlapping)
    assert calibrated.shape == probabilities.shape
    assert ((calibrated >= 0) & (calibrated <= 1)).all()
    if overlapping:
        assert ((calibrated > 0.5) == (probabilities > 0.5)).all()
    else:
        assert (calibrated.argmax(0) == probabilities.argmax(0)).all()
        np.testing.assert_allclose(calibrated.sum(0), 1)


@given(data=st.data(), classes=st.integers(1, 300))
def test_the_likeliest_class_is_the_first_of_the_largest(data: st.DataObject, classes: int) -> None:
    few_values = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    chances = data.draw(arrays(np.float32, (classes, 3, 2), elements=few_values))
    np.testing.assert_array_equal(find_likeliest(chances), chances.argmax(0))


def test_a_certain_network_stays_finite() -> None:
    certain = np.array([[1.0, 0.0], [0.0, 1.0]])
    for overlapping in (False, True):
        assert np.isfinite(Temperature((0.05,)).apply(certain, overlapping)).all()
        scores = score_calibration(certain, certain < 0.5, overlapping=overlapping)
        assert all(value is not None and math.isfinite(value) for value in scores.values())
    assert fit_temperature(certain[:, :0], certain[:, :0] > 0, overlapping=False).values == (1.0,)


def test_the_band_reaches_equally_far_in_length_on_every_axis() -> None:
    label = np.zeros((9, 41), int)
    truth = label.copy()
    truth[4, 20] = 1
    band = select_band(label, truth, (4.0, 1.0))
    assert band[4].sum() == 11
    assert band[:, 20].sum() == 3  # four units are one row
    assert not select_band(label, label, (1.0, 1.0)).any()


@pytest.fixture(scope="module")
def run(phantom: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = small_config("test_domains=['west']", "train.learning_rate=0.01", "calibration.kind=per_class")
    return train(phantom, settings, tmp_path_factory.mktemp("runs") / "run")


def test_a_training_fits_the_temperature_on_held_out_patients_alone(
    phantom: Dataset, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = atomic.read_json(run.path / runs.CALIBRATION)
    assert set(facts["cases"]) <= set(run.splits["held_out"])
    assert {phantom_case.domain for phantom_case in phantom.cases if phantom_case.id in facts["cases"]} == {
        "north",
        "east",
    }
    assert facts["voxels"] > 0
    assert facts["expected_calibration_error"]["after"] <= facts["expected_calibration_error"]["before"]
    assert run.temperature.values == tuple(facts["temperature"])
    assert len(run.temperature.values) == len(run.plan.classes)
    show_run(run)
    told = capsys.readouterr().out
    for name, value in zip(run.plan.classes, run.temperature.values, strict=True):
        assert f"{value:.2f} for {name}" in told


def test_one_dataset_has_one_temperature_by_default(phantom: Dataset, tmp_path: Path) -> None:
    run = train(phantom, small_config(), tmp_path / "run")
    assert len(run.temperature.values) == 1
    assert atomic.read_json(run.path / runs.CALIBRATION)["kind"] == "global"


def test_prediction_is_calibrated_by_default_and_no_voxel_changes(phantom: Dataset, run: Run) -> None:
    plain = run.config.predict.model_copy(update={"calibrate": False})
    hotter = replace(run, temperature=Temperature((3.0,)))
    changed = 0
    for case in phantom.cases:
        raw, calibrated = (Segmenter([r], s).segment(case.image()) for r, s in ((run, plain), (hotter, None)))
        np.testing.assert_array_equal(raw.label.array, calibrated.label.array)
        chances = raw.probabilities.array
        np.testing.assert_array_equal(
            calibrated.probabilities.array, hotter.temperature.apply(chances, overlapping=False)
        )
        changed += not np.allclose(chances, calibrated.probabilities.array, atol=1e-3)
    assert changed == len(phantom.cases)


def test_the_mean_of_several_runs_is_left_as_it_is(phantom: Dataset, run: Run) -> None:
    image = phantom.cases[0].image()
    hot = replace(run, temperature=Temperature((3.0,)))
    together, plain = Segmenter([hot, hot]).segment(image), Segmenter([hot]).segment(image)
    np.testing.assert_array_equal(together.probabilities.array, together.raw.array)
    np.testing.assert_allclose(together.raw.array, plain.raw.array)
    assert not np.allclose(plain.probabilities.array, plain.raw.array)


def test_an_altered_calibration_is_noticed(run: Run, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run.path, tmp_path / "run"))
    facts = atomic.read_json(copied / runs.CALIBRATION)
    atomic.write_json(copied / runs.CALIBRATION, facts | {"temperature": [9.0]})
    with pytest.raises(
        RunError, match=r"altered since training.*calibration\.json|calibration\.json.*altered"
    ):
        runs.open_run(copied)
    (copied / runs.CALIBRATION).unlink()
    with pytest.raises(RunError, match="no such file"):
        runs.open_run(copied)
    for wrong in ([], [0.0], "hot", [1.0, "2"]):
        atomic.write_json(copied / runs.CALIBRATION, {"temperature": wrong})
        with pytest.raises(RunError, match="temperature"):
            runs.read_temperature(copied)


@pytest.mark.parametrize("setting", ["calibration.kind=none", "train.validation_fraction=0"])
def test_without_held_out_patients_or_wish_there_is_no_temperature(
    phantom: Dataset, tmp_path: Path, setting: str
) -> None:
    run = train(phantom, small_config("train.steps=1", setting), tmp_path / "run")
    assert not (run.path / runs.CALIBRATION).exists()
    assert run.temperature == Temperature()


def test_a_case_that_cannot_be_read_is_named_and_costs_no_training(phantom: Dataset, run: Run) -> None:
    broken = replace(phantom.cases[0], id="broken", image_paths=(Path("nowhere.png"),))
    facts = calibrate(
        Segmenter([run]), [broken, phantom.cases[1]], phantom, CalibrationSettings(kind="global")
    )
    assert list(facts["failed"]) == ["broken"]
    assert facts["cases"] == [phantom.cases[1].id]
    assert calibrate(Segmenter([run]), [broken], phantom, CalibrationSettings())["temperature"] == [1.0]


def test_evaluation_scores_saved_probabilities_apart_from_classes(
    phantom: Dataset, run: Run, tmp_path: Path
) -> None:
    cases = [case for case in phantom.cases if case.domain == "west"]
    list(predict([run], cases, tmp_path, save_probabilities=True, dataset=phantom))
    result = evaluate(tmp_path, phantom)
    rows = [row for row in result.rows if row["class"] == ALL_CLASSES]
    assert {row["metric"] for row in rows} == set(CALIBRATION_METRICS)
    assert len(rows) == len(CALIBRATION_METRICS) * len(cases)
    case = cases[0]
    probabilities = read_probabilities(tmp_path / f"{case.id}.npz")
    label = phantom.class_indices(case.label())
    mask = files.read_label(tmp_path / f"{case.id}.png")
    band = select_band(mask.array[0], label.array[0], label.spacing)
    truth = run.plan.as_maps(label.array[0][band])
    expected = oracle(probabilities[:, band].astype(float).clip(1e-12), truth, overlapping=False)
    for row in rows:
        if row["case"] == case.id:
            assert row["value"] == pytest.approx(expected[row["metric"]], abs=1e-5)
    summary = atomic.read_json(tmp_path / "summary.json")
    mean_ece = np.mean([row["value"] for row in rows if row["metric"] == "ece"])
    assert summary["by_domain"]["west"]["ece"] == pytest.approx(mean_ece)
    assert summary["by_split"]["unseen"]["nll"] > 0
    assert summary["undefined"]["ece"] == 0
    assert ALL_CLASSES not in summary["mean"]
    assert "ece" not in summary["foreground_mean"]
    # The counts behind the diagram give the error of all voxels together.
    told = atomic.read_json(tmp_path / "reliability.json")
    assert list(told) == ["unseen"]
    voxels, right, confidence = (np.array(told["unseen"][name]) for name in ("voxels", "right", "confidence"))
    together: list[np.ndarray] = []
    for each in cases:
        truth = phantom.class_indices(each.label()).array[0]
        found = files.read_label(tmp_path / f"{each.id}.png").array[0]
        near = select_band(found, truth, (1.0, 1.0))
        chances = read_probabilities(tmp_path / f"{each.id}.npz")[:, near]
        together.append(np.stack([chances.max(0), chances.argmax(0) == truth[near]]))
    sure, correct = np.concatenate(together, 1)
    assert voxels.sum() == len(sure)
    assert right.sum() == correct.sum()
    assert confidence.sum() == pytest.approx(sure.sum())
    inside = (sure > 14 / 15) & (sure <= 1)
    assert right[-1] == correct[inside].sum()
    page = write_report([tmp_path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "As sure as right?" in page
    for path in tmp_path.glob("*.npz"):
        path.unlink()
    evaluate(tmp_path, phantom)
    assert not (tmp_path / "reliability.json").exists()


def test_damaged_or_foreign_probabilities_cost_no_row_of_another_case(
    phantom: Dataset, run: Run, tmp_path: Path
) -> None:
    cases = [case for case in phantom.cases if case.domain == "west"]
    list(predict([run], cases, tmp_path, save_probabilities=True, dataset=phantom))
    altered, deleted = (tmp_path / f"{case.id}.npz" for case in cases[:2])
    altered.write_bytes(altered.read_bytes()[:100])
    deleted.unlink()
    result = evaluate(tmp_path, phantom)
    assert not result.failed
    assert {row["case"] for row in result.rows if row["metric"] == "dice"} == {case.id for case in cases}
    scored = {row["case"] for row in result.rows if row["metric"] == "ece"}
    assert scored == {case.id for case in cases[2:]}
    plain = tmp_path / "plain"
    list(predict([run], cases[:1], plain, dataset=phantom))
    np.savez_compressed(plain / f"{cases[0].id}.npz", probabilities=np.ones((5, 64, 64)))
    assert not [row for row in evaluate(plain, phantom).rows if row["metric"] == "ece"]


def test_files_that_hold_no_probabilities_are_named(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    np.savez_compressed(path, probabilities=np.full((2, 3, 3), 0.5))
    whole = path.read_bytes()
    for content in (whole[:50], b"", whole[:60] + bytes(20) + whole[80:]):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match="case.npz"):
            read_probabilities(path)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    path.write_bytes((tmp_path / "plain.npy").read_bytes())
    with pytest.raises(FileFormatError, match="case.npz"):
        read_probabilities(path)
    for value in (np.nan, 1.5, -0.1):
        np.savez_compressed(path, probabilities=np.full((2, 3, 3), value))
        with pytest.raises(FileFormatError, match="from 0 to 1"):
            read_probabilities(path)


@pytest.mark.parametrize("error", [MemoryError(), ValueError("what"), KeyboardInterrupt()])
def test_nothing_that_happens_while_judging_costs_the_training(
    phantom: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    settings = small_config("train.checkpoint_every=4", "judge.detectors={nearest = {}}")
    notes: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("anysite.assess.calibrate", fail)
        if isinstance(error, Exception):
            run = train(phantom, settings, tmp_path / "run", on_progress=lambda p: notes.append(p.note))
            assert run.judge is None
            assert any("no calibration and no verdicts" in note for note in notes)
            return
        with pytest.raises(KeyboardInterrupt):
            train(phantom, settings, tmp_path / "run")
    steps: list[int] = []
    run = train(phantom, settings, tmp_path / "run", resume=True, on_progress=lambda p: steps.append(p.step))
    assert not [step for step in steps if step > 0]
    assert run.judge is not None
    assert run.manifest["steps"] == 6


def test_a_region_that_is_never_there_gets_the_temperature_of_all() -> None:
    probabilities, truth = draw(3, 2, 20_000, True)
    truth[1] = False
    wrong = Temperature((0.5,)).apply(probabilities, True)
    fitted = fit_temperature(wrong, truth, overlapping=True, per_class=True)
    overall = fit_temperature(wrong, truth, overlapping=True)
    assert fitted.values[1] == overall.values[0]
    assert fitted.values[0] == pytest.approx(2, rel=0.1)
