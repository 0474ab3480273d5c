"""From image to prediction: ensembles, mirrored views, precision, and the image's own grid."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anysite import runs
from anysite.config import load
from anysite.data.case import Dataset
from anysite.data.volume import Volume
from anysite.errors import ConfigError, GeometryError, RunError
from anysite.learner import build_network
from anysite.normalisation import Normalisation
from anysite.plan import Plan
from anysite.planning import learn_plan
from anysite.runs import Run
from anysite.segment import Segmenter, flip_combinations
from anysite.settings import AugmentSettings, PlanSettings, PredictSettings
from anysite.train import train
from conftest import small_config

EXACT = PredictSettings(flips=False, precision="32-true", batch_size=4)


def make_run(path: Path, plan: Plan, seed: int) -> Run:
    """A finished run with random weights."""
    config = load("baseline", ["network.width=4", "network.depth=2"])
    runs.start(path, config, plan, {"training": [], "held_out": [], "test": []})
    torch.manual_seed(seed)
    runs.finish(path, build_network(config, plan))
    return runs.open_run(path)


def segment(members: Sequence[Run], image: Volume, **settings: Any) -> np.ndarray:
    changed = EXACT.model_copy(update=settings)
    return Segmenter(members, changed, "cpu").segment(image).probabilities.array


@pytest.fixture(scope="module")
def plan(phantom: Dataset) -> Plan:
    return learn_plan(phantom, PlanSettings(patch_size=(32, 32)))


@pytest.fixture(scope="module")
def image(phantom: Dataset) -> Volume:
    return phantom.cases[0].image()


@pytest.fixture(scope="module")
def members(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("members")
    coarse = plan.model_copy(update={"spacing": (2.0, 1.5)})
    return [make_run(folder / str(seed), chosen, seed) for seed, chosen in enumerate((plan, plan, coarse))]


def test_an_ensemble_is_the_mean_of_its_members(members: list[Run], image: Volume) -> None:
    single = [segment([run], image) for run in members]
    assert np.abs(single[0] - single[1]).max() > 0.1
    for chosen in itertools.combinations(range(3), 2):  # the last works on a coarser grid
        expected = np.mean([single[i] for i in chosen], axis=0)
        np.testing.assert_allclose(segment([members[i] for i in chosen], image), expected, atol=1e-6)
    found = Segmenter(members, EXACT, "cpu").segment(image)
    np.testing.assert_array_equal(found.label.array[0], np.mean(single, axis=0).argmax(0))


def test_members_of_one_plan_share_the_image_on_its_grid(
    members: list[Run], image: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Plan] = []
    to_grids = Plan.to_grids
    monkeypatch.setattr(Plan, "to_grids", lambda plan, image: made.append(plan) or to_grids(plan, image))
    Segmenter(members, EXACT, "cpu").segment(image)
    assert made == [members[0].plan, members[2].plan]


def test_what_networks_disagree_about_needs_no_judge(members: list[Run], image: Volume) -> None:
    assert not any(run.judge for run in members)
    verdict = Segmenter(members).segment(image).verdict
    assert verdict is not None
    assert set(verdict.scores) == {"ensemble"}
    assert Segmenter(members[:1]).segment(image).verdict is None


def test_every_member_predicts_an_image_on_its_grid(members: list[Run], image: Volume) -> None:
    for run in members:
        (grid,) = Segmenter([run], EXACT, "cpu").predict_grid(run.plan.to_grid(image))
        native = run.plan.from_grid(grid, image).array
        np.testing.assert_array_equal(native, segment([run], image))


def test_probabilities_of_classes_sum_to_one(members: list[Run], image: Volume) -> None:
    for run in members:
        probabilities = segment([run], image)
        assert probabilities.shape == (len(run.plan.classes), *image.shape)
        assert probabilities.min() >= 0
        np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)


def test_flips_are_the_mean_of_mirrored_images(plan: Plan, image: Volume, tmp_path: Path) -> None:
    """One window covers the picture, so that mirroring windows is mirroring the picture."""
    run = make_run(tmp_path / "run", plan.model_copy(update={"patch_size": (64, 64)}), 3)
    views = []
    for axes in ((), (1,), (2,), (1, 2)):
        mirrored = image.with_array(np.flip(image.array, axes).copy())
        views.append(np.flip(segment([run], mirrored), axes))
    found = segment([run], image, flips=True)
    np.testing.assert_allclose(found, np.mean(views, axis=0), atol=1e-5)
    assert np.abs(found - views[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("dimension", "augment", "expected"),
    [
        (2, {}, [(), (2,), (3,), (2, 3)]),
        (3, {}, [(), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)]),
        (2, {"flip_axes": (1,)}, [(), (3,)]),
        (3, {"flip_axes": (2, 0)}, [(), (4,), (2,), (4, 2)]),
        (2, {"flip_axes": ()}, [()]),
        (2, {"flip": 0.0}, [()]),
        (2, {"enabled": False}, [()]),
    ],
)
def test_only_views_seen_in_training(plan: Plan, dimension: Any, augment: Any, expected: Any) -> None:
    config = load().model_copy(update={"augment": AugmentSettings(**augment)})
    found = flip_combinations(plan.model_copy(update={"dimension": dimension}), config)
    assert found == expected


def test_runs_of_other_classes_are_not_averaged(members: list[Run], plan: Plan, tmp_path: Path) -> None:
    renamed = plan.model_copy(update={"classes": (*plan.classes[:-1], "other")})
    regions = plan.model_copy(update={"regions": ((1,), (1, 2)), "region_classes": (1, 2)})
    for name, changed in (("renamed", renamed), ("regions", regions)):
        run = make_run(tmp_path / name, changed, 0)
        with pytest.raises(RunError, match=r"expected .* as in .*, to average the two") as caught:
            Segmenter([members[0], run], EXACT, "cpu")
        assert caught.value.where == str(run.path)


def test_an_image_of_other_channels_is_refused(members: list[Run], image: Volume) -> None:
    twice = Volume.of_pixels(np.concatenate([image.array, image.array]))
    with pytest.raises(GeometryError, match="as in training"):
        segment(members[:1], twice)


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_the_batch_size_does_not_matter(members: list[Run], image: Volume, overlap: float) -> None:
    expected = segment(members[:1], image, batch_size=1, overlap=overlap)
    for batch_size in (2, 3, 16):
        found = segment(members[:1], image, batch_size=batch_size, overlap=overlap)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("context", [0, 1])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAL", "PIR"])
@pytest.mark.parametrize("regions", [(), ((1, 2), (2,))], ids=["classes", "regions"])
def test_the_output_lies_on_the_grid_of_the_image(
    tmp_path: Path, axes: str, context: int, regions: Any
) -> None:
    plan = Plan(
        dimension=2,
        image_dimension=3,
        axes="SRA",
        spacing=(4.0, 1.0, 1.2),
        unit="mm",
        channels=1,
        normalisation=(Normalisation(),),
        context_slices=context,
        patch_size=(16, 16),
        classes=("background", "organ", "nodule"),
        label_values=(0, 1, 2),
        regions=regions,
        region_classes=(1, 2) if regions else (),
    )
    affine = np.array([[0.8, 0.1, 0, 3], [-0.1, 1.2, 0.3, 5], [0, -0.3, 3.9, -80], [0, 0, 0, 1]])
    stored = Volume(np.random.default_rng(0).normal(size=(1, 14, 20, 5)), affine).oriented(axes)
    run = make_run(tmp_path / "run", plan, 0)
    found = Segmenter([run], EXACT, "cpu").segment(stored)
    for volume, channels in ((found.label, 1), (found.probabilities, 2 if regions else 3)):
        assert volume.array.shape == (channels, *stored.shape)
        assert volume.affine.tobytes() == stored.affine.tobytes()
        assert volume.unit == "mm"
    assert set(np.unique(found.label.array)) <= {0, 1, 2}
    upright = Segmenter([run], EXACT, "cpu").segment(stored.oriented("RAS")).probabilities.oriented(axes)
    np.testing.assert_allclose(found.probabilities.array, upright.array, atol=1e-4)


@pytest.fixture(scope="module")
def trained(phantom: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("trained") / "run"
    # Of a few steps the last weights have learned more than their mean.
    last = ("train.schedule=cosine", "train.average_share=0")
    config = small_config("train.steps=60", "train.learning_rate=0.01", "test_domains=['west']", *last)
    return train(phantom, config, path)


def test_bfloat16_decides_like_float32(trained: Run, phantom: Dataset) -> None:
    agreement, foreground = [], 0
    for case in phantom.cases[::3]:
        exact = Segmenter([trained], EXACT, "cpu").segment(case.image())
        fast = Segmenter([trained], EXACT.model_copy(update={"precision": "bf16-mixed"}), "cpu").segment(
            case.image()
        )
        assert fast.probabilities.array.dtype == np.float32
        assert not np.array_equal(fast.probabilities.array, exact.probabilities.array)
        agreement.append((exact.label.array == fast.label.array).mean())
        foreground += int((exact.label.array > 0).sum())
    assert foreground > 100
    assert min(agreement) > 0.98
    assert np.mean(agreement) > 0.99


def test_the_settings_of_the_run_count_where_none_are_given(trained: Run, phantom: Dataset) -> None:
    image = phantom.cases[0].image()
    first = Segmenter([trained], accelerator="cpu")
    assert first.settings == trained.config.predict
    assert first.plan == trained.plan
    given = Segmenter([trained], trained.config.predict, "cpu").segment(image)
    assert np.array_equal(first.segment(image).probabilities.array, given.probabilities.array)


def test_batch_statistics_are_those_of_the_windows_and_leave_the_run_alone(
    phantom: Dataset, image: Volume, tmp_path: Path
) -> None:
    overrides = ["network.name=ram_dsir_unet", "network.width=4", "plan.patch_size=[32, 32]", "train.steps=2"]
    alone = ["judge.detectors={}", "calibration.kind=none", "postprocessing.fragments=kept"]
    config = load("baseline", [*overrides, *alone, "train.precision=32-true", "train.threads=1"])
    run = train(phantom, config, tmp_path / "run")
    before = (run.path / "weights.safetensors").read_bytes()
    kept = segment([run], image)
    shifted = image.with_array(image.array.astype(np.float32) * 3 + 40)
    assert not np.allclose(segment([run], image, normalisation="batch"), kept)
    assert (run.path / "weights.safetensors").read_bytes() == before
    np.testing.assert_array_equal(segment([runs.open_run(run.path)], image), kept)
    assert np.isfinite(segment([run], shifted, normalisation="batch")).all()


def test_batch_statistics_of_a_network_without_any_are_refused(members: list[Run], image: Volume) -> None:
    with pytest.raises(ConfigError, match=r"without batch normalisation.*expected eval"):
        segment(members[:1], image, normalisation="batch")
