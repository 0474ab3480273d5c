"""Dice + cross-entropy: Milletari, Navab, Ahmadi, 2016, https://arxiv.org/abs/1606.04797; as in nnU-Net, 2021."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anysite.networks import Network
from anysite.objectives import Objective, Step
from anysite.plan import Plan


class Supervised(Objective):
    """The mean of soft Dice over the batch plus cross-entropy: softmax, or sigmoid for overlapping regions.

    Args:
        dice_weight: Of Dice.
        cross_entropy_weight: Of cross-entropy.
        unknown: What becomes of classes that a sample's label does not tell of, in a joint training: their
            probability counts as background, so that wherever a dataset labels background they may be (a marginal
            loss: Shi, Xiao, Chen, Zhou, 2021, https://arxiv.org/abs/2007.03868), or they are left out of the softmax,
            so that every dataset has a head of its own.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        dice_weight: float = 1.0,
        cross_entropy_weight: float = 1.0,
        unknown: Literal["background", "left_out"] = "background",
    ) -> None:
        super().__init__(weight=weight)
        self.dice_weight, self.cross_entropy_weight = dice_weight, cross_entropy_weight
        self.unknown = unknown
        self.regions: tuple[tuple[int, ...], ...] = ()

    def attach(self, network: Network, plan: Plan, domains: tuple[str, ...]) -> None:
        """Take the plan's regions: with them every output map is a region of its own."""
        from monai.losses.dice import DiceLoss  # slow to import, which prediction does without

        self.regions = plan.regions
        overlapping = bool(plan.regions)
        self.dice = DiceLoss(
            include_background=overlapping,
            to_onehot_y=not overlapping,
            softmax=not overlapping,
            sigmoid=overlapping,
            batch=True,
        )
        # MONAI's DiceCELoss would compare overlapping regions by softmax, as if they excluded each other.
        self.cross_entropy = nn.BCEWithLogitsLoss() if overlapping else nn.CrossEntropyLoss()

    def forward(self, step: Step) -> Float[Tensor, ""]:
        """Return the loss of the step's logits against its label, at every scale there is."""
        return self.compare_scales(step.scales, step)

    def compare_scales(self, scales: list[Tensor], step: Step) -> Float[Tensor, ""]:
        """Return the mean loss of logits at several scales, each weighted half as much as the next finer one."""
        known = step.known if step.known is not None and not step.known.all() else None
        losses = [
            self.compare(logits, shrink_label(step.label, logits.shape[2:]), known) for logits in scales
        ]
        return weigh_scales(losses)

    def compare(
        self,
        logits: Float[Tensor, "b k *s"],
        label: Int[Tensor, "b *s"],
        known: Bool[Tensor, "b c"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss of any logits against a label map of class indices.

        Args:
            logits: Of classes or regions.
            label: Class indices.
            known: Which classes each label tells of; a sample without any is left out.
        """
        logits = logits.float()
        if known is not None:
            rows = known.any(1)
            logits, label, known = logits[rows], label[rows], known[rows]
            if not len(logits):
                return logits.sum()
        told = 1.0
        if known is not None and not known.all():
            logits = hide_unknown(logits, known, self.unknown)
            # A class that no label of the batch tells of costs nothing, and shall not lower the mean.
            told = (known.shape[1] - 1) / max(1, int(known.any(0)[1:].sum()))
        if self.regions:
            maps = region_maps(label, self.regions)
            dice, cross_entropy = self.dice(logits, maps), self.cross_entropy(logits, maps)
        else:
            dice, cross_entropy = self.dice(logits, label[:, None]), self.cross_entropy(logits, label.long())
        return self.dice_weight * told * dice + self.cross_entropy_weight * cross_entropy


def hide_unknown(
    logits: Float[Tensor, "b k *s"], known: Bool[Tensor, "b k"], unknown: str
) -> Float[Tensor, "b k *s"]:
    """Return logits whose softmax gives the classes that a label does not tell of no probability.

    Args:
        logits: Of classes that exclude each other.
        known: Which of them each sample's label tells of; the background always.
        unknown: "background": their probability goes to the background; "left_out": to all the others.
    """
    shown = known.view(*known.shape, *[1] * (logits.ndim - 2))
    lowest = torch.finfo(logits.dtype).min / 2
    hidden = logits.masked_fill(~shown, lowest)
    if unknown == "left_out":
        return hidden
    merged = shown.logical_not()
    merged[:, 0] = True
    background = logits.masked_fill(~merged, lowest).logsumexp(1, keepdim=True)
    return torch.cat([background, hidden[:, 1:]], 1)


def weigh_scales(losses: Sequence[Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """Return the mean of losses at several scales, finest first, each weighted half as much as the one before.

    As in nnU-Net: Isensee et al., 2021, https://doi.org/10.1038/s41592-020-01008-z.
    """
    weights = [0.5**scale for scale in range(len(losses))]
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)


def shrink_label(label: Int[Tensor, "b *s"], shape: Sequence[int]) -> Int[Tensor, "b *t"]:
    """Return a label map at a coarser shape, by the nearest voxel."""
    if label.shape[1:] == tuple(shape):
        return label
    return F.interpolate(label[:, None].float(), tuple(shape), mode="nearest-exact")[:, 0].to(label.dtype)


def region_maps(label: Int[Tensor, "b *s"], regions: tuple[tuple[int, ...], ...]) -> Float[Tensor, "b k *s"]:
    """Return one binary map a region, from a label map of class indices."""
    maps = [torch.isin(label, torch.tensor(region, device=label.device)) for region in regions]
    return torch.stack(maps, dim=1).float()
