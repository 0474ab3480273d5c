"""Adaptation that does no harm: only where image or mask are in doubt, checked afterwards, undone where it erred."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from anysite.detectors import Output
from anysite.judge import QUALITY, Verdict
from anysite.settings import AdaptSettings

NOT_SHIFTED = "the image is like those known, and nothing says that its mask is in doubt"
NOT_JUDGED = "nothing says whether the image is unlike those known"
NOTHING_FOUND = "nothing was found to adapt by"
NO_BETTER = "the method found nothing better"


@dataclass(frozen=True)
class Adaptation:
    """What became of adapting to one image.

    Attributes:
        method: The adapter's name.
        kept: Whether the mask is the adapted one.
        reason: Why not.
        facts: What the adapter observed.
        changed_share: Voxels that adapting changed, over those that were found before; none where it was not tried.
    """

    method: str
    kept: bool
    reason: str = ""
    facts: dict[str, float] = field(default_factory=dict)
    changed_share: float | None = None


def find_reason_against(settings: AdaptSettings, verdict: Verdict | None, shift_scores: set[str]) -> str:
    """Return why an image should not be adapted to, empty where it should.

    Args:
        settings: Of the adaptation.
        verdict: On the mask without adaptation.
        shift_scores: Those that speak of the image.
    """
    if not settings.only_shifted:
        return ""
    if verdict is None:
        return NOT_JUDGED
    limits = dict.fromkeys(shift_scores, 1.0) | {QUALITY: settings.least_doubt}
    scores = [(score, limits[name]) for name, score in verdict.scores.items() if name in limits]
    odd = any(score is None or score > limit for score, limit in scores)
    return "" if odd else NOT_SHIFTED


def find_fault(settings: AdaptSettings, before: Output, after: Output) -> tuple[str, float]:
    """Return what went astray, empty where nothing did, and the share of voxels that changed.

    Args:
        settings: Of the adaptation; nothing is a fault where they have no guard but values that are not finite.
        before: What the network made of the image.
        after: What the adapted one did.
    """
    if not np.isfinite(after.probabilities).all():
        return "probabilities that are not finite", 1.0
    old, new = before.foreground, after.foreground
    found, now = int(old.sum()), int(new.sum())
    changed = changed_share(before, after)
    if not settings.guard:
        return "", changed
    if not found:
        return NOTHING_FOUND, changed
    ratio, (low, high) = now / found, settings.volume_ratio
    if not low <= ratio <= high:
        return f"the volume became {ratio:.2f} times what it was", changed
    agreement = 2 * int((old & new).sum()) / max(1, found + now)
    if agreement < settings.least_agreement:
        return f"the masks before and after share a Dice of {agreement:.2f}", changed
    if changed > settings.most_changed:
        return f"{changed:.2f} of the voxels found before changed", changed
    if before.agreement is not None and after.agreement is not None:
        fall = before.agreement.pairwise_dice - after.agreement.pairwise_dice
        if fall > settings.agreement_fall:
            return f"views of the image agree less by {fall:.3f}", changed
    return "", changed


def changed_share(before: Output, after: Output) -> float:
    """Return the voxels that changed over those that were found before."""
    return float((before.masks != after.masks).any(0).sum()) / max(1, int(before.foreground.sum()))
