"""The plan: choices from training cases alone, the way onto its grid and back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from anysite.data.case import Case, Dataset
from anysite.data.volume import Volume
from anysite.errors import ConfigError, DataError, GeometryError
from anysite.normalisation import Normalisation
from anysite.plan import Plan
from anysite.planning import LOCAL_SHARE, choose_patch_size, learn_plan
from anysite.settings import PlanSettings

AXES = [
    "".join(order)
    for letters in itertools.product("RL", "AP", "SI")
    for order in itertools.permutations(letters)
]


def plan(**changes: Any) -> Plan:
    facts: dict[str, Any] = {
        "dimension": 2,
        "image_dimension": 3,
        "axes": "SRA",
        "spacing": (3.0, 1.0, 1.0),
        "unit": "mm",
        "channels": 1,
        "normalisation": (Normalisation(kind="none"),),
        "patch_size": (16, 16),
        "classes": ("background", "organ"),
        "label_values": (0, 1),
    }
    return Plan(**(facts | changes))


def write_dataset(
    folder: Path,
    shapes: Sequence[Sequence[int]],
    spacing: Sequence[float],
    offset: float = 0,
    labels: int = 2,
) -> Dataset:
    """Random volumes with a block of every class, one shape a case."""
    rng = np.random.default_rng(0)
    cases = []
    for number, shape in enumerate(shapes):
        label = np.zeros(shape, np.uint8)
        for index in range(1, labels):
            label[index : index + 2, 1:4, min(1, shape[2] - 1) : 3] = index
        image = (rng.normal(100, 20, shape) + 50 * label + offset * (label == 0)).astype(np.float32)
        paths = folder / f"{number}.nii", folder / f"{number}_label.nii"
        for path, array in zip(paths, (image, label), strict=True):
            nibabel.save(nibabel.Nifti1Image(array, np.diag([*spacing, 1.0])), path)
        cases.append(Case(str(number), str(number), "here", (paths[0],), paths[1]))
    return Dataset("blocks", tuple(cases), ("background", "organ", "nodule")[:labels], tuple(range(labels)))


@given(
    shape=st.lists(st.floats(0.6, 700), min_size=2, max_size=3),
    limit=st.integers(64, 2**20),
)
def test_patch_size_properties(shape: list[float], limit: int) -> None:
    def step(voxels: int) -> int:
        return 4 if voxels < 12 else 8 if voxels < 32 else 16 if voxels < 96 else 32

    size, whole = choose_patch_size(shape, limit), choose_patch_size(shape, 2**60)
    assert np.prod(size) <= limit
    for chosen, full, extent in zip(size, whole, shape, strict=True):
        assert extent <= full < extent + 32
        assert chosen <= full
        assert chosen % step(chosen - 1) == 0
        if chosen < full:  # only the longest axes are cut, down to about one length
            assert chosen + step(chosen) >= max(size)
    if np.prod(whole) <= limit:
        assert size == whole
    else:
        larger = [n + step(n) if n < full else n for n, full in zip(size, whole, strict=True)]
        assert np.prod(larger) > limit


@pytest.mark.parametrize(
    ("shape", "limit", "expected"),
    [
        ((256, 256), 2**16, (256, 256)),
        ((384, 384), 2**16, (256, 256)),
        ((60, 100), 2**16, (64, 128)),
        ((20, 512, 512), 2**18, (24, 96, 96)),
        ((160, 160, 160), 2**18, (64, 64, 64)),
    ],
)
def test_patch_sizes_by_hand(shape: tuple[int, ...], limit: int, expected: tuple[int, ...]) -> None:
    assert choose_patch_size(shape, limit) == expected


def test_a_limit_below_the_smallest_patch_is_refused() -> None:
    assert choose_patch_size((500, 500), 16) == (4, 4)
    with pytest.raises(ConfigError, match=r"plan.max_patch_voxels: 63 voxels; expected at least 64"):
        choose_patch_size((500, 500, 500), 63)


@pytest.mark.parametrize(
    ("shape", "spacing", "axes", "dimension", "reason"),
    [
        ((24, 24, 6), (1, 1, 4), "SRA", 2, "slices along S: its spacing is 4.0 x the finest"),
        ((6, 24, 24), (4, 1, 1), "RAS", 2, "slices along R"),
        ((24, 6, 24), (1, 3, 1), "ARS", 2, "slices along A"),
        ((24, 24, 1), (4, 1, 1), "SRA", 2, "slices along S: 1 of them against 24 voxels"),
        ((24, 6, 24), (1, 1, 1), "ARS", 2, "slices along A: 6 of them against 24 voxels"),
        ((24, 7, 24), (1, 2.9, 1), "ARS", 3, "no slice axis stands out"),
        ((24, 24, 24), (1, 1.2, 1), "RAS", 3, "nearly isotropic"),
    ],
)
def test_the_slice_axis_is_found_by_spacing_or_shape(
    tmp_path: Path, shape: Any, spacing: Any, axes: str, dimension: int, reason: str
) -> None:
    learned = learn_plan(write_dataset(tmp_path, [shape] * 2, spacing), PlanSettings())
    order = ["RAS".index(a) for a in axes]
    assert (learned.axes, learned.dimension, learned.image_dimension) == (axes, dimension, 3)
    assert learned.spacing == pytest.approx([spacing[a] for a in order])
    assert learned.slice_wise == (dimension == 2)
    assert (learned.context_slices, learned.network_channels) == (0, 1)
    assert learned.patch_size == tuple(choose_patch_size([shape[a] for a in order][3 - dimension :], 2**16))
    assert any(reason in text for text in learned.reasons)


def test_a_label_lies_on_the_grid_of_its_image_however_its_own_place_is_rounded() -> None:
    image = Volume(np.zeros((1, 6, 6, 61), np.float32), np.diag([1, 1, 1.50000006, 1]))
    label = Volume(np.zeros((1, 6, 6, 61), np.uint8), np.diag([1, 1, 1.49999999, 1]))
    assert label.same_grid(image)
    chosen = Plan(
        dimension=3, image_dimension=3, axes="RAS", spacing=(1.0, 1.0, 1.0), unit="mm", channels=1,
        normalisation=(Normalisation(),), patch_size=(4, 4, 4), classes=("background", "a"), label_values=(0, 1),
    )  # fmt: skip
    assert chosen.label_to_grid(label, image).shape == chosen.to_grid(image).shape[1:]


@pytest.mark.parametrize(
    ("changes", "dimension", "channels"),
    [
        ({"dimension": "2d"}, 2, 1),
        ({"dimension": "2.5d", "context_slices": 2}, 2, 5),
        ({"dimension": "3d"}, 3, 1),
        ({"context_slices": 2}, 2, 1),
    ],
)
def test_the_dimension_as_set(tmp_path: Path, changes: Any, dimension: int, channels: int) -> None:
    learned = learn_plan(write_dataset(tmp_path, [(16, 16, 4)], (1, 1, 5)), PlanSettings(**changes))
    assert (learned.dimension, learned.network_channels) == (dimension, channels)
    assert len(learned.patch_size) == dimension


def test_the_median_of_the_cases_and_settings_above_it(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [(16, 16, 8), (20, 20, 8), (40, 40, 8)], (1, 1, 2))
    assert learn_plan(dataset, PlanSettings(dimension="2d")).patch_size == (24, 24)
    chosen = PlanSettings(dimension="2d", spacing=(2, 0.5, 0.25), patch_size=(8, 16), normalisation="none")
    learned = learn_plan(dataset, chosen)
    assert (learned.spacing, learned.patch_size) == ((2, 0.5, 0.25), (8, 16))
    assert learned.normalisation[0].kind == "none"
    assert "spacing 2 x 0.5 x 0.25 as set" in learned.reasons
    finer = learn_plan(dataset, PlanSettings(dimension="2d", spacing=(2, 0.5, 0.5)))
    assert finer.patch_size == (48, 48)  # 20 mm at 0.5 mm


def test_hounsfield_units_are_normalised_by_the_training_foreground(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [(16, 16, 12)] * 3, (1, 1, 1), offset=-1100)
    learned = learn_plan(dataset, PlanSettings())
    images, labels = zip(*((c.image().array[0], c.label().array[0]) for c in dataset.cases), strict=True)
    voxels = np.concatenate([i[m > 0] for i, m in zip(images, labels, strict=True)])
    low, high = np.percentile(voxels, [0.5, 99.5])
    clipped = np.clip(voxels, low, high)
    norm = learned.normalisation[0]
    assert norm.kind == "dataset"
    assert (norm.low, norm.high, norm.mean, norm.std) == pytest.approx(
        (low, high, clipped.mean(), clipped.std()), rel=1e-5
    )
    expected = (np.clip(images[0], low, high) - clipped.mean()) / clipped.std()
    (grid,) = learned.to_grid(dataset.cases[0].image()).numpy()
    np.testing.assert_allclose(
        grid, np.transpose(expected, ["RAS".index(a) for a in learned.axes]), atol=1e-4
    )
    assert (
        learn_plan(write_dataset(tmp_path, [(16, 16, 12)], (1, 1, 1)), PlanSettings()).normalisation[0].kind
        == "case"
    )


def test_only_labelled_training_cases_are_read(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [(16, 16, 12)] * 2, (1, 1, 1))
    absent = Case("absent", "absent", "elsewhere", (tmp_path / "gone.nii",))
    assert learn_plan(dataset.with_cases([*dataset.cases, absent]), PlanSettings()) == learn_plan(
        dataset, PlanSettings()
    )
    whole = dataset.with_cases(
        [*dataset.cases, Case("t", "t", "test", (tmp_path / "t.nii",), tmp_path / "t_l.nii")]
    )
    training, _ = whole.leave_out(["test"])
    assert learn_plan(training, PlanSettings()) == learn_plan(dataset, PlanSettings())
    with pytest.raises(DataError, match="no labelled training cases"):
        learn_plan(dataset.with_cases([absent]), PlanSettings())


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"spacing": (1, 1)}, "plan.spacing"),
        ({"patch_size": (16, 16), "dimension": "3d"}, "plan.patch_size"),
        ({"patch_size": (8, 16, 16), "dimension": "2d"}, "plan.patch_size"),
        ({"max_patch_voxels": 10}, "plan.max_patch_voxels"),
    ],
)
def test_settings_that_do_not_fit_the_data(tmp_path: Path, changes: Any, place: str) -> None:
    dataset = write_dataset(tmp_path, [(16, 16, 12)], (1, 1, 1))
    with pytest.raises(ConfigError) as caught:
        learn_plan(dataset, PlanSettings(**changes))
    assert caught.value.where == place


def test_pictures_have_no_axes_and_no_slices(phantom: Dataset) -> None:
    learned = learn_plan(phantom, PlanSettings())
    assert (learned.axes, learned.dimension, learned.unit, learned.spacing) == ("", 2, "px", (1, 1))
    assert not learned.slice_wise
    assert learned.patch_size == (64, 64)
    with pytest.raises(ConfigError, match=r"plan.dimension: '3d' for images with two axes"):
        learn_plan(phantom, PlanSettings(dimension="3d"))


def test_cases_that_contradict_each_other(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [(16, 16, 12)] * 2, (1, 1, 1))
    first, second = dataset.cases
    double = Case("double", "double", "here", (first.image_paths[0], second.image_paths[0]), first.label_path)
    with pytest.raises(DataError, match="double: 3 spatial axes and 2 channels; expected 3 and 1 as in 0"):
        learn_plan(dataset.with_cases([first, double]), PlanSettings())
    assert second.label_path is not None
    nibabel.save(nibabel.Nifti1Image(np.ones((16, 16, 11), np.uint8), np.eye(4)), second.label_path)
    with pytest.raises(GeometryError, match=r"^1: a label of shape \(16, 16, 11\).*anysite check"):
        learn_plan(dataset, PlanSettings())
    for case in dataset.cases:
        assert case.label_path is not None
        nibabel.save(nibabel.Nifti1Image(np.zeros((16, 16, 12), np.uint8), np.eye(4)), case.label_path)
    with pytest.raises(DataError, match="no training case has any foreground"):
        learn_plan(dataset, PlanSettings())


def test_other_channels_or_axes_than_in_training_are_refused() -> None:
    with pytest.raises(GeometryError, match="2 channels; expected 3 spatial axes and 1 channels"):
        plan().to_grid(Volume(np.zeros((2, 4, 4, 4)), np.eye(4)))
    with pytest.raises(GeometryError, match="an image with 2 spatial axes"):
        plan().to_grid(Volume.of_pixels(np.zeros((1, 4, 4))))


def anatomy(seed: int = 0) -> Volume:
    array = np.random.default_rng(seed).normal(size=(2, 7, 9, 5)).astype(np.float32)
    return Volume(array, np.array([[0.9, 0.1, 0, 5], [-0.1, 1.1, 0.2, -7], [0, -0.3, 2.8, 90], [0, 0, 0, 1]]))


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("kind", ["case", "local", "none"])
def test_the_grid_does_not_depend_on_how_the_file_is_stored(axes: str, kind: Any) -> None:
    normalisation = Normalisation(kind=kind, sigma_voxels=(0, 2, 3))
    anyhow = plan(channels=2, normalisation=(normalisation,) * 2)
    expected = anyhow.to_grid(anatomy())
    found = anyhow.to_grid(anatomy().oriented(axes))
    assert found.shape == (2, 5, 6, 10)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    label = anatomy().with_array((anatomy().array[:1] > 0.5).astype(np.int32))
    assert torch.equal(anyhow.label_to_grid(label.oriented(axes), label), anyhow.label_to_grid(label, label))


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("grid", ["SRA", "RAS", "ARS"])
def test_there_and_back_is_exact_where_spacings_agree(axes: str, grid: str) -> None:
    native = anatomy().oriented(axes)
    spacing = native.oriented(grid).spacing
    same = plan(channels=2, axes=grid, spacing=spacing, normalisation=(Normalisation(kind="none"),) * 2)
    back = same.from_grid(same.to_grid(native), native)
    np.testing.assert_array_equal(back.array, native.array)
    assert back.affine.tobytes() == native.affine.tobytes()
    assert back.unit == native.unit


@settings(deadline=None)
@given(
    angles=st.tuples(*[st.floats(-180, 180) | st.sampled_from([0.0, 45.0, -45.0, 90.0, 135.0])] * 3),
    mirrored=st.tuples(*[st.booleans()] * 3),
    grid=st.sampled_from(["SRA", "RAS", "ARS"]),
)
def test_there_and_back_for_slices_tilted_by_any_angle(angles: Any, mirrored: Any, grid: str) -> None:
    """At 45 degrees two axes are equally near, and a turned affine names them differently."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag([1.0, 1.0, 2.0])
    affine[:3, :3] *= np.where(mirrored, -1, 1)
    native = Volume(np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32), affine)
    same = plan(axes=grid, spacing=native.oriented(grid).spacing)
    back = same.from_grid(same.to_grid(native), native)
    np.testing.assert_array_equal(back.array, native.array)
    assert back.affine.tobytes() == affine.tobytes()


@pytest.mark.parametrize("axes", ["RAS", "SPL", "ILA"])
@pytest.mark.parametrize("spacing", [(0.7, 0.7, 0.7), (1.5, 1.0, 1.0), (2.0, 0.8, 1.3), (1.37, 1.61, 1.9)])
def test_the_volume_of_a_sphere_survives_other_spacings(axes: str, spacing: Any) -> None:
    centre = np.array([22.6, 20.3, 24.1]).reshape(3, 1, 1, 1)
    distance_mm = np.linalg.norm(np.indices((44, 44, 44)) - centre, axis=0) - 16
    ball = 1 / (1 + np.exp(distance_mm))
    native = Volume(np.stack([1 - ball, ball]).astype(np.float32), np.eye(4)).oriented(axes)
    other = plan(channels=2, spacing=spacing, normalisation=(Normalisation(kind="none"),) * 2)
    back = other.decide(other.from_grid(other.to_grid(native), native).array)
    assert back.shape == native.shape
    assert back.sum() == pytest.approx((distance_mm < 0).sum(), rel=0.01)


@settings(deadline=None, max_examples=30)
@given(gain=st.floats(0.01, 1000), offset=st.floats(-1000, 1000), seed=st.integers(0, 99))
def test_case_normalisation_ignores_scale_and_offset(gain: float, offset: float, seed: int) -> None:
    assume(abs(offset) < 100 * gain)  # float32 holds seven digits
    by_case = plan(spacing=(1, 1, 1), axes="RAS", normalisation=(Normalisation(kind="case"),))
    array = np.random.default_rng(seed).gamma(2, size=(1, 8, 9, 10)).astype(np.float32)
    grid = by_case.to_grid(Volume(array, np.eye(4)))
    low, high = np.percentile(array, [0.5, 99.5])
    clipped = np.clip(array.astype(float), low, high)
    np.testing.assert_allclose(grid, (clipped - clipped.mean()) / clipped.std(), atol=1e-4)
    assert float(grid.mean()) == pytest.approx(0, abs=1e-5)
    assert float(grid.std(correction=0)) == pytest.approx(1, abs=1e-5)
    other = by_case.to_grid(Volume(gain * array + offset, np.eye(4)))
    torch.testing.assert_close(other, grid, atol=1e-2, rtol=1e-3)


def test_an_image_of_one_value_becomes_zero() -> None:
    by_case = plan(normalisation=(Normalisation(kind="case"),))
    assert not by_case.to_grid(Volume(np.full((1, 4, 4, 4), 1e4, np.float32), np.eye(4))).any()


@settings(deadline=None, max_examples=40)
@given(
    st.permutations(range(3)), st.tuples(*[st.booleans()] * 3), st.sampled_from(["RAS", "SAR", "ASR", "LPI"]),
    st.sampled_from([(1, 1, 1), (0.7, 1.3, 2)]), st.integers(1, 9),
)  # fmt: skip
def test_rows_from_the_grid_are_rows_of_the_whole(order, flips, axes, spacing, step) -> None:
    affine = np.zeros((4, 4))
    affine[order, range(3)] = np.where(flips, -1.5, 1.5)
    affine[3, 3] = 1
    native = Volume(np.zeros((1, 9, 7, 8), np.float32), affine)
    there = plan(axes=axes, spacing=spacing)
    grid = torch.rand(2, *there.to_grid(native).shape[1:], generator=torch.Generator().manual_seed(step))
    whole = there.from_grid(grid, native).array
    upright = native.with_array(whole).oriented(axes).array
    shape = upright.shape[1:]
    expected = torch.nn.functional.interpolate(grid[None], size=shape, mode="trilinear", align_corners=False)[
        0
    ]
    np.testing.assert_allclose(upright, expected, atol=1e-6)
    parts = [there.rows_from_grid(grid, native, slice(start, start + step)) for start in range(0, 9, step)]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-6)


def test_decide_takes_the_largest_class() -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), (5, 6)).transpose(2, 0, 1)
    label = plan(classes=tuple("abcd")).decide(probabilities)
    assert label.shape == (5, 6)
    for place in np.ndindex(5, 6):
        assert label[place] == max(range(4), key=lambda k: probabilities[:, *place][k])


def test_decide_paints_regions_in_their_order() -> None:
    """As in BraTS: the whole tumour, painted over by its core, painted over by what enhances."""
    tumour = plan(classes=tuple("abcd"), regions=((1, 2, 3), (2, 3), (3,)), region_classes=(1, 2, 3))
    assert tumour.outputs == 3
    voxels = {
        (0.4, 0.4, 0.4): 0,
        (0.9, 0.5, 0.1): 1,
        (0.9, 0.6, 0.5): 2,
        (0.6, 0.6, 0.6): 3,
        (0.1, 0.2, 0.8): 3,
    }
    label = tumour.decide(np.array(list(voxels)).T[:, None])
    assert label[0].tolist() == list(voxels.values())
    other = tumour.model_copy(update={"region_classes": (3, 1, 2)})
    assert other.decide(np.full((3, 1, 1), 0.6)).item() == 2


def test_probabilities_are_softmax_or_sigmoid() -> None:
    logits = torch.randn(2, 3, 4, 5)
    exponential = logits.exp()
    by_class, by_region = plan(), plan(regions=((1, 2), (2,), (1,)))
    torch.testing.assert_close(
        by_class.as_probabilities(logits), exponential / exponential.sum(1, keepdim=True)
    )
    torch.testing.assert_close(by_class.as_probabilities(logits[0], 0), by_class.as_probabilities(logits)[0])
    torch.testing.assert_close(by_region.as_probabilities(logits), exponential / (1 + exponential))


def test_an_image_of_another_unit_is_refused() -> None:
    rng = np.random.default_rng(0)
    array = rng.normal(size=(1, 32, 32, 32)).astype(np.float32)
    plan = Plan(
        dimension=3, image_dimension=3, axes="RAS", spacing=(1.0, 1.0, 1.0), unit="mm", channels=1,
        normalisation=(Normalisation(),), patch_size=(32, 32, 32), classes=("background", "organ"), label_values=(0, 1),
    )  # fmt: skip
    with pytest.raises(GeometryError, match="an image in px; expected mm"):
        plan.to_grid(Volume.of_pixels(array))


def test_an_image_that_is_nearly_all_one_value_keeps_its_contrast() -> None:
    array = np.zeros((1, 64, 64), np.float32)
    array[0, 30:33, 30:33] = 5.0  # far less than half a percent
    plan = Plan(
        dimension=2, image_dimension=2, spacing=(1.0, 1.0), unit="px", channels=1,
        normalisation=(Normalisation(),), patch_size=(32, 32), classes=("background", "organ"), label_values=(0, 1),
    )  # fmt: skip
    grid = plan.to_grid(Volume.of_pixels(array))
    assert float(grid[0, 31, 31]) > 5
    assert abs(float(grid.mean())) < 1e-5


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1.0, 1e9])
def test_case_normalisation_heeds_contrast_whatever_its_unit(scale: float) -> None:
    """Diffusion in m2/s is as good an image as one in mm2/s."""
    values = np.random.default_rng(0).normal(1, 0.1, (1, 16, 16))
    image = Volume.of_pixels((values * scale).astype(np.float64))
    grid = plan(image_dimension=2, unit="px", spacing=(1, 1), patch_size=(16, 16), channels=1,
                normalisation=(Normalisation(kind="case"),)).to_grid(image)  # fmt: skip
    assert float(grid.std()) == pytest.approx(1, abs=0.01)
    flat = Volume.of_pixels(np.full((1, 16, 16), scale))
    flat.array[0, 0, 0] *= 1 + 1e-9  # no contrast, but what rounding makes
    assert float(plan(image_dimension=2, unit="px", spacing=(1, 1), patch_size=(16, 16), channels=1,
                      normalisation=(Normalisation(kind="case"),)).to_grid(flat).abs().max()) < 1e-3  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((24, 24, 6), (1, 1, 4), (0.0, 3.0, 3.0)),  # thick slices, each by itself
        ((24, 32, 40), (1, 1.5, 1), (5.0, 3.333, 5.0)),  # 3-D: 5 mm along every axis
    ],
)
def test_a_plan_learns_how_far_surroundings_reach(
    tmp_path: Path, shape: Any, spacing: Any, expected: tuple[float, ...]
) -> None:
    given = PlanSettings(normalisation="local", least_contrast=0.3, noise_contrast=2.0)
    learned = learn_plan(write_dataset(tmp_path, [shape] * 2, spacing), given)
    (one,) = learned.normalisation
    assert (one.kind, one.least_contrast, one.noise_contrast) == ("local", 0.3, 2.0)
    sigma_mm = np.multiply(one.sigma_voxels, learned.spacing)
    own = np.multiply(shape, spacing)[["RAS".index(a) for a in learned.axes]]
    assert sigma_mm[-1] == pytest.approx(LOCAL_SHARE * own[-2:].min(), abs=0.01)
    assert sorted(one.sigma_voxels) == pytest.approx(sorted(expected), abs=0.01)
    assert "channel 0 normalised by case, then locally: no common intensity scale" in learned.reasons


def test_hounsfield_units_keep_their_meaning(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [(20, 20, 20)] * 2, (1, 1, 1), offset=-1000)
    (one,) = learn_plan(dataset, PlanSettings(normalisation="local")).normalisation
    assert (one.kind, one.sigma_voxels) == ("dataset", ())


@pytest.mark.parametrize("kind", ["case", "local"])
def test_intensities_that_overflow_are_named(tmp_path: Path, kind: Any) -> None:
    plan = learn_plan(
        write_dataset(tmp_path, [(16, 16, 16)] * 2, (1, 1, 1)), PlanSettings(normalisation=kind)
    )
    array = np.random.default_rng(0).normal(size=(1, 16, 16, 16))
    array[:, :4] = np.finfo(np.float64).min  # stands for no data in some programs
    with pytest.raises(DataError, match="intensities too large to compute with"):
        plan.to_grid(Volume(array, np.eye(4)))
