"""The verdict on a mask: is the image like those of training, and is the network as sure as it is on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

from anysite import quality, registry
from anysite.detectors import Detector, Output, Vector
from anysite.judgement import EMPTY_REASON, ENSEMBLE, QUALITY
from anysite.settings import JudgeSettings

LEAST = 5  # distances that a limit can be learned from, and patients that one can be left out of
REJECT = 3.0  # times as far beyond the usual as where a review begins
COMBINED = "combined"  # the score that rests on those of all detectors, as QUALITY does
LEAST_DISAGREEMENT = 0.1  # of an ensemble, that sends a mask to review, however high a Dice is asked for
COMBINED_REASON = "several signs together are unlike those of images it knows"
QUALITY_REASON = "a lower Dice is to be expected than on images it knows"
ENSEMBLE_REASON = "the networks segment it differently"
UNKNOWN_REASON = "what the network makes of it is not in finite numbers"
Decision = Literal["accept", "review", "reject"]


@dataclass(frozen=True, eq=False)
class Reference:
    """What the judge learns from one source image.

    Attributes:
        vectors: What `Judge.describe` returned.
        patient: Whose it is, told apart from those of other sites.
        dice: Of the mask, the mean over classes; none where unknown or undefined.
        shifted: Whether it is a copy under a synthetic shift.
    """

    vectors: Mapping[str, Vector]
    patient: str
    dice: float | None = None
    shifted: bool = False


@dataclass(frozen=True)
class Verdict:
    """What to do with a mask.

    Attributes:
        decision: "accept", "review" by a person, or "reject".
        reasons: Why not to accept it, the weightiest first, in words for a reader of images.
        scores: Of every detector: 0 is the usual, 1 where a review begins; none where it is not finite.
        predicted_dice: Lower bound, expected value, upper bound; none where nothing is known, where nothing was found,
            and of images unlike those that the prediction was learned from.
        safe_dice: What can be counted on: the Dice that all but a stated share of masks like it reach; none where
            no Dice is predicted.
        least_dice: The Dice that was asked for, 0 where none was.
    """

    decision: Decision
    reasons: tuple[str, ...]
    scores: dict[str, float | None]
    predicted_dice: tuple[float, float, float] | None = None
    safe_dice: float | None = None
    least_dice: float = 0.0


class Judge:
    """Detectors with limits from source patients; a limit is crossed by a stated share of images like theirs.

    Attributes:
        limits: Of every score the median of its reference distances and where a review begins.
        share_empty: Share of the reference images in which nothing was found.
        weights: Of every detector in the combined score, and what its sign takes from the expected Dice, after
            the Dice of an image without signs, nothing where it speaks of the image; empty where there were too few
            held-out patients.
        margins: How far below and above the expected Dice the true one lies.
        risk_margin: How far below it the one that can be counted on lies.

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
        self.weights: dict[str, np.ndarray] = {}
        self.margins = (-1.0, 1.0)
        self.risk_margin = 0.0
        self._takes_dice_as_it_is = True

    @property
    def reasons(self) -> dict[str, str]:
        """What a high value of every score means, in words."""
        told = {name: detector.reason for name, detector in self.detectors.items()}
        return told | {COMBINED: COMBINED_REASON, QUALITY: QUALITY_REASON}

    @property
    def shift_scores(self) -> set[str]:
        """The scores that speak of the image, and not of its mask."""
        return {COMBINED, *(name for name, detector in self.detectors.items() if detector.of_shift)}

    @property
    def usual_intensities(self) -> Float[np.ndarray, "c k"] | None:
        """How the intensities of training images are distributed; none where no detector has learned it."""
        known = (detector.usual_intensities for detector in self.detectors.values())
        return next((shares for shares in known if shares is not None), None)

    def describe(self, output: Output) -> dict[str, Vector]:
        """Return the vector of every detector that can describe an output, all that needs to be kept of it.

        Where features or probabilities are not finite, so that nothing can be said, the vector is not either.
        """
        vectors: dict[str, Vector] = {}
        finite = bool(np.isfinite(output.probabilities).all())
        for name, detector in self.detectors.items():
            if not detector.can_describe(output):
                continue
            vectors[name] = np.array([np.nan])
            with (
                np.errstate(all="ignore"),
                suppress(ValueError, ArithmeticError),
            ):  # of values that are not finite
                if finite or detector.of_shift:
                    vectors[name] = detector.describe(output)
        return vectors | {"empty": np.array([float(not output.foreground.any())])}

    def fit(self, training: Sequence[Reference], held_out: Sequence[Reference]) -> None:
        """Learn references from training images, and limits from them and from held-out ones.

        Distances of training images are taken with all images of their patient left out of the references. Of
        detectors that speak of the segmentation they say nothing, and held-out images alone count where there are
        enough. A limit is the quantile of the false-alarm rate, shared out among the scores, or where a normal
        distribution of these distances' cube roots would have it for one image more, whichever is higher: of few
        images the quantile is but the largest. Detectors with fewer than five distances are dropped, and those that
        cannot describe every held-out image. From held-out images and their shifted copies the judge learns which signs
        together tell a shift, and what Dice to expect.
        """
        clean = [reference for reference in held_out if not reference.shifted]
        patients = [reference.patient for reference in training]
        enough = len(dict.fromkeys(patients)) >= LEAST
        joint = len({reference.patient for reference in clean}) >= LEAST and len(clean) < len(held_out)
        share = 1 - self.settings.false_alarms / max(1, len(self.detectors) + 2 * joint)
        for name, detector in list(self.detectors.items()):
            learned = [reference.vectors[name] for reference in training if name in reference.vectors]
            if learned:
                detector.fit(np.stack(learned))
            vectors = [reference.vectors[name] for reference in clean if name in reference.vectors]
            distances = [detector.distance(vector) for vector in vectors]
            if enough and len(learned) == len(training) and (detector.of_shift or len(distances) < LEAST):
                distances += detector.leave_one_out(np.stack(learned), patients).tolist()
            if len(distances) < LEAST or len(vectors) < len(clean):  # of some it would leave nothing joint
                del self.detectors[name]
                continue
            self.limits[name] = _find_limit(distances, share)
        if joint and self.detectors:
            self._fit_joint_scores(held_out, share)
        empty = [reference.vectors["empty"][0] for reference in (*training, *clean)]
        self.share_empty = float(np.mean(empty)) if empty else 1.0

    def judge(self, output: Output, least_dice: float = 0.0, *, image_alone: bool = False) -> Verdict:
        """Return the verdict on what the run's network made of one image.

        Args:
            output: Of the image.
            least_dice: Where only a lower Dice can be counted on the mask is sent to review.
            image_alone: Leave out what speaks of the segmentation, and what rests on it: it is made in another way
                than those that the limits were learned from.
        """
        described = self.describe(output)
        scores = self._score(described)
        if image_alone:
            scores = {name: score for name, score in scores.items() if self.detectors[name].of_shift}
        expected = safe = None
        if self.weights and not image_alone and np.isfinite(list(scores.values())).all():
            # Of an image that fits into one window nothing tells whether windows agree: that counts as usual.
            known = np.array([scores.get(name, 0.0) for name in self.detectors])
            strangeness = float(quality.signs_of(known) @ self.weights[COMBINED])
            scores[COMBINED] = self._relative(COMBINED, strangeness)
            # Where nothing was found there is nothing to doubt: the Dice is 0 or, of an empty truth, none.
            found = not described["empty"][0]
            signs = quality.signs_of(known, self._in_dice)
            middle = float(quality.predict_dice(self.weights[QUALITY], signs[None])[0])
            if found:
                scores[QUALITY] = self._relative(QUALITY, 1 - middle)
            if found and all(scores[name] <= 1 for name in self.shift_scores):
                below, above = self.margins
                expected = max(0.0, middle + below), middle, min(1.0, middle + above)
                safe = max(0.0, middle + self.risk_margin)
        return decide(scores, self.reasons, self._is_odd(described), expected, safe, least_dice)

    def memory(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return arrays and facts that `recall` needs."""
        arrays = {f"{name}.{key}": a for name, d in self.detectors.items() for key, a in d.memory.items()}
        arrays |= {f"{name}.weights": array for name, array in self.weights.items()}
        return arrays, {
            "limits": self.limits, "share_empty": self.share_empty, "margins": self.margins,
            "risk_margin": self.risk_margin,
        }  # fmt: skip

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
        for name in (COMBINED, QUALITY):
            if name in facts["limits"]:
                self.limits[name] = tuple(facts["limits"][name])
                self.weights[name] = arrays[f"{name}.weights"]
        below, above = facts.get("margins", self.margins)
        self.margins = float(below), float(above)
        # Runs of before it was learned have weights for signs that are all clipped.
        self._takes_dice_as_it_is = "risk_margin" in facts
        self.risk_margin = float(facts.get("risk_margin", self.risk_margin))

    @property
    def _in_dice(self) -> Bool[np.ndarray, " d"]:
        in_dice = [detector.in_dice for detector in self.detectors.values()]
        return np.array(in_dice, bool) & self._takes_dice_as_it_is

    def _score(self, described: Mapping[str, Vector]) -> dict[str, float]:
        scores = {}
        for name, detector in self.detectors.items():
            if name not in described:
                continue
            known = np.isfinite(described[name]).all()
            scores[name] = self._relative(name, detector.distance(described[name])) if known else np.nan
        return scores

    def _fit_joint_scores(self, held_out: Sequence[Reference], share: float) -> None:
        held_out = [r for r in held_out if all(name in r.vectors for name in self.detectors)]
        scores = np.array([[*self._score(reference.vectors).values()] for reference in held_out])
        signs, doubts = quality.signs_of(scores), quality.signs_of(scores, self._in_dice)
        shifted = np.array([reference.shifted for reference in held_out])
        usual = np.array([float(detector.of_shift) for detector in self.detectors.values()])
        if not usual.all():  # what the image says withdraws the expectation, and has no part in it
            doubts = np.where(usual > 0, 0.0, doubts)
        # Of a mask in which nothing was found no Dice is expected.
        dice_of = [None if reference.vectors["empty"][0] else reference.dice for reference in held_out]
        scored = np.array([dice is not None for dice in dice_of])
        patients = [r.patient for r, dice in zip(held_out, dice_of, strict=True) if dice is not None]
        dice = np.array([dice for dice in dice_of if dice is not None])
        if len({*patients}) < LEAST or not (scored & ~shifted).any():
            return
        expected = quality.expect_left_out(doubts[scored], dice, patients)
        errors = dice - expected
        below, above = quality.find_margins(errors, patients, self.settings.coverage)
        self.margins = max(below, -1.0), min(above, 1.0)
        # One tail of an interval has half of what it leaves out.
        self.risk_margin = max(-1.0, quality.find_margins(errors, patients, 1 - 2 * self.settings.risk)[0])
        self.weights = {
            COMBINED: quality.fit_shift(signs, shifted, usual),
            QUALITY: quality.fit_dice(doubts[scored], dice),
        }
        everyone = [reference.patient for reference in held_out]
        strangeness = quality.score_left_out(signs, shifted, usual, everyone)
        self.limits[COMBINED] = _find_limit(strangeness[~shifted], share, least=0.0)
        lost = 1 - expected[~shifted[scored]]
        unmarked = 1 - float(self.weights[QUALITY][0])
        self.limits[QUALITY] = _find_limit(lost, share, least=min(unmarked, float(lost.min())))

    def _relative(self, name: str, distance: float) -> float:
        usual, limit = self.limits[name]
        spread = limit - usual
        # Known images that are all alike in this tell nothing of how far others may be from them.
        return (distance - usual) / spread if spread > 1e-9 * max(1.0, abs(usual)) else 0.0

    def _is_odd(self, vectors: Mapping[str, Vector]) -> bool:
        return bool(vectors["empty"][0]) and self.share_empty < 0.05


def decide(
    scores: Mapping[str, float],
    reasons: Mapping[str, str],
    empty: bool = False,
    predicted_dice: tuple[float, float, float] | None = None,
    safe_dice: float | None = None,
    least_dice: float = 0.0,
) -> Verdict:
    """Return the verdict from scores of which 1 begins a review and 3 a rejection, and from the Dice to count on.

    A score that is not finite rejects: nothing can be said.
    """
    finite = {name: score for name, score in scores.items() if np.isfinite(score)}
    flagged = sorted((name for name, score in finite.items() if score > 1), key=lambda name: -finite[name])
    stated = [EMPTY_REASON] if empty else []
    if len(finite) < len(scores):
        stated.append(UNKNOWN_REASON)
    if safe_dice is not None and safe_dice < least_dice:
        stated.append(f"a Dice of only {safe_dice:.2f} can be counted on")
    stated += [reasons[name] for name in flagged]
    decision: Decision = "review" if stated else "accept"
    if len(finite) < len(scores) or any(score > REJECT for score in finite.values()):
        decision = "reject"
    kept = {name: float(finite[name]) if name in finite else None for name in scores}
    return Verdict(decision, tuple(stated), kept, predicted_dice, safe_dice, least_dice)


def average_verdicts(
    verdicts: Sequence[Verdict],
    reasons: Mapping[str, str],
    empty: bool,
    least_dice: float = 0.0,
    agreement: float | None = None,
) -> Verdict:
    """Return the verdict of several runs on one image, from the means of their scores, below 0 counted as 0.

    What they agree on needs no reference images: a review begins where their masks share less than the least Dice to
    be had (pairwise Dice; Zenk et al., 2025, https://arxiv.org/abs/2406.03323).

    Args:
        verdicts: One a run that judges.
        reasons: Of every detector.
        empty: Whether the mask they made together is.
        least_dice: As each of them was judged by.
        agreement: The mean Dice of each two of their masks; none of a single run.
    """
    if len(verdicts) == 1 and agreement is None:
        return verdicts[0]
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.scores)
    means = {}
    for name in names:
        values = [verdict.scores[name] for verdict in verdicts if name in verdict.scores]
        means[name] = float(np.mean([np.inf if value is None else max(value, 0.0) for value in values]))
    odd = empty and any(EMPTY_REASON in verdict.reasons for verdict in verdicts)
    known = [verdict.predicted_dice for verdict in verdicts if verdict.predicted_dice is not None]
    expected = safe = None
    if agreement is not None:
        means[ENSEMBLE] = (1 - agreement) / max(1 - least_dice, LEAST_DISAGREEMENT)
    if known and len(known) == len(verdicts) and not empty:
        low, middle, high = np.mean(known, 0).tolist()
        expected = low, middle, high
        safe = float(np.mean([verdict.safe_dice for verdict in verdicts if verdict.safe_dice is not None]))
    return decide(means, {**reasons, ENSEMBLE: ENSEMBLE_REASON}, odd, expected, safe, least_dice)


def _find_limit(
    distances: Sequence[float] | np.ndarray, share: float, least: float | None = None
) -> tuple[float, float]:
    """Return the median, and where a review begins so that so large a share of further such images lies below.

    Of few distances neither the mean nor the spread is sure, so that a normal distribution's quantile would be crossed
    several times as often: the limit is that of Student's t for one image more. Distances have longer tails than that,
    and it is taken of their cube roots, which are nearer to normal (Wilson, Hilferty, 1931,
    https://doi.org/10.1073/pnas.17.12.684). Of scores that begin at `least`, where many lie, it is taken of square
    roots (as Fisher's of chi-square); cube roots would put it at twice to four times where it belongs, of few images.
    """
    values = np.asarray(distances, float)
    origin = 0.0 if least is None else least
    power = 2 if least is not None else 3 if values.min() >= 0 else 1
    bent = (values - origin) ** (1 / power)
    count = len(values)
    beyond = special.stdtrit(count - 1, share) * np.sqrt(1 + 1 / count)
    limit = float(np.mean(bent) + beyond * np.std(bent, ddof=1))
    if power > 1:
        limit = origin + max(limit, 0.0) ** power
    return float(np.median(values)), max(float(np.quantile(values, share)), limit)
