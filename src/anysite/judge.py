"""The verdict on a mask: is the image like those of training, and is the network as sure as it is on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from anysite import registry
from anysite.config import JudgeSettings
from anysite.detectors import Detector, Output, Vector

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
        """Return the vector of every detector for an output, all that needs to be kept of it."""
        vectors = {name: detector.describe(output) for name, detector in self.detectors.items()}
        return vectors | {"empty": np.array([float(_is_empty(output))])}

    def fit(self, training: Sequence[Mapping[str, Vector]], held_out: Sequence[Mapping[str, Vector]]) -> None:
        """Learn references from training images, and limits from them and from held-out ones.

        Distances of training images are taken without themselves among the references. Of detectors that speak of
        the segmentation they say nothing, and only held-out images count, if there are any. The false-alarm rate is
        shared out among the detectors.
        """
        known = [*training, *held_out]
        share = 1 - self.settings.false_alarms / max(1, len(self.detectors))
        for name, detector in self.detectors.items():
            learned = np.stack([vectors[name] for vectors in training])
            others = [vectors[name] for vectors in held_out]
            detector.fit(learned)
            distances = [detector.distance(vector) for vector in others]
            if detector.of_shift or not distances:
                distances += detector.leave_one_out(learned).tolist() if len(learned) > 1 else []
            usual = float(np.median(distances)) if distances else 0.0
            limit = float(np.quantile(distances, share, method="higher")) if distances else np.inf
            self.limits[name] = usual, limit
        self.share_empty = float(np.mean([vectors["empty"][0] for vectors in known]))

    def judge(self, output: Output) -> Verdict:
        """Return the verdict on what the run's network made of one image."""
        described = self.describe(output)
        scores = {
            name: self._relative(name, detector.distance(described[name]))
            for name, detector in self.detectors.items()
        }
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
        for name, detector in self.detectors.items():
            self.limits[name] = tuple(facts["limits"][name])
            detector.memory = {
                key.removeprefix(f"{name}."): array
                for key, array in arrays.items()
                if key.startswith(f"{name}.")
            }
        self.share_empty = facts["share_empty"]

    def _relative(self, name: str, distance: float) -> float:
        usual, limit = self.limits[name]
        if not np.isfinite(limit):
            return 0.0
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


def average_verdicts(verdicts: Sequence[Verdict], reasons: Mapping[str, str]) -> Verdict:
    """Return the verdict of several runs on one image, from the means of their scores."""
    if len(verdicts) == 1:
        return verdicts[0]
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.scores)
    means = {}
    for name in names:
        values = [verdict.scores[name] for verdict in verdicts if name in verdict.scores]
        means[name] = float(np.mean([np.inf if value is None else value for value in values]))
    return decide(means, reasons, all(EMPTY_REASON in verdict.reasons for verdict in verdicts))


def _is_empty(output: Output) -> bool:
    chances = output.probabilities
    return not ((chances > 0.5).any() if output.overlapping else chances.argmax(0).any())
