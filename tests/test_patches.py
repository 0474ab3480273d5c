"""Patches as a function of the step, and windows that put an image together again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map
from monai.inferers.utils import sliding_window_inference
from torch import Tensor
from torch.nn import functional as F

from anysite.data.case import Case, Dataset
from anysite.errors import DataError
from anysite.normalisation import Normalisation
from anysite.patches import Batch, PatchSampler, PreparedCase, PreparedCases, prepare
from anysite.plan import Plan
from anysite.planning import learn_plan
from anysite.settings import AugmentSettings, PlanSettings, TrainSettings
from anysite.windows import cut_patch, gaussian_weight, place_windows, slide, thin_out

PLAIN = AugmentSettings(enabled=False)
CASE = Case("a", "a", "here", ())


def plan(patch_size: Sequence[int], outputs: int = 1, context: int = 0, volumes: bool = False) -> Plan:
    """A plan for images of as many axes as the patch, or for volumes slice by slice."""
    return Plan(
        dimension=3 if len(patch_size) == 3 else 2,
        image_dimension=3 if volumes or len(patch_size) == 3 else 2,
        axes="SRA" if volumes else "",
        spacing=(1.0,) * len(patch_size),
        unit="mm",
        channels=1,
        normalisation=(Normalisation(),),
        context_slices=context,
        patch_size=tuple(patch_size),
        classes=tuple(f"class {i}" for i in range(outputs)),
        label_values=tuple(range(outputs)),
    )


def prepared(shape: Sequence[int], domain: int = 0, seed: int = 0, foreground: bool = True) -> PreparedCase:
    """A case whose image tells each voxel's place, with one voxel of class 1 and one of class 2."""
    image = torch.arange(1.0, 1 + int(np.prod(shape))).reshape(1, *shape)
    label = torch.zeros(tuple(shape), dtype=torch.uint8)
    rng = np.random.default_rng(seed)
    places = [tuple(int(rng.integers(n)) for n in shape) for _ in range(2)] if foreground else []
    for index, place in enumerate(places):
        label[place] = index + 1
    foreground_voxels = tuple(np.array([place], np.int32) for place in places)
    return PreparedCase(CASE, domain, image, label, foreground_voxels, known=(0,))


def sampler(cases: Sequence[PreparedCase], chosen: Plan, rank: int = 0, **train: Any) -> PatchSampler:
    return PatchSampler(cases, chosen, TrainSettings(**train), PLAIN, seed=5, rank=rank)


def same(first: Batch, second: Batch) -> bool:
    tensors = zip(
        (first.image, first.label, first.domain), (second.image, second.label, second.domain), strict=True
    )
    return all(torch.equal(a, b) for a, b in tensors) and first.case_ids == second.case_ids


@pytest.fixture(scope="module")
def phantom_plan(phantom: Dataset) -> Plan:
    return learn_plan(phantom, PlanSettings(patch_size=(24, 32)))


@pytest.fixture(scope="module")
def cases(phantom: Dataset, phantom_plan: Plan) -> list[PreparedCase]:
    return PreparedCases(phantom, phantom_plan, phantom.domains, memory_gb=1).cases


def test_processes_together_go_through_the_sites_in_turn(
    cases: list[PreparedCase], phantom_plan: Plan
) -> None:
    train = TrainSettings(batch_size=1, sampling="domain")
    sites = len({case.domain for case in cases})
    samplers = [PatchSampler(cases, phantom_plan, train, PLAIN, 0, rank, sites) for rank in range(sites)]
    for step in range(3):
        assert {int(one.batch(step).domain) for one in samplers} == set(range(sites))


def test_a_batch_depends_on_its_step_and_nothing_else(cases: list[PreparedCase], phantom_plan: Plan) -> None:
    def make(rank: int = 0, seed: int = 0) -> PatchSampler:
        return PatchSampler(cases, phantom_plan, TrainSettings(batch_size=3), AugmentSettings(), seed, rank)

    first = make()
    expected = [first.batch(step) for step in range(4)]
    second = make()
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 (a global state that must not matter)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(second.batch, (3, 1, 0, 2)))
    assert all(same(expected[step], batch) for step, batch in zip((3, 1, 0, 2), found, strict=True))
    assert same(first.batch(2), expected[2])
    assert expected[0].image.shape == (3, phantom_plan.channels, 24, 32)
    assert expected[0].label.shape == (3, 24, 32)
    others = [expected[1], make(rank=1).batch(0), make(seed=1).batch(0)]
    assert not any(same(expected[0], other) for other in others)


@pytest.mark.parametrize("steps", [range(2, 6), range(1), range(3, 3)])
def test_batches_ahead_are_the_same_batches(
    cases: list[PreparedCase], phantom_plan: Plan, steps: range
) -> None:
    drawn = sampler(cases, phantom_plan)
    ahead, one_by_one = (list(drawn.batches(steps, ahead=ahead)) for ahead in (True, False))
    assert len(ahead) == len(one_by_one) == len(steps)
    for step, first, second in zip(steps, ahead, one_by_one, strict=True):
        assert same(first, drawn.batch(step))
        assert same(second, drawn.batch(step))


def test_a_batch_moves_to_a_device_whole(cases: list[PreparedCase], phantom_plan: Plan) -> None:
    batch = sampler(cases, phantom_plan).batch(0)
    moved = batch.to(torch.device("meta"))
    assert {t.device.type for t in (moved.image, moved.label, moved.domain)} == {"meta"}
    assert moved.case_ids == batch.case_ids


@pytest.mark.parametrize(
    ("shape", "patch", "volumes"),
    [
        ((40, 50), (8, 12), False),
        ((20, 21, 22), (8, 4, 6), False),
        ((6, 30, 31), (10, 7), True),
        ((5, 9), (16, 8), False),
    ],
)
def test_every_patch_that_should_holds_foreground(shape: Any, patch: Any, volumes: bool) -> None:
    chosen = plan(patch, 3, volumes=volumes)
    drawn = sampler(
        [prepared(shape, seed=s) for s in range(20)], chosen, foreground_fraction=1.0, batch_size=4
    )
    found = torch.cat([drawn.batch(step).label for step in range(25)]).flatten(1)
    assert (found > 0).any(1).all()
    for index in (1, 2):  # classes take turns, whatever their size
        assert (found == index).any(1).float().mean() > 0.4


def test_patches_come_from_everywhere_in_the_image() -> None:
    drawn = sampler(
        [prepared((9, 10), foreground=False)], plan((4, 4)), batch_size=50, foreground_fraction=1.0
    )
    corners = {int(image[0, 0, 0]) for step in range(10) for image in drawn.batch(step).image}
    assert corners == {1 + 10 * i + j for i in range(6) for j in range(7)}


def test_the_foreground_fraction_is_a_fraction() -> None:
    cases = [prepared((400, 400), seed=s) for s in range(8)]
    drawn = sampler(cases, plan((8, 8), 3), foreground_fraction=0.3, batch_size=50)
    share = torch.cat([drawn.batch(s).label for s in range(20)]).flatten(1).any(1).float().mean()
    assert float(share) == pytest.approx(0.3, abs=0.05)


def test_sites_take_turns_however_many_cases_they_have() -> None:
    cases = [prepared((8, 8), domain) for domain in (0, 1, 1, 1, 1, 1, 1, 4)]
    drawn = sampler(cases, plan((4, 4), 3), sampling="domain", batch_size=2)
    domains = torch.cat([drawn.batch(step).domain for step in range(30)])
    assert [int((domains == d).sum()) for d in (0, 1, 4)] == [20, 20, 20]
    by_case = sampler(cases, plan((4, 4), 3), sampling="case", batch_size=40)
    assert float((by_case.batch(0).domain == 1).float().mean()) == pytest.approx(0.75, abs=0.2)


def test_small_images_lie_inside_a_patch_of_zeros() -> None:
    case = prepared((5, 20), foreground=False)
    for step in range(10):
        (patch,) = sampler([case], plan((8, 12)), batch_size=1).batch(step).image[:, 0]
        rows, columns = np.nonzero(patch.numpy())
        assert (np.ptp(rows), np.ptp(columns)) == (4, 11)
        assert (patch[rows.min() : rows.max() + 1] > 0).all()
        assert int((patch > 0).sum()) == 5 * 12


@pytest.mark.parametrize("kind", ["2d", "2.5d", "3d"])
def test_neighbouring_slices_share_their_fate(kind: str) -> None:
    """With channelwise augmentation on, context slices still come out alike."""
    size = (1, 8, 8) if kind == "3d" else (8, 8)
    chosen = plan(size, context=2 if kind == "2.5d" else 0, volumes=True)
    shape = (7, 8, 8)
    case = PreparedCase(
        CASE, 0, torch.rand(8, 8).expand(1, *shape), torch.zeros(shape, dtype=torch.uint8), (), (0,)
    )
    bright = AugmentSettings(noise=0, low_resolution=0, blur=0, brightness=1, contrast=1, gamma=1)
    image = PatchSampler([case], chosen, TrainSettings(batch_size=3), bright, 0).batch(0).image
    assert image.shape == (3, chosen.network_channels, *size)
    torch.testing.assert_close(image, image[:, :1].expand_as(image))


def test_no_cases_are_an_error() -> None:
    with pytest.raises(DataError, match="no training cases are left"):
        sampler([], plan((8, 8)))


def slow_patch(
    image: np.ndarray, start: Sequence[int], size: Sequence[int], context: int | None
) -> np.ndarray:
    """Voxel by voxel: zero outside in plane, the outermost slice repeated across it."""
    offsets = [0] if context is None else list(range(-context, context + 1))
    result = np.zeros((len(offsets), len(image), *size), image.dtype)
    for (group, offset), channel, place in itertools.product(
        enumerate(offsets), range(len(image)), np.ndindex(*size)
    ):
        index = [s + p for s, p in zip(start, place, strict=True)]
        if context is not None:
            index[0] = min(max(index[0] + offset, 0), image.shape[1] - 1)
        if all(0 <= i < n for i, n in zip(index, image.shape[1:], strict=True)):
            result[group, channel][place] = image[(channel, *index)]
    result = result.reshape(-1, *size)
    return result if context is None else result[:, 0]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), dimension=st.sampled_from([2, 3]), context=st.none() | st.integers(0, 3))
def test_cutting_against_voxel_by_voxel(data: st.DataObject, dimension: int, context: int | None) -> None:
    dimension = 3 if context is not None else dimension
    shape = data.draw(st.tuples(*[st.integers(1, 6)] * dimension))
    size = data.draw(st.tuples(*[st.integers(1, 8)] * dimension))
    start = tuple(
        data.draw(st.integers(min(0, n - s), max(0, n - s))) for n, s in zip(shape, size, strict=True)
    )
    if context is not None:
        size, start = (1, *size[1:]), (data.draw(st.integers(0, shape[0] - 1)), *start[1:])
    image = np.random.default_rng(0).normal(size=(2, *shape))
    patch = cut_patch(torch.from_numpy(image), start, size, context)
    np.testing.assert_array_equal(patch.numpy(), slow_patch(image, start, size, context))


@given(
    axes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=3),
    overlap=st.floats(0, 0.9),
)
def test_windows_cover_everything_with_their_overlap(axes: list[tuple[int, int]], overlap: float) -> None:
    shape, size = zip(*axes, strict=True)
    windows = place_windows(shape, size, overlap)
    assert len(set(windows)) == len(windows)
    per_axis = [sorted(set(starts)) for starts in zip(*windows, strict=True)]
    assert sorted(itertools.product(*per_axis)) == sorted(windows)
    for starts, length, window in zip(per_axis, shape, size, strict=True):
        if length <= window:
            assert len(starts) == 1
            before, after = -starts[0], starts[0] + window - length
            assert 0 <= before <= after <= before + 1  # in the middle of the window
            continue
        assert (starts[0], starts[-1]) == (0, length - window)
        for first, second in itertools.pairwise(starts):
            assert first + window - second >= min(window * overlap, window - 1) - 1e-9


def identity(windows: Tensor) -> Tensor:
    return windows[:, windows.shape[1] // 2][:, None]


def onehot(windows: Tensor) -> Tensor:
    return F.one_hot(windows[:, windows.shape[1] // 2].long(), 3).movedim(-1, 1).float()


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    kind=st.sampled_from(["2d", "3d", "slices"]),
    overlap=st.sampled_from([0.0, 0.3, 0.5, 0.75]),
)
def test_windows_put_the_image_together_again(data: st.DataObject, kind: str, overlap: float) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 14)] * (2 if kind == "2d" else 3)))
    size = data.draw(st.tuples(*[st.integers(2, 9)] * (3 if kind == "3d" else 2)))
    context, batch_size = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 5))
    chosen = plan(size, 1, context if kind == "slices" else 0, volumes=kind == "slices")
    # With fractions, so that no window is of one value.
    classes = torch.from_numpy(np.random.default_rng(0).uniform(0, 3, (1, *shape))).float()
    result = slide(classes, identity, chosen, overlap, batch_size)
    torch.testing.assert_close(result, classes, atol=1e-5, rtol=0)
    three = slide(
        classes, onehot, chosen.model_copy(update={"classes": ("a", "b", "c")}), overlap, batch_size
    )
    assert torch.equal(three.argmax(0), classes[0].long())
    torch.testing.assert_close(three.sum(0), torch.ones(shape), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("shape", "size", "overlap"),
    [
        ((27, 28), (9, 7), 0.0),
        ((33, 25), (9, 9), 0.5),
        ((15, 9, 21), (5, 9, 7), 0.0),
        ((25, 11, 11), (9, 5, 5), 0.5),
    ],
)
def test_sliding_as_monai_does_where_the_windows_agree(shape: Any, size: Any, overlap: float) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d if len(shape) == 2 else torch.nn.Conv3d
    network = layer(1, 3, 3, padding="same")  # padding makes a voxel's value depend on the window
    image = torch.randn(1, *shape)
    with torch.no_grad():
        found = slide(image, network, plan(size, 3), overlap, batch_size=4)
        expected = sliding_window_inference(
            image[None], size, 4, network, overlap=overlap, mode="gaussian", sigma_scale=0.125
        )
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("regions", [(), ((1,), (2,), (1, 2))])
def test_windows_of_one_value_are_background_and_not_predicted(regions: Any) -> None:
    image = torch.full((1, 12, 40), -1.0)
    image[:, 4:8, 2:9] = torch.rand(4, 7)
    seen: list[Tensor] = []

    def predict(windows: Tensor) -> Tensor:
        seen.extend(windows)
        # Sure of the background where there is nothing, as a network would be that need not be asked.
        found = (windows > 0).float()
        return torch.cat([found if regions else 1 - found, found, 0 * found], 1)

    chosen = plan((8, 8), 3).model_copy(update={"regions": regions})
    result = slide(image, predict, chosen, 0.5, 4)
    assert 0 < len(seen) < len(place_windows((12, 40), (8, 8), 0.5))
    assert all(window.amin() != window.amax() for window in seen)
    found = (image[0] > 0).float()
    expected = torch.stack([found if regions else 1 - found, found, 0 * found])
    torch.testing.assert_close(result, expected)
    seen.clear()
    slide(torch.zeros(1, 12, 40), predict, chosen, 0.5, 4)
    assert len(seen) == len(place_windows((12, 40), (8, 8), 0.5))  # else nothing could be said of the image


@pytest.mark.parametrize("size", [(9, 7), (31, 15, 5), (3,), (8, 12)])
def test_window_weights_as_monai_has_them(size: tuple[int, ...]) -> None:
    weight = gaussian_weight(size)
    expected = compute_importance_map(size, "gaussian", 0.125)
    inner = expected > 1.001e-3  # where sizes are even, MONAI's lower limit is another
    torch.testing.assert_close(weight[inner], expected[inner])
    assert float(weight.min()) >= 0.999e-3 * float(weight.max())
    torch.testing.assert_close(weight, weight.flip(tuple(range(len(size)))))
    flat = gaussian_weight((1, *size))  # an axis of one voxel changes nothing
    torch.testing.assert_close(flat[0], weight)


def test_cases_above_the_memory_limit_give_the_same_batches(phantom: Dataset, phantom_plan: Plan) -> None:
    held = PreparedCases(phantom, phantom_plan, phantom.domains, memory_gb=1)
    size = held.cases[0].image.nbytes + held.cases[0].label.nbytes
    for limit in (0.0, 3 * size / 2**30):
        moved = PreparedCases(phantom, phantom_plan, phantom.domains, memory_gb=limit)
        assert held.folder is None
        assert moved.folder is not None
        if (maps := Path("/proc/self/maps")).exists():
            on_disk = {line.split()[5] for line in maps.read_text().splitlines() if str(moved.folder) in line}
            assert len(on_disk) == 2 * (len(phantom.cases) - (3 if limit else 0))  # image and label
            assert not list(moved.folder.iterdir())  # a killed process leaves no images behind
        train = TrainSettings(batch_size=4)
        samplers = [PatchSampler(c.cases, phantom_plan, train, AugmentSettings(), 1) for c in (held, moved)]
        assert all(same(samplers[0].batch(step), samplers[1].batch(step)) for step in range(3))
        assert moved.fingerprint() == held.fingerprint()
        folder = moved.folder
        del moved, samplers
        assert not folder.exists()


def test_the_fingerprint_sees_every_voxel_and_every_case(phantom: Dataset, phantom_plan: Plan) -> None:
    def fresh(dataset: Dataset) -> PreparedCases:
        return PreparedCases(dataset, phantom_plan, phantom.domains, memory_gb=1)

    few = phantom.with_cases(phantom.cases[:3])
    expected = fresh(few).fingerprint()
    assert fresh(few).fingerprint() == expected
    for attribute in ("image", "label"):
        changed = fresh(few)
        tensor = getattr(changed.cases[-1], attribute)
        tensor[(-1,) * tensor.ndim] += 1
        assert changed.fingerprint() != expected
    assert fresh(few.with_cases(reversed(few.cases))).fingerprint() != expected
    assert fresh(few.with_cases(few.cases[:2])).fingerprint() != expected


def test_preparing_finds_the_foreground_of_each_class(phantom: Dataset, phantom_plan: Plan) -> None:
    for case in phantom.cases:
        found = prepare(case, phantom, phantom_plan, 1)
        label = case.label().array[0]
        present = [index for index in range(1, len(phantom.classes)) if (label == index).any()]
        assert len(found.foreground) == len(present)
        for index, voxels in zip(present, found.foreground, strict=True):
            assert len(np.unique(voxels, axis=0)) == len(voxels) == min(4096, (label == index).sum())
            assert (label[tuple(voxels.T)] == index).all()
        assert (found.domain, found.image.dtype) == (1, torch.float16)
        torch.testing.assert_close(
            found.image.float(), phantom_plan.to_grid(case.image()), atol=4e-3, rtol=1e-3
        )


def test_raw_values_are_kept_in_full_precision(phantom: Dataset, phantom_plan: Plan) -> None:
    """Half precision ends at 65504, and raw 16-bit images do not."""
    raw = phantom_plan.model_copy(
        update={"normalisation": (Normalisation(kind="none"),) * phantom_plan.channels}
    )
    assert torch.equal(
        prepare(phantom.cases[0], phantom, raw, 0).image, raw.to_grid(phantom.cases[0].image())
    )


def test_a_case_that_cannot_be_prepared_is_named(
    phantom: Dataset, phantom_plan: Plan, tmp_path: Path
) -> None:
    good = phantom.cases[0]
    bad = Case("bad", "bad", "north", (tmp_path / "gone.png",), good.label_path)
    with pytest.raises(DataError, match=r"^bad: .*gone\.png: no such file.*anysite check"):
        prepare(bad, phantom, phantom_plan, 0)
    two = phantom_plan.model_copy(update={"channels": phantom_plan.channels + 1})
    with pytest.raises(DataError, match=rf"^{good.id}: .*channels as in training"):
        prepare(good, phantom, two, 0)
    from PIL import Image

    Image.fromarray(np.zeros((10, 10), np.uint8)).save(tmp_path / "small.png")
    other = Case("other", "other", "north", good.image_paths, tmp_path / "small.png")
    with pytest.raises(DataError, match=r"^other: a label of shape \(10, 10\); expected \(64, 64\)"):
        prepare(other, phantom, phantom_plan, 0)


@pytest.mark.parametrize(
    ("shape", "size", "overlap"), [((20, 13), (8, 8), 0.5), ((9, 21, 8), (5, 9, 6), 0.4)]
)
def test_windows_are_compared_with_what_those_before_them_made_of_the_same_voxels(
    shape: Any, size: Any, overlap: float
) -> None:
    numbers = iter(range(100))

    def count(windows: Tensor) -> Tensor:  # every window says its own number everywhere
        return torch.stack([torch.full((1, *size), float(next(numbers))) for _ in windows])

    told: list[tuple[Tensor, Tensor, Tensor]] = []
    image = torch.randn(1, *shape)
    slide(image, count, plan(size, 1), overlap, 3, lambda *shown: told.append(shown))
    weight = gaussian_weight(size)
    merged, total, expected = torch.zeros(shape), torch.zeros(shape), []
    for number, start in enumerate(place_windows(shape, size, overlap)):
        place = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
        shared = (total[place] >= 0.01 * weight.max()) & (weight >= 0.01 * weight.max())
        if shared.any():
            expected.append((merged[place][shared] / total[place][shared], number))
        merged[place] += number * weight
        total[place] += weight
    assert len(told) == len(expected) > 0
    for (before, now, shared), (merged_before, number) in zip(told, expected, strict=True):
        torch.testing.assert_close(before[0][shared], merged_before)
        assert (now == number).all()
        assert before.shape == now.shape


@pytest.mark.parametrize(
    "shape", [(100, 100), (192, 192), (1, 192, 192), (1, 512, 512), (64, 64, 64), (40, 129, 31), (1, 1, 9)]
)
def test_a_grid_is_thinned_evenly_to_few_enough_places(shape: Any) -> None:
    grid = thin_out(shape, 10_000)
    places = np.empty(shape)[grid]
    assert places.size <= 10_000
    (step,) = {part.step for part in grid}
    assert step == 1 or np.empty(shape)[(slice(None, None, step - 1),) * len(shape)].size > 10_000


def test_one_window_has_nothing_to_be_compared_with() -> None:
    slide(torch.randn(1, 7, 6), identity, plan((8, 8), 1), 0.5, 2, lambda *shown: pytest.fail("compared"))
