"""Dice on held-out source patients while training: it is shown and logged, and chooses nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anysite.data.case import Dataset
from anysite.networks import Network
from anysite.patches import PreparedCase, prepare
from anysite.plan import Plan
from anysite.windows import slide

OVERLAP = 0.25


def prepare_validation(held_out: Dataset, plan: Plan, count: int) -> list[PreparedCase]:
    """Bring up to `count` held-out cases onto the grid, of all sites alike.

    None where labels are disregarded, for there is no Dice to measure.

    Raises:
        DataError: a case cannot be used.
    """
    if held_out.unlabelled:
        return []
    return [prepare(case, held_out, plan, 0) for case in held_out.cases_by_turns[:count]]


def validate(network: Network, cases: Sequence[PreparedCase], plan: Plan, batch_size: int) -> float | None:
    """Return the mean Dice over cases and the foreground classes they have, on the plan's grid; none without any."""
    device = next(network.parameters()).device

    def predict(windows: Tensor) -> Tensor:
        logits = network(windows.contiguous(memory_format=network.memory_format))
        return plan.as_probabilities(logits.float())

    scores: list[float] = []
    network.eval()
    with torch.inference_mode():
        for case in cases:
            probabilities = slide(case.image.float().to(device), predict, plan, OVERLAP, batch_size)
            scores += dice_of_maps(probabilities.cpu(), case.label, plan, case.known)
    return sum(scores) / len(scores) if scores else None


def dice_of_maps(probabilities: Tensor, label: Tensor, plan: Plan, known: Sequence[int]) -> list[float]:
    """Return Dice for every foreground class or region that the label or the prediction has.

    Of classes only those `known`, which the label tells of.
    """
    if plan.regions:
        pairs = [
            (p > 0.5, torch.isin(label, torch.tensor(r)))
            for p, r in zip(probabilities, plan.regions, strict=True)
        ]
    else:
        decided = torch.from_numpy(plan.decide(probabilities.numpy()))
        pairs = [(decided == k, label == k) for k in known if k > 0]
    sums = [(2 * int((a & b).sum()), int(a.sum()) + int(b.sum())) for a, b in pairs]
    return [both / either for both, either in sums if either]
