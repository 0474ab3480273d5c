"""What adapting to each image brought and cost: gain, and harm case by case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from anysite.judgement import ADAPTED, exact_interval
from anysite.report.read import Row
from anysite.report.summary import is_clean, person_of
from anysite.statistics import Estimate, estimate_mean

HARMED = 0.01  # Dice lost by which an image counts as harmed
PLAIN = ("", "none")
KINDS = {"unseen": "unseen site", "in_domain": "held out", "corrupted": "corrupted"}

Key = tuple[object, ...]


@dataclass(frozen=True)
class Gain:
    """What one adapter did to one kind of image; one image by one run counts once.

    Attributes:
        adapted: Images whose mask is that of an adapted network.
        gain: Mean change of Dice over patients, all images counted.
        gain_adapted: Over the adapted ones alone.
        harmed: Images that lost more than 0.01 Dice.
        harmed_share: The mean over patients of the share of their images that did, and its 95 % interval over patients;
            where none or all of them did, the exact one of so many patients.
        worst: The largest losses: case, and change of Dice.
    """

    kind: str
    images: int
    adapted: int
    gain: Estimate
    gain_adapted: Estimate | None
    harmed: int
    harmed_share: tuple[float, float, float]
    helped: int
    worst: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class AdaptationResult:
    """One adapter on one method."""

    method: str
    adapter: str
    gains: tuple[Gain, ...]


@dataclass
class _Image:
    dice: dict[str, float | None]
    person: str
    case: str
    adapted: bool = True


def describe_adaptations(rows: Sequence[Row]) -> tuple[AdaptationResult, ...]:
    """Return what every adapter did, compared image by image with none by the same run."""
    found: dict[tuple[str, str, str], dict[Key, _Image]] = defaultdict(dict)
    for row in rows:
        if not row.case or row.split not in ("unseen", "in_domain") or row.metric not in ("dice", ADAPTED):
            continue
        kind = row.split if is_clean(row) else "corrupted"
        run = (row.dataset, row.seed, row.train_domains, row.labels, row.overrides)
        key = (*run, row.domain, row.case, row.corruption_version, row.severity)
        group = found[row.method, "none" if row.adapt in PLAIN else row.adapt, kind]
        image = group.setdefault(key, _Image({}, person_of(row.domain, row.patient or row.case), row.case))
        if row.metric == "dice":
            image.dice[row.class_name] = row.value
        elif row.metric == ADAPTED:
            image.adapted = bool(row.value)
    results = []
    for method, adapter in dict.fromkeys((method, adapter) for method, adapter, _ in found):
        if adapter == "none":
            continue
        gains = [
            gain
            for kind in KINDS
            if (gain := _compare(kind, found[method, adapter, kind], found[method, "none", kind])) is not None
        ]
        if gains:
            results.append(AdaptationResult(method, adapter, tuple(gains)))
    return tuple(results)


def _compare(kind: str, adapted: dict[Key, _Image], plain: dict[Key, _Image]) -> Gain | None:
    pairs = [
        (image, change)
        for key, image in adapted.items()
        if key in plain and (change := _subtract(image.dice, plain[key].dice)) is not None
    ]
    if not pairs:
        return None
    changed = [(image, change) for image, change in pairs if image.adapted]
    harmed = sum(change < -HARMED for _, change in pairs)
    worst = sorted(((image.case, change) for image, change in pairs), key=lambda pair: pair[1])[:3]
    return Gain(
        kind=kind,
        images=len(pairs),
        adapted=len(changed),
        gain=_estimate(pairs),
        gain_adapted=_estimate(changed) if changed else None,
        harmed=harmed,
        harmed_share=_share_of(pairs),
        helped=sum(change > HARMED for _, change in pairs),
        worst=tuple((case, change) for case, change in worst if change < 0),
    )


def _share_of(pairs: Sequence[tuple[_Image, float]]) -> tuple[float, float, float]:
    harmed = [float(change < -HARMED) for _, change in pairs]
    share = estimate_mean(harmed, [image.person for image, _ in pairs])
    if share.low is None or share.high is None or share.low == share.high:
        # Patients who are all alike have no scatter that an interval could come from.
        return share.mean, *exact_interval(round(share.mean * share.n_patients), share.n_patients)
    return share.mean, share.low, share.high


def _subtract(after: dict[str, float | None], before: dict[str, float | None]) -> float | None:
    """Return the mean change over the classes that one of both masks or the truth holds.

    Where a Dice is undefined neither mask nor truth hold the class: nothing was found where nothing is, which is right.
    """
    pairs = [(after[name], before[name]) for name in sorted(after.keys() & before.keys())]
    changes = [(1 if a is None else a) - (1 if b is None else b) for a, b in pairs if (a, b) != (None, None)]
    return fmean(changes) if changes else None


def _estimate(pairs: Sequence[tuple[_Image, float]]) -> Estimate:
    return estimate_mean([change for _, change in pairs], [image.person for image, _ in pairs])
