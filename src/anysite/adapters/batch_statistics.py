"""Batch normalisation by the image's own statistics: Nado et al., 2020, https://arxiv.org/abs/2006.10963."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from anysite.adapters import Adapter
from anysite.errors import ConfigError
from anysite.networks import Network, require_fractions
from anysite.objectives.reflection import Reflection
from anysite.plan import Plan

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class BatchStatistics(Adapter):
    """Mixes the statistics of training with those of the image's windows, all of them alike.

    Args:
        source_share: Of the statistics of training.

    Raises:
        ConfigError: a share out of range, or a network without batch normalisation.
    """

    def __init__(self, *, source_share: float = 0.5) -> None:
        require_fractions("adapter batch_statistics", source_share=source_share)
        self.source_share = source_share

    def attach(
        self,
        network: Network,
        plan: Plan,
        reflection: Reflection | None,
        usual: Float[np.ndarray, "c k"] | None = None,
    ) -> None:
        """Find the layers.

        Raises:
            ConfigError: there are none with statistics of training.
        """
        super().attach(network, plan, reflection, usual)
        norms = [module for module in self.network.modules() if isinstance(module, NORMS)]
        self.norms = [norm for norm in norms if norm.running_mean is not None]
        if not self.norms:
            raise ConfigError(
                "a network without batch normalisation", where="predict.adapt.method=batch_statistics",
                expected="batch normalisation", fix="choose another method, or train with network.norm=batch",
            )  # fmt: skip

    def adapt(self, windows: Float[Tensor, "b c *p"]) -> dict[str, float]:
        """Measure every layer on the windows, layer by layer as the changed ones before it leave them."""

        def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(norm, NORMS)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            features = inputs[0].float().movedim(1, -1).flatten(0, -2)
            norm.running_mean.lerp_(features.mean(0), 1 - self.source_share)
            norm.running_var.lerp_(features.var(0), 1 - self.source_share)

        hooks = [norm.register_forward_pre_hook(measure) for norm in self.norms]
        try:
            with torch.no_grad():
                self.network(windows)
        finally:
            for hook in hooks:
                hook.remove()
        return {"layers": float(len(self.norms)), "kept": 1.0}
