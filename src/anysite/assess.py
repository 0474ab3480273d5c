"""What a network that is trained can learn of itself from source cases: its temperature and its judge."""

from __future__ import annotations

import copy
from typing import Any

from anysite import runs
from anysite.calibrate import calibrate
from anysite.config import choose_adapter
from anysite.errors import describe_error
from anysite.judge import Judge
from anysite.loop import Training
from anysite.references import learn_references
from anysite.segment import Segmenter


def assess(training: Training) -> tuple[dict[str, Any] | None, Judge | None]:
    """Return the calibration and the judge of a trained network, as far as wanted and there are source cases for them.

    Whatever goes wrong is a warning, and never costs the training.
    """
    if training.held_out.unlabelled:
        return None, None
    try:
        calibration, judge, failed = _observe_source_cases(training)
    except Exception as error:  # noqa: BLE001 - the network is trained, whatever else cannot be learned of it
        training.warn(f"no calibration and no verdicts: {describe_error(error)}")
        return None, None
    for case, error in failed.items():
        training.warn(f"{case} is left out of calibration and judge: {error}")
    return calibration, judge


def _observe_source_cases(training: Training) -> tuple[dict[str, Any] | None, Judge | None, dict[str, str]]:
    config, held_out = training.config, training.held_out
    path, network = training.output, training.learner.network
    run = runs.Run(path, config, training.plan, runs.read_splits(path), {})
    # A copy, because predicting by batch statistics would change the network.
    networks = [copy.deepcopy(network).eval()]
    # Of the plain network: neither adapted, nor told which of several datasets an image is like.
    settings = choose_adapter(config.predict, "none").model_copy(update={"task": None})
    segmenter = Segmenter([run], settings, training.fabric.device.type, networks)
    chosen = held_out.cases_by_turns[: config.calibration.cases]
    calibration, judge, failed = None, None, dict[str, str]()
    if chosen and config.calibration.kind != "none":
        calibration = calibrate(segmenter, chosen, held_out, config.calibration)
        failed |= calibration["failed"]
    if config.judge.detectors:
        references = training.trained_on.cases_by_turns[: config.judge.cases]
        others = held_out.cases_by_turns[: config.judge.held_out_cases]
        judge, unseen = learn_references(segmenter, references, others, held_out, config.judge)
        failed |= unseen
        if judge is None:
            training.warn("too few source patients to judge masks by: predictions will have no verdicts")
    return calibration, judge, failed
