"""What the judge of a finished training knows: descriptions of source images, training and held out."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from anysite.corrupt import CORRUPTIONS, corrupt
from anysite.data.case import Case, Dataset
from anysite.data.volume import Volume
from anysite.errors import describe_error
from anysite.judge import LEAST, Judge, Reference
from anysite.metrics import score_case
from anysite.plan import Plan
from anysite.segment import Segmenter
from anysite.settings import JudgeSettings


def learn_references(
    segmenter: Segmenter,
    training: Sequence[Case],
    held_out: Sequence[Case],
    dataset: Dataset,
    settings: JudgeSettings,
) -> tuple[Judge | None, dict[str, str]]:
    """Return the judge of a network, none where there are too few cases to learn limits from, and errors by case.

    Training cases are seen without mirrored views, which cost time and change no feature, unless they have to
    stand for held-out ones.

    Args:
        segmenter: Of the run.
        training: Cases to keep as references.
        held_out: Cases the network was not trained on.
        dataset: What they are of.
        settings: Detectors and limits.
    """
    judge, failed = Judge(settings), dict[str, str]()

    def observe(case: Case, image: Volume, flips: bool | None, shifted: bool = False) -> Reference | None:
        output = segmenter.observe(image, flips)
        vectors = judge.describe(output)
        if not all(np.isfinite(vector).all() for vector in vectors.values()):
            failed[case.id] = "features or probabilities that are not finite"
            return None
        dice = None
        if case in held_out and case.label_path is not None:
            truth = dataset.label_of(case)
            known = dataset.known_to(case)
            dice = mean_dice(segmenter.label_of(output, image), truth, segmenter.plan, known)
        return Reference(vectors, f"{case.domain}/{case.patient}", dice, shifted)

    def gather(cases: Sequence[Case], flips: bool | None, copies: int) -> Iterator[Reference]:
        for index, case in enumerate(cases):
            share = (copies + len(cases) - 1 - index) // len(cases)  # of the copies of all cases
            try:
                image = case.image()
                seen = [observe(case, image, flips)]
                seen += [observe(case, copy, flips, shifted=True) for copy in shift(image, case.id, share)]
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost a finished training
                failed[case.id] = case.without_folders(describe_error(error))
                continue
            yield from (reference for reference in seen if reference is not None)

    unseen = list(gather(held_out, None, settings.shifted_copies))
    enough = sum(not reference.shifted for reference in unseen) >= LEAST
    known = list(gather(training, False if enough else None, 0))
    if not known:
        return None, failed
    judge.fit(known, unseen)
    return (judge if judge.detectors else None), failed


def shift(image: Volume, case_id: str, copies: int) -> Iterator[Volume]:
    """Yield copies of an image under corruptions of any kind and severity, the same at every call."""
    chooser = np.random.default_rng(zlib.crc32(case_id.encode()))
    for _ in range(copies):
        name = str(chooser.choice(sorted(CORRUPTIONS)))
        yield corrupt(image, name, int(chooser.integers(1, 6)), int(chooser.integers(2**31)))


def mean_dice(label: Volume, truth: Volume, plan: Plan, known: Sequence[int]) -> float | None:
    """Return the mean Dice over the known classes, or the regions, that either map holds; none without any."""
    groups = plan.regions or tuple((index,) for index in known if index > 0)
    masks_of = [(str(group), tuple(group)) for group in groups]
    scores = score_case(label.array[0], truth.array[0], masks_of, truth.spacing, truth.unit, metrics=["dice"])
    defined = [score.value for score in scores if score.value is not None]
    return float(np.mean(defined)) if defined else None
