"""Fragments: what they are, which classes lose them, and what a run makes of it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from anysite import atomic, runs
from anysite.assess import assess
from anysite.data.case import Dataset
from anysite.describe import describe
from anysite.errors import RunError
from anysite.loop import Training
from anysite.postprocessing import (
    Postprocessing,
    choose_size,
    combine,
    find_fragments,
    find_single_classes,
    measure_gain,
    remove,
)
from anysite.predict import predict
from anysite.runs import Run
from anysite.segment import Segmenter
from anysite.train import train
from conftest import small_config

MASKS = st.sampled_from([(9,), (6, 7), (4, 3, 5)]).flatmap(lambda shape: arrays.arrays(bool, shape))
SHARES = st.sampled_from([0.1, 0.5, 0.75, 1.0])


def flood(mask: np.ndarray, smaller_than: float) -> np.ndarray:
    """The obvious twin: grow every piece voxel by voxel."""
    left = {tuple(index) for index in np.argwhere(mask)}
    pieces: list[set[tuple[int, ...]]] = []
    while left:
        piece, grown = set(), [left.pop()]
        while grown:
            voxel = grown.pop()
            piece.add(voxel)
            around = itertools.product(*((place - 1, place, place + 1) for place in voxel))
            near = left.intersection(around)
            left -= near
            grown += near
        pieces.append(piece)
    largest = max((len(piece) for piece in pieces), default=0)
    expected = np.zeros(mask.shape, bool)
    for piece in pieces:
        if len(piece) < smaller_than * largest:
            expected[tuple(np.array([*piece]).T)] = True
    return expected


@given(MASKS, SHARES)
def test_fragments_are_those_of_the_slow_twin(mask: np.ndarray, smaller_than: float) -> None:
    np.testing.assert_array_equal(find_fragments(mask, smaller_than), flood(mask, smaller_than))


@given(
    st.sampled_from([(6, 7), (4, 3, 5), (5, 6, 1)]).flatmap(
        lambda shape: arrays.arrays(np.uint8, shape, elements=st.integers(0, 3))
    ),
    SHARES,
)
def test_applying_takes_out_fragments_of_the_chosen_classes_and_nothing_else(
    label: np.ndarray, smaller_than: float
) -> None:
    rule = Postprocessing(classes=(1, 3, 9), smaller_than=smaller_than)
    found = label.copy()
    rule.apply(found)
    fragments = flood(label == 1, smaller_than) | flood(label == 3, smaller_than)
    np.testing.assert_array_equal(found, surround(label, fragments))
    assert {*np.unique(found)} | {0} == {*np.unique(label)} | {0}  # no class is lost altogether


def surround(label: np.ndarray, fragments: np.ndarray) -> np.ndarray:
    """The obvious twin: ask each neighbour of each voxel of a fragment."""
    expected = label.copy()
    left = {tuple(index) for index in np.argwhere(fragments)}
    while left:
        hole, grown = set(), [left.pop()]
        while grown:
            voxel = grown.pop()
            hole.add(voxel)
            near = {
                other for other in left if sum(abs(a - b) for a, b in zip(voxel, other, strict=True)) == 1
            }
            left -= near
            grown += near
        around = {
            place
            for place in np.ndindex(*label.shape)
            if not fragments[place]
            and any(sum(abs(a - b) for a, b in zip(voxel, place, strict=True)) == 1 for voxel in hole)
        }
        votes = [int(label[place]) for place in around]
        filled = 0 if not all(votes) or not votes else max(sorted({*votes}), key=votes.count)
        expected[tuple(np.array([*hole]).T)] = filled
    return expected


def test_enclosed_fragments_take_the_class_around_them() -> None:
    label = np.zeros((12, 12), np.uint8)
    label[:, 6:] = 1
    label[2:9, 7:11] = 2  # a cavity in its wall
    label[4:6, 8] = 1  # a speck of wall in the cavity
    label[5, 2] = 2  # and one of the cavity, in the open
    label[0, 0] = 2  # in the corner
    label[10, 6] = 2  # between wall and open: three voxels of wall touch it, one of the open
    label[0, 11] = 2  # in the wall, at the edge of the image
    expected = label.copy()
    expected[4:6, 8], expected[5, 2], expected[0, 0], expected[10, 6], expected[0, 11] = 2, 0, 0, 0, 1
    Postprocessing(classes=(1, 2)).apply(label)
    np.testing.assert_array_equal(label, expected)


def test_a_fragment_with_nothing_around_it_becomes_background() -> None:
    label = np.ones((3, 4), np.uint8)
    remove(label, np.ones((3, 4), bool))
    assert not label.any()


def test_no_rule_changes_nothing(rng: np.random.Generator) -> None:
    label = rng.integers(0, 4, (8, 9, 7)).astype(np.uint8)
    found = label.copy()
    Postprocessing().apply(found)
    np.testing.assert_array_equal(found, label)


def picture(*pieces: tuple[int, int]) -> np.ndarray:
    """A label map with a row for each piece: its class, and how many voxels of it."""
    label = np.zeros((2 * len(pieces), 40), np.uint8)
    for row, (index, count) in enumerate(pieces):
        label[2 * row, :count] = index
    return label


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([picture((1, 20))] * 3, (1,)),
        ([picture((1, 20))] * 2, ()),  # too few to call it so
        ([picture((1, 20), (1, 11))] * 3, (1,)),  # two lungs
        ([picture((1, 20), (1, 9))] * 3, ()),  # and two of which one is often small
        ([picture((1, 39), (1, 2))] * 3, (1,)),  # a slip of the pen, below a twentieth
        ([picture((1, 20))] * 9 + [picture((1, 20), (1, 9))], ()),  # one patient is enough
        ([picture((2, 5), (1, 20), (2, 1))] * 4, (1,)),
        ([picture((3, 20))] * 4, ()),  # of which these labels do not tell
        ([], ()),
    ],
)
def test_a_class_in_one_piece_is_so_in_every_label(
    labels: list[np.ndarray], expected: tuple[int, ...]
) -> None:
    known: Sequence[int] = (0, 1, 2)
    assert find_single_classes(((label, known) for label in labels), [0.5]) == {0.5: expected}


def test_a_class_may_be_in_one_piece_by_one_size_and_not_by_another() -> None:
    labels = [(picture((1, 20), (1, 9)), (0, 1))] * 3
    assert find_single_classes(labels, [0.1, 0.25, 0.5]) == {0.1: (1,), 0.25: (1,), 0.5: ()}


def test_the_gain_is_that_of_dice_over_cases_that_hold_the_class() -> None:
    single = {0.5: (1, 2), 0.1: (1, 2), 0.9: ()}
    whole, broken = picture((1, 20), (0, 0)), picture((1, 20), (1, 5))
    pairs = [(broken, whole, (0, 1)), (whole, whole, (0, 1)), (whole, broken, (0, 1)), (whole, whole, (0, 2))]
    assert measure_gain(pairs[:2], single) == {
        0.5: {1: pytest.approx((1 - 40 / 45) / 2)},
        0.1: {1: 0},
        0.9: {},
    }
    assert measure_gain([(broken, broken, (0, 1))], single)[0.5] == {1: pytest.approx(40 / 45 - 1)}
    assert measure_gain(pairs[3:], single) == {0.5: {}, 0.1: {}, 0.9: {}}  # neither holds it


@given(
    st.sampled_from([(9,), (6, 7), (4, 3, 5)]).flatmap(
        lambda shape: st.tuples(arrays.arrays(bool, shape), arrays.arrays(bool, shape))
    ),
    SHARES,
)
def test_the_gain_is_that_of_the_slow_twin(masks: tuple[np.ndarray, np.ndarray], size: float) -> None:
    found, true = masks
    gains = measure_gain([(found.astype(np.uint8), true.astype(np.uint8), (0, 1))], {size: (1,)})[size]
    if not found.any() and not true.any():
        assert gains == {}
        return
    kept = found & ~flood(found, size)
    after, before = (2 * (mask & true).sum() / (mask.sum() + true.sum()) for mask in (kept, found))
    assert gains == {1: pytest.approx(after - before)}


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({0.1: {1: 0.02}, 0.25: {1: 0.024}, 0.5: {1: 0.024}}, 0.1),  # not clearly more
        ({0.1: {1: 0.02}, 0.25: {1: 0.024}, 0.5: {1: 0.026}}, 0.25),
        ({0.1: {1: 0.02}, 0.25: {1: 0.02}, 0.5: {1: 0.026}}, 0.5),
        ({0.1: {1: 0.02}, 0.25: {1: 0.03}, 0.5: {1: 0.033}}, 0.25),
        (
            {0.1: {1: 0.02, 2: 0.0}, 0.25: {1: 0.026, 2: 0.0}, 0.5: {1: 0.01}},
            0.1,
        ),  # in the mean of the classes
        ({0.1: {1: -0.02}, 0.5: {1: 0.006}}, 0.5),  # what loses is left alone
        ({0.1: {}, 0.25: {}, 0.5: {}}, 0.1),
        ({0.3: {1: 0.1}}, 0.3),
    ],
)
def test_the_smallest_size_is_taken_that_no_larger_one_gains_clearly_more_than(
    gains: dict[float, dict[int, float]], expected: float
) -> None:
    chosen, means = choose_size(gains)
    assert chosen == expected
    assert means.keys() == gains.keys()


def test_several_runs_take_out_what_each_of_them_would() -> None:
    rules = [
        Postprocessing(classes=(1, 2), smaller_than=0.5),
        Postprocessing(classes=(2, 3), smaller_than=0.2),
    ]
    assert combine(rules) == Postprocessing(classes=(2,), smaller_than=0.2)
    assert combine([*rules, Postprocessing()]).classes == ()


@pytest.fixture(scope="module")
def run(phantom: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Barely trained, so that its masks are in many pieces."""
    config = small_config("train.steps=4", "train.validation_fraction=0.4", "judge.detectors={}")
    return train(phantom, config, tmp_path_factory.mktemp("runs") / "run")


def test_a_training_learns_it_from_labels_and_held_out_cases(run: Run, phantom: Dataset) -> None:
    facts = atomic.read_json(run.path / runs.POSTPROCESSING)
    names = run.plan.classes
    assert facts["in_one_piece"] == [*names[1:]]  # as the phantom's labels are
    told = describe(run.path)
    assert told["no_fragments_of"] == [names[index] for index in run.postprocessing.classes]
    assert told["fragments_below"] == run.postprocessing.smaller_than
    assert run.postprocessing.classes == tuple(
        index for index, name in enumerate(names) if facts["dice_gained"].get(name, -1) >= 0
    )
    gains = {}
    plain = Segmenter([run], run.config.predict.model_copy(update={"postprocess": False}), "cpu")
    held_out = phantom.with_cases(case for case in phantom.cases if case.id in run.splits["held_out"])
    for case in held_out.cases_by_turns[: run.config.postprocessing.cases]:
        found, truth = plain.segment(case.image()).label.array[0], phantom.label_of(case).array[0]
        for index in range(1, len(names)):
            one, other = found == index, truth == index
            if one.any() or other.any():
                kept = one & ~flood(one, run.postprocessing.smaller_than)
                change = 2 * (kept & other).sum() / (kept.sum() + other.sum())
                change -= 2 * (one & other).sum() / (one.sum() + other.sum())
                gains.setdefault(names[index], []).append(change)
    assert [*facts["mean_dice_gained_below"]] == ["0.1", "0.25", "0.5"]
    assert facts["dice_gained"] == {name: pytest.approx(np.mean(g), abs=1e-5) for name, g in gains.items()}


def test_masks_leave_without_fragments_unless_asked_otherwise(
    run: Run, phantom: Dataset, tmp_path: Path
) -> None:
    assert run.postprocessing.classes
    case = next(case for case in phantom.cases if case.id in run.splits["held_out"])
    for folder, asked in (("without", None), ("with", False)):
        assert [o.status for o in predict([run], [case], tmp_path / folder, postprocess=asked)] == ["done"]
    image = case.image()
    with_fragments = Segmenter([run], run.config.predict.model_copy(update={"postprocess": False}))
    kept = with_fragments.segment(image).label.array[0]
    expected = kept.copy()
    run.postprocessing.apply(expected)
    assert (expected != kept).any()
    np.testing.assert_array_equal(Segmenter([run]).segment(image).label.array[0], expected)
    manifests = [atomic.read_json(tmp_path / name / "predictions.json") for name in ("without", "with")]
    assert manifests[0]["cases"][case.id]["sha256"] != manifests[1]["cases"][case.id]["sha256"]
    assert manifests[0]["origin"] != manifests[1]["origin"]
    assert manifests[0]["runs"][0]["postprocessing"]["classes"] == [*run.postprocessing.classes]


def test_a_size_that_was_asked_for_is_the_only_one(phantom: Dataset, tmp_path: Path) -> None:
    config = small_config("train.steps=1", "postprocessing.smaller_than=0.3", "judge.detectors={}")
    run = train(phantom, config, tmp_path / "run")
    assert run.postprocessing.smaller_than == 0.3
    assert [*atomic.read_json(run.path / runs.POSTPROCESSING)["mean_dice_gained_below"]] == ["0.3"]


def test_a_run_that_kept_fragments_has_no_rule(phantom: Dataset, tmp_path: Path) -> None:
    config = small_config("train.steps=1", 'postprocessing.fragments="kept"', "judge.detectors={}")
    run = train(phantom, config, tmp_path / "run")
    assert run.postprocessing == Postprocessing()
    assert not (run.path / runs.POSTPROCESSING).exists()


def test_without_held_out_cases_nothing_is_taken_out(phantom: Dataset, tmp_path: Path) -> None:
    config = small_config("train.steps=1", "train.validation_fraction=0", "judge.detectors={}")
    run = train(phantom, config, tmp_path / "run")
    assert run.postprocessing.classes == ()
    assert atomic.read_json(run.path / runs.POSTPROCESSING)["in_one_piece"]


def test_a_case_that_fails_does_not_cost_the_rest(
    phantom: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = []
    found = []

    def assess_one_broken(training: Training) -> object:
        broken.append(training.held_out.cases_by_turns[0])
        segment = Segmenter.segment

        def fail_first(self: Segmenter, image: object) -> object:
            if not found:
                found.append(1)
                raise ValueError("a broken image")
            return segment(self, image)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(Segmenter, "segment", fail_first)
        return assess(training)

    monkeypatch.setattr("anysite.train.assess", assess_one_broken)
    notes: list[str] = []
    config = small_config(
        "train.steps=1", "train.validation_fraction=0.4", "judge.detectors={}", "calibration.kind=none"
    )
    run = train(
        phantom, config, tmp_path / "run", on_progress=lambda p: notes.append(p.note) if p.note else None
    )
    assert atomic.read_json(run.path / runs.POSTPROCESSING)["dice_gained"]
    assert any(broken[0].id in note and "a broken image" in note for note in notes)


@pytest.mark.parametrize(
    "content", [{"classes": "all"}, {"classes": [1], "smaller_than": 0}, [1], {"classes": [0.5]}]
)
def test_a_rule_that_is_none_is_refused(run: Run, tmp_path: Path, content: object) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run.path, copied)
    atomic.write_json(copied / runs.POSTPROCESSING, content)
    with pytest.raises(RunError, match="altered since training"):
        runs.open_run(copied)
    manifest = atomic.read_json(copied / runs.MANIFEST)
    manifest["files"][runs.POSTPROCESSING] = atomic.sha256(copied / runs.POSTPROCESSING)
    atomic.write_json(copied / runs.MANIFEST, manifest)
    with pytest.raises(RunError, match=r"postprocessing\.json"):
        runs.open_run(copied)
