"""EATA on the voxels of one image, entropy where it is reliable: Niu et al., 2022, https://arxiv.org/abs/2204.02610."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from anysite.adapters import Adapter, Subset, choose_parameters, descend, divergence, entropy, require_rate
from anysite.networks import require_counts


class ReliableEntropy(Adapter):
    """Lowers the entropy of voxels that are neither sure nor a guess, the surer the more, and stays near the start.

    EATA leaves out unreliable samples and anchors the weights by their Fisher information over earlier images. Of one
    image there are voxels instead of samples, and the anchor is the first prediction.

    Args:
        subset: The parameters that change.
        learning_rate: Of Adam.
        steps: Of it.
        margin: Voxels of more than this share of the largest entropy are left out.
        anchor_weight: Of the divergence from the first prediction.
    """

    def __init__(
        self,
        *,
        subset: Subset = "norm",
        learning_rate: float = 1e-3,
        steps: int = 5,
        margin: float = 0.4,
        anchor_weight: float = 0.1,
    ) -> None:
        require_counts("adapter reliable_entropy", steps=steps)
        require_rate("reliable_entropy", learning_rate)
        self.subset: Subset = subset
        self.learning_rate, self.steps = learning_rate, steps
        self.margin, self.anchor_weight = margin, anchor_weight

    def adapt(self, windows: Float[Tensor, "b c *p"]) -> dict[str, float]:
        """Return the entropy of reliable voxels before and after."""
        overlapping = bool(self.plan.regions)
        maps = self.plan.outputs
        limit = self.margin * (maps * math.log(2) if overlapping else math.log(maps))
        with torch.no_grad():
            first = self.probabilities(self.network(windows))
        doubts: list[float] = []

        def loss_of() -> Tensor:
            chances = self.probabilities(self.network(windows))
            each = entropy(chances, overlapping)
            weight = torch.where(each < limit, torch.exp(limit - each), 0.0).detach()
            # What is certain anyway, such as the air around a body, has nothing to learn from.
            weight = weight * (each.detach() > 1e-3)
            doubt = (weight * each).sum() / weight.sum().clamp(min=1)
            doubts.append(float(doubt.detach()))
            return doubt + self.anchor_weight * divergence(chances, first, overlapping).mean()

        descend(loss_of, choose_parameters(self.network, self.subset), self.learning_rate, self.steps)
        return {"entropy_before": doubts[0], "entropy_after": doubts[-1], "kept": 1.0}
