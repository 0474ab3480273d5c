"""Learning from images alone, starting from what was learned, and learning from few labels."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anysite import registry, runs
from anysite.config import load
from anysite.data.case import Dataset
from anysite.errors import ConfigError, DataError, InterruptedTraining, RunError
from anysite.learner import build_network
from anysite.loop import Progress
from anysite.masking import draw_blocks
from anysite.networks import encoder_tensors
from anysite.objectives import Step
from anysite.objectives.tile_autoencoder import TileAutoencoder, choose_grid, cut_tiles, join_tiles
from anysite.planning import learn_plan
from anysite.predict import predict
from anysite.report import write_report
from anysite.roles import split_of
from anysite.segment import Segmenter
from anysite.settings import PlanSettings
from anysite.splits import split
from anysite.train import train
from anysite.transfer import transfer
from conftest import small_config

PRETRAINING = ("tile_autoencoder", "masked_autoencoder")
MASKING = {"masked_autoencoder": {"block_voxels": 8}}


def pretraining(*overrides: str, method: str = "tile_autoencoder") -> Any:
    config = small_config(*overrides)
    return config.model_copy(update={"objectives": {method: MASKING.get(method, {})}})


@given(
    grid=st.lists(st.integers(1, 3), min_size=2, max_size=3),
    tile=st.integers(1, 4),
    channels=st.integers(1, 2),
)
def test_joining_undoes_cutting(grid: list[int], tile: int, channels: int) -> None:
    shape = [count * (tile + axis) for axis, count in enumerate(grid)]
    image = torch.randn(2, channels, *shape)
    tiles = cut_tiles(image, grid)
    assert torch.equal(join_tiles(tiles, grid), image)
    assert len(tiles) == 2 * torch.tensor(grid).prod()
    first = image[(0, slice(None), *(slice(0, tile + axis) for axis in range(len(grid))))]
    assert torch.equal(tiles[0], first)


@pytest.mark.parametrize(
    ("patch_size", "stride", "wanted", "grid"),
    [
        ((256, 256), (16, 16), 4, (4, 4)),
        ((128, 128), (32, 32), 4, (2, 2)),
        ((192, 96), (32, 32), 4, (3, 1)),
        ((16, 128, 128), (4, 16, 16), 4, (2, 4, 4)),
        ((64, 64), (64, 64), 4, (1, 1)),
    ],
)
def test_tiles_suit_the_network(patch_size: Any, stride: Any, wanted: int, grid: Any) -> None:
    assert choose_grid(patch_size, stride, wanted) == grid


def test_tiles_that_the_network_cannot_take_are_enlarged(phantom: Dataset) -> None:
    plan = learn_plan(phantom, PlanSettings(patch_size=(64, 64)))
    config = load("baseline", ["network.name=swin_unetr", "network.width=12"])
    objective = TileAutoencoder()
    objective.attach(build_network(config, plan), plan, ("north",))
    assert objective.enlarge
    assert objective.grid == (2, 2)


@pytest.mark.parametrize("shape", [(32, 48), (30, 41), (8, 24, 24), (3, 20, 20)])
@pytest.mark.parametrize("ratio", [0.25, 0.6, 0.75])
def test_blocks_cover_the_stated_share(shape: tuple[int, ...], ratio: float) -> None:
    masks = draw_blocks(5, shape, 8, ratio, generator=torch.Generator().manual_seed(0))
    assert masks.shape == (5, *shape)
    cells = [-(-n // min(8, n)) for n in shape]
    total = int(torch.tensor(cells).prod())
    corners = masks[(slice(None), *(slice(None, None, min(8, n)) for n in shape))]
    assert corners.flatten(1).sum(1).tolist() == [round(ratio * total)] * 5
    assert not all(torch.equal(masks[0], mask) for mask in masks[1:])


def test_gradients_reach_the_encoder_from_tiles_and_from_the_whole(phantom: Dataset) -> None:
    plan = learn_plan(phantom, PlanSettings(patch_size=(32, 32)))
    network = build_network(small_config(), plan)
    objective = TileAutoencoder()
    objective.attach(network, plan, ("north",))
    image = torch.randn(2, 1, 32, 32)
    step = Step(image, torch.zeros(2, 32, 32).long(), torch.zeros(2).long(), 0.0, network)
    for loss in objective(step).values():
        network.zero_grad()
        loss.backward(retain_graph=True)
        first = next(network.encoder.parameters())  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        assert first.grad is not None
        assert float(first.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", registry.NETWORKS)
@pytest.mark.parametrize("dimension", [2, 3])
def test_the_encoder_is_what_encode_depends_on(name: str, dimension: int) -> None:
    if name == "ram_dsir_unet" and dimension == 3:
        pytest.skip("the paper's network has two spatial axes")
    patch_size = (64, 64) if dimension == 2 else (32, 32, 64)
    network = registry.build("network", name, 1, 3, patch_size)
    names = encoder_tensors(network)
    state = network.state_dict()
    assert names < state.keys()
    network.eval()
    image = torch.randn(1, 1, *patch_size)
    before = network.encode(image)
    with torch.no_grad():
        for other in state.keys() - names:
            if state[other].is_floating_point():
                state[other].add_(1)
    assert all(torch.equal(a, b) for a, b in zip(before, network.encode(image), strict=True))


@pytest.mark.parametrize("method", PRETRAINING)
@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("network", ["unet", "unetr", "mednext"])
def test_pretraining_trains_every_kind_of_network(method: str, dimension: int, network: str) -> None:
    from anysite.learner import build_learner
    from anysite.normalisation import Normalisation
    from anysite.plan import Plan

    patch_size = (64, 64) if dimension == 2 else (32, 32, 32)
    plan = Plan(
        dimension=3 if dimension == 3 else 2, image_dimension=3 if dimension == 3 else 2, spacing=(1.0,) * dimension,
        unit="mm", channels=1, normalisation=(Normalisation(),), patch_size=patch_size,
        classes=("background", "foreground"), label_values=(0, 1),
    )  # fmt: skip
    config = load("baseline", [f"network.name={network}"])
    config = config.model_copy(update={"objectives": {method: {}}})
    learner = build_learner(config, plan, ("north",))
    image, label = torch.randn(2, 1, *patch_size), torch.zeros(2, *patch_size).long()
    learner(image, label, torch.zeros(2).long(), 0.0)["total"].backward()
    encoder = encoder_tensors(learner.network)
    without = [n for n, p in learner.network.named_parameters() if n in encoder and p.grad is None]
    # Some networks have layers on their skips alone, which a decoder from the bottleneck does not need.
    assert len(without) < len(encoder) / 2


@pytest.mark.parametrize("method", PRETRAINING)
def test_labels_play_no_part(method: str, phantom: Dataset, tmp_path: Path) -> None:
    bare = phantom.with_cases(replace(case, label_path=None) for case in phantom.cases)
    with_labels = train(phantom, pretraining(method=method), tmp_path / "a")
    without = train(bare, pretraining(method=method), tmp_path / "b")
    assert (tmp_path / "a" / runs.WEIGHTS).read_bytes() == (tmp_path / "b" / runs.WEIGHTS).read_bytes()
    assert with_labels.manifest["kind"] == without.manifest["kind"] == "pretraining"
    assert with_labels.plan == without.plan


@pytest.mark.parametrize(("method", "columns"), [
    ("tile_autoencoder", ["image", "tiles drawn", "blanked", "whole drawn"]),
    ("masked_autoencoder", ["image", "blanked", "drawn"]),
])  # fmt: skip
def test_what_was_drawn_is_there_to_look_at(
    method: str, columns: list[str], phantom: Dataset, tmp_path: Path
) -> None:
    run = train(phantom, pretraining("train.batch_size=3", method=method), tmp_path / "run")
    with Image.open(run.path / f"preview_{method}.png") as picture:
        assert picture.size == (32 * len(columns), 32 * 3)
        assert picture.info["columns"].split(", ") == columns
        assert len(set(picture.tobytes())) > 20
    page = write_report([run.path], tmp_path / "report.html").read_text()
    assert "Pretraining" in page
    assert all(f"<span>{column}</span>" in page for column in columns)
    assert "effective rank" not in page  # measured once, which is no curve
    assert "learning rate" in page


def test_pretraining_resumes_bit_identically(phantom: Dataset, tmp_path: Path) -> None:
    whole = train(phantom, pretraining(), tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedTraining):
        train(phantom, pretraining(), tmp_path / "parts", on_progress=stop)
    resumed = train(phantom, pretraining(), tmp_path / "parts", resume=True)
    assert (whole.path / runs.WEIGHTS).read_bytes() == (resumed.path / runs.WEIGHTS).read_bytes()


def test_a_pretraining_segments_nothing(phantom: Dataset, tmp_path: Path) -> None:
    run = train(phantom, pretraining("train.steps=1"), tmp_path / "run")
    with pytest.raises(RunError, match="segments nothing"):
        Segmenter([run])


def test_training_starts_from_the_pretrained_encoder(phantom: Dataset, tmp_path: Path) -> None:
    run = train(phantom, pretraining(), tmp_path / "first")
    config = small_config(f"pretrained={run.path}", "train.steps=1", "train.learning_rate=1e-12")
    second = train(phantom, config, tmp_path / "second")
    told = second.manifest["started_from"]
    pretrained, _ = runs.load_tensors(run.path / runs.WEIGHTS)
    started, _ = runs.load_tensors(second.path / runs.WEIGHTS)
    encoder = set(run.manifest["encoder"])
    assert set(told["taken"]) == encoder
    assert set(told["skipped"]) == started.keys() - encoder
    assert set(told["skipped"].values()) == {"not pretrained"}
    assert told["encoder_share"] == 1
    for name in encoder:
        torch.testing.assert_close(started[name], pretrained[name], atol=1e-6, rtol=1e-5)
    scratch, _ = runs.load_tensors(
        train(phantom, small_config("train.steps=1"), tmp_path / "s").path / runs.WEIGHTS
    )
    assert any(not torch.allclose(scratch[name], started[name], atol=1e-3) for name in encoder)


def test_a_training_hands_on_all_that_fits(phantom: Dataset, tmp_path: Path) -> None:
    run = train(phantom, small_config("train.steps=1"), tmp_path / "run")
    more = run.plan.model_copy(
        update={"classes": (*run.plan.classes, "new"), "label_values": (0, 1, 2, 3, 4, 5)}
    )
    result = transfer(run, build_network(small_config(), more))
    assert set(result.skipped) == {"head.weight", "head.bias"}
    assert set(result.skipped.values()) == {"of another shape"}


def test_weights_for_images_normalised_otherwise_come_with_a_warning(
    phantom: Dataset, tmp_path: Path
) -> None:
    run = train(phantom, pretraining("train.steps=1"), tmp_path / "run")
    for kind, told in (("local", True), ("case", False)):
        notes: list[str] = []
        config = small_config(f"pretrained={run.path}", "train.steps=1", f"plan.normalisation={kind}")
        train(
            phantom, config, tmp_path / kind, on_progress=lambda progress, to=notes: to.append(progress.note)
        )
        said = [note for note in notes if "normalised by case, these are by local" in note]
        assert bool(said) == told


def test_other_channels_take_the_mean_filter(phantom: Dataset, tmp_path: Path) -> None:
    run = train(phantom, pretraining("train.steps=1"), tmp_path / "run")
    colour = build_network(small_config(), run.plan.model_copy(update={"channels": 3}))
    result = transfer(run, colour)
    (name,) = result.reshaped
    weights, _ = runs.load_tensors(run.path / runs.WEIGHTS)
    assert colour.state_dict()[name].shape[1] == 3
    # A grey image repeated over the channels gives the same features.
    torch.testing.assert_close(colour.state_dict()[name].sum(1), weights[name].sum(1))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["network.width=8"], r"^pretrained=.*fit \d+ % of the encoder; expected at least 50 %"),
        (["network.name=segresnet"], r"^pretrained=.*fit 0 %"),
        (["pretrain.objectives={masked_autoencoder={}}"], "both pretrained and pretrain.objectives"),
    ],
)
def test_a_start_that_would_be_none_is_refused(
    overrides: list[str], text: str, phantom: Dataset, tmp_path: Path
) -> None:
    run = train(phantom, pretraining("train.steps=1"), tmp_path / "run")
    config = load(
        "baseline", ["plan.patch_size=[32, 32]", "train.steps=1", f"pretrained={run.path}", *overrides]
    )
    with pytest.raises(ConfigError, match=text):
        train(phantom, config, tmp_path / "other")
    assert not (tmp_path / "other" / runs.MANIFEST).exists()


def test_weights_that_saw_what_is_tested_are_refused(phantom: Dataset, tmp_path: Path) -> None:
    run = train(phantom, pretraining("train.steps=1"), tmp_path / "all_sites")
    for overrides in (['test_domains=["west"]'], ["seed=3"]):
        config = small_config(f"pretrained={run.path}", *overrides)
        with pytest.raises(ConfigError, match="cases that this training holds out or tests"):
            train(phantom, config, tmp_path / "other")
    assert not (tmp_path / "other" / runs.MANIFEST).exists()


def test_what_earlier_runs_saw_is_remembered_and_ids_of_other_datasets_are_told_of(
    phantom: Dataset, tmp_path: Path
) -> None:
    one_step = "train.steps=1"
    first = train(phantom, pretraining(one_step, 'test_domains=["east"]'), tmp_path / "first")
    north = phantom.with_cases(case for case in phantom.cases if case.domain == "north")
    second = train(north, small_config(one_step, f"pretrained={first.path}"), tmp_path / "second")
    chained = small_config(one_step, 'test_domains=["west"]', f"pretrained={second.path}")
    with pytest.raises(ConfigError, match="cases that this training holds out or tests"):
        train(phantom, chained, tmp_path / "third")
    notes: list[str] = []
    renamed = replace(phantom, name="the same under another name")
    other = small_config(one_step, 'test_domains=["west"]', f"pretrained={first.path}")
    train(renamed, other, tmp_path / "renamed", on_progress=lambda progress: notes.append(progress.note))
    assert any("learned from another dataset in which" in note for note in notes)


def test_both_stages_in_one_training(phantom: Dataset, tmp_path: Path) -> None:
    """The pretraining sees the images of the training sites, of patients that are not held out, and no others."""
    config = small_config(
        "pretrain.objectives={tile_autoencoder={}}", "pretrain.steps=3", 'test_domains=["west"]',
        "train.labelled_patients=2",
    )  # fmt: skip
    run = train(phantom, config, tmp_path / "run")
    first = runs.open_run(tmp_path / "run" / "pretraining")
    assert first.manifest["kind"] == "pretraining"
    assert first.manifest["steps"] == 3
    assert first.plan == run.plan
    seen, case_of = set(first.splits["training"]), {case.id: case for case in phantom.cases}
    held_out = {case_of[name].patient for name in run.splits["held_out"]}
    assert not seen & {*run.splits["held_out"], *run.splits["test"]}
    assert not {case_of[name].patient for name in seen} & held_out
    assert set(run.splits["training"]) < seen
    assert len({case_of[name].patient for name in run.splits["training"]}) == 2
    assert run.manifest["started_from"]["encoder_share"] == 1


def test_the_preset_does_both_stages(phantom: Dataset, tmp_path: Path) -> None:
    overrides = [
        "plan.patch_size=[32, 32]",
        "train.steps=2",
        "pretrain.steps=2",
        "network.width=4",
        "train.threads=1",
    ]
    run = train(phantom, load("t_ae", overrides), tmp_path / "run")
    assert run.manifest["started_from"]["encoder_share"] == 1
    assert "auxiliary_reconstruction" in (run.path / runs.LOG).read_text()


def test_sites_whose_images_were_pretrained_on_are_not_unseen(phantom: Dataset, tmp_path: Path) -> None:
    without = [replace(c, label_path=None) if c.domain == "west" else c for c in phantom.cases]
    config = small_config("pretrain.objectives={tile_autoencoder={}}", "pretrain.steps=1", "train.steps=1")
    run = train(phantom.with_cases(without), config, tmp_path / "run")
    assert "west" in run.manifest["train_domains"]
    assert {split_of(case, [run]) for case in phantom.cases if case.domain == "west"} == {"training"}


@pytest.mark.parametrize("stopped_at", [2, 5], ids=["pretraining", "training"])
def test_two_stages_resume_bit_identically(stopped_at: int, phantom: Dataset, tmp_path: Path) -> None:
    config = small_config("pretrain.objectives={tile_autoencoder={}}", "pretrain.steps=3")
    whole = train(phantom, config, tmp_path / "whole")
    taken = 0

    def stop(progress: Progress) -> None:
        nonlocal taken
        taken += 1
        if taken == stopped_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedTraining):
        train(phantom, config, tmp_path / "parts", on_progress=stop)
    assert (tmp_path / "parts" / runs.CHECKPOINT).is_file() == (stopped_at == 5)
    resumed = train(phantom, config, tmp_path / "parts", resume=True)
    for folder in (".", "pretraining"):
        weights = [(run.path / folder / runs.WEIGHTS).read_bytes() for run in (whole, resumed)]
        assert weights[0] == weights[1]


def test_a_pretraining_that_needs_labels_is_refused(phantom: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'supervised', which needs labels"):
        train(phantom, small_config("pretrain.objectives={supervised={}}"), tmp_path / "run")


def test_auxiliary_reconstruction_is_gone_in_inference(phantom: Dataset, tmp_path: Path) -> None:
    """A reconstruction that pulls at nothing leaves prediction as it is, to the bit."""
    plain = train(phantom, small_config(), tmp_path / "plain")
    beside = train(
        phantom, small_config("objectives.auxiliary_reconstruction.weight=0.0"), tmp_path / "beside"
    )
    weights, _ = runs.load_tensors(beside.path / runs.WEIGHTS)
    assert weights.keys() == runs.load_tensors(plain.path / runs.WEIGHTS)[0].keys()
    cases = phantom.cases[:2]
    for run, folder in ((plain, "p"), (beside, "b")):
        assert {o.status for o in predict([run], cases, tmp_path / folder, dataset=phantom)} == {"done"}
    for case in cases:
        name = f"{case.id}.png"
        assert (tmp_path / "p" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_auxiliary_reconstruction_and_rank_are_logged(phantom: Dataset, tmp_path: Path) -> None:
    run = train(phantom, small_config("objectives.auxiliary_reconstruction={}"), tmp_path / "run")
    first = json.loads((run.path / runs.LOG).read_text().splitlines()[0])
    assert first["auxiliary_reconstruction"] > 0
    assert first["auxiliary_reconstruction_gradient_ratio"] > 0
    assert 1 <= first["effective_rank"] <= 16


def test_the_encoder_may_learn_more_slowly_at_first(phantom: Dataset, tmp_path: Path) -> None:
    slow = ["train.encoder_rate_factor=1e-9", "train.warmup_steps=0", "train.weight_decay=0"]
    frozen = train(phantom, small_config(*slow), tmp_path / "frozen")
    freed = train(phantom, small_config(*slow, "train.encoder_rate_steps=3"), tmp_path / "freed")
    torch.manual_seed(0)
    start = build_network(small_config(), frozen.plan).state_dict()
    encoder = set(frozen.manifest["encoder"])

    def moved(run: runs.Run) -> dict[str, bool]:
        weights, _ = runs.load_tensors(run.path / runs.WEIGHTS)
        return {name: not torch.allclose(weights[name], start[name], atol=1e-6) for name in weights}

    assert not any(moved(frozen)[name] for name in encoder)
    assert any(moved(frozen)[name] for name in start.keys() - encoder)
    assert any(moved(freed)[name] for name in encoder)


def test_fewer_labels_are_a_subset_of_more_and_sites_take_turns(phantom: Dataset) -> None:
    drawn = []
    for count in (1, 2, 3, 4):
        splits = split(phantom, small_config(f"train.labelled_patients={count}"))
        patients = {case.patient for case in splits.training.cases}
        assert len(patients) == count
        drawn.append(patients)
        assert splits.held_out.cases == split(phantom, small_config()).held_out.cases
        assert len(splits.images.cases) == len(split(phantom, small_config()).training.cases)
    assert all(few < more for few, more in zip(drawn, drawn[1:], strict=False))
    three = split(phantom, small_config("train.labelled_patients=3")).training
    assert set(three.domains) == {"north", "east", "west"}
    others = [
        split(phantom, small_config("train.labelled_patients=2", f"seed={s}")).training.cases
        for s in range(4)
    ]
    assert len(set(others)) > 1


def test_more_labelled_patients_than_there_are_is_an_error(phantom: Dataset) -> None:
    with pytest.raises(DataError, match=r"labelled patients.*expected at least train.labelled_patients=99"):
        split(phantom, small_config("train.labelled_patients=99"))
