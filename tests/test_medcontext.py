"""MedContext against closed forms, slow twins and what its masks must hide."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anysite.config import load
from anysite.data.case import Dataset
from anysite.errors import ConfigError
from anysite.learner import Learner, build_learner
from anysite.loop import Progress
from anysite.masking import draw_blocks
from anysite.normalisation import Normalisation
from anysite.objectives.medcontext import (
    MedContext,
    Teacher,
    diverge,
    momentum_at,
    released_momentum,
    replace_tokens,
)
from anysite.plan import Plan
from anysite.train import train
from conftest import small_config

DOMAINS = ("north", "east")
# Networks of both kinds, small; UNETR and Swin UNETR have tokens.
SMALL = {
    "unet": 'network={name="unet", width=4, residual=true}',
    "deep": 'network={name="unet", width=4, deep_supervision=true}',
    "dynunet": 'network={name="dynunet", width=4}',
    "segresnet": 'network={name="segresnet", width=8}',
    "mednext": 'network={name="mednext", width=4}',
    "unetr": 'network={name="unetr", width=4, hidden_size=24, mlp_size=24, heads=2}',
    "swin_unetr": 'network={name="swin_unetr", width=12, window_size=2}',
}


def plan(patch_size: tuple[int, ...], regions: Any = ()) -> Plan:
    dimension = len(patch_size)
    return Plan(
        dimension=2 if dimension == 2 else 3,
        image_dimension=2 if dimension == 2 else 3,
        spacing=(1.0,) * dimension,
        unit="mm",
        channels=1,
        normalisation=(Normalisation(),),
        patch_size=patch_size,
        classes=("background", "disc", "cup"),
        label_values=(0, 1, 2),
        regions=regions,
        region_classes=(1, 2)[: len(regions)],
    )


def learner(settings: str = "", network: str = "unet", patch_size: tuple[int, ...] = (32, 32)) -> Learner:
    torch.manual_seed(0)
    config = load(
        "baseline", [SMALL[network], f"objectives={{supervised = {{}}, medcontext = {{{settings}}}}}"]
    )
    return build_learner(config, plan(patch_size), DOMAINS)


def medcontext(built: Learner) -> MedContext:
    objective = built.objectives["medcontext"]
    assert isinstance(objective, MedContext)
    return objective


def batch(patch_size: tuple[int, ...] = (32, 32), count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn((count, 1, *patch_size), generator=generator)
    label = torch.randint(0, 3, (count, *patch_size), generator=generator)
    return image, label, torch.zeros(count).long()


@pytest.mark.parametrize(
    ("grid", "ratio", "per_frame", "share"),
    [
        ((6, 6, 6), 0.6, 21, 0.583),
        ((32, 32, 32), 0.4, 409, 0.399),
        ((14, 40, 40), 0.4, 640, 0.4),
        ((32, 32, 32), 0.6, 614, 0.6),
    ],
)
def test_tubes_hold_the_published_counts_and_run_through_the_first_axis(
    grid: tuple[int, ...], ratio: float, per_frame: int, share: float
) -> None:
    masks = draw_blocks(3, grid, 1, ratio, tube=True)
    assert masks.flatten(2).sum(2).unique().tolist() == [per_frame]
    assert (masks == masks[:, :1]).all()
    assert float(masks.float().mean()) == pytest.approx(share, abs=1e-3)
    assert not torch.equal(masks[0], masks[1])
    alike = draw_blocks(3, grid, 1, ratio, tube=True, alike=True)
    assert (alike == alike[:1]).all()


def test_the_moving_average_has_its_closed_form_and_copies_buffers() -> None:
    network = learner("", "unet").network
    network.register_buffer("statistics", torch.zeros(3))
    teacher = Teacher(network)
    image = torch.randn(1, 1, 32, 32)
    teacher.segment(image, network)
    began = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
        network.get_buffer("statistics").fill_(7)
    for _ in range(5):
        teacher.follow(network, 0.9)
    for mine, first, theirs in zip(teacher.parameters(), began, network.parameters(), strict=True):
        torch.testing.assert_close(mine, 0.9**5 * first + (1 - 0.9**5) * theirs)
    assert teacher.network.get_buffer("statistics").tolist() == [7, 7, 7]
    assert int(teacher.updates) == 5


def test_the_teacher_begins_as_the_network_then_stands_still_without_gradient() -> None:
    built = learner("ramp=0")
    with torch.no_grad():  # as a pretraining taken over after the objectives were attached
        for p in built.network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    built.train()
    built(*batch(), 0.5)["total"].backward()
    teacher = medcontext(built).teacher
    assert not teacher.training
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    for mine, theirs in zip(teacher.network.parameters(), built.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_momentum_follows_half_a_cosine_and_is_never_longer_than_the_past() -> None:
    assert momentum_at(0.0, 10**6, 0.99, 0.999) == pytest.approx(0.99)
    assert momentum_at(0.5, 10**6, 0.99, 0.999) == pytest.approx(0.9945)
    assert momentum_at(1.0, 10**6, 0.99, 0.999) == pytest.approx(0.999)
    assert [momentum_at(0.0, n, 0.99, 1.0) for n in (0, 1, 3)] == [0, 0.5, 0.75]


def test_the_released_schedule_never_reaches_the_momentum_it_plans() -> None:
    """UNETR: 18 steps an epoch of a warm-up of 900; nnFormer: 250 of 5,000."""
    assert released_momentum(17, warmup=900, epoch=18) == pytest.approx(0.018834, abs=1e-6)
    assert released_momentum(249) == pytest.approx(0.049611, abs=1e-6)
    assert released_momentum(250) == 0


def test_without_consistency_it_is_supervision_of_two_passes() -> None:
    built = learner("consistency_weight=0")
    image, label, domain = batch()
    torch.manual_seed(3)
    losses = built(image, label, domain, 0.5)
    assert set(losses) == {"supervised", "medcontext_masked", "total"}
    assert not hasattr(medcontext(built), "teacher")
    torch.manual_seed(3)
    masked = draw_blocks(2, (32, 32), 8, 0.4)
    objective = medcontext(built)
    expected = objective.supervised.compare(
        built.network(image.masked_fill(masked[:, None], 0.0)), label
    ) + objective.supervised.compare(built.network(image), label)
    torch.testing.assert_close(losses["total"], expected)


@pytest.mark.parametrize("method", ["medcontext", "ram_dsir"])
def test_further_passes_are_supervised_by_the_settings_of_the_first(method: str) -> None:
    more = "objectives.supervised={cross_entropy_weight = 0.25, weight = 3.0, unknown = 'left_out'}"
    config = load("baseline", [SMALL["unet"], f"objectives.{method}={{}}", more])
    built = build_learner(config, plan((32, 32)), DOMAINS)
    objective: Any = built.objectives[method]
    assert objective.supervised.cross_entropy_weight == 0.25
    assert objective.supervised.unknown == "left_out"
    assert objective.supervised.weight == 1, "the weight is that of the whole objective"


def test_looking_at_the_bottleneck_moves_no_running_statistics() -> None:
    config = load("baseline", [SMALL["unet"], "network.norm=batch", "objectives={medcontext = {}}"])
    built = build_learner(config, plan((32, 32)), DOMAINS).train()
    states = []
    for compare in (False, True):
        again = copy.deepcopy(built)
        torch.manual_seed(0)
        found = again(*batch(), 0.5, compare=compare)
        assert ("effective_rank" in found) == compare
        assert again.network.training
        states.append(again.network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("network", SMALL)
@pytest.mark.parametrize("patch_size", [(64, 64), (32, 32, 64)], ids=["2d", "3d"])
def test_every_network_learns_from_it_unchanged(network: str, patch_size: tuple[int, ...]) -> None:
    built = learner("ramp=0", network, patch_size)
    built.train()
    losses = built(*batch(patch_size), 0.5)
    losses["total"].backward()
    assert losses["medcontext_masked"].item() > 0
    assert losses["medcontext_consistency"].item() > 0
    built.after_step()


@pytest.mark.parametrize("patch_size", [(64, 64), (32, 32, 64)], ids=["2d", "3d"])
@pytest.mark.parametrize("network", SMALL)
def test_nothing_of_a_blanked_voxel_reaches_the_masked_pass(
    network: str, patch_size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is handed zeros where the mask is, everything else as it is, and nothing besides."""
    built = learner("consistency_weight=0", network, patch_size).eval()
    objective, image = medcontext(built), batch(patch_size)[0]
    seen: list[Tensor] = []
    encode = built.network.encode
    monkeypatch.setattr(built.network, "encode", lambda given: seen.append(given) or encode(given))
    with torch.no_grad():
        masked, (logits, *_) = objective._segment_masked(step(built, image), torch.arange(len(image)))
    (given,) = seen
    assert 0.25 < masked.float().mean() < 0.6
    assert (given[masked[:, None].expand_as(given)] == 0).all()
    kept = ~masked[:, None].expand_as(given)
    assert torch.equal(given[kept], image[kept])
    with torch.no_grad():
        torch.testing.assert_close(logits, built.network(given))


def test_a_share_of_the_samples_is_masked_and_the_rest_segmented_whole_in_the_same_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load("baseline", [SMALL["unet"], "objectives={medcontext = {ramp = 0, share = 0.5}}"])
    built = build_learner(config, plan((32, 32)), DOMAINS)
    objective, image = medcontext(built), torch.randn(5, 1, 32, 32)
    seen: dict[str, list[Tensor]] = {"network": [], "teacher": []}
    for name, network in (("network", built.network), ("teacher", objective.teacher.network)):
        encode = network.encode
        monkeypatch.setattr(
            network, "encode", lambda given, n=name, e=encode: seen[n].append(given.clone()) or e(given)
        )
    label = torch.randint(0, 3, (5, 32, 32))
    losses = built(image, label, torch.zeros(5).long(), 0.5)
    assert set(losses) == {"medcontext_masked", "medcontext_consistency", "total"}
    (given,), (whole,) = seen["network"], seen["teacher"]
    masked = (given != image).flatten(1).any(1)
    assert masked.sum() == 2
    assert torch.equal(whole, image[masked])
    assert ((given == image) | (given == 0)).all()
    expected = objective.supervised.compare(built.network(given), label)
    torch.testing.assert_close(losses["medcontext_masked"], expected)
    chosen = {tuple(objective._choose_samples(5).tolist()) for _ in range(50)}
    assert len(chosen) > 5
    assert {index for rows in chosen for index in rows} == set(range(5))


def test_the_teacher_moves_after_every_step_by_the_planned_momentum() -> None:
    built = learner("momentum=[0.5, 0.5], ramp=0")
    teacher = medcontext(built).teacher
    expected = [p.clone() for p in built.network.parameters()]
    for updates in range(3):
        built(*batch(), 0.3)
        with torch.no_grad():
            for p in built.network.parameters():
                p.add_(torch.randn_like(p))
        built.after_step()
        momentum = min(0.5, 1 - 1 / (updates + 1))
        pairs = zip(expected, built.network.parameters(), strict=True)
        expected = [momentum * e + (1 - momentum) * p.detach() for e, p in pairs]
    for mine, other in zip(teacher.network.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, other)
    assert "objectives.medcontext.teacher.updates" in built.state_dict()
    assert "objectives.medcontext.teacher.begun" in built.state_dict()


def test_a_sharpened_teacher_asks_for_more() -> None:
    losses = {}
    for temperature in (0.1, 1.0):
        built = learner(f"temperature={temperature}, ramp=0", "unet")
        torch.manual_seed(5)
        losses[temperature] = built(*batch(), 0.5)["medcontext_consistency"].item()
    assert losses[0.1] > losses[1.0]


def test_overlapping_regions_are_compared_each_by_itself() -> None:
    config = load("baseline", [SMALL["unet"], "objectives={medcontext = {ramp = 0, consistency_weight = 1}}"])
    torch.manual_seed(0)
    built = build_learner(config, plan((32, 32), regions=((1, 2), (2,))), DOMAINS).eval()
    image, label, domain = batch()
    torch.manual_seed(7)
    found = built(image, label, domain, 0.5)["medcontext_consistency"]
    torch.manual_seed(7)
    masked = draw_blocks(2, (32, 32), 8, 0.4)
    one, other = (
        built.network(image.masked_fill(masked[:, None], 0.0)).sigmoid(),
        built.network(image).sigmoid(),
    )
    torch.testing.assert_close(found, ((one - other) ** 2).sum(1)[masked].mean())


@pytest.mark.parametrize(("network", "side"), [("unet", 6), ("swin_unetr", 6), ("unetr", 16)])
def test_blocks_are_whole_tokens(network: str, side: int) -> None:
    """At least four along the longest axis of 32 x 32 x 64, and those of the U-Net of any size."""
    assert medcontext(learner("block_voxels=24", network, (32, 32, 64))).block == (16, 16, 16)
    assert medcontext(learner("block_voxels=6", network, (32, 32, 64))).block == (side,) * 3


def test_a_stopped_training_resumes_to_the_same_bit(phantom: Dataset, tmp_path: Path) -> None:
    settings = small_config("objectives.medcontext={}", "train.checkpoint_every=3", 'test_domains=["west"]')
    whole = train(phantom, settings, tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.step == 4:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(phantom, settings, tmp_path / "halves", on_progress=stop)
    halves = train(phantom, settings, tmp_path / "halves", resume=True)
    one, other = (run.network().state_dict() for run in (whole, halves))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_something_is_masked_however_small_the_share() -> None:
    assert draw_blocks(2, (16, 32), 16, 0.2).flatten(1).any(1).all()
    assert draw_blocks(2, (16, 16, 32), 16, 0.4, tube=True).flatten(1).any(1).all()
    assert not draw_blocks(2, (16, 32), 16, 0.99).flatten(1).all(1).any()
    assert not draw_blocks(1, (16, 32), 8, 0.0).any()


def step(built: Learner, image: Tensor) -> Any:
    from anysite.objectives import Step

    label = torch.zeros(image.shape[0], *image.shape[2:]).long()
    return Step(image, label, torch.zeros(len(image)).long(), 0.5, built.network)


@pytest.mark.parametrize("network", ["unetr", "swin_unetr"])
@pytest.mark.parametrize("patch_size", [(64, 64), (32, 32, 64)], ids=["2d", "3d"])
def test_masked_tokens_are_replaced_once_and_learn(network: str, patch_size: tuple[int, ...]) -> None:
    built = learner('place="tokens", ratio=0.5', network, patch_size)
    built(*batch(patch_size), 0.5)["total"].backward()
    objective = medcontext(built)
    assert objective.mask_token.grad is not None
    assert float(objective.mask_token.grad.abs().sum()) > 0
    embedding = built.network.embedding
    assert embedding is not None
    assert not embedding._forward_hooks
    masked = objective._draw_mask(step(built, batch(patch_size)[0]), torch.arange(2))
    side = built.network.token_voxels[0]
    assert masked.shape == (2, *patch_size)
    pooled = masked.float().unfold(1, side, side).mean(-1)
    assert set(pooled.unique().tolist()) <= {0.0, 1.0}  # a token is masked as a whole


def test_tokens_of_either_shape_are_replaced_where_masked() -> None:
    masked = torch.tensor([[[True, False], [False, True]]])
    token = torch.tensor([1.0, 2.0, 3.0])
    sequence = replace_tokens(torch.zeros(1, 4, 3), masked, token)
    assert sequence[0].tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 0], [1, 2, 3]]
    as_map = replace_tokens(torch.zeros(1, 3, 2, 2), masked, token)
    torch.testing.assert_close(as_map.flatten(2).transpose(1, 2), sequence)


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("kind", ["mse", "mse_logits", "kl"])
def test_divergences_against_a_slow_twin(kind: str, overlapping: bool) -> None:
    logits, target = torch.randn(2, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    each = diverge(logits, target, kind, overlapping)
    for y, x in ((0, 0), (1, 1)):
        one, other = logits[0, :, y, x].tolist(), target[0, :, y, x].tolist()
        if kind == "mse_logits":
            expected = sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
        else:
            if overlapping:
                p, q = ([1 / (1 + math.exp(-v)) for v in values] for values in (one, other))
            else:
                p, q = ([math.exp(v) / sum(map(math.exp, values)) for v in values] for values in (one, other))
            if kind == "mse":
                expected = sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
            else:
                expected = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
                if overlapping:
                    expected += sum((1 - b) * math.log((1 - b) / (1 - a)) for a, b in zip(p, q, strict=True))
        assert float(each[0, y, x]) == pytest.approx(expected)


def test_consistency_counts_the_masked_voxels_or_all_and_rises() -> None:
    full = {}
    for settings in ('region="masked"', 'region="all"'):
        built = learner(f"{settings}, ramp=0.2, consistency_weight=1")
        for progress in (0.0, 0.1, 0.2, 1.0):
            torch.manual_seed(5)
            full[settings, progress] = built(*batch(), progress)["medcontext_consistency"].item()
    for settings in ('region="masked"', 'region="all"'):
        assert full[settings, 0.0] == 0
        assert full[settings, 0.1] == pytest.approx(0.5 * full[settings, 1.0])
        assert full[settings, 0.2] == full[settings, 1.0]
    assert full['region="masked"', 1.0] > full['region="all"', 1.0] > 0


def test_the_released_consistency_is_divided_by_the_norm_of_the_targets() -> None:
    built = learner(
        'compat="official", divergence="mse_logits", region="all", ramp=0, consistency_weight=0.5'
    )
    built.eval()
    image, label, domain = batch()
    torch.manual_seed(6)
    losses = built(image, label, domain, 0.0)
    torch.manual_seed(6)
    masked = draw_blocks(2, (32, 32), 8, 0.4, alike=True)
    z2, zt = built.network(image.masked_fill(masked[:, None], 0.0)), built.network(image)
    expected = 0.5 * ((z2 - zt) ** 2).mean() / zt.square().sum().sqrt()
    torch.testing.assert_close(losses["medcontext_consistency"], expected)


def test_with_deep_supervision_every_scale_is_supervised_and_follows_the_teacher() -> None:
    built = learner("ramp=0, supervised_weight=0", "deep")
    built.train()
    torch.manual_seed(3)
    losses = built(*batch(), 0.5)
    heads = [p for name, p in built.network.named_parameters() if name.startswith("deep_heads")]
    assert heads
    gradients = torch.autograd.grad(losses["medcontext_consistency"], heads, retain_graph=True)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    torch.manual_seed(3)
    masked = draw_blocks(2, (32, 32), 8, 0.4)
    image = batch()[0]
    hidden = image.masked_fill(masked[:, None], 0.0)
    pairs = zip(*(built.network.decode_scales(built.network.encode(x)) for x in (hidden, image)), strict=True)
    total = 0.0
    for scale, (one, other) in enumerate(pairs):
        side = 2**scale
        share = masked.float().unfold(1, side, side).unfold(2, side, side).mean((3, 4))
        difference = (one.softmax(1) - other.softmax(1)).square().sum(1)
        total += 0.5**scale * ((difference * share).sum() / share.sum()).item()
    weights = sum(0.5**scale for scale in range(len(heads) // 2 + 1))
    assert losses["medcontext_consistency"].item() == pytest.approx(0.5 * total / weights, rel=1e-4)


def test_it_composes_with_the_other_objectives() -> None:
    others = "ram_dsir = {}, auxiliary_reconstruction = {}"
    config = load(
        "baseline", [SMALL["unet"], f"objectives={{supervised = {{}}, medcontext = {{}}, {others}}}"]
    )
    built = build_learner(config, plan((32, 32)), DOMAINS)
    image, label, _ = batch(count=4)
    losses = built(image, label, torch.tensor([0, 1, 0, 1]), 0.5, True)
    losses["total"].backward()
    assert {"medcontext_consistency", "ram_dsir_mixed", "auxiliary_reconstruction"} <= set(losses)
    assert any(name.startswith("medcontext_consistency") and "gradient" in name for name in losses)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("ratio=1.0", "ratio"),
        ("share=0.0", "share"),
        ("share=1.5", "share"),
        ("supervised_weight=-1.0", "supervised_weight"),
        ("temperature=0.0", "temperature"),
        ("momentum=[0.9, 0.5]", "momentum"),
        ("block_voxels=0", "block_voxels"),
        ('divergence="cosine"', "divergence"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"medcontext.*{message}"):
        learner(settings)
