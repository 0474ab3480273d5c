"""RefSeg, online reflection: Huang et al., 2022, https://arxiv.org/abs/2207.00476 (from its abstract).

The network segments the image; a synthesiser draws an image from that mask alone; and the network is changed until the
drawn image is as like the real one in structure as it gets. Where the mask is wrong, so is the drawing.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from anysite.adapters import Adapter, Subset, choose_parameters, divergence, require_rate
from anysite.networks import require_counts
from anysite.similarity import compare, mean_over


class RefSeg(Adapter):
    """Raises the structural similarity between an image and what is drawn from its mask, over a fixed region.

    Args:
        similarity: "mind": of neighbourhoods (Heinrich et al., 2012); "correlation": local normalised
            cross-correlation; "ssim"; "contrast": its term that a change of brightness leaves alone.
        subset: The parameters that change.
        learning_rate: Of Adam.
        steps: At most.
        shape_weight: Of what the autoencoder of masks would mend.
        anchor_weight: Of the divergence from the first prediction.
        least_gain: The best step is kept if the similarity rose by at least so much, otherwise nothing changes.
        patience: Steps without a rise of 0.0001 after which it stops.
        margin_voxels: Of the region around what was found. A wide one pays for painting whatever is bright there.

    Raises:
        ConfigError: a setting out of range.
    """

    needs_reflection: ClassVar[bool] = True

    def __init__(
        self,
        *,
        similarity: Literal["contrast", "ssim", "correlation", "mind"] = "mind",
        subset: Subset = "norm",
        learning_rate: float = 5e-3,
        steps: int = 5,
        shape_weight: float = 0.1,
        anchor_weight: float = 0.01,
        least_gain: float = 0.002,
        patience: int = 3,
        margin_voxels: int = 3,
    ) -> None:
        require_counts("adapter refseg", steps=steps, patience=patience, margin_voxels=margin_voxels)
        require_rate("refseg", learning_rate)
        self.subset: Subset = subset
        self.similarity, self.learning_rate = similarity, learning_rate
        self.steps, self.shape_weight, self.anchor_weight = steps, shape_weight, anchor_weight
        self.least_gain, self.patience, self.margin_voxels = least_gain, patience, margin_voxels

    def adapt(self, windows: Float[Tensor, "b c *p"]) -> dict[str, float]:
        """Return the similarity before and after; nothing changes where no window holds anything."""
        reflection = self.reflection
        assert reflection is not None
        with torch.no_grad():
            first = self.probabilities(self.network(windows))
        region = reflection.region(first, self.margin_voxels)
        full = region.flatten(1).any(1)
        if not full.any():
            return {"kept": 0.0}
        windows, first, region = windows[full], first[full], region[full]
        target = reflection.target(windows)
        parameters = choose_parameters(self.network, self.subset)
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        reached: list[float] = []
        best = [parameter.detach().clone() for parameter in parameters]
        for step in range(self.steps + 1):
            chances = self.probabilities(self.network(windows))
            similarity = self._similarity(chances, target, region)
            reached.append(float(similarity.detach()))
            if reached[-1] == max(reached):
                best = [parameter.detach().clone() for parameter in parameters]
            recent = reached[-self.patience - 1 :]
            stalled = len(recent) > self.patience and max(recent) - recent[0] < 1e-4
            if step == self.steps or stalled:
                break
            loss = 1 - similarity + self._regularise(chances, first)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        kept = max(reached) - reached[0] >= self.least_gain
        if kept:
            with torch.no_grad():
                for parameter, value in zip(parameters, best, strict=True):
                    parameter.copy_(value)
        else:
            self.reset()
        self.network.requires_grad_(False)
        return {
            "similarity_before": reached[0],
            "similarity_after": max(reached) if kept else reached[0],
            "steps": float(len(reached) - 1),
            "kept": float(kept),
        }

    def draw(self, windows: Float[Tensor, "b c *p"]) -> dict[str, Float[Tensor, "b _ *p"]]:
        """Return the `image`, and what the synthesiser has `drawn` from its mask."""
        assert self.reflection is not None
        with torch.no_grad():
            drawn = self.reflection.synthesiser(self.probabilities(self.network(windows)))
        return {"image": self.reflection.target(windows), "drawn": drawn}

    def _similarity(
        self, chances: Tensor, target: Tensor, region: Bool[Tensor, "b 1 *p"]
    ) -> Float[Tensor, ""]:
        assert self.reflection is not None
        drawn = self.reflection.synthesiser(chances)
        return mean_over(compare(self.similarity, drawn, target), region).mean()

    def _regularise(self, chances: Tensor, first: Tensor) -> Float[Tensor, ""]:
        overlapping = bool(self.plan.regions)
        total = chances.new_zeros(())
        if self.anchor_weight:
            total = total + self.anchor_weight * divergence(chances, first, overlapping).mean()
        if self.shape_weight:
            assert self.reflection is not None
            with torch.no_grad():
                mended = self.reflection.mend(chances)
            total = total + self.shape_weight * soft_disagreement(chances, mended, overlapping)
        return total


def soft_disagreement(
    one: Float[Tensor, "b k *p"], other: Float[Tensor, "b k *p"], overlapping: bool
) -> Float[Tensor, ""]:
    """Return 1 minus the mean soft Dice of two predictions, over regions or all classes but the background."""
    first = 0 if overlapping else 1
    one, other = one[:, first:].flatten(2), other[:, first:].flatten(2)
    both, either = (one * other).sum((0, 2)), (one + other).sum((0, 2))
    return 1 - ((2 * both + 1e-3) / (either + 1e-3)).mean()
