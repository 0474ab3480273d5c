"""The verdict on a mask: is the image like those of training, and is the network as sure as it is on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import special

from anysite import registry
from anysite.config import JudgeSettings
from anysite.detectors import Detector, Output, Vector

LEAST = 5  # distances that a limit can be learned from, and patients that one can be left out of
REJECT = 3.0  # times as far beyond the usual as where a review begins
EMPTY_REASON = "nothing was found, which was so in fewer than one of twenty images known"
Decision = Literal["accept", "review", "reject"]


@dataclass(frozen=True)
class Verdict:
    """What to do with a mask.

    Attributes:
        decision: "accept", "review" by a person, or "reject".
        reasons: Why not to accept it, the weightiest first, in words for a reader of images.
        scores: Of every detector: 0 is the usual, 1 where a review begins; none where it is not finite.
    """

    decision: Decision
    reasons: tuple[str, ...]
    scores: dict[str, float | None]


class Judge:
    """Detectors with limits from source patients; a limit is crossed by a stated share of images like theirs.

    Attributes:
        limits: Of every detector the median of its reference distances and where a review begins.
        share_empty: Share of the reference images in which nothing was found.

    Raises:
        ConfigError: an unknown detector or setting.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.detectors: dict[str, Detector] = {
            name: registry.build("detector", name, **arguments)
            for name, arguments in settings.detectors.items()
        }
        self.limits: dict[str, tuple[float, float]] = {}
        self.share_empty = 0.0

    def describe(self, output: Output) -> dict[str, Vector]:
        """Return the vector of every detector for an output, all that needs to be kept of it.

        Where features or probabilities are not finite, so that nothing can be said, the vector is not either.
        """
        vectors: dict[str, Vector] = {}
        finite = bool(np.isfinite(output.probabilities).all())
        for name, detector in self.detectors.items():
            try:
                vectors[name] = detector.describe(output) if finite else np.array([np.nan])
            except (ValueError, ArithmeticError):  # of matrices that are not finite
                vectors[name] = np.array([np.nan])
        return vectors | {"empty": np.array([float(_is_empty(output))])}

    def fit(
        self,
        training: Sequence[Mapping[str, Vector]],
        held_out: Sequence[Mapping[str, Vector]],
        patients: Sequence[str],
    ) -> None:
        """Learn references from training images, and limits from them and from held-out ones.

        Distances of training images are taken with all images of their patient left out of the references. Of
        detectors that speak of the segmentation they say nothing, and held-out images alone count where there are
        enough. A limit is the quantile of the false-alarm rate, shared out among the detectors, or where a
        normal distribution of these distances would have it, whichever is higher: of few images the quantile is
        but the largest. Detectors with fewer than five distances are dropped.

        Args:
            training: What `describe` returned of training images.
            held_out: The same of images not trained on.
            patients: Of the training images.
        """
        share = 1 - self.settings.false_alarms / max(1, len(self.detectors))
        enough = len(dict.fromkeys(patients)) >= LEAST
        for name, detector in list(self.detectors.items()):
            learned = np.stack([vectors[name] for vectors in training])
            detector.fit(learned)
            distances = [detector.distance(vectors[name]) for vectors in held_out]
            if enough and (detector.of_shift or len(distances) < LEAST):
                distances += detector.leave_one_out(learned, patients).tolist()
            if len(distances) < LEAST:
                del self.detectors[name]
                continue
            usual = float(np.median(distances))
            normal = np.mean(distances) + special.ndtri(share) * np.std(distances, ddof=1)
            limit = max(float(np.quantile(distances, share)), float(normal))
            self.limits[name] = usual, limit
        empty = [vectors["empty"][0] for vectors in (*training, *held_out)]
        self.share_empty = float(np.mean(empty)) if empty else 1.0

    def judge(self, output: Output) -> Verdict:
        """Return the verdict on what the run's network made of one image."""
        described = self.describe(output)
        scores = {}
        for name, detector in self.detectors.items():
            known = np.isfinite(described[name]).all()
            scores[name] = self._relative(name, detector.distance(described[name])) if known else np.nan
        return decide(scores, {name: d.reason for name, d in self.detectors.items()}, self._is_odd(described))

    def memory(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return arrays and facts that `recall` needs."""
        arrays = {f"{name}.{key}": a for name, d in self.detectors.items() for key, a in d.memory.items()}
        return arrays, {"limits": self.limits, "share_empty": self.share_empty}

    def recall(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Take over what `memory` returned.

        Raises:
            KeyError: something is missing.
        """
        for name, detector in list(self.detectors.items()):
            if name not in facts["limits"]:
                del self.detectors[name]
                continue
            usual, limit = facts["limits"][name]
            self.limits[name] = float(usual), float(limit)
            detector.memory = {
                key.removeprefix(f"{name}."): array
                for key, array in arrays.items()
                if key.startswith(f"{name}.")
            }
        self.share_empty = facts["share_empty"]

    def _relative(self, name: str, distance: float) -> float:
        usual, limit = self.limits[name]
        return (distance - usual) / max(limit - usual, 1e-9 * max(1.0, abs(usual)))

    def _is_odd(self, vectors: Mapping[str, Vector]) -> bool:
        return bool(vectors["empty"][0]) and self.share_empty < 0.05


def decide(scores: Mapping[str, float], reasons: Mapping[str, str], empty: bool = False) -> Verdict:
    """Return the verdict from scores of which 1 begins a review and 3 a rejection.

    A score that is not finite rejects: nothing can be said.
    """
    worst = {name: score if np.isfinite(score) else np.inf for name, score in scores.items()}
    flagged = sorted((name for name, score in worst.items() if score > 1), key=lambda name: -worst[name])
    stated = ([EMPTY_REASON] if empty else []) + [reasons[name] for name in flagged]
    decision: Decision = "review" if stated else "accept"
    if any(score > REJECT for score in worst.values()):
        decision = "reject"
    kept = {name: float(score) if np.isfinite(score) else None for name, score in scores.items()}
    return Verdict(decision, tuple(stated), kept)


def average_verdicts(verdicts: Sequence[Verdict], reasons: Mapping[str, str], empty: bool) -> Verdict:
    """Return the verdict of several runs on one image, from the means of their scores, below 0 counted as 0.

    Args:
        verdicts: One a run that judges.
        reasons: Of every detector.
        empty: Whether the mask they made together is.
    """
    if len(verdicts) == 1:
        return verdicts[0]
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.scores)
    means = {}
    for name in names:
        values = [verdict.scores[name] for verdict in verdicts if name in verdict.scores]
        means[name] = float(np.mean([np.inf if value is None else max(value, 0.0) for value in values]))
    return decide(means, reasons, empty and any(EMPTY_REASON in verdict.reasons for verdict in verdicts))


def _is_empty(output: Output) -> bool:
    chances = output.probabilities
    return not ((chances > 0.5).any() if output.overlapping else chances.argmax(0).any())
