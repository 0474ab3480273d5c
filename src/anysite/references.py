"""What the judge of a finished training knows: descriptions of source images, training and held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anysite.config import JudgeSettings
from anysite.data.case import Case
from anysite.detectors import Vector
from anysite.errors import describe_error
from anysite.judge import LEAST, Judge
from anysite.segment import Segmenter


def learn_references(
    segmenter: Segmenter, training: Sequence[Case], held_out: Sequence[Case], settings: JudgeSettings
) -> tuple[Judge | None, dict[str, str]]:
    """Return the judge of a network, none where there are too few cases to learn limits from, and errors by case.

    Training cases are seen without mirrored views, which cost time and change no feature, unless they have to
    stand for held-out ones.

    Args:
        segmenter: Of the run.
        training: Cases to keep as references.
        held_out: Cases the network was not trained on.
        settings: Detectors and limits.
    """
    judge, failed = Judge(settings), dict[str, str]()

    def describe(cases: Sequence[Case], flips: bool | None) -> list[tuple[str, dict[str, Vector]]]:
        described = []
        for case in cases:
            try:
                vectors = judge.describe(segmenter.observe(case.image(), flips))
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost a finished training
                failed[case.id] = case.without_folders(describe_error(error))
                continue
            if all(np.isfinite(vector).all() for vector in vectors.values()):
                described.append((f"{case.domain}/{case.patient}", vectors))
            else:
                failed[case.id] = "features or probabilities that are not finite"
        return described

    unseen = [vectors for _, vectors in describe(held_out, None)]
    known = describe(training, False if len(unseen) >= LEAST else None)
    if not known:
        return None, failed
    judge.fit([vectors for _, vectors in known], unseen, [patient for patient, _ in known])
    return (judge if judge.detectors else None), failed
