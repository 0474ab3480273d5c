"""Detectors against closed forms and slow twins, and verdicts from training to verdicts.json."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, special

from anysite import atomic, cli, quality, registry, runs
from anysite import judge as judging
from anysite.augment import blur
from anysite.corrupt import corrupt
from anysite.data.case import Dataset
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.data.volume import Volume
from anysite.detectors import Agreement, Detector, Layer, Output, add_layers
from anysite.detectors.mahalanobis import learn_components, measure
from anysite.detectors.spectral import signature, split_signatures
from anysite.errors import ConfigError, FileFormatError, RunError
from anysite.intensities import measure_shares
from anysite.judge import (
    COMBINED,
    EMPTY_REASON,
    ENSEMBLE_REASON,
    QUALITY,
    REJECT,
    Judge,
    Reference,
    Verdict,
    average_verdicts,
    decide,
)
from anysite.judgement import area_under_roc, suspicion
from anysite.learner import build_network
from anysite.normalisation import Normalisation
from anysite.observations import count_agreement, count_shared, sum_layers
from anysite.plan import Plan
from anysite.predict import judged_by_image_alone, predict
from anysite.references import learn_references
from anysite.report.read import read_sources
from anysite.runs import Run
from anysite.segment import Segmenter, flip_combinations
from anysite.settings import JudgeSettings
from anysite.train import train
from anysite.verdicts import read_verdicts
from conftest import small_config

PLAN = Plan(
    dimension=2, image_dimension=2, spacing=(1.0, 1.0), unit="mm", channels=1, normalisation=(Normalisation(),),
    patch_size=(64, 64), classes=("background", "disc"), label_values=(0, 1),
)  # fmt: skip
JUDGED = "judge.detectors={histogram = {}, spectral = {}, entropy = {}, nearest = {}, mahalanobis = {}}"
Draw = Callable[..., Output]
PATIENTS = [str(number) for number in range(100)]


def layer_of(positions: np.ndarray) -> Layer:
    return Layer(len(positions), positions.sum(0), positions.T @ positions)


def signature_of(layer: Layer) -> np.ndarray:
    assert layer.gram is not None
    return signature(layer.gram, layer.count)


@pytest.fixture
def draw(rng: np.random.Generator) -> Draw:
    """Make an output of one kind: features of a covariance, an image of a contrast, a network of a certainty."""
    mixing = rng.normal(size=(2, 6, 6))

    def make(kind: int = 0, *, empty: bool = False, overlapping: bool = False) -> Output:
        layers = tuple(layer_of(rng.normal(size=(n, 6)) @ mixing[kind] + 2 * kind) for n in (400, 100))
        image = ndimage.gaussian_filter(rng.normal(size=(1, 24, 24)), (0, 1, 1)) * 3
        if kind:  # dark with few bright voxels, coarse, and shaded
            image = ndimage.gaussian_filter(rng.normal(size=(1, 24, 24)), (0, 3, 1)) * 8
            image = (image + np.linspace(-3, 3, 24)) ** 3 / 9
        distance = np.hypot(*np.mgrid[-12:12, -12:12]) - rng.uniform(5, 8)
        if kind:  # a second piece in a corner
            distance = np.minimum(distance, np.hypot(*(np.mgrid[-12:12, -12:12] + 9)) - 2)
        logits = -distance * (0.3 if kind else 2.0) - (100 if empty else 0)
        found = 1 / (1 + np.exp(-logits))
        maps = np.stack([found, found / 2]) if overlapping else np.stack([1 - found, found])
        mirrored = np.roll(maps, 1 + 5 * kind, axis=-1)
        views = [torch.from_numpy(view)[None] for view in (maps, mirrored)]
        agreement = count_agreement(views, overlapping)
        return Output(image, maps, overlapping, layers, agreement, nothing=(-6.0,))

    return make


def build(name: str) -> Detector:
    return registry.build("detector", name)


@pytest.mark.parametrize("overlapping", [False, True], ids=["classes", "regions"])
@pytest.mark.parametrize("name", registry.DETECTORS)
def test_every_detector_tells_one_kind_from_another(name: str, overlapping: bool, draw: Draw) -> None:
    detector = build(name)
    usual = np.stack([detector.describe(draw(overlapping=overlapping)) for _ in range(12)])
    detector.fit(usual)
    memory = {key: array.copy() for key, array in detector.memory.items()}
    near = [detector.distance(detector.describe(draw(overlapping=overlapping))) for _ in range(8)]
    far = [detector.distance(detector.describe(draw(1, overlapping=overlapping))) for _ in range(8)]
    assert min(far) > max(near)
    assert all(np.isfinite([*near, *far]))
    alone = detector.leave_one_out(usual, PATIENTS[:12])
    assert alone.shape == (12,)
    assert alone.max() < min(far)
    for key, array in detector.memory.items():  # unchanged by leaving out
        np.testing.assert_array_equal(array, memory[key])
    restored = build(name)
    restored.memory = detector.memory
    vector = restored.describe(draw(1, overlapping=overlapping))
    assert restored.distance(vector) == detector.distance(vector)


@pytest.mark.parametrize("size", [(30, 40), (12, 25, 18)])
@pytest.mark.parametrize("level", [-9.0, 0.0, 0.15, 9.0])  # everything, much, pieces, nothing
def test_the_shape_of_a_structure_is_that_of_its_pieces(
    size: tuple[int, ...], level: float, rng: np.random.Generator
) -> None:
    mask = ndimage.gaussian_filter(rng.normal(size=size), 1.5) > level
    pieces, count = ndimage.label(mask)  # pyright: ignore[reportGeneralTypeIssues]
    sizes = [int((pieces == piece).sum()) for piece in range(1, count + 1)]
    surface = int(mask.sum() - ndimage.binary_erosion(mask).sum())
    share = max(sizes) / sum(sizes) if sizes else 1.0
    expected = np.log([(mask.sum() + 1) / mask.size, count + 1, share, surface + 1])
    output = Output(np.zeros((1, *size)), np.stack([1.0 - mask, mask]), False, ())
    np.testing.assert_allclose(build("shape").describe(output), expected)


@pytest.mark.parametrize("name", registry.DETECTORS)
def test_leaving_one_out_is_fitting_on_the_other_patients(name: str, draw: Draw) -> None:
    detector, twin = build(name), build(name)
    vectors = np.stack([detector.describe(draw()) for _ in range(6)])
    detector.fit(vectors)
    alone = detector.leave_one_out(vectors, ["a", "b", "c", "b", "d", "e"])
    twin.fit(vectors[[0, 2, 4, 5]])
    assert alone[[1, 3]].tolist() == [twin.distance(vectors[1]), twin.distance(vectors[3])]


def test_signatures_are_those_of_the_singular_values(rng: np.random.Generator) -> None:
    positions = rng.normal(size=(5000, 32)) @ rng.normal(size=(32, 32))
    layer = layer_of(positions)
    scale = np.sqrt(10_000 / 5000)
    logarithms = np.log(scale * torch.linalg.svdvals(torch.from_numpy(positions)).numpy())
    expected = logarithms / np.linalg.norm(logarithms)
    np.testing.assert_allclose(signature_of(layer), expected, rtol=1e-6)
    assert np.linalg.norm(signature_of(layer)) == pytest.approx(1)
    shuffled = layer_of(rng.permutation(positions)[:, rng.permutation(32)])
    np.testing.assert_allclose(signature_of(shuffled), expected, rtol=1e-6)
    np.testing.assert_allclose(signature_of(layer + layer), expected, rtol=1e-6)  # size does not count
    flat = layer_of(np.ones((10, 4)))  # three directions unused
    assert np.isfinite(signature_of(flat)).all()


def test_a_training_image_has_no_spectral_distance_from_itself(draw: Draw) -> None:
    detector = registry.build("detector", "spectral", layers="bottleneck")
    vectors = np.stack([detector.describe(draw()) for _ in range(4)])
    detector.fit(vectors)
    assert detector.distance(vectors[2]) == 0
    assert [len(part) for part in split_signatures(vectors[0])] == [6]
    assert [len(part) for part in split_signatures(build("spectral").describe(draw()))] == [6, 6]


def test_mahalanobis_counts_directions_in_their_own_units_and_what_lies_beyond() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(4000, 3)) * [10.0, 1.0, 0.1]
    components = learn_components(vectors, 0.999)
    assert len(components["spread"]) == 2
    np.testing.assert_allclose(components["spread"], [10, 1], rtol=0.05)
    centre = vectors.mean(0)
    assert measure(centre, components) == pytest.approx(0, abs=1e-9)
    assert measure(centre + [20, 0, 0], components) == pytest.approx(2 / np.sqrt(3), rel=0.05)
    assert measure(centre + [0, 0, 1], components) == pytest.approx(10 / np.sqrt(3), rel=0.05)
    same = learn_components(np.ones((5, 3)), 0.95)
    assert np.isfinite(measure(np.zeros(3), same))


def image_of(array: np.ndarray, *, slice_wise: bool = False, nothing: float = 0.0) -> Output:
    chances = np.zeros((2, *array.shape))
    return Output(
        array[None].astype(np.float32), chances, False, (), nothing=(nothing,), slice_wise=slice_wise
    )


@pytest.mark.parametrize("shape", [(40, 31), (5, 40, 31), (18, 22, 20)])
def test_the_power_spectrum_is_that_of_a_slow_twin(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    array = ndimage.gaussian_filter(rng.normal(size=shape), 1.0).astype(np.float32)
    slice_wise = len(shape) == 3 and shape[0] == 5
    orientations = [0] if len(shape) == 2 or slice_wise else [0, 1, 2]
    expected: list[float] = []
    for axis in orientations:
        slices = np.moveaxis(array, axis, 0) if len(shape) == 3 else array[None]
        slices = slices[sorted({round(i) for i in np.linspace(0, len(slices) - 1, 16)})]
        height, width = slices.shape[1:]
        rows = [np.sin(np.pi * (i + 1) / (height + 1)) ** 2 for i in range(height)]
        columns = [np.sin(np.pi * (j + 1) / (width + 1)) ** 2 for j in range(width)]
        spectra = [np.abs(np.fft.fft2(one * np.outer(rows, columns))) ** 2 for one in slices]
        power = np.mean(spectra, 0)
        bands: list[list[float]] = [[] for _ in range(10)]
        for (i, j), value in np.ndenumerate(power):
            cycles = math.hypot(min(i, height - i) / height, min(j, width - j) / width)
            if cycles < 0.5:
                bands[int(20 * cycles)].append(float(value))
        expected += [math.log(np.mean(band) / power.mean()) for band in bands]
        smooth = np.mean(np.log(spectra), 0)
        uneven = np.empty_like(smooth)
        for i, j in np.ndindex(*smooth.shape):
            near = [smooth[(i + a) % height, (j + b) % width] for a in range(-2, 3) for b in range(-2, 3)]
            uneven[i, j] = smooth[i, j] - np.mean(near)
        lines = [uneven.mean(0), uneven.mean(1)]
        spread = sorted(line.std() for line in lines) + sorted(np.abs(line).max() for line in lines)
        expected += [math.log(value) for value in (*spread, uneven.std(), uneven.max())]
    found = build("power_spectrum").describe(image_of(array, slice_wise=slice_wise))
    np.testing.assert_allclose(found, expected, atol=0.02)  # transforms in single precision


@pytest.mark.parametrize(
    "corruption", ["gaussian_noise", "motion_blur", "ghosting", "motion_ghosting", "spike"]
)
def test_the_power_spectrum_tells_what_normalised_intensities_hardly_do(
    corruption: str, rng: np.random.Generator
) -> None:
    """Of images whose sharpness differs from one to the other, so that it is a matter of kind, not of degree."""

    def image() -> Volume:
        array = ndimage.gaussian_filter(rng.normal(size=(96, 80)), rng.uniform(1.2, 1.6))
        return Volume.of_pixels((array / array.std())[None].astype(np.float32))

    detector = build("power_spectrum")
    detector.fit(np.stack([detector.describe(image_of(image().array[0])) for _ in range(30)]))
    near = [detector.distance(detector.describe(image_of(image().array[0]))) for _ in range(20)]
    copies = [corrupt(image(), corruption, 4, seed).array[0] for seed in range(20)]
    far = [detector.distance(detector.describe(image_of(copy))) for copy in copies]
    assert area_under_roc(near, far) > 0.85


@pytest.mark.parametrize("shape", [(1, 1), (2, 50), (1, 30, 30), (3, 4, 5)])
@pytest.mark.parametrize("name", ["power_spectrum", "shading"])
def test_tiny_and_empty_images_are_described_by_as_many_finite_numbers(
    name: str, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    usual = build(name).describe(image_of(rng.normal(size=(40,) * len(shape))))
    for array in (np.zeros(shape), rng.normal(size=shape)):
        vector = build(name).describe(image_of(array))
        assert vector.shape == usual.shape
        assert np.isfinite(vector).all()


@pytest.mark.parametrize("shape", [(60, 50), (20, 33, 40)])
def test_shading_is_the_lowest_waves_of_the_logarithm_of_the_signal(
    shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    """A field as smooth as that adds its own waves, and normalisation changes nothing."""
    places = np.meshgrid(*[(np.arange(n) + 0.5) / n for n in shape], indexing="ij")
    coefficients = rng.normal(0, 0.1, (3,) * len(shape))
    coefficients.flat[0] = 0
    log_field = sum(
        value * math.prod(np.cos(np.pi * k * place) for k, place in zip(wave, places, strict=True))
        for wave, value in np.ndenumerate(coefficients)
    )
    signal = 300 * np.exp(log_field)
    described = build("shading").describe(image_of((signal - 20) / 70, nothing=-20 / 70))
    assert described[0] == pytest.approx(np.log(signal.std() / signal.mean()), abs=1e-3)
    halves = 0.5 ** np.array([sum(k > 0 for k in wave) for wave in np.ndindex(*coefficients.shape)])
    np.testing.assert_allclose(described[1:], (coefficients.ravel() * halves)[1:], atol=0.004)


def test_shading_knows_no_other_zero_than_the_lowest_value_where_there_are_lower_ones(draw: Draw) -> None:
    output = draw()
    lowest = float(output.image.min())
    described = [build("shading").describe(replace(output, nothing=(zero,))) for zero in (lowest, 0.0)]
    assert np.array_equal(described[0], described[1])
    assert not np.allclose(build("shading").describe(replace(output, nothing=(lowest - 3,))), described[0])
    assert not build("shading").can_describe(replace(output, nothing=None))


@pytest.mark.parametrize("overlapping", [False, True], ids=["classes", "regions"])
def test_soft_dice_is_the_mean_over_structures_found_of_a_dice_with_chances(
    overlapping: bool, draw: Draw, rng: np.random.Generator
) -> None:
    logits = rng.normal(0, 2, (4, 24, 24))
    logits[3] = -50  # never found: it has no part in the mean
    chances = 1 / (1 + np.exp(-logits)) if overlapping else np.exp(logits) / np.exp(logits).sum(0)
    output = replace(draw(), probabilities=chances, overlapping=overlapping)
    lost = []
    for index in range(0 if overlapping else 1, 4):
        shared = total = 0.0
        for place in np.ndindex(24, 24):
            chance = chances[:, *place]
            mask = chance[index] > 0.5 if overlapping else chance.argmax() == index
            shared += chance[index] * mask
            total += chance[index] + mask
        if shared:
            lost.append(1 - 2 * shared / total)
    assert len(lost) == (3 if overlapping else 2)
    detector = build("soft_dice")
    assert detector.distance(detector.describe(output)) == pytest.approx(np.mean(lost), rel=1e-9)
    nothing = replace(
        output, probabilities=np.eye(4)[0][:, None, None] * np.ones((4, 24, 24)), overlapping=False
    )
    assert detector.describe(nothing) == [0.0]


def test_of_chances_that_are_true_soft_dice_is_the_dice_to_expect(
    draw: Draw, rng: np.random.Generator
) -> None:
    """As Borges et al. (2024) show: of independent voxels, and close to it the more of them there are."""
    chance = rng.uniform(0.02, 0.98, (60, 60)) ** 2
    drawn, image = draw(), np.zeros((1, 60, 60))
    output = replace(drawn, image=image, probabilities=np.stack([1 - chance, chance]))
    detector = build("soft_dice")
    mask = output.foreground
    truths = rng.uniform(size=(400, 60, 60)) < chance
    dice = [2 * (mask & truth).sum() / (mask.sum() + truth.sum()) for truth in truths]
    assert 1 - detector.distance(detector.describe(output)) == pytest.approx(np.mean(dice), abs=0.003)


def test_the_histogram_compares_intensities_before_those_around_have_a_say(
    draw: Draw, rng: np.random.Generator
) -> None:
    """What normalisation by surroundings makes alike is told by; what the network sees is what adapters restore."""
    histogram = build("histogram")
    evened = rng.normal(size=(1, 24, 24))
    usual = [replace(draw(), image=evened, whole=draw().image) for _ in range(12)]
    histogram.fit(np.stack([histogram.describe(output) for output in usual]))
    near = [histogram.distance(histogram.describe(output)) for output in usual]
    far = histogram.distance(histogram.describe(replace(draw(), image=evened, whole=draw(1).image)))
    assert far > 1.5 * max(near)
    usual_now = histogram.usual_intensities
    assert usual_now is not None
    np.testing.assert_allclose(usual_now, measure_shares(evened, usual_now.shape[1]), atol=1e-6)


def test_entropy_inside_leaves_out_borders(draw: Draw) -> None:
    output = draw()
    foreground, inside = (registry.build("detector", "entropy", region=r) for r in ("foreground", "inside"))
    assert inside.describe(output)[0] < 0.3 * foreground.describe(output)[0]
    even = replace(output, probabilities=np.full((2, 24, 24), 0.5))
    assert foreground.describe(even)[0] == pytest.approx(1)
    assert foreground.describe(draw(empty=True))[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("region", ["foreground", "inside"])
@pytest.mark.parametrize("overlapping", [False, True], ids=["classes", "regions"])
@pytest.mark.parametrize("shape", [(19, 23), (9, 11, 12)])
def test_entropy_is_that_of_a_slow_twin(
    shape: tuple[int, ...], overlapping: bool, region: str, rng: np.random.Generator
) -> None:
    """Computed everywhere, and not only around what was found."""
    smooth = 30 * ndimage.gaussian_filter(rng.normal(size=(3, *shape)), (0, *[2.0] * len(shape))) - 1
    chances = special.expit(smooth) if overlapping else special.softmax(smooth, 0)
    wrong = special.entr(chances).sum(0) + overlapping * special.entr(1 - chances).sum(0)
    kinds = [chances > 0.5] if overlapping else [chances.argmax(0)[None]]
    label = sum((2**index * kind for index, kind in enumerate(kinds[0])), np.zeros(shape, int))
    chosen = ndimage.binary_dilation(label > 0, iterations=2)
    if region == "inside":
        chosen &= ndimage.maximum_filter(label, 5) == ndimage.minimum_filter(label, 5)
    assert 0 < chosen.sum() < chosen.size
    expected = wrong[chosen].mean() / (3 * np.log(2) if overlapping else np.log(3))
    described = registry.build("detector", "entropy", region=region).describe(
        Output(np.zeros((1, *shape)), chances, overlapping, ())
    )
    assert described[0] == pytest.approx(expected, rel=1e-5)


def test_windows_add_up_and_large_ones_are_thinned() -> None:
    features = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    positions = features.movedim(1, -1).reshape(-1, 3).double().numpy()
    (whole,) = sum_layers([features])
    assert whole.gram is not None
    np.testing.assert_allclose(whole.gram, positions.T @ positions, rtol=1e-5)
    np.testing.assert_allclose(whole.total, positions.sum(0), rtol=1e-4, atol=1e-5)
    (parts,) = add_layers(sum_layers([features[:1]]), sum_layers([features[1:]]))
    assert parts.gram is not None
    np.testing.assert_allclose(parts.gram, whole.gram, rtol=1e-5)
    assert parts.count == whole.count == 70
    for size, least, most in (
        ((200, 200), 40_000, 40_000),
        ((300, 300), 16_384, 65_536),
        ((48, 48, 48), 8_192, 65_536),
    ):
        (thinned,) = sum_layers([torch.randn(1, 2, *size)])
        assert least <= thinned.count <= most


def test_spectra_are_taken_of_layers_with_enough_positions_for_their_channels() -> None:
    torch.manual_seed(0)
    encoder = [torch.randn(3, 4, 16, 16), torch.randn(3, 8, 8, 16), torch.randn(3, 16, 4, 4)]
    layers = sum_layers(encoder)
    assert [layer.gram is not None for layer in layers] == [True, True, False]  # 64, 16 and 1 a channel
    assert [layer.count for layer in layers] == [3 * 256, 3 * 128, 3 * 16]
    assert [layer.gram is not None for layer in sum_layers(encoder[2:])] == [True]  # where there is no other
    (doubled,) = add_layers(layers[2:], layers[2:])
    assert doubled.gram is None
    np.testing.assert_allclose(doubled.total, 2 * layers[2].total)


def test_sums_in_blocks_give_the_signatures_of_singular_values_in_double_precision() -> None:
    """Of features that are nearly alike too, more than those of trained networks."""
    torch.manual_seed(0)
    features = torch.relu(torch.randn(2, 12, 90, 91))
    features[:, 1:] = features[:, :1] + torch.logspace(-2.5, 0, 11)[None, :, None, None] * features[:, 1:]
    positions = features.movedim(1, -1).flatten(0, 2).double()
    values = torch.linalg.svdvals(positions)
    assert values[-1] < 2e-3 * values[0]
    expected = (values * math.sqrt(10_000 / len(positions))).log().numpy()
    (layer,) = sum_layers([features])
    assert layer.gram is not None
    np.testing.assert_allclose(
        signature(layer.gram, layer.count), expected / np.linalg.norm(expected), atol=5e-4
    )


def test_each_singular_value_counts_by_how_far_it_varies_over_training_images(
    rng: np.random.Generator,
) -> None:
    spectral = build("spectral")
    usual = np.array([0.6, 0.8])

    def vector(*change: float) -> np.ndarray:
        return np.concatenate([[2], usual + change])

    spectral.fit(np.stack([vector(*(rng.normal(0, 1, 2) * [0.1, 0.001])) for _ in range(40)]))
    assert spectral.distance(vector(0.1, 0)) < 1 < spectral.distance(vector(0, 0.01))
    now = spectral.distance(vector(0.1, 0))
    assert now > 0
    spectral.memory |= {"mean": np.full(1, 0.5)}  # as runs of before have it, whose limits are less by that
    assert spectral.distance(vector(0.1, 0)) == pytest.approx(now - 0.5 / spectral.memory["deviation"][0])
    del spectral.memory["spread"]
    spectral.memory |= {"mean": np.zeros(1), "deviation": np.ones(1)}
    assert spectral.distance(vector(0.3, 0)) > spectral.distance(vector(0, 0.1))


def test_a_larger_image_of_the_same_kind_is_no_further_away() -> None:
    """Deep layers, whose windows have fewer positions than channels, would tell the number of windows."""
    network = build_network(
        small_config("plan.patch_size=[64, 64]", "network.depth=4", "network.width=16"), PLAN
    )
    spectral = build("spectral")
    torch.manual_seed(0)

    def vector(windows: int) -> np.ndarray:
        smoothness = 0.5 + 1.5 * torch.rand(1)  # of one image, all of its windows
        layers: tuple[Layer, ...] = ()
        with torch.no_grad():
            for _ in range(windows):
                window = blur(torch.randn(1, 1, 64, 64), smoothness)
                features = network.eval().encode(window)
                layers = add_layers(layers, sum_layers(features))
        return spectral.describe(Output(np.zeros((1, 4, 4)), np.zeros((2, 4, 4)), False, layers))

    spectral.fit(np.stack([vector(1) for _ in range(15)]))
    usual, larger = ([spectral.distance(vector(count)) for _ in range(8)] for count in (1, 6))
    assert np.median(larger) < max(usual)
    assert len(split_signatures(vector(1))) == 2  # of four


def references(vectors: Sequence[dict[str, np.ndarray]], first: int = 0) -> list[Reference]:
    """Each of a patient of its own."""
    return [Reference(described, str(first + index)) for index, described in enumerate(vectors)]


def judge_of(draw: Draw, count: int = 20, held_out: int = 20, shifted: int = 0, **settings: Any) -> Judge:
    judge = Judge(JudgeSettings(**settings))
    training = references([judge.describe(draw()) for _ in range(count)])
    clean = references([judge.describe(draw()) for _ in range(held_out)], 100)
    strange = references([judge.describe(draw(1)) for _ in range(shifted)], 100)
    dice = np.random.default_rng(0).normal(0, 0.02, size=held_out + shifted)
    judge.fit(
        training,
        [replace(r, dice=0.9 + error) for r, error in zip(clean, dice, strict=False)]
        + [replace(r, dice=0.4 + e, shifted=True) for r, e in zip(strange, dice[held_out:], strict=True)],
    )
    return judge


def test_the_dice_to_expect_rests_on_the_mask_wherever_something_speaks_of_it(draw: Draw) -> None:
    judge = judge_of(draw, shifted=20, detectors={"histogram": {}, "entropy": {}, "nearest": {}})
    _, *slopes = judge.weights[QUALITY]
    assert slopes[0] == slopes[2] == 0
    assert slopes[1] > 0
    assert (judge.weights[COMBINED][[0, 2]] > 0).all()
    blind = judge_of(draw, shifted=20, detectors={"histogram": {}, "nearest": {}})
    assert blind.weights[QUALITY][1:].sum() > 0


@pytest.mark.parametrize("held_out", [0, 5, 20])
@pytest.mark.parametrize("count", [5, 30])
def test_the_false_alarm_rate_is_about_the_one_stated(count: int, held_out: int, draw: Draw) -> None:
    decisions = []
    for _ in range(6):
        judge = judge_of(draw, count, held_out, detectors={"histogram": {}, "nearest": {}})
        decisions += [judge.judge(draw()).decision for _ in range(25)]
        assert all(judge.judge(draw(1)).decision != "accept" for _ in range(5))
    assert decisions.count("accept") >= 0.75 * len(decisions)
    assert decisions.count("reject") <= 0.05 * len(decisions)


@pytest.mark.parametrize(("count", "held_out"), [(2, 0), (3, 2), (4, 4)])
def test_too_few_patients_give_no_judge_rather_than_a_blind_one(
    count: int, held_out: int, draw: Draw
) -> None:
    assert not judge_of(draw, count, held_out).detectors
    assert judge_of(draw, count, 5).detectors  # held-out images are enough


def test_siblings_of_one_patient_do_not_vouch_for_each_other(draw: Draw) -> None:
    judge = Judge(JudgeSettings(detectors={"nearest": {"neighbours": 1}}))
    twice = [vectors for vectors in (judge.describe(draw()) for _ in range(8)) for _ in range(2)]
    judge.fit([Reference(vectors, str(i // 2)) for i, vectors in enumerate(twice)], [])
    assert judge.limits["nearest"][0] > 0
    judge.fit(references(twice), [])
    assert judge.limits["nearest"][0] == 0


def test_of_the_segmentation_only_held_out_images_are_references(draw: Draw) -> None:
    judge = Judge(JudgeSettings(detectors={"entropy": {}, "nearest": {}}))
    sure = [judge.describe(draw()) for _ in range(6)]
    unsure = [judge.describe(draw(1)) for _ in range(6)]
    judge.fit(references(sure), references(unsure))
    assert judge.limits["entropy"][0] == np.median([v["entropy"][0] for v in unsure])
    judge.fit(references(sure), references(unsure[:4]))
    assert judge.limits["entropy"][0] == np.median([v["entropy"][0] for v in (*sure, *unsure[:4])])


def test_finding_nothing_is_odd_where_something_was_always_found(draw: Draw) -> None:
    judge = judge_of(draw, detectors={"nearest": {}})
    verdict = judge.judge(draw(empty=True))
    assert verdict.decision != "accept"
    assert verdict.reasons[0] == EMPTY_REASON
    often = Judge(JudgeSettings(detectors={"nearest": {}}))
    often.fit(references([often.describe(draw(empty=i % 4 == 0)) for i in range(20)]), [])
    assert EMPTY_REASON not in often.judge(draw(empty=True)).reasons


def test_where_nothing_was_found_no_dice_is_expected(draw: Draw) -> None:
    """Nothing is surer of itself than an empty mask, and its Dice is 0 or, of an empty truth, none."""
    detectors: dict[str, Any] = {"histogram": {}, "entropy": {}, "soft_dice": {}}
    vectors_of = Judge(JudgeSettings(detectors=detectors)).describe
    training = references([vectors_of(draw(empty=i % 5 == 0)) for i in range(20)])

    def fitted(*missed: Reference) -> Judge:
        known = np.random.default_rng(3)
        clean = references([vectors_of(output) for output in drawn], 100)
        copies = references([vectors_of(output) for output in unlike], 100)
        judge = Judge(JudgeSettings(detectors=detectors))
        known_dice = [replace(r, dice=0.9 + known.normal(0, 0.02)) for r in clean]
        shifted = [replace(r, dice=0.4 + known.normal(0, 0.02), shifted=True) for r in copies]
        judge.fit(training, [*known_dice, *shifted, *missed])
        return judge

    drawn, unlike = [draw() for _ in range(20)], [draw(1) for _ in range(20)]
    judge = fitted()
    verdict = judge.judge(draw(empty=True), least_dice=0.7)
    assert (verdict.decision, verdict.predicted_dice, verdict.safe_dice) == ("accept", None, None)
    assert QUALITY not in verdict.scores
    assert judge.judge(draw(), least_dice=0.7).predicted_dice is not None
    together = average_verdicts([judge.judge(draw()) for _ in range(2)], judge.reasons, empty=True)
    assert together.predicted_dice is None
    # Nor does a Dice of 0 with which nothing was found say what to expect of masks in which something was.
    missed = [Reference(vectors_of(draw(empty=True)), f"missed {i}", 0.0, True) for i in range(10)]
    assert (fitted(*missed).weights[QUALITY] == judge.weights[QUALITY]).all()


def test_what_is_not_finite_is_rejected(draw: Draw) -> None:
    judge = judge_of(draw, shifted=10, detectors={name: {} for name in registry.DETECTORS})
    output = draw()
    holes = output.probabilities.copy()
    holes[:, :2] = np.nan
    bad = replace(output.layers[0], gram=np.full((6, 6), np.nan), total=np.full(6, np.nan))
    for broken in (replace(output, probabilities=holes), replace(output, layers=(bad, bad))):
        verdict = judge.judge(broken)
        assert verdict.decision == "reject"
        assert None in verdict.scores.values()
        assert verdict.predicted_dice is None
        assert verdict.reasons == (judging.UNKNOWN_REASON,)  # and nothing of intensities, which are as usual
        assert verdict.scores["histogram"] is not None


def test_the_dice_to_expect_is_withdrawn_from_images_unlike_those_known(draw: Draw) -> None:
    judge = judge_of(draw, shifted=20, detectors={name: {} for name in registry.DETECTORS})
    known = [judge.judge(draw()) for _ in range(40)]
    told = [verdict.predicted_dice for verdict in known if verdict.predicted_dice is not None]
    assert len(told) >= 30
    assert all(0 <= low <= middle <= high <= 1 for low, middle, high in told)
    assert np.mean([low <= 0.9 <= high for low, _, high in told]) >= 0.8
    safe = [verdict.safe_dice for verdict in known]
    assert [dice is None for dice in safe] == [verdict.predicted_dice is None for verdict in known]
    assert all(low <= dice <= high for (low, _, high), dice in zip(told, filter(None, safe), strict=True))
    assert all(judge.judge(draw(), least_dice=1.0).decision != "accept" for _ in range(5))
    assert {*known[0].scores} == {*registry.DETECTORS, COMBINED, QUALITY}
    strange = [judge.judge(draw(1)) for _ in range(10)]
    assert all(verdict.predicted_dice is None for verdict in strange)
    assert all(verdict.safe_dice is None for verdict in strange)
    assert min(v.scores[COMBINED] or 0 for v in strange) > max(v.scores[COMBINED] or 0 for v in known)
    assert all(verdict.scores[QUALITY] is not None for verdict in strange)
    alone = judge_of(draw, shifted=0, detectors={"nearest": {}}).judge(draw())
    assert (alone.predicted_dice, {*alone.scores}) == (None, {"nearest"})


def test_decisions_follow_the_scores() -> None:
    reasons = {"a": "reason a", "b": "reason b"}
    assert decide({"a": 0.9, "b": 1.0}, reasons) == Verdict("accept", (), {"a": 0.9, "b": 1.0})
    assert decide({"a": 1.1, "b": 2.0}, reasons) == Verdict(
        "review", ("reason b", "reason a"), {"a": 1.1, "b": 2.0}
    )
    assert decide({"a": REJECT + 0.1, "b": 0.0}, reasons).decision == "reject"
    assert decide({"a": float("nan"), "b": 0.0}, reasons) == Verdict(
        "reject", (judging.UNKNOWN_REASON,), {"a": None, "b": 0.0}
    )
    low = decide({"a": 0.0}, reasons, predicted_dice=(0.5, 0.75, 0.8), safe_dice=0.65, least_dice=0.7)
    assert (low.decision, low.reasons) == ("review", ("a Dice of only 0.65 can be counted on",))
    assert decide({"a": 0.0}, reasons, False, (0.5, 0.75, 0.8), 0.65, 0.6).decision == "accept"
    assert average_verdicts([low, low], reasons, False, 0.7) == low
    both = [decide({"a": 0.0}, reasons), decide({"a": 3.0}, reasons)]
    assert average_verdicts(both, reasons, False) == Verdict("review", ("reason a",), {"a": 1.5})
    assert average_verdicts(both[:1], reasons, False) is both[0]
    apart = [decide({"a": 8.0}, reasons), decide({"a": -70.0}, reasons)]
    assert average_verdicts(apart, reasons, False).decision == "reject"
    odd = [decide({"a": 0.0}, reasons, empty=True), decide({"a": 0.0}, reasons)]
    assert average_verdicts(odd, reasons, True).reasons == (EMPTY_REASON,)
    assert average_verdicts(odd, reasons, False).decision == "accept"


def test_a_judge_is_the_same_after_storing(draw: Draw, tmp_path: Path) -> None:
    settings = JudgeSettings(detectors={name: {} for name in registry.DETECTORS})
    judge = judge_of(draw, shifted=10, detectors=settings.detectors)
    assert set(judge.weights) == {COMBINED, QUALITY}
    arrays, facts = judge.memory()
    runs.save_tensors(
        tmp_path / "judge.safetensors", {n: torch.from_numpy(a.copy()) for n, a in arrays.items()}, facts
    )
    tensors, read = runs.load_tensors(tmp_path / "judge.safetensors")
    again = Judge(settings)
    again.recall({name: t.numpy() for name, t in tensors.items()}, read)
    for output in (draw(), draw(1)):
        assert again.judge(output) == judge.judge(output)
    before = Judge(settings)  # of a run of before, whose weights are for signs that are all clipped
    before.recall(
        {name: t.numpy() for name, t in tensors.items()},
        {k: v for k, v in read.items() if k != "risk_margin"},
    )
    assert before.risk_margin == 0
    assert not before._in_dice.any()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("sites") / "phantom"
    return open_dataset(write_phantom(folder, patients_per_site=8, size=64, sites=("north", "east")))


@pytest.fixture(scope="module")
def run(sites: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = small_config(
        JUDGED, "train.steps=60", "train.learning_rate=0.01", "train.validation_fraction=0.3"
    )
    return train(sites, settings, tmp_path_factory.mktemp("runs") / "run")


def test_from_training_to_verdicts_beside_the_masks(sites: Dataset, run: Run, tmp_path: Path) -> None:
    held_out = [case for case in sites.cases if case.id in run.splits["held_out"]]
    outcomes = list(predict([run], held_out, tmp_path, dataset=sites))
    verdicts = atomic.read_json(tmp_path / "verdicts.json")["cases"]
    assert set(verdicts) == {case.id for case in held_out}
    assert [o.verdict for o in outcomes] == [verdicts[o.case.id]["verdict"] for o in outcomes]
    assert all(set(v["scores"]) == set(run.config.judge.detectors) for v in verdicts.values())
    assert all(v["reasons"] or v["verdict"] == "accept" for v in verdicts.values())
    assert {v["least_dice"] for v in verdicts.values()} == {run.config.predict.least_dice}
    accepted = sum(v["verdict"] == "accept" for v in verdicts.values())
    assert accepted >= len(held_out) - 1  # the limits are those of these very cases
    with (tmp_path / "verdicts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["verdict"]) for r in rows] == [(n, v["verdict"]) for n, v in verdicts.items()]
    again = list(predict([run], held_out, tmp_path, dataset=sites))
    assert [(o.status, o.verdict) for o in again] == [("skipped", o.verdict) for o in outcomes]


def test_an_image_of_something_else_is_not_accepted(sites: Dataset, run: Run) -> None:
    segmenter, rng = Segmenter([run]), np.random.default_rng(0)
    image = sites.cases[0].image()
    stripes = np.broadcast_to(255 * (np.arange(image.shape[0]) % 8 < 4)[:, None], image.array.shape)
    for other in (rng.integers(0, 255, image.array.shape), stripes):
        verdict = segmenter.segment(image.with_array(other.astype(image.array.dtype))).verdict
        assert verdict is not None
        assert verdict.decision != "accept"
        assert verdict.reasons


def test_an_ensemble_has_one_verdict_from_both_judges(sites: Dataset, run: Run) -> None:
    image = sites.cases[0].image()
    alone, twice = (Segmenter(members).segment(image).verdict for members in ([run], [run, run]))
    assert alone is not None
    assert twice is not None
    assert (alone.decision, alone.reasons) == (twice.decision, twice.reasons)
    own = {name: max(0.0, score or 0.0) for name, score in alone.scores.items()}
    assert twice.scores == {**own, "ensemble": 0.0}  # a network agrees with itself
    unjudged = replace(run, judge=None)
    assert Segmenter([unjudged]).segment(image).verdict is None
    both = Segmenter([unjudged, unjudged]).segment(image).verdict
    assert both is not None
    assert (both.decision, both.scores) == ("accept", {"ensemble": 0.0})
    assert Segmenter([unjudged, run]).segment(image).verdict == twice


def test_networks_that_disagree_send_a_mask_to_review() -> None:
    fine = decide({"histogram": 0.2, "entropy": 0.4}, {})
    for least_dice, agreement, decision in (
        (0.7, 0.71, "accept"), (0.7, 0.69, "review"), (0.7, 0.05, "reject"), (0.4, 0.5, "accept"), (0.0, 0.0, "accept"),
    ):  # fmt: skip
        verdict = average_verdicts([fine, fine], {}, False, least_dice, agreement)
        assert verdict.decision == decision, (least_dice, agreement)
        assert verdict.reasons == (() if decision == "accept" else (ENSEMBLE_REASON,))
        assert verdict.scores["ensemble"] == pytest.approx((1 - agreement) / (1 - least_dice))


def test_agreement_of_masks_is_their_mean_pairwise_dice() -> None:
    rng = np.random.default_rng(0)
    views = [rng.random((2, 6, 7)) < share for share in (0.3, 0.5, 0.8)]
    pairs = [(views[0], views[1]), (views[0], views[2]), (views[1], views[2])]
    expected = [
        2 * (a & b).sum() / (a.sum() + b.sum())
        for one, other in pairs
        for a, b in zip(one, other, strict=True)
    ]
    assert Agreement(count_shared(views)).pairwise_dice == pytest.approx(np.mean(expected))
    nothing = np.zeros((2, 6, 7), bool)
    assert Agreement(count_shared([nothing, nothing])).pairwise_dice == 1
    # What only one of them found is a disagreement, what none found is none.
    assert Agreement(count_shared([nothing, np.stack([nothing[0], ~nothing[1]])])).pairwise_dice == 0


def test_references_hold_no_image_and_an_altered_judge_is_noticed(run: Run, tmp_path: Path) -> None:
    stored = (run.path / runs.JUDGE).stat().st_size
    assert stored < 100_000
    copied = Path(shutil.copytree(run.path, tmp_path / "run"))
    tensors, facts = runs.load_tensors(copied / runs.JUDGE)
    runs.save_tensors(copied / runs.JUDGE, tensors, facts | {"share_empty": 1.0})
    with pytest.raises(RunError, match="altered since training"):
        runs.open_run(copied)
    runs.save_tensors(copied / runs.JUDGE, tensors, {"limits": {}})
    with pytest.raises(RunError, match="not a judge"):
        runs.read_judge(copied)


def test_a_case_that_cannot_be_read_is_named_and_the_rest_judges(sites: Dataset, run: Run) -> None:
    broken = replace(sites.cases[0], id="broken", image_paths=(Path("nowhere.png"),))
    segmenter, settings = Segmenter([run]), run.config.judge
    judge, failed = learn_references(
        segmenter, [broken, *sites.cases[:9]], [sites.cases[10]], sites, settings
    )
    assert judge is not None
    assert list(failed) == ["broken"]
    assert "/" not in failed["broken"]
    assert learn_references(segmenter, [broken, sites.cases[0]], [], sites, settings)[0] is None


def test_a_training_of_too_few_patients_says_that_it_will_not_judge(sites: Dataset, tmp_path: Path) -> None:
    notes: list[str] = []
    settings = small_config(
        "judge.detectors={nearest = {}}",
        "train.labelled_patients=2",
        "train.steps=1",
        "train.validation_fraction=0.1",
    )
    run = train(sites, settings, tmp_path / "run", on_progress=lambda progress: notes.append(progress.note))
    assert run.judge is None
    assert any("no verdicts" in note for note in notes)


def test_verdicts_of_another_run_do_not_stay_and_foreign_files_do(
    sites: Dataset, run: Run, tmp_path: Path
) -> None:
    list(predict([run], sites.cases[:2], tmp_path))
    assert (tmp_path / "verdicts.csv").is_file()
    list(
        predict(
            [replace(run, judge=None, manifest=run.manifest | {"files": {runs.WEIGHTS: "other"}})],
            sites.cases[:2],
            tmp_path,
        )
    )
    assert not list(tmp_path.glob("verdicts.*"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "verdicts.csv").write_text("mine")
    with pytest.raises(ConfigError, match="verdicts.csv"):
        list(predict([run], sites.cases[:2], other))


def test_the_command_says_how_many_and_its_code_that_some_were_rejected(
    sites: Dataset,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for case in sites.cases[:2]:
        shutil.copy(case.image_paths[0], folder / case.image_paths[0].name)
    monkeypatch.setattr("anysite.judge.REJECT", -1e9)
    monkeypatch.setattr(
        "sys.argv", ["anysite", "predict", str(run.path), str(folder), "--output", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    printed = capsys.readouterr()
    assert "verdicts: 0 accept, 0 review, 2 reject" in printed.out
    assert "2 of 2 masks were rejected" in printed.err
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_parts_share_one_file_of_verdicts(sites: Dataset, run: Run, tmp_path: Path) -> None:
    for part in ("1/2", "2/2"):
        list(predict([run], sites.cases[:4], tmp_path, part=part))
    assert len(atomic.read_json(tmp_path / "verdicts.json")["cases"]) == 4
    list(predict([replace(run, judge=None)], sites.cases[:4], tmp_path / "plain"))
    assert not (tmp_path / "plain" / "verdicts.json").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("judge.detectors={spektral = {}}", "unknown detector 'spektral'"),
        ("judge.detectors={nearest = {neighbours = 0}}", "neighbours"),
        ('judge.detectors={spectral = {layers = "first"}}', "layers"),
    ],
)
def test_wrong_detectors_are_refused_before_training(
    sites: Dataset, tmp_path: Path, setting: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(sites, small_config(setting), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_referral_is_what_the_files_the_command_and_the_report_say(
    sites: Dataset,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for case in sites.cases[:4]:
        shutil.copy(case.image_paths[0], folder / case.image_paths[0].name)
    monkeypatch.setattr("anysite.judge.REJECT", 1e9)
    monkeypatch.setattr(
        "sys.argv",
        [
            "anysite",
            "predict",
            str(run.path),
            str(folder),
            "--output",
            str(tmp_path / "out"),
            "--referral",
            "0.5",
        ],
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    assert "verdicts: 2 accept, 2 review, 0 reject" in capsys.readouterr().out
    written = atomic.read_json(tmp_path / "out" / "verdicts.json")["cases"]
    order = sorted(written, key=lambda case: -suspicion(written[case]["scores"]))
    assert [written[case]["verdict"] for case in order] == ["review", "review", "accept", "accept"]
    (source,) = read_sources([tmp_path / "out"])
    assert source.predictions is not None
    shown = {name: case.verdict.decision for name, case in source.predictions.cases.items() if case.verdict}
    assert shown == {name: verdict["verdict"] for name, verdict in written.items()}
    (tmp_path / "out" / "verdicts.json").write_text('{"cases": 3}')
    with pytest.raises(FileFormatError, match=r"verdicts\.json"):
        read_sources([tmp_path / "out"])
    with pytest.raises(FileFormatError, match=r"verdicts\.json"):
        read_verdicts(tmp_path / "out" / ".." / "out")


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"entropy": 3.0, "quality": 1.0, "ensemble": 0.5}, 1.0),
        ({"entropy": 3.0, "quality": 0.2, "ensemble": 0.5}, 0.5),
        ({"entropy": 3.0, "ensemble": 0.5}, 0.5),
        ({"entropy": 3.0, "quality": 1.0}, 1.0),
        ({"entropy": 3.0, "shape": 4.0}, 4.0),
        ({"entropy": None, "ensemble": 0.5}, math.inf),
        ({}, 0.0),
    ],
)
def test_what_several_networks_disagree_about_speaks_against_a_mask(
    scores: dict[str, float | None], expected: float
) -> None:
    assert suspicion(scores) == expected


def test_references_that_are_all_alike_reject_nothing() -> None:
    """As where the networks agree that rare lesions are in no known image."""
    judge = Judge(JudgeSettings(detectors={"entropy": {}}))
    judge.limits = {"entropy": (0.0, 0.0)}
    judge.detectors["entropy"].fit(np.zeros((1, 1)))
    assert judge._relative("entropy", 0.001) == 0
    judge.limits = {"entropy": (0.0, 0.01)}
    assert judge._relative("entropy", 0.001) == pytest.approx(0.1)


def test_limits_count_only_for_segmentations_made_as_those_they_were_learned_from(draw: Draw) -> None:
    judge = judge_of(draw, shifted=20, detectors={"histogram": {}, "entropy": {}})
    output = draw()
    known, alone = judge.judge(output), judge.judge(output, image_alone=True)
    assert known.scores.keys() == {"histogram", "entropy", "combined", "quality"}
    assert known.predicted_dice is not None
    assert alone.scores == {"histogram": known.scores["histogram"]}
    assert alone.predicted_dice is None


def test_mirrored_views_that_the_limits_do_not_know_leave_the_image_alone_to_speak(
    sites: Dataset, run: Run, tmp_path: Path
) -> None:
    case = next(case for case in sites.cases if case.id in run.splits["held_out"])
    told = {}
    for flips in (False, True):
        list(predict([run], [case], tmp_path / str(flips), flips=flips))
        told[flips] = read_verdicts(tmp_path / str(flips))[case.id]
    speaking = {n for n in told[False]["scores"] if n in ("histogram", "spectral", "mahalanobis", "nearest")}
    assert speaking < told[False]["scores"].keys()
    assert told[True]["scores"].keys() == speaking
    assert [judged_by_image_alone([run], flips, None) for flips in (None, False, True)] == [
        False,
        False,
        True,
    ]
    assert judged_by_image_alone([run], None, "heart")
    assert told[True]["predicted_dice"] is None


def test_windows_that_overlap_are_views_of_a_network_without_mirrored_ones(
    sites: Dataset, run: Run, tmp_path: Path
) -> None:
    image = sites.cases[0].image()
    segmenter = Segmenter([run])
    assert flip_combinations(run.plan, run.config)[1:]
    mirrored = segmenter.observe(image, flips=True).agreement
    windows = segmenter.observe(image, flips=False).agreement
    assert mirrored is not None
    assert windows is not None
    assert len(mirrored.shared) == 2**run.plan.dimension
    assert len(windows.shared) == 2
    assert 0 <= windows.pairwise_dice < 1
    small = Volume.of_pixels(image.array[:, :20, :20])
    assert segmenter.observe(small, flips=False).agreement is None


@pytest.mark.parametrize("count", [5, 10, 30])
@pytest.mark.parametrize("share", [0.95, 0.99])
def test_a_further_image_crosses_a_limit_as_seldom_as_stated(count: int, share: float) -> None:
    """Also of few images, of which neither mean nor spread is sure."""
    rng = np.random.default_rng(0)
    crossed = []
    for _ in range(4000):
        *known, further = rng.normal(size=count + 1)
        crossed.append(further > judging._find_limit(known, share)[1])
    assert np.mean(crossed) <= (1 - share) * 1.2 + 0.001


@pytest.mark.parametrize("count", [5, 10, 30])
@pytest.mark.parametrize("dimensions", [2, 5, 20])
def test_of_distances_whose_tail_is_longer_too(count: int, dimensions: int) -> None:
    """As squared ones are: a limit that takes them for normal is crossed more often than stated."""
    rng, share = np.random.default_rng(2), 0.99
    crossed, by_normal = [], []
    for known in rng.chisquare(dimensions, (4000, count + 1)):
        crossed.append(known[-1] > judging._find_limit(known[:-1], share)[1])
        by_normal.append(known[-1] > judging._find_limit(known[:-1] - 1e6, share)[1] + 1e6)
    assert np.mean(crossed) <= (1 - share) * 1.5
    assert np.mean(by_normal) > np.mean(crossed) * 1.5


@pytest.mark.parametrize("count", [5, 10, 30])
@pytest.mark.parametrize("shape", ["half normal", "sum of signs"])
def test_of_scores_that_begin_at_nothing_too(count: int, shape: str) -> None:
    """As the combined one, whose tail is longer than a normal distribution's: by that it was crossed more often."""
    rng, share = np.random.default_rng(1), 0.99
    weights = np.array([0.5, 1.0, 0.3, 0.0, 0.8])

    def draw_scores(number: int) -> np.ndarray:
        if shape == "sum of signs":
            return quality.signs_of(rng.normal(0, 0.4, (number, len(weights)))) @ weights
        return np.abs(rng.normal(size=number))

    crossed, by_normal = [], []
    for _ in range(4000):
        *known, further = draw_scores(count + 1)
        crossed.append(further > judging._find_limit(known, share, least=0.0)[1])
        by_normal.append(further > judging._find_limit(np.subtract(known, 1e6), share)[1] + 1e6)
    assert np.mean(crossed) <= (1 - share) * 1.2
    assert np.mean(by_normal) > (1 - share) * 1.5


def test_a_limit_of_scores_that_are_all_alike() -> None:
    assert judging._find_limit([0.0] * 8, 0.99, least=0.0) == (0.0, 0.0)
    usual, limit = judging._find_limit([0.2] * 8, 0.99, least=0.2)
    assert usual == limit == pytest.approx(0.2)


def test_an_image_of_one_window_still_has_joint_scores_and_a_dice_to_expect(draw: Draw) -> None:
    judge = judge_of(draw, shifted=20, detectors={"histogram": {}, "entropy": {}, "pairwise_dice": {}})
    assert "pairwise_dice" in judge.detectors
    for kind in (0, 1):
        output = draw(kind)
        whole, alone = judge.judge(output), judge.judge(replace(output, agreement=None))
        assert whole.scores.keys() - alone.scores.keys() == {"pairwise_dice"}
        lower, upper = alone.scores["quality"], whole.scores["quality"]
        assert lower is not None
        assert upper is not None
        assert lower <= upper or not kind  # windows may agree better than usual
        assert (alone.predicted_dice is None) == (kind == 1)
    assert judge.judge(replace(draw(), agreement=None), least_dice=0.99).decision != "accept"


def test_a_detector_that_some_held_out_images_know_nothing_of_is_dropped(draw: Draw) -> None:
    """As of windows that overlap, where one holds some of the images: the joint scores would miss those."""
    judge = Judge(JudgeSettings(detectors={"histogram": {}, "pairwise_dice": {}}))
    training = references([judge.describe(draw()) for _ in range(8)])
    clean = references([judge.describe(draw()) for _ in range(12)], 100)
    for reference in clean[::2]:
        del reference.vectors["pairwise_dice"]  # type: ignore[attr-defined]
    shifted = [replace(r, vectors=judge.describe(draw(1)), shifted=True) for r in clean]
    known = [replace(r, dice=0.5 + 0.03 * n) for n, r in enumerate([*clean, *shifted])]
    judge.fit(training, known)
    assert judge.detectors.keys() == {"histogram"}
    assert judge.judge(draw()).scores.keys() == {"histogram", "combined", "quality"}
