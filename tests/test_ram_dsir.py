"""RAM-DSIR against the published numbers, slow twins and closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anysite import registry
from anysite.amplitude import choose_partners, mix_amplitude
from anysite.augment import augment
from anysite.config import load
from anysite.data.case import Dataset
from anysite.errors import ConfigError
from anysite.learner import build_learner, build_network
from anysite.networks.restoration import RestorationDecoder, list_scales, scale_to_unit
from anysite.normalisation import Normalisation
from anysite.objectives import Step
from anysite.objectives.ram_dsir import RamDsir, symmetric_divergence
from anysite.plan import Plan
from anysite.settings import AugmentSettings
from anysite.train import train
from conftest import small_config

DOMAINS = ("north", "east", "south")
ALONE = {
    "mixing": {"consistency_weight": 0, "restoration_weight": 0},
    "consistency": {"supervised_weight": 0, "restoration_weight": 0},
    "restoration": {"mixing": False, "supervised_weight": 0, "consistency_weight": 0},
}


def plan(patch_size: tuple[int, ...] = (32, 32), channels: int = 1, regions: Any = ()) -> Plan:
    dimension = 3 if len(patch_size) == 3 else 2
    return Plan(
        dimension=dimension,
        image_dimension=dimension,
        spacing=(1.0,) * dimension,
        unit="mm",
        channels=channels,
        normalisation=(Normalisation(),) * channels,
        patch_size=patch_size,
        classes=("background", "disc", "cup"),
        label_values=(0, 1, 2),
        regions=regions,
        region_classes=(1, 2)[: len(regions)],
    )


def positive(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed_by_the_paper(own: np.ndarray, other: np.ndarray, share: float, window: float) -> np.ndarray:
    """One channel, frequency by frequency, as the released code words it: shift, window, inverse."""
    spectrum, partner = np.fft.fftshift(np.fft.fftn(own)), np.fft.fftshift(np.fft.fftn(other))
    amplitude, phase = np.abs(spectrum), np.angle(spectrum)
    radius = math.floor(window * min(own.shape))
    centre = [n // 2 for n in own.shape]
    for place in np.ndindex(*own.shape):
        if all(abs(i - c) <= radius for i, c in zip(place, centre, strict=True)):
            amplitude[place] = share * amplitude[place] + (1 - share) * abs(partner[place])
    return np.fft.ifftn(np.fft.ifftshift(amplitude * np.exp(1j * phase))).real


@pytest.mark.parametrize("shape", [(24, 32), (25, 31), (21, 40), (12, 14, 16), (11, 12, 13)])
@pytest.mark.parametrize("window", [0.1, 0.25])
def test_amplitude_mixing_against_the_released_wording(shape: tuple[int, ...], window: float) -> None:
    own, other = positive((2, 3, *shape), 0), positive((2, 3, *shape), 1)
    share = torch.tensor([0.3, 0.8], dtype=torch.float64)
    mixed = mix_amplitude(own, other, share, window)
    for sample, channel in np.ndindex(2, 3):
        pair = own[sample, channel].numpy(), other[sample, channel].numpy()
        twin = mixed_by_the_paper(*pair, float(share[sample]), window)
        limits = min(p.min() for p in pair), max(p.max() for p in pair)
        np.testing.assert_allclose(mixed[sample, channel], twin.clip(*limits), atol=1e-12)


@pytest.mark.parametrize(("size", "side"), [(256, 51), (384, 77)])
def test_the_window_has_the_published_side(size: int, side: int) -> None:
    """Where the partner has no amplitude, mixing removes exactly the frequencies of the window."""
    own = torch.randn((1, 1, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide = torch.full_like(own, 1e9)  # keeps the clamp away; its own amplitude lies at frequency 0 alone
    wide[..., ::2] = -1e9
    removed = torch.fft.fftn(own - mix_amplitude(own, wide, torch.ones(1) * 0.5, 0.1), dim=(2, 3))[0, 0]
    changed = removed.abs() > 1e-6
    changed[0, size // 2] = False  # the frequency of the stripes
    assert int(changed.sum()) == side * side
    assert int(changed.any(0).sum()) == int(changed.any(1).sum()) == side


def test_mixing_with_all_of_the_own_amplitude_changes_nothing() -> None:
    own, other = positive((2, 3, 256, 256), 0), positive((2, 3, 256, 256), 1)
    assert float((mix_amplitude(own, other, torch.ones(2), 0.1) - own).abs().max()) < 2e-13


def test_the_mean_is_mixed_too() -> None:
    own, other = positive((1, 1, 64, 64), 0) + 1, positive((1, 1, 64, 64), 1) + 3
    mixed = mix_amplitude(own, other, torch.tensor([0.25], dtype=torch.float64), 0.1)
    assert float(mixed.mean()) == pytest.approx(
        0.25 * float(own.mean()) + 0.75 * float(other.mean()), rel=1e-6
    )


def test_thick_slices_are_mixed_each_in_its_plane() -> None:
    own, other = positive((1, 1, 4, 24, 24), 0), positive((1, 1, 4, 24, 24), 1)
    share = torch.tensor([0.4])
    mixed = mix_amplitude(own, other, share, 0.1)
    apart = torch.stack([mix_amplitude(own[:, :, z], other[:, :, z], share, 0.1) for z in range(4)], 2)
    torch.testing.assert_close(mixed, apart, atol=2e-2, rtol=0)  # only the clamp's range differs
    inner = (mixed > 0.05) & (mixed < 0.95)
    torch.testing.assert_close(mixed[inner], apart[inner])


def test_partners_come_from_another_site_and_every_site_alike() -> None:
    domain = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    drawn = torch.stack([choose_partners(domain) for _ in range(2000)])
    assert not (domain[drawn] == domain).any()
    of_first = domain[drawn[:, 0]]
    assert float((of_first == 1).float().mean()) == pytest.approx(0.5, abs=0.05)
    only_site = torch.stack([choose_partners(torch.zeros(3).long()) for _ in range(50)])
    assert not (only_site == torch.arange(3)).any()
    assert choose_partners(torch.zeros(1).long()).tolist() == [0]


def test_as_augmentation_it_acts_alone_and_by_the_site() -> None:
    off = dict.fromkeys(("affine", "elastic", "flip", "bias_field", "noise", "blur", "brightness"), 0.0)
    off |= dict.fromkeys(("contrast", "low_resolution", "gamma"), 0.0)
    settings = AugmentSettings(**off, amplitude_mixing=1.0)
    image, label = torch.rand(4, 1, 32, 32), torch.zeros(4, 32, 32).long()
    image[2:] += 5  # another site, brighter
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        mixed, same = augment(image, label, settings, generator, torch.tensor([0, 0, 1, 1]))
        assert torch.equal(same, label)
        before, after = image.mean((1, 2, 3)), mixed.mean((1, 2, 3))
        assert (after[:2] > before[:2]).all()
        assert (after[2:] < before[2:]).all()
        again, _ = augment(image, label, settings, generator.manual_seed(seed), torch.tensor([0, 0, 1, 1]))
        assert torch.equal(again, mixed)


@pytest.mark.parametrize(("domains", "parameters"), [(3, 614_755), (5, 617_635)])
def test_the_restoration_decoder_has_the_published_parameter_count(domains: int, parameters: int) -> None:
    decoder = RestorationDecoder(256, (16, 16), 3, domains)
    assert sum(p.numel() for p in decoder.parameters()) == parameters


def test_scales_double_thick_slices_first() -> None:
    assert list_scales((4, 16, 16)) == [(2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)]


def test_every_site_keeps_statistics_of_its_own() -> None:
    torch.manual_seed(0)
    decoder = RestorationDecoder(8, (2, 2), 1, 2).train()
    bottleneck, domain = torch.randn(4, 8, 6, 6), torch.tensor([0, 1, 0, 1])
    together = decoder(bottleneck, domain)
    for site in (0, 1):
        chosen = domain == site
        torch.testing.assert_close(decoder(bottleneck[chosen], domain[chosen]), together[chosen])
    statistics = [norm.running_mean for norm in decoder.blocks[0].norms[0].norms]  # pyright: ignore
    assert not torch.allclose(statistics[0], statistics[1])
    assert together.abs().max() <= 1


@pytest.mark.parametrize("overlapping", [False, True])
def test_divergence_against_probabilities(overlapping: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 3, 5, 4, generator=generator).double() for _ in range(2))
    if overlapping:
        p, q = one.sigmoid(), other.sigmoid()
        whole = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
        whole += (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()
        official = ((p - q) * (p.log() - q.log())).mean()
    else:
        p, q = one.softmax(1), other.softmax(1)
        whole = (p * (p / q).log() + q * (q / p).log()).sum(1).mean()
        official = (p * (p / q).log() + q * (q / p).log()).mean()
    assert float(symmetric_divergence(one, other, overlapping)) == pytest.approx(float(whole), rel=1e-12)
    assert float(symmetric_divergence(one, other, overlapping, official=True)) == pytest.approx(
        float(official)
    )
    assert float(symmetric_divergence(one, one, overlapping)) == 0


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("official", [False, True])
def test_divergence_of_certain_and_opposite_answers_is_finite(overlapping: bool, official: bool) -> None:
    """The released code takes the logarithm of probabilities, which is infinite here."""
    one = torch.tensor([[[200.0]], [[-200.0]]])[None].requires_grad_()
    other = -one.detach()
    loss = symmetric_divergence(one, other, overlapping, official)
    loss.backward()
    assert torch.isfinite(loss)
    assert one.grad is not None
    assert torch.isfinite(one.grad).all()


def learner(settings: dict[str, Any], regions: Any = (), patch_size: tuple[int, ...] = (32, 32)) -> Any:
    config = load("baseline", ["network.width=4"])
    config.objectives["ram_dsir"] = settings
    torch.manual_seed(0)
    return build_learner(config, plan(patch_size, 1, regions), DOMAINS)


def losses_of(model: Any, patch_size: tuple[int, ...] = (32, 32)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    image, label = torch.randn(6, 1, *patch_size), torch.randint(0, 3, (6, *patch_size))
    return model(image, label, torch.tensor([0, 1, 2, 0, 1, 2]), 0.0)


@pytest.mark.parametrize("piece", ALONE)
def test_each_piece_can_be_switched_on_alone(piece: str) -> None:
    losses = losses_of(learner(ALONE[piece]))
    term = {"mixing": "mixed"}.get(piece, piece)
    assert losses.keys() == {"supervised", f"ram_dsir_{term}", "total"}
    assert float(losses[f"ram_dsir_{term}"].detach()) > 0


@pytest.mark.parametrize("compat", ["recommended", "paper", "official"])
@pytest.mark.parametrize("regions", [(), ((1, 2), (2,))], ids=["classes", "regions"])
@pytest.mark.parametrize("patch_size", [(32, 32), (16, 16, 16)], ids=["2d", "3d"])
def test_all_pieces_together_reach_the_encoder(
    compat: str, regions: Any, patch_size: tuple[int, ...]
) -> None:
    model = learner({"compat": compat}, regions, patch_size)
    losses = losses_of(model, patch_size)
    assert len(losses) == 5
    for name, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        gradient = next(model.network.encoder.parameters()).grad
        assert float(gradient.abs().sum()) > 0, name


def test_the_official_restoration_is_the_sum_over_sites() -> None:
    terms = {
        compat: losses_of(learner(ALONE["restoration"] | {"compat": compat, "restoration_factor": 1}))[
            "ram_dsir_restoration"
        ].item()
        for compat in ("recommended", "paper", "official")
    }
    assert terms["official"] == terms["paper"] == pytest.approx(3 * terms["recommended"], rel=1e-5)


def test_half_resolution_restores_block_means() -> None:
    model = learner(ALONE["restoration"])
    objective = model.objectives["ram_dsir"]
    image = torch.randn(3, 1, 32, 32)
    step = Step(image, torch.zeros(3, 32, 32).long(), torch.arange(3), 0.0, model.network)
    bottleneck = model.network.encode(image)[-1]
    restored = objective.decoder(bottleneck, step.domain)
    blocks = scale_to_unit(image).reshape(3, 1, 16, 2, 16, 2).mean((3, 5))
    expected = (restored - blocks).square().mean()
    torch.testing.assert_close(objective._restoration_error(bottleneck, step), expected)


def test_partners_of_any_site_and_a_range_that_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def note(image: Tensor, domain: Tensor | None, own_share: tuple[float, float], window: float) -> Tensor:
        seen.append((domain, own_share))
        return image

    monkeypatch.setattr("anysite.objectives.ram_dsir.mix_with_partners", note)
    for settings in ({}, {"partner": "any"}, {"ramp": 0.5, "own_share": [0.2, 0.8]}):
        objective = learner(settings).objectives["ram_dsir"]
        for progress in (0.0, 0.25, 0.9):
            domain = torch.arange(3)
            step = Step(
                torch.randn(3, 1, 32, 32),
                torch.zeros(3, 32, 32).long(),
                domain,
                progress,
                learner({}).network,
            )
            objective.mix(step)
    assert all(torch.equal(domain, torch.arange(3)) for domain, _ in seen[:3])
    assert all(domain is None for domain, _ in seen[3:6])
    assert [share for _, share in seen[:6]] == [(0.0, 1.0)] * 6
    assert [share for _, share in seen[6:]] == [
        (0.8, 0.8),
        (pytest.approx(0.5), 0.8),
        (pytest.approx(0.2), 0.8),
    ]


def test_official_shares_are_tenths(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def note(image: Tensor, domain: Tensor, own_share: Tensor, window: float) -> Tensor:
        seen.append(own_share)
        return image

    monkeypatch.setattr("anysite.objectives.ram_dsir.mix_with_partners", note)
    model = learner({"compat": "official"})
    for _ in range(50):
        losses_of(model)
    tenths = torch.cat(seen) * 10
    assert set(tenths.round().int().tolist()) <= set(range(1, 11))
    torch.testing.assert_close(tenths, tenths.round())


def test_images_are_scaled_from_minus_one_to_one() -> None:
    image = torch.randn(2, 3, 8, 8) * 7 + 100
    scaled = scale_to_unit(image).flatten(2)
    torch.testing.assert_close(scaled.amin(2), -torch.ones(2, 3))
    torch.testing.assert_close(scaled.amax(2), torch.ones(2, 3))
    assert torch.isfinite(scale_to_unit(torch.ones(1, 1, 4, 4))).all()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mixing": False}, "objectives.ram_dsir.mixing.*no second view"),
        ({"own_share": [0.5, 0.2]}, "own_share"),
        ({"ramp": 1.5}, "ramp"),
        ({"partner": "self"}, "partner"),
        ({"window": 0.7}, "window"),
        ({"compat": "exact"}, "compat"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        learner(settings)


@pytest.mark.parametrize("name", registry.NETWORKS)
@pytest.mark.parametrize("dimension", [2, 3])
def test_works_on_every_network(name: str, dimension: int) -> None:
    if name == "ram_dsir_unet" and dimension == 3:
        pytest.skip("the paper's network has two spatial axes")
    patch_size = (64, 64) if dimension == 2 else (32, 32, 64)
    small = {
        "unet": {"width": 4},
        "dynunet": {"width": 4},
        "segresnet": {"width": 8},
        "mednext": {"width": 4},
    }
    small |= {"ram_dsir_unet": {"width": 4}, "swin_unetr": {"width": 12, "window_size": 2}}
    small |= {"unetr": {"width": 4, "hidden_size": 24, "mlp_size": 32, "heads": 2}}
    config = load("baseline", [f"network.name={name}"])
    config.network.arguments.clear()
    known = registry.describe("network", name).settings
    config.network.arguments.update({k: v for k, v in small[name].items() if k in known})
    config.objectives["ram_dsir"] = {}
    model = build_learner(config, plan(patch_size), DOMAINS)
    image = torch.randn(3, 1, *patch_size)
    losses = model(image, torch.zeros(3, *patch_size).long(), torch.arange(3), 0.0)
    losses["ram_dsir_restoration"].backward()
    assert any(p.grad is not None and p.grad.any() for p in model.network.parameters())


@pytest.mark.parametrize("preset", ["baseline_weak", "fast", "robust", "ram_dsir", "ram_dsir_official"])
def test_presets_train(preset: str, phantom: Dataset, tmp_path: Any) -> None:
    overrides = ["plan.patch_size=[32, 32]", "train.batch_size=4", "train.steps=3", "train.threads=1"]
    overrides += ["network.width=4", "train.precision=bf16-mixed", "train.diagnose_every=2"]
    run = train(phantom, load(preset, overrides), tmp_path / "run")
    log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3
    if preset not in ("baseline_weak", "fast", "robust"):  # one loss alone has no rival
        ratios = [entry.get("ram_dsir_consistency_gradient_ratio") for entry in log]
        assert ratios[0] > 0
        assert ratios[1] is None
        assert ratios[2] > 0


def test_batches_are_balanced_over_the_sites_and_not_replayed(phantom: Dataset, tmp_path: Any) -> None:
    """The released loaders replay the first pass of the smaller sites; ours draws anew every step."""
    from anysite import runs
    from anysite.train import build_training, start_fabric

    settings = small_config("train.sampling=domain", "train.batch_size=6")
    train(phantom, settings, tmp_path / "run")
    training = build_training(
        start_fabric(settings), phantom, runs.read_config(tmp_path / "run"), tmp_path / "run"
    )
    batches = [training.sampler.batch(step) for step in range(20)]
    assert all(torch.bincount(batch.domain).tolist() == [2, 2, 2] for batch in batches)
    images = {image.numpy().tobytes() for batch in batches for image in batch.image}
    assert len(images) == 120


def test_network_and_result_are_those_without_the_objective_in_inference() -> None:
    config = load("baseline", ["network.width=4"])
    assert build_network(config, plan()).state_dict().keys() == learner({}).network.state_dict().keys()


def test_defaults_are_the_papers_weights() -> None:
    objective = RamDsir()
    assert (objective.supervised_weight, objective.consistency_weight, objective.restoration_weight) == (
        1,
        0.5,
        0.1,
    )


@pytest.mark.parametrize("setting", ["objectives.ram_dsir={}", "augment.amplitude_mixing=0.5"])
def test_a_batch_of_one_image_mixes_nothing_and_the_training_says_so(
    setting: str, phantom: Dataset, tmp_path: Path
) -> None:
    def listen(size: int) -> bool:
        notes: list[str] = []
        config = small_config(setting, f"train.batch_size={size}", "train.steps=1")
        train(phantom, config, tmp_path / str(size), on_progress=lambda progress: notes.append(progress.note))
        return any("none to mix amplitudes with" in note for note in notes)

    assert listen(1)
    assert not listen(2)
