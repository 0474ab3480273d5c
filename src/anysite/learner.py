"""The network with its objectives, as one module that turns a batch into losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anysite import compute, registry
from anysite.config import Config
from anysite.diagnostics import compare_gradients, effective_rank
from anysite.errors import ConfigError
from anysite.networks import Network
from anysite.objectives import Objective, Step
from anysite.plan import Plan


class Learner(nn.Module):
    """Network and objectives together: the only module that may be wrapped for distributed training.

    Wrapping the network alone and calling its parts beside the wrapper would let ranks drift apart, because
    gradients are exchanged in the wrapper's forward.
    """

    def __init__(self, network: Network, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.network = network
        self.objectives = nn.ModuleDict(objectives)

    def forward(
        self,
        image: Float[Tensor, "b c *s"],
        label: Int[Tensor, "b *s"],
        domain: Int[Tensor, " b"],
        progress: float,
        compare: bool = False,
        known: Bool[Tensor, "b k"] | None = None,
    ) -> dict[str, Tensor]:
        """Return every weighted loss by its objective's name (and term), and their sum as "total".

        With `compare` also the effective rank of the bottleneck and, of several losses, how strongly each
        pulls at the network's weights. This has to happen here: outside, Fabric's precision refuses any other
        backward pass than its own.
        """
        step = Step(image, label, domain, progress, self.network, known)
        losses: dict[str, Tensor] = {}
        for name, objective in self.named_objectives():
            loss, weight = objective(step), objective.weight
            terms = (
                {f"{name}_{term}": t for term, t in loss.items()} if isinstance(loss, dict) else {name: loss}
            )
            losses |= {term: weight * value for term, value in terms.items()}
        diagnostics: dict[str, Tensor] = {}
        if compare:
            diagnostics["effective_rank"] = effective_rank(self._look_at_bottleneck(step))
            if len(losses) > 1:
                diagnostics |= compare_gradients(losses, self.network)
        return {**losses, **diagnostics, "total": torch.stack(list(losses.values())).sum()}

    def _look_at_bottleneck(self, step: Step) -> Tensor:
        """Return the bottleneck's features, without moving running statistics where no objective asked for them."""
        if "features" in vars(step):
            return step.features[-1]
        learning = self.network.training
        try:
            with torch.no_grad():
                return self.network.eval().encode(step.image)[-1]
        finally:
            self.network.train(learning)

    def after_step(self) -> None:
        """Let every objective follow the network after an optimizer step."""
        for _, objective in self.named_objectives():
            objective.after_step(self.network)

    def named_objectives(self) -> Iterator[tuple[str, Objective]]:
        """Yield every objective with its name."""
        for name, objective in self.objectives.items():
            assert isinstance(objective, Objective)
            yield name, objective


def build_network(config: Config, plan: Plan) -> Network:
    """Construct the configured network for a plan.

    Raises:
        ConfigError: an unknown network or setting, or a patch size the network cannot take.
    """
    network: Network = registry.build(
        "network",
        config.network.name,
        plan.network_channels,
        plan.outputs,
        plan.patch_size,
        **config.network.arguments,
    )
    compute.protect_small_convolutions(network)
    return network


def build_learner(config: Config, plan: Plan, domains: tuple[str, ...]) -> Learner:
    """Construct network and objectives, attached to each other.

    Raises:
        ConfigError: an unknown name or setting.
    """
    network = build_network(config, plan)
    objectives: dict[str, Any] = {}
    teaches = any(registry.find("objective", name).teaches_network for name in config.objectives)
    if not teaches and config.pretrained is None:
        raise ConfigError(
            f"only {', '.join(config.objectives)}",
            where="objectives",
            expected="one that teaches the network",
            fix="add objectives.supervised={}, or give a trained network by pretrained",
        )
    supervision = {k: v for k, v in config.objectives.get("supervised", {}).items() if k != "weight"}
    registry.build("objective", "supervised", **supervision)
    for name, settings in config.objectives.items():
        objective = registry.build("objective", name, **settings)
        objective.supervision = supervision
        objective.attach(network, plan, domains)
        objectives[name.replace(".", "_")] = objective
    learner = Learner(network, objectives)
    compute.protect_small_convolutions(learner)
    return learner


def needs_labels(config: Config) -> bool:
    """Tell whether any configured objective reads labels; a training without is a pretraining.

    Raises:
        ConfigError: an unknown objective.
    """
    return any(registry.find("objective", name).needs_label for name in config.objectives)
