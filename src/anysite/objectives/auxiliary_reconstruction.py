"""Reconstruction beside segmentation, against collapsed features: Chen et al., 2022, https://arxiv.org/abs/2108.03823."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from anysite.networks import Network
from anysite.networks.restoration import RestorationDecoder, scale_to_unit
from anysite.objectives import Objective, Step
from anysite.plan import Plan


class AuxiliaryReconstruction(Objective):
    """A decoder without skips draws the image from the bottleneck, which so has to keep describing it.

    Args:
        loss: Squared ("mse") or absolute ("l1") error; the image is scaled to -1..1.
    """

    needs_label = False

    def __init__(self, *, weight: float = 0.1, loss: Literal["mse", "l1"] = "mse") -> None:
        super().__init__(weight=weight)
        self.error = F.mse_loss if loss == "mse" else F.l1_loss

    def attach(self, network: Network, plan: Plan, domains: tuple[str, ...]) -> None:
        """Build the decoder on the network's bottleneck; training alone has it."""
        self.decoder = RestorationDecoder(network.widths[-1], network.stride, plan.network_channels)

    def forward(self, step: Step) -> Float[Tensor, ""]:
        """Return the error of the image drawn from the step's bottleneck."""
        return self.error(self.decoder(step.features[-1], step.domain), scale_to_unit(step.image))

    def preview(self, step: Step) -> dict[str, Tensor]:
        """Return the image and its reconstruction."""
        drawn = self.decoder(step.features[-1], step.domain)
        return {"image": scale_to_unit(step.image), "drawn": drawn}
