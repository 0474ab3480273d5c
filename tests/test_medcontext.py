"""MedContext against closed forms, slow twins and what its masks must hide."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from anysite.config import load
from anysite.errors import ConfigError
from anysite.learner import Learner, build_learner
from anysite.masking import draw_blocks
from anysite.objectives.medcontext import (
    MedContext,
    Teacher,
    diverge,
    momentum_at,
    released_momentum,
    replace_tokens,
)
from anysite.plan import Normalisation, Plan

DOMAINS = ("north", "east")
# Networks of both kinds, small; UNETR and Swin UNETR have tokens.
SMALL = {
    "unet": 'network={name="unet", width=4, residual=true}',
    "dynunet": 'network={name="dynunet", width=4}',
    "segresnet": 'network={name="segresnet", width=8}',
    "mednext": 'network={name="mednext", width=4}',
    "unetr": 'network={name="unetr", width=4, hidden_size=24, mlp_size=24, heads=2}',
    "swin_unetr": 'network={name="swin_unetr", width=12}',
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


@pytest.mark.parametrize("network", SMALL)
def test_nothing_of_a_blanked_voxel_reaches_the_masked_pass(network: str) -> None:
    """Where all blocks are masked but one, changing the image elsewhere changes no logit."""
    built = learner("ratio=0.9, consistency_weight=0", network, (64, 64)).eval()
    objective = medcontext(built)
    logits = []
    for other in (0.0, 5.0):
        torch.manual_seed(4)
        masked = objective._draw_mask(step(built, torch.zeros(2, 1, 64, 64)))
        image = torch.where(masked[:, None], other, batch((64, 64))[0])
        torch.manual_seed(4)
        with torch.no_grad():
            logits.append(objective._segment_masked(step(built, image))[1])
    torch.testing.assert_close(*logits)


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
    masked = objective._draw_mask(step(built, batch(patch_size)[0]))
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
        ("temperature=0.0", "temperature"),
        ("momentum=[0.9, 0.5]", "momentum"),
        ("block_voxels=0", "block_voxels"),
        ('divergence="cosine"', "divergence"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"medcontext.*{message}"):
        learner(settings)
