"""Objectives add loss terms while training; each sees one step and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from anysite.networks import Network
from anysite.plan import Plan


@dataclass(frozen=True, eq=False)
class Step:
    """What a training step offers to objectives.

    Attributes:
        domain: Index of each sample's site among the training sites.
        progress: Share of training done, 0 to 1, for ramps.
        features: The network's encoding of `image`, bottleneck last.
    """

    image: Float[Tensor, "b c *s"]
    label: Int[Tensor, "b *s"]
    domain: Int[Tensor, " b"]
    progress: float
    network: Network
    features: list[Tensor]
    logits: Float[Tensor, "b k *s"]


class Objective(nn.Module):
    """A weighted loss term; keyword arguments of the constructor are its settings.

    `attach` is called once before training with everything that may shape the objective's own modules,
    `forward` on every step, `after_step` after the optimizer moved the weights.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def attach(self, network: Network, plan: Plan, domains: tuple[str, ...]) -> None:
        """Build what depends on the network, the plan or the number of training sites."""

    def forward(self, step: Step) -> Float[Tensor, ""] | dict[str, Tensor]:
        """Return the loss of one step, not yet weighted, or its terms by name, which are added."""
        raise NotImplementedError

    def after_step(self, network: Network) -> None:
        """Follow the network after an optimizer step, as a moving-average teacher does."""
