"""Test-time adaptation: likeness against independent twins, what adapters may change, and the guard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ssim_and_cs
from PIL import Image
from scipy import ndimage
from torch import Tensor

from anysite import registry
from anysite.adapters import Adapter, choose_parameters, entropy
from anysite.adapters.refseg import RefSeg
from anysite.adapters.standard_views import StandardViews
from anysite.benchmark import benchmark, list_jobs
from anysite.config import choose_adapter
from anysite.corrupt import corrupt
from anysite.data import files
from anysite.data.case import Dataset
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.data.volume import Volume
from anysite.detectors import Agreement, Output
from anysite.errors import ConfigError
from anysite.evaluate import evaluate
from anysite.guard import (
    NO_BETTER,
    NOT_JUDGED,
    NOT_SHIFTED,
    NOTHING_FOUND,
    find_fault,
    find_reason_against,
)
from anysite.intensities import measure_shares, standardise
from anysite.judge import Verdict
from anysite.learner import build_learner
from anysite.maps import Prediction
from anysite.networks import Network
from anysite.networks.synthesiser import Synthesiser
from anysite.normalisation import Normalisation
from anysite.objectives import Step
from anysite.objectives.reflection import Reflection, spoil_mask
from anysite.plan import Plan
from anysite.predict import predict
from anysite.report.page import write_report
from anysite.rows import read_rows
from anysite.runs import Run, open_run
from anysite.segment import Segmenter
from anysite.settings import AdaptSettings
from anysite.similarity import SIMILARITIES, compare, describe_neighbourhoods, grow, mean_over
from anysite.train import train
from conftest import SMALL, small_config


def pictures(dimension: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    shape = (24, 30) if dimension == 2 else (14, 16, 18)
    smooth = [ndimage.gaussian_filter(rng.normal(size=shape), 1.5) for _ in range(2)]
    one, other = (torch.tensor(x / np.abs(x).max(), dtype=torch.float32)[None, None] for x in smooth)
    return one, (0.7 * one + 0.3 * other)


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("name", SIMILARITIES)
def test_an_image_is_like_itself_and_less_like_others_the_further_they_are(name: str, dimension: int) -> None:
    one, _ = pictures(dimension)
    same = compare(name, one, one)
    assert same.shape == one.shape
    torch.testing.assert_close(same, torch.ones_like(same), rtol=0, atol=2e-3)
    shifted = [float(compare(name, one, torch.roll(one, step, -1))[..., 6:-6].mean()) for step in range(4)]
    assert shifted == sorted(shifted, reverse=True)
    assert shifted[3] < 0.9


@pytest.mark.parametrize("name", SIMILARITIES)
def test_likeness_is_the_same_under_bfloat16_autocast(name: str) -> None:
    one, other = pictures()
    flat = torch.ones_like(one)
    expected = [compare(name, a, b) for a, b in ((one, other), (flat, flat), (one, flat))]
    with torch.autocast("cpu", torch.bfloat16):
        found = [compare(name, a, b) for a, b in ((one, other), (flat, flat), (one, flat))]
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.isfinite().all()


def test_ssim_and_its_contrast_term_against_a_slow_twin() -> None:
    """Wang et al., 2004: 11 x 11 Gaussian window of 1.5 pixels, K1 0.01 and K2 0.03, range 2."""
    one, other = pictures()
    a, b = one[0, 0].double().numpy(), other[0, 0].double().numpy()
    distance = np.arange(-5, 6)
    gauss = np.exp(-(distance**2) / (2 * 1.5**2))
    weight = np.outer(gauss, gauss) / gauss.sum() ** 2
    for row, column in ((8, 9), (12, 20), (15, 6)):
        window = (slice(row - 5, row + 6), slice(column - 5, column + 6))
        x, y = a[window], b[window]
        mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
        var_x, var_y = (weight * (x - mean_x) ** 2).sum(), (weight * (y - mean_y) ** 2).sum()
        both = (weight * (x - mean_x) * (y - mean_y)).sum()
        contrast = (2 * both + 0.06**2) / (var_x + var_y + 0.06**2)
        light = (2 * mean_x * mean_y + 0.02**2) / (mean_x**2 + mean_y**2 + 0.02**2)
        assert float(SIMILARITIES["contrast"](one, other)[0, 0, row, column]) == pytest.approx(
            contrast, abs=1e-4
        )
        assert float(SIMILARITIES["ssim"](one, other)[0, 0, row, column]) == pytest.approx(
            light * contrast, abs=1e-4
        )


@pytest.mark.parametrize(("dimension", "window"), [(2, 11), (3, 7)])
def test_ssim_is_that_of_monai_where_no_window_reaches_beyond_the_image(dimension: int, window: int) -> None:
    one, other = (torch.cat([image, image.flip(-1)], 1) for image in pictures(dimension))
    sizes, sigmas = [window] * dimension, [1.5] * dimension
    expected = compute_ssim_and_cs(one, other, dimension, sizes, sigmas, data_range=2.0)
    inside = (..., *[slice(window // 2, -(window // 2))] * dimension)
    for name, known in zip(("ssim", "contrast"), expected, strict=True):
        torch.testing.assert_close(compare(name, one, other)[inside], known, rtol=0, atol=1e-4)


def test_the_contrast_term_is_blind_to_brightness_and_correlation_to_contrast_too() -> None:
    one, other = pictures()
    for name in ("contrast", "correlation"):
        torch.testing.assert_close(
            SIMILARITIES[name](one, other), SIMILARITIES[name](one, other + 0.3), atol=1e-3, rtol=0
        )
    correlated = SIMILARITIES["correlation"]
    torch.testing.assert_close(correlated(one, other), correlated(one, 0.5 * other), atol=2e-2, rtol=0)
    assert (SIMILARITIES["ssim"](one, other) - SIMILARITIES["ssim"](one, other + 0.3)).abs().mean() > 0.05


def test_correlation_against_a_slow_twin() -> None:
    one, other = pictures()
    a, b = one[0, 0].double().numpy(), other[0, 0].double().numpy()
    found = SIMILARITIES["correlation"](one, other)[0, 0].numpy()
    for row, column in ((8, 9), (12, 20), (15, 5)):
        window = (slice(row - 4, row + 5), slice(column - 4, column + 5))
        assert found[row, column] == pytest.approx(
            np.corrcoef(a[window].ravel(), b[window].ravel())[0, 1] ** 2, abs=1e-3
        )


def test_neighbourhoods_against_a_slow_twin() -> None:
    one, _ = pictures()
    array = np.pad(one[0, 0].double().numpy(), 2, mode="edge")
    found = describe_neighbourhoods(one)[:, 0, 0].numpy()
    for row, column in ((8, 9), (12, 20)):
        distances = []
        for axis, step in ((0, -1), (0, 1), (1, -1), (1, 1)):
            squares = []
            for i in range(row - 1, row + 2):
                for j in range(column - 1, column + 2):
                    there = (i + (step if axis == 0 else 0), j + (step if axis == 1 else 0))
                    squares.append((array[i + 2, j + 2] - array[there[0] + 2, there[1] + 2]) ** 2)
            distances.append(np.mean(squares))
        expected = np.exp(-np.array(distances) / max(np.mean(distances), 1e-6))
        np.testing.assert_allclose(found[:, row, column], expected / expected.max(), rtol=1e-3)


@pytest.mark.parametrize("dimension", [2, 3])
def test_a_region_grows_by_whole_voxels_and_means_stay_inside(dimension: int) -> None:
    region = torch.zeros(1, 1, *(11,) * dimension, dtype=torch.bool)
    region[(0, 0, *(5,) * dimension)] = True
    grown = grow(region, 2)
    assert int(grown.sum()) == 5**dimension
    values = torch.where(grown, 2.0, 100.0).expand(1, 3, *grown.shape[2:])
    assert mean_over(values, grown).tolist() == [2.0]
    assert mean_over(values, torch.zeros_like(grown)).tolist() == [0.0]


@pytest.mark.parametrize("patch_size", [(32, 48), (8, 32, 32)], ids=["2d", "3d"])
def test_the_synthesiser_draws_from_the_mask_at_every_scale(patch_size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    synthesiser = Synthesiser(3, 2, patch_size, width=4)
    mask = torch.rand(2, 3, *patch_size).requires_grad_()
    drawn = synthesiser(mask)
    assert drawn.shape == (2, 2, *patch_size)
    assert drawn.abs().max() <= 1
    (gradient,) = torch.autograd.grad(drawn.sum(), mask)
    assert gradient.abs().amax((0, 1)).min() > 0
    larger = torch.rand(1, 3, *(2 * n for n in patch_size))
    assert synthesiser(larger).shape == (1, 2, *larger.shape[2:])


def test_spoiled_masks_hold_the_same_values_elsewhere() -> None:
    torch.manual_seed(0)
    label = torch.zeros(4, 32, 32).long()
    label[:, 8:20, 10:22] = 1
    mask = torch.nn.functional.one_hot(label, 2).movedim(-1, 1).float()
    spoiled = spoil_mask(mask, 8)
    assert (spoiled.sum(1) == 1).all()
    assert 0 < (spoiled != mask).any(1).float().mean() < 0.5


JUDGED = "judge.detectors={histogram = {}, entropy = {}}"
ADAPTABLE = [
    "network.norm=batch", "objectives.reflection={width=4, prior_width=4, margin_voxels=6}", "train.batch_size=4",
    'test_domains=["west"]',
]  # fmt: skip


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three sites, with patients enough to judge by."""
    folder = tmp_path_factory.mktemp("sites") / "phantom"
    return open_dataset(write_phantom(folder, patients_per_site=7, size=64, sites=("north", "east", "west")))


@pytest.fixture(scope="module")
def run(phantom: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A network that has learned a little, with all that reflection needs."""
    config = small_config(*ADAPTABLE, "train.steps=150", "train.validation_fraction=0.3", JUDGED)
    return train(phantom, config, tmp_path_factory.mktemp("adapted") / "run")


@pytest.fixture(scope="module")
def image(phantom: Dataset) -> Volume:
    """One of the site that was not trained on."""
    return next(case for case in phantom.cases if case.domain == "west").image()


def test_reflection_lies_in_the_run_folder_and_leaves_the_network_alone(
    run: Run, phantom: Dataset, tmp_path: Path
) -> None:
    reflection = open_run(run.path).reflection()
    assert isinstance(reflection, Reflection)
    assert not any(parameter.requires_grad for parameter in reflection.parameters())
    plain = [*ADAPTABLE[:1], *ADAPTABLE[2:], "train.steps=3", "train.gradient_clip=1e9"]
    without = train(phantom, small_config(*plain), tmp_path / "without")
    beside = train(phantom, small_config(*plain, ADAPTABLE[1]), tmp_path / "beside")
    for mine, other in zip(without.network().parameters(), beside.network().parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert without.reflection() is None


def test_what_is_drawn_shows_flaws_of_the_mask(run: Run, phantom: Dataset) -> None:
    """The drawing from the true mask is likest; eroded, shifted, or with a part missing it is less and less like."""
    reflection = run.reflection()
    assert reflection is not None
    scores: dict[str, list[float]] = {}
    for case in phantom.cases[:6]:
        image = run.plan.to_grid(case.image())[None]
        label = run.plan.label_to_grid(phantom.label_of(case), case.image())[None].long()
        target = reflection.target(image)
        region = reflection.region(reflection.as_maps(label))
        eroded = torch.from_numpy(ndimage.grey_erosion(label.numpy(), (1, 7, 7)))
        half = label.clone()
        half[..., : label.shape[-1] // 2] = 0
        flawed = {
            "true": label,
            "eroded": eroded,
            "shifted": torch.roll(label, 6, -1),
            "half": half,
            "none": 0 * label,
        }
        for name, one in flawed.items():
            drawn = reflection.synthesiser(reflection.as_maps(one))
            scores.setdefault(name, []).append(
                float(mean_over(SIMILARITIES["contrast"](drawn, target), region))
            )
    mean = {name: np.mean(values) for name, values in scores.items()}
    assert all(mean["true"] > mean[name] + 0.01 for name in ("eroded", "shifted", "half", "none")), mean


def attached(name: str, run: Run, **settings: Any) -> Adapter:
    adapter: Adapter = registry.build("adapter", name, **settings)
    adapter.attach(run.network(), run.plan, run.reflection())
    return adapter


def windows_of(run: Run, image: Volume) -> Tensor:
    grid = run.plan.to_grid(image)
    return torch.stack([grid[:, :32, :32], grid[:, 16:48, 16:48], grid[:, 32:, 32:]])


@pytest.mark.parametrize("name", registry.ADAPTERS)
def test_every_adapter_changes_its_copy_and_takes_it_back_bit_by_bit(
    name: str, run: Run, image: Volume
) -> None:
    adapter, windows = (
        attached(name, run, **({"least_gain": -1.0} if name == "refseg" else {})),
        windows_of(run, image),
    )
    network = run.network()
    with torch.no_grad():
        before = adapter.predict(windows)
        torch.testing.assert_close(before, network(windows), rtol=0, atol=0)
    facts = adapter.adapt(windows)
    assert all(isinstance(value, float) and np.isfinite(value) for value in facts.values())
    with torch.no_grad():
        assert (adapter.predict(windows) - before).abs().max() > 1e-5
    adapter.reset()
    with torch.no_grad():
        torch.testing.assert_close(adapter.predict(windows), before, rtol=0, atol=0)
    for mine, original in zip(
        adapter.network.state_dict().values(), network.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, original)


@pytest.mark.parametrize("name", ["tent", "reliable_entropy", "denoising_prior", "fourier_prompt", "refseg"])
def test_what_an_adapter_lowers_gets_lower(name: str, run: Run, image: Volume) -> None:
    adapter = attached(name, run)
    facts = adapter.adapt(windows_of(run, image))
    before, after = (next(v for k, v in facts.items() if k.endswith(end)) for end in ("_before", "_after"))
    assert after >= before if name == "refseg" else after < before


class Threshold(Network):
    """Sees every voxel by itself, so that its prediction moves with the image."""

    def encode(self, image: Tensor) -> list[Tensor]:
        return [image]

    def decode(self, features: list[Tensor]) -> Tensor:
        return torch.cat([-4 * features[0], 4 * features[0]], 1)


@pytest.mark.parametrize("size", [0.85, 1.18])
@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_view_of_another_size_comes_back_to_where_it_was(
    precision: str, dimension: Literal[2, 3], size: float
) -> None:
    shape = (512, 96) if dimension == 2 else (40, 48, 56)
    places = np.indices(shape) - np.reshape([0.3 * n for n in shape], (-1, *[1] * dimension))
    ball = np.linalg.norm(places, axis=0) < 0.2 * min(shape)
    window = torch.from_numpy(ndimage.gaussian_filter(2.0 * ball - 1, 1.5).astype(np.float32))[None, None]
    plan = Plan(
        dimension=dimension, image_dimension=dimension, unit="mm", spacing=(1.0,) * dimension, patch_size=shape,
        axes="RAS", channels=1, classes=("background", "ball"), label_values=(0, 1),
        normalisation=(Normalisation(kind="none"),),
    )  # fmt: skip
    adapter = StandardViews(sizes=(size,))
    adapter.attach(Threshold(1, 2, shape), plan, None)
    expected = adapter.probabilities(adapter.network(window))[:, 1]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        chances, shown = adapter._look_at(window, size)
    inside = torch.as_tensor(shown).expand_as(chances)[:, 1] > 0
    assert inside.all() == (size < 1)
    assert inside.float().mean() > 0.5
    assert (chances[:, 1] - expected)[inside].abs().max() < 0.3  # a voxel aside it is more


def test_standardised_intensities_are_those_usual_whatever_a_scanner_made_of_them() -> None:
    rng = np.random.default_rng(0)
    image = np.where(rng.random((2, 64, 64)) < 0.5, -0.7, rng.normal(0.7, 0.6, (2, 64, 64))).astype(
        np.float32
    )
    image[1] *= -1  # another channel, another distribution
    image[0, 0, 0] = 9.0  # beyond the bins
    usual = measure_shares(image, 64)
    shown = torch.from_numpy(image)
    torch.testing.assert_close(standardise(shown[None], usual, usual)[0], shown, rtol=0, atol=1e-3)
    bent = shown.clamp(-4, 4) * 1.3 + 0.4
    own = measure_shares(bent.numpy(), 64)
    found = standardise(torch.cat([bent, bent])[None], own, usual)[0]  # two slices of two channels
    assert torch.equal(found[:2], found[2:])
    assert (found[:2] - shown).abs().mean() < 0.05 < (bent - shown).abs().mean()


def test_a_background_of_one_value_goes_to_that_of_training_however_large_it_is() -> None:
    rng = np.random.default_rng(1)

    def picture(share: float, background: float) -> np.ndarray:
        tissue = rng.normal(0.9, 0.5, (1, 100, 100))
        return np.where(rng.random((1, 100, 100)) < share, background, tissue).astype(np.float32)

    usual = measure_shares(picture(0.4, -0.7), 64)
    for background in np.linspace(-0.6, -0.3, 7):
        image = picture(0.6, float(background))
        found = standardise(torch.from_numpy(image)[None], measure_shares(image, 64), usual)[0].numpy()
        assert np.abs(found[image == np.float32(background)] + 0.7).max() < 0.32  # the width of two bins


@pytest.mark.parametrize("subset", ["norm", "first", "all"])
def test_only_the_chosen_parameters_change(subset: Any, run: Run, image: Volume) -> None:
    adapter = attached("refseg", run, subset=subset, least_gain=-1.0, learning_rate=3e-4)
    chosen = {id(p) for p in choose_parameters(adapter.network, subset)}
    names = {name for name, p in adapter.network.named_parameters() if id(p) in chosen}
    total = len(list(adapter.network.parameters()))
    assert {"norm": 2 < len(names) < total, "first": len(names) == 1, "all": len(names) == total}[subset]
    adapter.adapt(windows_of(run, image))
    original = dict(run.network().named_parameters())
    changed = {n for n, p in adapter.network.named_parameters() if not torch.equal(p, original[n])}
    assert changed <= names
    assert changed


@pytest.mark.parametrize("subset", ["norm", "first", "all"])
def test_in_bfloat16_every_step_sees_the_weights_of_the_one_before(
    subset: Any, run: Run, image: Volume
) -> None:
    """Autocast keeps its copies of weights otherwise, and all steps but the first go blind."""
    settings = AdaptSettings(
        method="tent", only_shifted=False, settings={"subset": subset, "learning_rate": 0.01}
    )
    predict_settings = run.config.predict.model_copy(update={"adapt": settings, "precision": "bf16-mixed"})
    segmenter = Segmenter([run], predict_settings)
    segmenter.precision = "bf16-mixed"
    (adapter,) = segmenter.adapters
    assert adapter is not None
    windows = windows_of(run, image)
    seen: list[float] = []
    network = adapter.network
    inner = network.forward

    def watch(x: Tensor) -> Tensor:
        logits = inner(x)
        seen.append(float(logits.detach().float().abs().mean()))
        return logits

    network.forward = watch  # type: ignore[method-assign]
    with segmenter._autocast(learning=True):
        adapter.adapt(windows)
    network.forward = inner  # type: ignore[method-assign]
    assert len(set(seen)) >= 4


def test_refseg_keeps_the_first_mask_unless_likeness_rises_enough(run: Run, image: Volume) -> None:
    adapter = attached("refseg", run, least_gain=0.9)
    windows = windows_of(run, image)
    with torch.no_grad():
        before = adapter.predict(windows)
    facts = adapter.adapt(windows)
    assert facts["kept"] == 0
    assert facts["similarity_after"] == facts["similarity_before"]
    with torch.no_grad():
        assert torch.equal(adapter.predict(windows), before)
    assert isinstance(adapter, RefSeg)
    assert {name: tuple(image.shape) for name, image in adapter.draw(windows).items()} == {
        "image": (3, 1, 32, 32),
        "drawn": (3, 1, 32, 32),
    }


def test_nothing_found_is_nothing_to_adapt_by(run: Run, image: Volume) -> None:
    adapter = attached("refseg", run)
    with torch.no_grad():
        for name, parameter in adapter.network.named_parameters():
            if name == "head.bias":
                parameter.copy_(torch.tensor([100.0, *[0.0] * (len(parameter) - 1)]))
    assert adapter.adapt(windows_of(run, image)) == {"kept": 0.0}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("refseg", {"steps": 0}, "steps"),
        ("refseg", {"similarity": "mse"}, "similarity"),
        ("refseg", {"learning_rate": 0.0}, "learning_rate"),
        ("tent", {"subset": "last"}, "subset"),
        ("tent", {"learning_rate": -1.0}, "learning_rate"),
        ("fourier_prompt", {"window": 0.0}, "window"),
        ("intensity_views", {"gamma": 1.0}, "gamma"),
        ("intensity_views", {"blur_voxels": -1.0}, "blur_voxels"),
        ("standard_views", {"sizes": [0.8, 1.0]}, "sizes"),
        ("standard_views", {"sizes": [-0.8]}, "sizes"),
        ("refseg", {"margin_voxels": 0}, "margin_voxels"),
        ("batch_statistics", {"source_share": 1.5}, "source_share"),
    ],
)
def test_wrong_settings_of_adapters_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.build("adapter", name, **settings)


def test_what_a_method_lacks_is_said(run: Run, phantom: Dataset, tmp_path: Path) -> None:
    plain = train(phantom, small_config("train.steps=2"), tmp_path / "plain")
    with pytest.raises(ConfigError, match="a run without reflection"):
        attached("refseg", plain)
    with pytest.raises(ConfigError, match="without batch normalisation"):
        attached("batch_statistics", plain)


@pytest.mark.parametrize("overlapping", [False, True])
def test_where_a_network_is_sure_the_entropy_pulls_at_nothing(overlapping: bool) -> None:
    logits = torch.tensor([[[20.0, 0.3], [-1e4, 0.1]]], requires_grad=True)
    chances = logits.sigmoid() if overlapping else logits.softmax(1)
    found = entropy(chances, overlapping)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert torch.isfinite(gradient).all()
    assert (gradient[0, :, 0] == 0).all()
    assert (gradient[0, :, 1] != 0).all()
    assert found[0, 0].item() == pytest.approx(0, abs=1e-4)


def test_what_an_adapter_lacks_is_said_before_a_benchmark_trains(
    phantom: Dataset, phantom_folder: Path
) -> None:
    def list_with(adapt: str, *overrides: str) -> None:
        list_jobs(phantom, phantom_folder, ["baseline"], [0], "leave-one-out", overrides, adapt=[adapt])

    with pytest.raises(ConfigError, match="without batch normalisation"):
        list_with("batch_statistics")
    list_with("batch_statistics", "network.norm=batch")
    with pytest.raises(ConfigError, match="steps"):
        list_with("auto", "predict.adapt.settings={steps=3}")
    list_with("auto", "predict.adapt.settings={sizes=[0.9]}")


def test_networks_that_are_adapted_are_judged_by_what_they_disagreed_about_before(
    run: Run, phantom: Dataset, tmp_path: Path
) -> None:
    other = train(phantom, small_config("train.steps=3", JUDGED), tmp_path / "other")
    image = corrupt(phantom.cases[0].image(), "gamma_dark", 5, 0)

    def judge(adapt: str) -> Prediction:
        return Segmenter([run, other], choose_adapter(run.config.predict, adapt)).segment(image)

    plain, adapted = judge("none"), judge("standard_views:always")
    assert any(adaptation.kept for adaptation in adapted.adaptations)
    assert not np.array_equal(plain.label.array, adapted.label.array)
    assert plain.verdict == adapted.verdict
    assert plain.verdict is not None
    assert "ensemble" in plain.verdict.scores


def output(mask: np.ndarray, agreement: float | None = None) -> Output:
    chances = np.stack([1.0 - mask, mask]).astype(np.float32)
    shared = None if agreement is None else Agreement(np.array([[[1.0], [agreement]], [[agreement], [1.0]]]))
    return Output(np.zeros((1, *mask.shape), np.float32), chances, False, (), shared)


def square(side: int, at: int = 10) -> np.ndarray:
    mask = np.zeros((60, 60))
    mask[at : at + side, at : at + side] = 1
    return mask


def test_the_guard_names_every_fault() -> None:
    settings, before = AdaptSettings(), output(square(20), 0.95)
    assert find_fault(settings, before, output(square(20), 0.95)) == ("", 0.0)
    small = output(square(21), 0.95)
    assert find_fault(settings, before, small)[0] == ""
    assert find_fault(settings, before, small)[1] == pytest.approx(41 / 400)
    broken = output(square(20))
    broken.probabilities[0, 3, 3] = np.nan
    for after, fault in (
        (output(square(30), 0.95), "volume became 2.25"),
        (output(square(20, 25), 0.95), "share a Dice of"),
        (output(square(20, 13), 0.95), "of the voxels found before changed"),
        (output(square(20), 0.9), "views of the image agree less"),
        (output(0 * square(20), 0.95), "volume became 0.00"),
        (broken, "not finite"),
    ):
        told, _ = find_fault(settings.model_copy(update={"least_agreement": 0.5}), before, after)
        assert fault in told
        unguarded = find_fault(settings.model_copy(update={"guard": False}), before, after)[0]
        assert unguarded == ("probabilities that are not finite" if after is broken else "")
    assert find_fault(settings, output(0 * square(1)), output(square(1)))[0] == NOTHING_FOUND


def test_only_images_unlike_those_known_are_adapted_to() -> None:
    settings, of_shift = AdaptSettings(), {"histogram", "combined"}

    def reason(**scores: float | None) -> str:
        return find_reason_against(settings, Verdict("review", (), scores), of_shift)

    assert reason(histogram=0.9, combined=0.3, entropy=7.0) == NOT_SHIFTED
    assert reason(histogram=1.1, combined=0.3) == ""
    assert reason(histogram=None, combined=0.3) == ""
    assert reason(histogram=0.9, combined=0.3, quality=0.9) == NOT_SHIFTED
    assert reason(histogram=0.9, combined=0.3, quality=1.1) == ""
    settings = settings.model_copy(update={"least_doubt": 0.4})
    assert reason(histogram=0.9, combined=0.3, quality=0.3) == NOT_SHIFTED
    assert reason(histogram=0.9, combined=0.3, quality=0.5) == ""
    assert find_reason_against(settings, None, of_shift) == NOT_JUDGED
    assert find_reason_against(settings.model_copy(update={"only_shifted": False}), None, of_shift) == ""


def states(run: Run) -> Iterator[bytes]:
    for tensor in run.network().state_dict().values():
        yield tensor.numpy().tobytes()


def test_order_and_company_of_images_change_nothing(run: Run, phantom: Dataset) -> None:
    settings = choose_adapter(run.config.predict, "refseg:always")
    settings = settings.model_copy(
        update={"adapt": settings.adapt.model_copy(update={"settings": {"least_gain": -1.0, "steps": 2}})}
    )
    segmenter, images = Segmenter([run], settings), [case.image() for case in phantom.cases[:4]]
    before = {name: t.clone() for name, t in segmenter.members[0].network.state_dict().items()}
    first = [segmenter.segment(image) for image in images]
    assert all(prediction.adaptations[0].kept for prediction in first)
    again = [segmenter.segment(image) for image in images[::-1]][::-1]
    alone = [Segmenter([run], settings).segment(image) for image in images]
    for one, two, three in zip(first, again, alone, strict=True):
        assert np.array_equal(one.raw.array, two.raw.array)
        assert np.array_equal(one.raw.array, three.raw.array)
    for name, tensor in segmenter.members[0].network.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", registry.ADAPTERS)
def test_objectives_that_go_astray_are_rolled_back(
    name: str, run: Run, image: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an adapter does to its copy, the mask that comes out is the one before, with the reason."""
    plain = Segmenter([run]).segment(image)

    def spoil(kind: str) -> Any:
        def adapt(adapter: Adapter, windows: Tensor) -> dict[str, float]:
            for parameter in adapter.network.parameters():
                parameter.data = {
                    "nan": parameter * np.nan,
                    "noise": torch.randn_like(parameter),
                    "zero": 0 * parameter,
                }[kind]
            return {"kept": 1.0}

        return adapt

    for kind in ("nan", "noise", "zero"):
        monkeypatch.setattr(registry.find("adapter", name), "adapt", spoil(kind))
        settings = choose_adapter(run.config.predict, name)
        settings = settings.model_copy(
            update={"adapt": settings.adapt.model_copy(update={"only_shifted": False})}
        )
        found = Segmenter([run], settings).segment(image)
        assert not found.adaptations[0].kept, kind
        assert found.adaptations[0].reason
        assert np.array_equal(found.label.array, plain.label.array)
        assert np.array_equal(found.raw.array, plain.raw.array)
        assert found.unadapted is None


def test_probabilities_before_and_after_are_averaged_by_the_share_asked_for(run: Run, image: Volume) -> None:
    def predict(method: str, **changes: Any) -> Prediction:
        settings = choose_adapter(run.config.predict, method)
        adapt = settings.adapt.model_copy(update={"settings": {"learning_rate": 0.01}} | changes)
        return Segmenter([run], settings.model_copy(update={"adapt": adapt})).segment(image)

    first, alone = predict("none", settings={}), predict("tent:always")
    assert alone.adaptations[0].kept
    assert not np.allclose(first.raw.array, alone.raw.array, atol=1e-3)
    for share in (0.25, 0.5):
        expected = share * first.raw.array + (1 - share) * alone.raw.array
        np.testing.assert_allclose(predict("tent:always", first_share=share).raw.array, expected, atol=1e-6)
    assert choose_adapter(run.config.predict, "tent").adapt.first_share == 0.5
    configured = choose_adapter(run.config.predict, "refseg").model_copy(deep=True)
    assert choose_adapter(run.config.predict, "tent").adapt.settings == run.config.predict.adapt.settings
    configured.adapt.settings["steps"] = 3
    assert choose_adapter(configured, "standard_views").adapt.settings == {}  # they are of refseg
    assert choose_adapter(configured, "refseg:always").adapt.settings == {"steps": 3}


@pytest.mark.parametrize("kind", ["file", "mask"])
def test_files_of_others_among_the_unadapted_masks_are_not_replaced(
    kind: str, run: Run, phantom: Dataset, tmp_path: Path
) -> None:
    case = phantom.cases[-1]
    mine = tmp_path / "unadapted" if kind == "file" else tmp_path / "unadapted" / f"{case.id}.png"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(ConfigError, match="would be replaced"):
        list(predict([run], [case], tmp_path, dataset=phantom, adapt="tent:always"))
    assert mine.read_text() == "mine"


def test_values_that_are_not_finite_end_no_batch(
    run: Run, phantom: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [case for case in phantom.cases if case.domain == "west"][:2]

    def diverge(adapter: Adapter, windows: Tensor) -> dict[str, float]:
        return {"entropy_before": 0.3, "entropy_after": np.nan, "kept": 1.0}

    def fail(adapter: Adapter, windows: Tensor) -> dict[str, float]:
        raise RuntimeError("out of memory")

    def divide(adapter: Adapter, windows: Tensor) -> dict[str, float]:
        return {"kept": 1 / 0}

    reasons = {
        "diverged": "",
        "failed": "it could not be computed (RuntimeError: out of memory)",
        "divided": "it could not be computed (ZeroDivisionError: division by zero)",
    }
    for name, adapt in zip(reasons, (diverge, fail, divide), strict=True):
        monkeypatch.setattr(registry.find("adapter", "tent"), "adapt", adapt)
        outcomes = list(predict([run], cases, tmp_path / name, dataset=phantom, adapt="tent:always"))
        assert [outcome.status for outcome in outcomes] == ["done", "done"]
        entry = json.loads((tmp_path / name / "predictions.json").read_text())["cases"][cases[0].id]
        (adaptation,) = entry["adaptation"]
        assert adaptation["facts"] == ({"entropy_before": 0.3, "kept": 1.0} if name == "diverged" else {})
        assert adaptation["reason"] == reasons[name]


def test_a_configured_adapter_costs_a_training_neither_calibration_nor_judge(
    phantom: Dataset, tmp_path: Path
) -> None:
    settings = ["train.steps=2", "train.validation_fraction=0.3", JUDGED, "predict.adapt.method=auto"]
    run = train(phantom, small_config(*settings), tmp_path / "run")
    assert run.judge is not None
    assert (run.path / "calibration.json").exists()
    found = Segmenter([run]).segment(phantom.cases[0].image())
    assert [adaptation.method for adaptation in found.adaptations] == ["standard_views"]
    for wrong, message in (("predict.adapt.method=tnet", "tnet"), ("predict.task=heart", "heart")):
        with pytest.raises(ConfigError, match=message):
            train(phantom, small_config("train.steps=2", wrong), tmp_path / "wrong")
        assert not (tmp_path / "wrong" / "run.json").exists()


def test_images_without_a_label_teach_the_synthesiser_nothing(run: Run, phantom: Dataset) -> None:
    learner = build_learner(small_config("objectives.reflection={width=4, prior_width=4}"), run.plan, ("a",))
    reflection = dict(learner.named_objectives())["reflection"]
    image, label = torch.randn(3, 1, 32, 32), torch.randint(0, 2, (3, 32, 32))
    known = torch.tensor([[True], [False], [True]]).expand(3, len(run.plan.classes))

    def losses(image: Tensor, label: Tensor, known: Tensor | None) -> list[float]:
        torch.manual_seed(0)
        step = Step(image, label, torch.zeros(len(image)).long(), 0.5, learner.network, known)
        return [value.item() for value in reflection(step).values()]

    assert losses(image, label, known) == pytest.approx(losses(image[[0, 2]], label[[0, 2]], None), rel=1e-5)
    assert losses(image, label, torch.zeros_like(known)) == [0, 0]


def test_prediction_keeps_both_masks_and_says_why(run: Run, phantom: Dataset, tmp_path: Path) -> None:
    cases = [case for case in phantom.cases if case.domain == "west"][:3]
    adapting = run.config.predict.adapt.model_copy(
        update={"settings": {"least_gain": -1.0, "learning_rate": 0.02}}
    )
    config = run.config.model_copy(
        update={"predict": run.config.predict.model_copy(update={"adapt": adapting})}
    )
    changed = replace(run, config=config)
    outcomes = list(predict([changed], cases, tmp_path / "always", dataset=phantom, adapt="refseg:always"))
    assert {outcome.status for outcome in outcomes} == {"done"}
    manifest = json.loads((tmp_path / "always" / "predictions.json").read_text())
    for case in cases:
        entry = manifest["cases"][case.id]
        (adaptation,) = entry["adaptation"]
        assert adaptation["kept"]
        assert adaptation["facts"]["steps"] > 0
        name = f"unadapted/{entry['mask']}"
        assert name in manifest["files"]
        before = files.read_label(tmp_path / "always" / name).array
        plain = Segmenter([run]).segment(case.image()).label.array
        assert np.array_equal(before, plain)
    rows = evaluate(tmp_path / "always", phantom).rows
    assert {(row["adapt"], row["labels"]) for row in rows} == {("refseg:always", "all")}
    told = {row["case"]: row["value"] for row in rows if row["metric"] == "unadapted_dice"}
    assert set(told) == {case.id for case in cases}
    page = write_report([tmp_path / "always"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Test-time adaptation" in page
    assert "after refseg" in page
    drawn = [manifest["cases"][case.id]["drawings"] for case in cases]
    for name in drawn:
        assert name in manifest["files"]
        with Image.open(tmp_path / "always" / name) as picture:
            assert picture.info["columns"] == "image, drawn before, drawn after"
            height, width = run.plan.patch_size
            assert picture.size == (3 * width, height)
            before, after = (np.asarray(picture)[:, k * width : (k + 1) * width] for k in (1, 2))
            assert not np.array_equal(before, after)
    assert page.count("what the synthesiser draws from its mask alone") == min(8, len(cases))
    for name in drawn:
        (tmp_path / "always" / name).write_bytes(b"no picture")
    page = write_report([tmp_path / "always"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "what the synthesiser draws from its mask alone" not in page
    list(predict([changed], cases[:1], tmp_path / "plain", dataset=phantom, adapt="refseg:always"))
    list(predict([run], cases[:1], tmp_path / "plain", dataset=phantom, adapt="none"))
    assert not list((tmp_path / "plain").glob("*/*.png"))
    list(predict([run], cases, tmp_path / "auto", dataset=phantom, adapt="auto"))
    manifest = json.loads((tmp_path / "auto" / "predictions.json").read_text())
    adaptations = [entry["adaptation"][0] for entry in manifest["cases"].values()]
    assert {adaptation["method"] for adaptation in adaptations} == {"standard_views"}
    reasons = {adaptation["reason"] for adaptation in adaptations}
    assert reasons <= {"", NOT_SHIFTED, NO_BETTER, NOTHING_FOUND} or all(reasons)
    with pytest.raises(ConfigError, match="unknown adapter 'reflect'"):
        list(predict([run], cases, tmp_path / "typo", dataset=phantom, adapt="reflect"))


def test_images_like_those_known_are_left_alone(run: Run, phantom: Dataset) -> None:
    held_out = [case for case in phantom.cases if case.id in run.splits["held_out"]]
    segmenter = Segmenter([run], choose_adapter(run.config.predict, "auto"))
    for case in held_out:
        found = segmenter.segment(case.image())
        assert [adaptation.reason for adaptation in found.adaptations] == [NOT_SHIFTED]
    dark = corrupt(held_out[0].image(), "gamma_dark", 5, 0)
    assert segmenter.segment(dark).adaptations[0].reason != NOT_SHIFTED


@pytest.mark.usefixtures("one_core")
def test_a_benchmark_scores_every_adapter_beside_none(
    phantom: Dataset, phantom_folder: Path, tmp_path: Path
) -> None:
    phantom = open_dataset(phantom_folder)
    overrides = [*SMALL, "train.steps=6", "objectives.reflection={width=4, prior_width=4}"]
    jobs = list_jobs(
        phantom, phantom_folder, ["baseline"], [0], "leave-one-out", overrides, test_domains=["west"],
        adapt=["tent:always", "refseg"], corruptions=["gaussian_noise"], severities=[3],
    )  # fmt: skip
    (outcome,) = benchmark(jobs, tmp_path / "rows.jsonl", parallel=0)
    assert not outcome.error
    rows = read_rows(tmp_path / "rows.jsonl")
    cases = {
        row["adapt"]: {row["case"] for row in rows if row["adapt"] == row["adapt"] and row["case"]}
        for row in rows
    }
    assert set(cases) == {"none", "tent:always", "refseg"}
    for name in ("tent:always", "refseg"):
        adapted = [row for row in rows if row["adapt"] == name and row["metric"] == "adapted"]
        assert {row["corruption"] for row in adapted} == {"none", "gaussian_noise"}
        assert all(row["value"] in (0, 1) for row in adapted)
    assert not [row for row in rows if row["adapt"] == "none" and row["metric"] == "adapted"]
    assert not list(benchmark(jobs, tmp_path / "rows.jsonl"))  # done
    # Rows of an adapter need not repeat the verdict, which is that on the mask before.
    topics = replace(jobs[0], metrics=("dice", "verdict")).topics
    assert ("verdict", "", 0) in topics
    assert ("adapted", "", 0, "refseg") in topics
    assert ("verdict", "", 0, "refseg") not in topics
    with pytest.raises(ConfigError, match="unknown adapter"):
        list_jobs(phantom, phantom_folder, ["baseline"], [0], "leave-one-out", adapt=["tentt"])
    for adapt, overrides, message in (
        ("refseg", [], "without reflection"),
        ("tent", ["predict.adapt.settings={similarity = 'mind'}"], "similarity"),
        ("none", ["predict.adapt.method=tent"], "--adapt tent"),
    ):
        with pytest.raises(ConfigError, match=message):
            list_jobs(phantom, phantom_folder, ["baseline"], [0], "leave-one-out", overrides, adapt=[adapt])
    with pytest.raises(ConfigError, match="tent:always"):
        list_jobs(phantom, phantom_folder, ["baseline"], [0], "leave-one-out", adapt=["tent:never"])


def test_regions_that_overlap_are_drawn_and_adapted_to() -> None:
    plan = Plan(
        dimension=2, image_dimension=2, spacing=(1.0, 1.0), unit="mm", channels=1, normalisation=(Normalisation(),),
        patch_size=(32, 32), classes=("background", "whole", "core"), label_values=(0, 1, 2),
        regions=((1, 2), (2,)), region_classes=(1, 2),
    )  # fmt: skip
    learner = build_learner(small_config("objectives.reflection={width=4, prior_width=4}"), plan, ("a",))
    image = torch.randn(2, 1, 32, 32)
    label = torch.zeros(2, 32, 32).long()
    label[:, 8:24, 8:24], label[:, 12:20, 12:20] = 1, 2
    losses = learner(image, label, torch.zeros(2).long(), 0.5)
    losses["total"].backward()
    reflection = dict(learner.named_objectives())["reflection"]
    assert isinstance(reflection, Reflection)
    for name in registry.ADAPTERS:
        if name == "batch_statistics":
            continue
        adapter: Adapter = registry.build("adapter", name)
        adapter.attach(learner.network, plan, reflection.eval().requires_grad_(False))
        assert np.isfinite(list(adapter.adapt(image).values())).all()
