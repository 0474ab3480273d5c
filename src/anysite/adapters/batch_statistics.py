"""Batch normalisation by the image's own statistics: Nado et al., 2020, https://arxiv.org/abs/2006.10963."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anysite.adapters import Adapter, find_batch_norms
from anysite.networks import require_fractions


class BatchStatistics(Adapter):
    """Mixes the statistics of training with those of the image's windows, all of them alike.

    Args:
        source_share: Of the statistics of training.

    Raises:
        ConfigError: a share out of range.
    """

    needs_batch_normalisation: ClassVar[bool] = True

    def __init__(self, *, source_share: float = 0.5) -> None:
        require_fractions("adapter batch_statistics", source_share=source_share)
        self.source_share = source_share

    def adapt(self, windows: Float[Tensor, "b c *p"]) -> dict[str, float]:
        """Measure every layer on the windows, layer by layer as the changed ones before it leave them."""

        def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(norm, _BatchNorm)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            features = inputs[0].float().movedim(1, -1).flatten(0, -2)
            norm.running_mean.lerp_(features.mean(0), 1 - self.source_share)
            norm.running_var.lerp_(features.var(0), 1 - self.source_share)

        norms = find_batch_norms(self.network)
        hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
        try:
            with torch.no_grad():
                self.network(windows)
        finally:
            for hook in hooks:
                hook.remove()
        return {"layers": float(len(norms)), "kept": 1.0}
