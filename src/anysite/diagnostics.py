"""What a training step tells beside its losses: how they pull at the weights, how many directions features use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from anysite.networks import Network


def compare_gradients(losses: Mapping[str, Tensor], network: Network) -> dict[str, Tensor]:
    """Return the norm of every loss's gradient on the network's weights, relative to that of "supervised".

    Args:
        losses: Before the backward pass, which can still follow; one that no weight feels has ratio 0.
        network: Whose weights they have in common. Without a supervised loss the first one is the measure;
            where that pulls at nothing, there are no ratios.
    """
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    norms: dict[str, Tensor] = {}
    for name, loss in losses.items():
        norms[name] = loss.new_zeros(())
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            felt = [g.float().norm() for g in gradients if g is not None]
            norms[name] = torch.stack(felt).norm() if felt else norms[name]
    reference = norms.get("supervised", next(iter(norms.values())))
    if not 0 < float(reference) < float("inf"):
        return {}
    return {f"{name}_gradient_ratio": norm / reference for name, norm in norms.items()}


@torch.no_grad()
def effective_rank(features: Float[Tensor, "b w *t"]) -> Float[Tensor, ""]:
    """Return how many directions the features use: the exponential of their singular values' entropy.

    1 where all positions and samples hold the same direction (collapse), `w` where all directions are used
    alike, nan where features are not finite. The mean over positions is taken off. Roy, Vetterli, 2007,
    https://ieeexplore.ieee.org/document/7098875.
    """
    positions = features.detach().double().movedim(1, -1).flatten(0, -2)
    centred = positions - positions.mean(0)
    if not bool(centred.isfinite().all()):
        return centred.new_tensor(float("nan"))
    singular = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum().exp()
