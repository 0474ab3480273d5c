"""What the judge of a finished training knows: descriptions of source images, training and held out."""

from __future__ import annotations

from collections.abc import Sequence

from anysite.config import JudgeSettings
from anysite.data.case import Case
from anysite.detectors import Vector
from anysite.errors import describe_error
from anysite.judge import Judge
from anysite.segment import Segmenter


def learn_references(
    segmenter: Segmenter, training: Sequence[Case], held_out: Sequence[Case], settings: JudgeSettings
) -> tuple[Judge | None, dict[str, str]]:
    """Return the judge of a network, none where fewer than two training cases can be read, and errors by case.

    Training cases are seen without mirrored views, which cost time and change no feature; without held-out cases
    they stand for them as prediction sees them.

    Args:
        segmenter: Of the run.
        training: Cases to keep as references.
        held_out: Cases the network was not trained on.
        settings: Detectors and limits.
    """
    judge, failed = Judge(settings), dict[str, str]()

    def describe(cases: Sequence[Case], flips: bool | None) -> list[dict[str, Vector]]:
        described = []
        for case in cases:
            try:
                described.append(judge.describe(segmenter.observe(case.image(), flips)))
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost a finished training
                failed[case.id] = case.without_folders(describe_error(error))
        return described

    known = describe(training, False if held_out else None)
    if len(known) < 2 or not judge.detectors:
        return None, failed
    judge.fit(known, describe(held_out, None))
    return judge, failed
