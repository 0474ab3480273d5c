"""Losses against slow twins, and what every objective promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anysite import registry
from anysite.config import load
from anysite.diagnostics import compare_gradients, effective_rank
from anysite.errors import ConfigError
from anysite.learner import Learner, build_learner, build_network
from anysite.networks import Network
from anysite.normalisation import Normalisation
from anysite.objectives import Objective, Step
from anysite.objectives.supervised import Supervised, region_maps
from anysite.plan import Plan

REGIONS = ((1, 2, 3), (2, 3), (3,))
DOMAINS = ("north", "east")


def plan(patch_size: tuple[int, ...] = (16, 16), regions: tuple[tuple[int, ...], ...] = ()) -> Plan:
    return Plan(
        dimension=3 if len(patch_size) == 3 else 2,
        image_dimension=3 if len(patch_size) == 3 else 2,
        spacing=(1.0,) * len(patch_size),
        unit="mm",
        channels=1,
        normalisation=(Normalisation(),),
        patch_size=patch_size,
        classes=("background", "whole", "core", "enhancing"),
        label_values=(0, 1, 2, 3),
        regions=regions,
        region_classes=(1, 2, 3)[: len(regions)],
    )


def supervised(regions: tuple[tuple[int, ...], ...] = (), **settings: Any) -> Supervised:
    objective = Supervised(**settings)
    objective.attach(
        build_network(load("baseline", ["network.width=2"]), plan()), plan(regions=regions), DOMAINS
    )
    return objective


def soft_dice(probability: np.ndarray, target: np.ndarray) -> float:
    """One map, all samples together, with MONAI's smoothing."""
    return float((2 * (probability * target).sum() + 1e-5) / (probability.sum() + target.sum() + 1e-5))


def softmax_twin(logits: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """(1 - Dice over the foreground classes, mean negative log-likelihood), sample by voxel."""
    exponential = np.exp(logits)
    probability = exponential / exponential.sum(1, keepdims=True)
    dice = [1 - soft_dice(probability[:, k], label == k) for k in range(1, logits.shape[1])]
    voxels = np.ndindex(*label.shape)
    entropy = [-np.log(probability[place[0], label[place], *place[1:]]) for place in voxels]
    return float(np.mean(dice)), float(np.mean(entropy))


def region_twin(
    logits: np.ndarray, label: np.ndarray, regions: tuple[tuple[int, ...], ...]
) -> tuple[float, float]:
    """The same for overlapping maps, each a question of its own answered by a sigmoid."""
    dice, entropy = [], []
    for k, region in enumerate(regions):
        probability = 1 / (1 + np.exp(-logits[:, k]))
        target = np.vectorize(lambda value, region=region: float(value in region))(label)
        dice.append(1 - soft_dice(probability, target))
        entropy.append(-(target * np.log(probability) + (1 - target) * np.log(1 - probability)).mean())
    return float(np.mean(dice)), float(np.mean(entropy))


def drawn(maps: int, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, maps, *shape, generator=generator)
    return logits, torch.randint(0, 4, (3, *shape), generator=generator)


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.0), (0.0, 2.0), (0.5, 1.5)])
@pytest.mark.parametrize("regions", [(), REGIONS, ((1, 3),)], ids=["classes", "regions", "one_region"])
def test_dice_and_cross_entropy_against_a_slow_twin(
    shape: tuple[int, ...], weights: tuple[float, float], regions: tuple[tuple[int, ...], ...]
) -> None:
    logits, label = drawn(len(regions) or 4, shape)
    objective = supervised(regions, dice_weight=weights[0], cross_entropy_weight=weights[1])
    arrays = logits.double().numpy(), label.numpy()
    dice, entropy = region_twin(*arrays, regions) if regions else softmax_twin(*arrays)
    assert float(objective.compare(logits, label)) == pytest.approx(
        weights[0] * dice + weights[1] * entropy, rel=1e-5
    )


def step_of(label: Tensor, known: Tensor | None = None) -> Step:
    network = build_network(load("baseline", ["network.width=2"]), plan())
    return Step(label[:, None].float(), label, torch.zeros(len(label)).long(), 0.5, network, known)


def test_coarser_scales_count_half_as_much_each_against_the_nearest_label() -> None:
    objective = supervised()
    fine, label = drawn(4, (8, 12))
    middle, coarse = drawn(4, (4, 6), seed=1)[0], drawn(4, (2, 3), seed=2)[0]
    # Of 2 x 2 (4 x 4) voxels the one behind the centre is the nearest.
    losses = [
        objective.compare(fine, label),
        objective.compare(middle, label[:, 1::2, 1::2]),
        objective.compare(coarse, label[:, 2::4, 2::4]),
    ]
    expected = (losses[0] + losses[1] / 2 + losses[2] / 4) / 1.75
    torch.testing.assert_close(objective.compare_scales([fine, middle, coarse], step_of(label)), expected)
    torch.testing.assert_close(objective.compare_scales([fine], step_of(label)), losses[0])


@pytest.mark.parametrize("regions", [(), REGIONS], ids=["classes", "regions"])
def test_a_perfect_answer_costs_nothing_and_its_opposite_much(regions: tuple[tuple[int, ...], ...]) -> None:
    _, label = drawn(4, (8, 8))
    maps = region_maps(label, regions or ((0,), (1,), (2,), (3,)))
    objective = supervised(regions)
    assert float(objective.compare(40 * (maps - 0.5), label)) == pytest.approx(0, abs=1e-5)
    assert float(objective.compare(-40 * (maps - 0.5), label)) > 10


def test_an_absent_class_and_half_precision_stay_finite() -> None:
    logits, _ = drawn(4, (8, 8))
    for regions in ((), REGIONS):
        chosen = logits[:, :3] if regions else logits
        loss = supervised(regions).compare(chosen, torch.zeros(3, 8, 8, dtype=torch.int32))
        assert torch.isfinite(loss)
        half = supervised(regions).compare(chosen.half() * 1000, torch.ones(3, 8, 8, dtype=torch.int64))
        assert torch.isfinite(half)
        assert half.dtype == torch.float32


def test_region_maps_hold_each_class_of_the_region() -> None:
    _, label = drawn(4, (6, 5))
    maps = region_maps(label, REGIONS)
    assert maps.shape == (3, 3, 6, 5)
    for place in np.ndindex(3, 6, 5):
        expected = [float(int(label[place]) in region) for region in REGIONS]
        assert maps[place[0], :, *place[1:]].tolist() == expected


class Counting(Objective):
    """Returns a constant and remembers what it was asked."""

    def __init__(self, value: float, *, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.value, self.steps, self.followed = value, [], []

    def forward(self, step: Step) -> Tensor:
        self.steps.append(step)
        return step.logits.sum() * 0 + self.value

    def after_step(self, network: Network) -> None:
        self.followed.append(network)


def test_the_total_is_the_weighted_sum_and_every_objective_sees_one_step() -> None:
    network = build_network(load("baseline", ["network.width=4", "network.depth=2"]), plan())
    first, second = Counting(3.0, weight=0.5), Counting(-1.0, weight=2.0)
    learner = Learner(network, {"first": first, "second": second})
    image, label = torch.randn(2, 1, 16, 16), torch.zeros(2, 16, 16, dtype=torch.long)
    domain = torch.tensor([0, 1])
    losses = learner(image, label, domain, 0.25)
    assert {name: float(loss.detach()) for name, loss in losses.items()} == {
        "first": 1.5,
        "second": -2,
        "total": -0.5,
    }
    (step,) = first.steps
    assert step is second.steps[0]  # encoded and decoded once
    assert (step.image is image, step.label is label, step.domain is domain, step.progress) == (
        True,
        True,
        True,
        0.25,
    )
    assert step.network is network
    torch.testing.assert_close(step.logits, network(image))
    assert [f.shape[1] for f in step.features] == list(network.widths)
    assert not first.followed
    learner.after_step()
    assert first.followed == second.followed == [network]


def test_gradients_are_compared_with_the_supervised_one_and_left_usable() -> None:
    network = build_network(load("baseline", ["network.width=4", "network.depth=2"]), plan())
    logits = network(torch.randn(2, 1, 16, 16))
    losses = {
        "supervised": logits.square().mean(),
        "other": -3 * logits.square().mean(),
        "none": 0 * logits.sum(),
    }
    ratios = {name: float(ratio) for name, ratio in compare_gradients(losses, network).items()}
    assert ratios == pytest.approx(
        {"supervised_gradient_ratio": 1, "other_gradient_ratio": 3, "none_gradient_ratio": 0}
    )
    losses["supervised"].backward()
    assert all(p.grad is not None for p in network.parameters())


def test_diagnostics_never_fail_where_training_would_tell_more() -> None:
    network = build_network(load("baseline", ["network.width=4", "network.depth=2"]), plan())
    own = torch.nn.Parameter(torch.ones(()))
    logits = network(torch.randn(2, 1, 16, 16)).mean()
    ratios = compare_gradients({"supervised": logits, "apart": own * 2}, network)
    assert float(ratios["apart_gradient_ratio"]) == 0
    assert compare_gradients({"supervised": own * 2, "other": logits}, network) == {}
    assert torch.isnan(effective_rank(torch.full((2, 3, 4, 4), float("nan"))))


def test_effective_rank_counts_the_directions_in_use() -> None:
    generator = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    for used in (1, 3, 8):
        signs = torch.tensor(
            np.array(np.meshgrid(*[[-1.0, 1.0]] * used)).reshape(used, -1)
        )  # uncorrelated, mean 0
        positions = (directions[:, :used] @ signs) + 5
        features = positions.reshape(8, -1, 2).movedim(1, 0)
        assert float(effective_rank(features)) == pytest.approx(used, rel=1e-6)
    assert float(effective_rank(torch.ones(2, 4, 3, 3))) == pytest.approx(1)
    one, two = torch.tensor([3.0, 1.0]) / 4
    uneven = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])[:, :, None]
    expected = torch.exp(-(one * one.log() + two * two.log()))
    assert float(effective_rank(uneven)) == pytest.approx(float(expected), rel=1e-6)


def test_an_objective_without_forward_says_so() -> None:
    network = build_network(load("baseline", ["network.width=2"]), plan())
    with pytest.raises(NotImplementedError):
        Learner(network, {"none": Objective()})(
            torch.zeros(1, 1, 16, 16), torch.zeros(1, 16, 16).long(), torch.zeros(1).long(), 0.0
        )


@pytest.mark.parametrize("patch_size", [(32, 32), (16, 16, 16)], ids=["2d", "3d"])
@pytest.mark.parametrize("regions", [(), REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("name", registry.OBJECTIVES)
def test_every_objective_keeps_the_contract(name: str, regions: Any, patch_size: tuple[int, ...]) -> None:
    """Finite scalars in float32 whose gradient reaches the network, or nothing but modules of their own."""
    torch.manual_seed(0)
    teaches = registry.find("objective", name).teaches_network
    beside = "" if teaches else "supervised = {weight = 0.0}, "
    config = load("baseline", [f"objectives={{{beside}{name} = {{weight = 0.5}}}}"])
    learner = build_learner(config, plan(patch_size, regions), DOMAINS)
    image, label = torch.randn(2, 1, *patch_size), torch.randint(0, 4, (2, *patch_size))
    for progress in (0.0, 0.5, 1.0):
        learner.zero_grad()
        losses = learner(image, label, torch.tensor([0, 1]), progress)
        terms = [losses[term] for term in losses if term != "total"]
        assert all(term in ("total", "supervised") or term.startswith(name) for term in losses)
        assert all(t.shape == () and t.dtype == torch.float32 and torch.isfinite(t) for t in terms)
        torch.testing.assert_close(losses["total"], torch.stack(terms).sum())
        losses["total"].backward()
        gradients = [p.grad for p in learner.network.parameters() if p.grad is not None]
        assert (sum(float(g.abs().sum()) for g in gradients) > 0) == teaches
        own = [p.grad for p in learner.objectives.parameters() if p.requires_grad and p.grad is not None]
        assert teaches or sum(float(g.abs().sum()) for g in own) > 0
        assert all(bool(torch.isfinite(g).all()) for g in [*gradients, *own])
    learner.after_step()
    reloaded = build_learner(config, plan(patch_size, regions), DOMAINS)
    reloaded.load_state_dict(learner.state_dict())  # what resuming needs


def test_objectives_of_which_none_teaches_the_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="only reflection.*teaches the network"):
        build_learner(load("baseline", ["objectives={reflection = {}}"]), plan(), DOMAINS)


def test_settings_reach_objectives_and_unknown_ones_are_refused() -> None:
    config = load("baseline", ["objectives.supervised.dice_weight=0.25", "objectives.supervised.weight=3"])
    objective = build_learner(config, plan(), DOMAINS).objectives["supervised"]
    assert isinstance(objective, Supervised)
    assert (objective.dice_weight, objective.cross_entropy_weight, objective.weight) == (0.25, 1.0, 3)
    with pytest.raises(ConfigError, match=r"no setting 'dice_wight'.*'dice_weight'"):
        build_learner(load("baseline", ["objectives.supervised.dice_wight=1"]), plan(), DOMAINS)
    with pytest.raises(ConfigError, match=r"no setting 'name'"):
        build_learner(load("baseline", ["objectives.supervised.name=a"]), plan(), DOMAINS)
    with pytest.raises(ConfigError, match="unknown objective 'unsupervised'.*'supervised'"):
        build_learner(load("baseline", ["objectives.unsupervised={}"]), plan(), DOMAINS)


def test_a_network_that_the_patch_does_not_fit_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"^network.depth: 9 levels"):
        build_network(load("baseline", ["network.depth=9"]), plan())
    network = build_network(
        load("baseline", ["network.width=2"]), plan().model_copy(update={"context_slices": 1})
    )
    assert network(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 16, 16)
    assert build_network(load(), plan(regions=REGIONS))(torch.zeros(1, 1, 16, 16)).shape[1] == 3
