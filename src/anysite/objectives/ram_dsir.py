"""RAM-DSIR, against unseen sites: Zhou, Qi, Shi, 2022, https://arxiv.org/abs/2208.03901.

A second view of every batch has its low-frequency amplitudes mixed with those of another site. It is supervised
by the same label, shall be segmented like the first view, and from its bottleneck a decoder restores the first.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from anysite.amplitude import mix_with_partners
from anysite.errors import ConfigError
from anysite.networks import Network, require_fractions
from anysite.networks.restoration import RestorationDecoder, scale_to_unit
from anysite.objectives import Objective, Step
from anysite.objectives.supervised import Supervised
from anysite.plan import Plan

OFFICIAL_SHARES = 10  # the released code draws from 0.1, 0.2, ..., 1.0


class RamDsir(Objective):
    """Random amplitude mixup, semantic consistency and domain-specific image restoration.

    Args:
        mixing: Make the second view; without it the restoration starts from the first view.
        supervised_weight: Of Dice and cross-entropy of the second view.
        consistency_weight: Of the symmetric divergence between the two views' probabilities.
        restoration_weight: Of the squared error of the restored image.
        restoration_factor: The image is restored with so many times fewer voxels along each axis, 1 or 2; none:
            2 as recommended, which costs less, and 1 as in the paper.
        own_share: Range of the weight of an image's own amplitude.
        window: Frequencies mixed on either side, as a share of the shortest axis.
        partner: Whose amplitudes are mixed in: of a sample of another site, or of any other sample.
        ramp: Share of training over which the range of the own weight opens, from its upper end alone.
        compat: "official" as the released code computes, "paper" as the text says, "recommended" as we advise;
            docs/methods/ram_dsir.md has the differences.

    Raises:
        ConfigError: a second view is weighted but not made, or a range or window out of bounds.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        mixing: bool = True,
        supervised_weight: float = 1.0,
        consistency_weight: float = 0.5,
        restoration_weight: float = 0.1,
        restoration_factor: Literal[1, 2] | None = None,
        own_share: tuple[float, float] = (0.0, 1.0),
        window: float = 0.1,
        partner: Literal["other_site", "any"] = "other_site",
        ramp: float = 0.0,
        compat: Literal["recommended", "paper", "official"] = "recommended",
    ) -> None:
        super().__init__(weight=weight)
        where = "objectives.ram_dsir"
        if not 0 <= own_share[0] <= own_share[1] <= 1:
            raise ConfigError(
                f"{list(own_share)}",
                where=f"{where}.own_share",
                expected="two numbers from 0 to 1, ascending",
            )
        if not 0 <= window <= 0.5:
            raise ConfigError(f"{window}", where=f"{where}.window", expected="0 to 0.5")
        require_fractions(where, ramp=ramp)
        self.partner, self.ramp = partner, ramp
        if not mixing and (supervised_weight or consistency_weight):
            raise ConfigError(
                "no second view to supervise or to compare with",
                where=f"{where}.mixing",
                expected="true",
                fix="set supervised_weight and consistency_weight to 0 as well",
            )
        self.mixing, self.own_share, self.window, self.compat = mixing, own_share, window, compat
        self.supervised_weight, self.consistency_weight = supervised_weight, consistency_weight
        self.restoration_weight = restoration_weight
        self.restoration_factor = restoration_factor or (2 if compat == "recommended" else 1)

    def attach(self, network: Network, plan: Plan, domains: tuple[str, ...]) -> None:
        """Build the restoration decoder on the network's bottleneck, with statistics for every site."""
        self.overlapping, self.domains = bool(plan.regions), len(domains)
        self.supervised = Supervised(**self.supervision)
        self.supervised.attach(network, plan, domains)
        if self.restoration_weight:
            # Thick slices, which the network keeps at full resolution, are restored so.
            self.shrink = [min(self.restoration_factor, step) for step in network.stride]
            stride = [step // shrink for step, shrink in zip(network.stride, self.shrink, strict=True)]
            self.decoder = RestorationDecoder(network.widths[-1], stride, plan.network_channels, self.domains)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the weighted terms `mixed`, `consistency` and `restoration`, as far as they have a weight."""
        terms: dict[str, Tensor] = {}
        features = step.network.encode(self.mix(step)) if self.mixing else step.features
        if self.supervised_weight or self.consistency_weight:
            scales = step.network.decode_scales(features)
            if self.supervised_weight:
                terms["mixed"] = self.supervised_weight * self.supervised.compare_scales(scales, step)
            if self.consistency_weight:
                divergence = symmetric_divergence(
                    step.logits.float(), scales[0].float(), self.overlapping, self.compat == "official"
                )
                terms["consistency"] = self.consistency_weight * divergence
        if self.restoration_weight:
            terms["restoration"] = self.restoration_weight * self._restoration_error(features[-1], step)
        return terms

    @torch.no_grad()
    def mix(self, step: Step) -> Float[Tensor, "b c *s"]:
        """Return the second view of a step's images."""
        low, high = self.own_share
        rise = min(1.0, step.progress / self.ramp) if self.ramp else 1.0
        own_share: tuple[float, float] | Tensor = (high - rise * (high - low), high)
        if self.compat == "official":
            own_share = torch.randint(1, OFFICIAL_SHARES + 1, (len(step.image),)) / OFFICIAL_SHARES
        with torch.autocast(step.image.device.type, enabled=False):
            domain = step.domain if self.partner == "other_site" else None
            mixed = mix_with_partners(step.image, domain, own_share, self.window)
        return mixed.contiguous(memory_format=step.network.memory_format)

    def _restoration_error(self, bottleneck: Tensor, step: Step) -> Float[Tensor, ""]:
        restored = self.decoder(bottleneck, step.domain)
        pool = F.avg_pool2d if step.image.ndim == 4 else F.avg_pool3d
        error = (restored - pool(scale_to_unit(step.image), self.shrink)).square().flatten(1).mean(1)
        if self.compat == "recommended":
            return error.mean()
        sites = [error[step.domain == domain].mean() for domain in step.domain.unique()]
        return torch.stack(sites).sum()


def symmetric_divergence(
    one: Float[Tensor, "b k *s"], other: Float[Tensor, "b k *s"], overlapping: bool, official: bool = False
) -> Float[Tensor, ""]:
    """Return KL(p||q) + KL(q||p) of two predictions, averaged over voxels (and over overlapping regions).

    Args:
        one: Logits; gradients flow into both.
        other: Logits.
        overlapping: Every map is a probability of its own (sigmoid), otherwise they exclude each other.
        official: Average over classes too, and leave out the background of overlapping regions, as the
            released code does.
    """
    if overlapping:
        difference = one.sigmoid() - other.sigmoid()
        if official:
            return (difference * (F.logsigmoid(one) - F.logsigmoid(other))).mean()
        # log p - log(1 - p) is the logit, which joins the terms of region and background.
        return (difference * (one - other)).mean()
    log_one, log_other = one.log_softmax(1), other.log_softmax(1)
    divergence = (log_one.exp() - log_other.exp()) * (log_one - log_other)
    return divergence.mean() if official else divergence.sum(1).mean()
