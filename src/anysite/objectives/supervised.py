"""Dice + cross-entropy: Milletari, Navab, Ahmadi, 2016, https://arxiv.org/abs/1606.04797; as in nnU-Net, 2021."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from monai.losses.dice import DiceLoss
from torch import Tensor, nn

from anysite.networks import Network
from anysite.objectives import Objective, Step
from anysite.plan import Plan


class Supervised(Objective):
    """The mean of soft Dice over the batch plus cross-entropy: softmax, or sigmoid for overlapping regions."""

    def __init__(
        self, *, weight: float = 1.0, dice_weight: float = 1.0, cross_entropy_weight: float = 1.0
    ) -> None:
        super().__init__(weight=weight)
        self.dice_weight, self.cross_entropy_weight = dice_weight, cross_entropy_weight
        self.regions: tuple[tuple[int, ...], ...] = ()

    def attach(self, network: Network, plan: Plan, domains: tuple[str, ...]) -> None:
        """Take the plan's regions: with them every output map is a region of its own."""
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
        return self.compare_scales(step.scales, step.label)

    def compare_scales(self, scales: list[Tensor], label: Int[Tensor, "b *s"]) -> Float[Tensor, ""]:
        """Return the mean loss of logits at several scales, each weighted half as much as the next finer one."""
        losses = [self.compare(logits, shrink_label(label, logits.shape[2:])) for logits in scales]
        return weigh_scales(losses)

    def compare(self, logits: Float[Tensor, "b k *s"], label: Int[Tensor, "b *s"]) -> Float[Tensor, ""]:
        """Return the loss of any logits against a label map of class indices."""
        logits = logits.float()
        if self.regions:
            maps = region_maps(label, self.regions)
            dice, cross_entropy = self.dice(logits, maps), self.cross_entropy(logits, maps)
        else:
            dice, cross_entropy = self.dice(logits, label[:, None]), self.cross_entropy(logits, label.long())
        return self.dice_weight * dice + self.cross_entropy_weight * cross_entropy


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
