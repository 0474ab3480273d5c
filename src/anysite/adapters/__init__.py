"""Adapters change a copy of the network for one image at test time; labels and training data they never see."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anysite.errors import ConfigError
from anysite.networks import Network
from anysite.objectives.reflection import Reflection
from anysite.plan import Plan

Subset = Literal["norm", "first", "all"]


class Adapter(ABC):
    """A network that may be changed for one image and then is as before; constructor arguments are its settings.

    `attach` is called once, then for every image `look`, `adapt`, `predict` on all windows, and `reset`.

    Attributes:
        needs_reflection: Whether it needs what a training with the objective `reflection` learned.
        needs_batch_normalisation: Whether it needs a network that normalises by statistics of its training.
        name: By which it is registered.
    """

    needs_reflection: ClassVar[bool] = False
    needs_batch_normalisation: ClassVar[bool] = False
    name = ""

    def attach(
        self,
        network: Network,
        plan: Plan,
        reflection: Reflection | None,
        usual: Float[np.ndarray, "c k"] | None = None,
    ) -> None:
        """Take a copy of the network; that of the run is never changed.

        Args:
            network: Of the run.
            plan: Of the run.
            reflection: What the objective `reflection` learned.
            usual: Shares of training images' voxels in bins of intensity.

        Raises:
            ConfigError: the network or the run lack what the method needs.
        """
        if self.needs_reflection and reflection is None:
            raise ConfigError(
                "a run without reflection",
                where="predict.adapt",
                expected="one trained with the objective reflection",
                fix="train with --set objectives.reflection={}",
            )
        if self.needs_batch_normalisation:
            require_batch_normalisation(network)
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.plan, self.reflection, self.usual = plan, reflection, usual
        self._original = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}

    def look(self, image: Float[Tensor, "c *s"]) -> None:
        """Take from a whole image what is needed of it, on the plan's grid; nothing by default."""
        return

    @abstractmethod
    def adapt(self, windows: Float[Tensor, "b c *p"]) -> dict[str, float]:
        """Change the copy by windows of one image, and return what was observed; raise nothing but ConfigError."""

    def predict(self, windows: Float[Tensor, "b c *p"]) -> Float[Tensor, "b k *p"]:
        """Return the logits of any windows of that image."""
        return self.network(windows)

    def draw(self, windows: Float[Tensor, "b c *p"]) -> dict[str, Float[Tensor, "b _ *p"]]:
        """Return what the method makes visible of windows, by name, from -1 to 1; nothing by default."""
        return {}

    def reset(self) -> None:
        """Make the copy bit by bit what it was."""
        self.network.load_state_dict(self._original)

    def probabilities(self, logits: Float[Tensor, "b k *p"]) -> Float[Tensor, "b k *p"]:
        """Return what the plan makes of logits, in float32; of several datasets the one told counts alone."""
        return self.plan.as_probabilities(logits.float())


def choose_parameters(network: Network, subset: Subset) -> list[nn.Parameter]:
    """Return the parameters that an adapter may change, and let gradients reach them alone.

    Args:
        network: A copy.
        subset: "norm": scales and shifts of normalisation layers; "first": the first module that has parameters;
            "all".

    Raises:
        ConfigError: the network has no such parameters.
    """
    network.requires_grad_(False)
    if subset == "norm":
        modules = [module for module in network.modules() if "norm" in type(module).__name__.lower()]
    elif subset == "first":
        leaves = [module for module in network.modules() if not list(module.children())]
        modules = [module for module in leaves if list(module.parameters())][:1]
    else:
        modules = [network]
    chosen = list({id(p): p for module in modules for p in module.parameters()}.values())
    if not chosen:
        raise ConfigError(f"a network without {subset!r} parameters", where="predict.adapt", expected="some")
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def require_rate(adapter: str, learning_rate: float) -> None:
    """Raise ConfigError unless a learning rate is above 0."""
    if not learning_rate > 0:
        raise ConfigError(f"{learning_rate}", where=f"adapter {adapter}.learning_rate", expected="above 0")


def descend(
    loss_of: Callable[[], Float[Tensor, ""]],
    parameters: Sequence[Tensor],
    learning_rate: float,
    steps: int,
) -> list[float]:
    """Lower a loss by so many steps of Adam on these parameters, and return its value before, between and after."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    values: list[float] = []
    for step in range(steps + 1):
        loss = loss_of()
        values.append(float(loss.detach()))
        if step < steps:
            # Not backward(): gradients shall reach nothing else.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(False)
    return values


def find_batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Return the layers that normalise by statistics of training."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]


def require_batch_normalisation(network: nn.Module) -> None:
    """Refuse a network without batch normalisation.

    Raises:
        ConfigError: there is no such layer.
    """
    if not find_batch_norms(network):
        raise ConfigError(
            "a network without batch normalisation", where="predict.adapt", expected="batch normalisation",
            fix="choose another method, or train with network.norm=batch",
        )  # fmt: skip


def entropy(probabilities: Float[Tensor, "b k *p"], overlapping: bool) -> Float[Tensor, "b *p"]:
    """Return the entropy at every voxel in nats, of overlapping regions summed over them."""
    # At 0 and 1 its slope is infinite, and every gradient of the image would be no number.
    probabilities = probabilities.clamp(1e-6, 1 - 1e-6)
    if overlapping:
        return torch.special.entr(probabilities).sum(1) + torch.special.entr(1 - probabilities).sum(1)
    return torch.special.entr(probabilities).sum(1)


def divergence(
    one: Float[Tensor, "b k *p"], other: Float[Tensor, "b k *p"], overlapping: bool
) -> Float[Tensor, "b *p"]:
    """Return the Kullback-Leibler divergence of `one` from `other` at every voxel."""
    one, other = one.clamp(1e-6, 1 - 1e-6), other.clamp(1e-6, 1 - 1e-6)
    total = (one * (one / other).log()).sum(1)
    if overlapping:
        total = total + ((1 - one) * ((1 - one) / (1 - other)).log()).sum(1)
    return total
