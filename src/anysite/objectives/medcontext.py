"""MedContext, masked self-supervision beside the labels: Gani, Naseer, Khan, Khan, 2024, https://arxiv.org/abs/2402.17725.

The network also segments a masked copy of the batch, towards the label and towards what a moving average of
itself, the teacher, makes of the whole image: what is hidden has to be told from its surroundings.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from anysite.errors import ConfigError
from anysite.masking import draw_blocks
from anysite.networks import Network, require_counts, require_fractions
from anysite.networks.restoration import scale_to_unit
from anysite.objectives import Objective, Step
from anysite.objectives.supervised import Supervised, weigh_scales
from anysite.plan import Plan

# The released code's schedule: linear over 5,000 steps, but read by the step within an epoch of 250.
RELEASED_MOMENTUM, RELEASED_WARMUP, RELEASED_EPOCH = 0.996, 5000, 250


class MedContext(Objective):
    """A masked pass that is supervised too, and consistency in the output with a moving-average teacher.

    Args:
        supervised_weight: Of Dice and cross-entropy of the masked pass.
        consistency_weight: Of the divergence from the teacher; 0 trains without a teacher.
        divergence: Squared error of probabilities ("mse") or logits ("mse_logits"), summed over classes, or
            Kullback-Leibler ("kl"); averaged over voxels.
        region: Over which voxels: "masked" alone, or "all".
        temperature: Of the teacher's probabilities; below 1 sharpens them.
        ramp: Share of training over which the consistency's weight rises from 0.
        share: Of the samples that are masked, at least one. Below 1 the others are segmented whole in the same pass,
            and the objective `supervised` can be left out: one pass instead of two.
        ratio: Share of the image masked.
        block_voxels: Side of a masked block, smaller where fewer than four would lie along the patch's longest
            axis; then rounded to whole tokens of a transformer, at least one.
        tube: Blocks run through the whole first axis.
        place: "voxels": blocks of the image are blanked, so that nothing of them reaches any layer; "tokens": a
            transformer's tokens are replaced by a learned vector after their positions were added, while its
            convolutional skips see the whole image, as released. Networks without tokens always blank voxels.
        momentum: The teacher's, at the beginning and the end, by half a cosine (Caron et al., 2021,
            https://arxiv.org/abs/2104.14294).
        compat: "official" as the released code computes: squared error of logits over the norm of the teacher's
            (whatever `divergence`, `region` and `temperature` say), one mask for the whole batch, and a momentum
            near zero (whatever `momentum` says).

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        supervised_weight: float = 1.0,
        consistency_weight: float = 0.5,
        divergence: Literal["mse", "mse_logits", "kl"] = "mse",
        region: Literal["masked", "all"] = "masked",
        temperature: float = 1.0,
        ramp: float = 0.1,
        share: float = 1.0,
        ratio: float = 0.4,
        block_voxels: int = 16,
        tube: bool = False,
        place: Literal["voxels", "tokens"] = "voxels",
        momentum: tuple[float, float] = (0.99, 0.999),
        compat: Literal["recommended", "official"] = "recommended",
    ) -> None:
        super().__init__(weight=weight)
        where = "objectives.medcontext"
        require_counts(where, block_voxels=block_voxels)
        require_fractions(where, ratio=ratio, ramp=ramp)
        if not 0 < share <= 1:
            raise ConfigError(f"{share}", where=f"{where}.share", expected="above 0, at most 1")
        for name, value in {
            "supervised_weight": supervised_weight,
            "consistency_weight": consistency_weight,
        }.items():
            if value < 0:
                raise ConfigError(f"{value}", where=f"{where}.{name}", expected="0 or above")
        if temperature <= 0:
            raise ConfigError(f"{temperature}", where=f"{where}.temperature", expected="above 0")
        if not 0 <= momentum[0] <= momentum[1] <= 1:
            raise ConfigError(
                f"{list(momentum)}", where=f"{where}.momentum", expected="two numbers from 0 to 1, ascending"
            )
        self.supervised_weight, self.consistency_weight = supervised_weight, consistency_weight
        self.divergence, self.region, self.temperature, self.ramp = divergence, region, temperature, ramp
        self.share, self.ratio, self.block_voxels = share, ratio, block_voxels
        self.tube, self.place = tube, place
        self.momentum, self.compat = momentum, compat

    def attach(self, network: Network, plan: Plan, domains: tuple[str, ...]) -> None:
        """Fit the blocks to patch and tokens, and build the teacher."""
        self.overlapping = bool(plan.regions)
        self.supervised = Supervised(**self.supervision)
        self.supervised.attach(network, plan, domains)
        side = min(self.block_voxels, max(1, max(plan.patch_size) // 4))
        tokens = network.token_voxels
        self.block = tuple(token * max(1, round(side / token)) for token in tokens)
        self.by_tokens = self.place == "tokens" and network.embedding is not None
        if self.by_tokens:
            self.grid = tuple(n // token for n, token in zip(plan.patch_size, tokens, strict=True))
            self.block = tuple(side // token for side, token in zip(self.block, tokens, strict=True))
            self.mask_token = nn.Parameter(torch.zeros(network.token_width))
        if self.consistency_weight:
            self.teacher = Teacher(network)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the weighted terms `masked` and, with a teacher, `consistency`."""
        self.progress = step.progress
        rows = self._choose_samples(len(step.image))
        masked, scales = self._segment_masked(step, rows)
        terms = {"masked": self.supervised_weight * self.supervised.compare_scales(scales, step)}
        if self.consistency_weight:
            targets = self.teacher.segment(step.image[rows], step.network)
            scales, masked = [logits[rows] for logits in scales], masked[rows]
            if self.compat == "official":
                scales, targets = scales[:1], targets[:1]
            rise = min(1.0, step.progress / self.ramp) if self.ramp else 1.0
            pairs = zip(scales, targets, strict=True)
            difference = weigh_scales([self._compare(s.float(), t.float(), masked) for s, t in pairs])
            terms["consistency"] = rise * self.consistency_weight * difference
        return terms

    def after_step(self, network: Network) -> None:
        """Move the teacher towards the network."""
        if self.consistency_weight:
            updates = int(self.teacher.updates)
            if self.compat == "official":
                momentum = released_momentum(updates)
            else:
                momentum = momentum_at(self.progress, updates, *self.momentum)
            self.teacher.follow(network, momentum)

    def preview(self, step: Step) -> dict[str, Tensor]:
        """Return the image, and what is left of it."""
        rows = self._choose_samples(len(step.image))
        image, masked = scale_to_unit(step.image), self._draw_mask(step, rows)
        return {"image": image, "masked": image.masked_fill(masked[:, None], 0.0)}

    def _choose_samples(self, count: int) -> Tensor:
        """Return the indices of those samples of a batch that are masked."""
        if self.share == 1:
            return torch.arange(count)
        return torch.randperm(count)[: max(1, round(self.share * count))].sort().values

    def _segment_masked(self, step: Step, rows: Tensor) -> tuple[Bool[Tensor, "b *s"], list[Tensor]]:
        masked = self._draw_mask(step, rows)
        if not self.by_tokens:
            return masked, _segment_scales(step.network, step.image.masked_fill(masked[:, None], 0.0))
        embedding = step.network.embedding
        assert embedding is not None
        every = (slice(None), *(slice(None, None, token) for token in step.network.token_voxels))

        def replace(module: nn.Module, image: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
            return replace_tokens(tokens, masked[every], self.mask_token)

        with embedding.register_forward_hook(replace):
            return masked, _segment_scales(step.network, step.image)

    def _draw_mask(self, step: Step, rows: Tensor) -> Bool[Tensor, "b *s"]:
        shape = self.grid if self.by_tokens else step.image.shape[2:]
        blocks = draw_blocks(
            len(rows), shape, self.block, self.ratio, tube=self.tube, alike=self.compat == "official"
        )
        masked = torch.zeros(len(step.image), *shape, dtype=torch.bool).index_copy(0, rows, blocks)
        if self.by_tokens:
            for axis, token in enumerate(step.network.token_voxels, start=1):
                masked = masked.repeat_interleave(token, dim=axis)
        return masked.to(step.image.device)

    def _compare(self, logits: Tensor, target: Tensor, masked: Tensor) -> Float[Tensor, ""]:
        if self.compat == "official":
            return F.mse_loss(logits, target) / target.norm()
        each = diverge(logits, target / self.temperature, self.divergence, self.overlapping)
        if self.region == "all":
            return each.mean()
        # Of a coarser scale, how much of each voxel was hidden.
        hidden = F.interpolate(masked[:, None].float(), tuple(each.shape[1:]), mode="area")[:, 0]
        return (each * hidden).sum() / hidden.sum().clamp(min=1)


class Teacher(nn.Module):
    """A copy of the network that follows it as a moving average and never learns by itself.

    It starts as the copy of what the network is at its first use, which may have begun from a pretraining.
    """

    updates: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("begun", torch.tensor(False))

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, whatever the mode of the training."""
        return super().train(False)

    @torch.no_grad()
    def segment(self, image: Float[Tensor, "b c *s"], network: Network) -> list[Tensor]:
        """Return the teacher's logits, at every scale that the network has."""
        if not self.begun:
            self.network.load_state_dict(network.state_dict())
            self.begun.fill_(True)
        return _segment_scales(self.network, image)

    @torch.no_grad()
    def follow(self, network: Network, momentum: float) -> None:
        """Set every weight to `momentum` of the teacher's and the rest of the network's; buffers are copied."""
        for mine, theirs in zip(self.network.parameters(), network.parameters(), strict=True):
            mine.lerp_(theirs, 1 - momentum)
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)
        self.updates += 1


def _segment_scales(network: Network, image: Float[Tensor, "b c *s"]) -> list[Tensor]:
    return network.decode_scales(network.encode(image))


def momentum_at(progress: float, updates: int, start: float, end: float) -> float:
    """Return the teacher's momentum: from `start` to `end` by half a cosine, at first no longer than its past."""
    planned = end - (end - start) * 0.5 * (1 + math.cos(math.pi * progress))
    return min(planned, 1 - 1 / (updates + 1))


def released_momentum(step: int, warmup: int = RELEASED_WARMUP, epoch: int = RELEASED_EPOCH) -> float:
    """Return the momentum that the released code arrives at: its schedule read by the step within an epoch."""
    return RELEASED_MOMENTUM * (step % epoch) / (warmup - 1)


def replace_tokens(
    tokens: Float[Tensor, "b *n"], masked: Bool[Tensor, "b *t"], mask_token: Float[Tensor, "w"]
) -> Float[Tensor, "b *n"]:
    """Return tokens `(b, n, w)` or `(b, w, *t)` with those masked replaced by `mask_token`."""
    if tokens.ndim == 3:
        return torch.where(masked.flatten(1)[..., None], mask_token.to(tokens.dtype), tokens)
    shaped = mask_token.to(tokens.dtype).view(-1, *[1] * (tokens.ndim - 2))
    return torch.where(masked[:, None], shaped, tokens)


def diverge(
    logits: Float[Tensor, "b k *s"], target: Float[Tensor, "b k *s"], kind: str, overlapping: bool
) -> Float[Tensor, "b *s"]:
    """Return how far the prediction is from the target at each voxel, summed over classes or regions."""
    if kind == "mse_logits":
        return (logits - target).square().sum(1)
    if kind == "mse":
        one, other = (x.sigmoid() if overlapping else x.softmax(1) for x in (logits, target))
        return (one - other).square().sum(1)
    if overlapping:
        both = (F.logsigmoid(target) - F.logsigmoid(logits), F.logsigmoid(-target) - F.logsigmoid(-logits))
        chance = target.sigmoid()
        return (chance * both[0] + (1 - chance) * both[1]).sum(1)
    log_target = target.log_softmax(1)
    return (log_target.exp() * (log_target - logits.log_softmax(1))).sum(1)
