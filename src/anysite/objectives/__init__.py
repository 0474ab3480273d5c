"""Objectives add loss terms while training; each sees one step and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anysite.networks import Network
from anysite.plan import Plan


@dataclass(frozen=True, eq=False)
class Step:
    """What a training step offers to objectives; the network runs when the first of them asks for its result.

    Attributes:
        label: Class indices; zeros where the training uses no labels.
        domain: Index of each sample's site among the training sites.
        progress: Share of training done, 0 to 1, for ramps.
        known: Which classes each sample's label tells of; none: all of every sample's.
    """

    image: Float[Tensor, "b c *s"]
    label: Int[Tensor, "b *s"]
    domain: Int[Tensor, " b"]
    progress: float
    network: Network
    known: Bool[Tensor, "b k"] | None = None

    @cached_property
    def features(self) -> list[Tensor]:
        """The network's encoding of `image`, bottleneck last."""
        return self.network.encode(self.image)

    @cached_property
    def logits(self) -> Float[Tensor, "b k *s"]:
        """The network's logits for `image`."""
        return self.scales[0]

    @cached_property
    def scales(self) -> list[Float[Tensor, "b k *t"]]:
        """The logits and, of a network with deep supervision, those of its coarser scales, finest first."""
        return self.network.decode_scales(self.features)


class Objective(nn.Module):
    """A weighted loss term; keyword arguments of the constructor are its settings.

    `attach` is called once before training with everything that may shape the objective's own modules,
    `forward` on every step, `after_step` after the optimizer moved the weights.

    Attributes:
        needs_label: Whether it reads `Step.label`; a training whose objectives all do without is a pretraining.
        teaches_network: Whether the network feels it; otherwise it trains modules of its own beside the network.
        supervision: Settings of the objective `supervised`, for those that supervise a further pass the same way.
    """

    needs_label: ClassVar[bool] = True
    teaches_network: ClassVar[bool] = True

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.supervision: Mapping[str, Any] = {}

    def attach(self, network: Network, plan: Plan, domains: tuple[str, ...]) -> None:
        """Build what depends on the network, the plan or the number of training sites."""

    def forward(self, step: Step) -> Float[Tensor, ""] | dict[str, Tensor]:
        """Return the loss of one step, not yet weighted, or its terms by name, which are added."""
        raise NotImplementedError

    def preview(self, step: Step) -> dict[str, Float[Tensor, "b c *s"]]:
        """Return images by name, each scaled to -1..1, that show a person what was learned; none by default."""
        return {}

    def after_step(self, network: Network) -> None:
        """Follow the network after an optimizer step, as a moving-average teacher does."""
