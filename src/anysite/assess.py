"""What a network that is trained can learn of itself from source cases: temperature, postprocessing and judge."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from anysite import runs
from anysite.calibrate import calibrate
from anysite.config import choose_adapter
from anysite.errors import describe_error
from anysite.judge import Judge
from anysite.loop import Training
from anysite.postprocessing import (
    SIZES,
    LabelMap,
    Postprocessing,
    choose_size,
    find_single_classes,
    measure_gain,
)
from anysite.references import learn_references
from anysite.segment import Segmenter


@dataclass
class Assessment:
    """What was learned, as far as it was wanted and there were source cases for it.

    Attributes:
        calibration: What calibration.json holds.
        postprocessing: What postprocessing.json holds.
        judge: Of masks.
        failed: Errors by case.
    """

    calibration: dict[str, Any] | None = None
    postprocessing: dict[str, Any] | None = None
    judge: Judge | None = None
    failed: dict[str, str] = field(default_factory=dict)


def assess(training: Training) -> Assessment:
    """Return what can be learned of a trained network from source cases.

    Whatever goes wrong is a warning, and never costs the training.
    """
    found = Assessment()
    if training.held_out.unlabelled:
        return found
    try:
        _observe_source_cases(training, found)
    except Exception as error:  # noqa: BLE001 - the network is trained, whatever else cannot be learned of it
        training.warn(f"no calibration and no verdicts: {describe_error(error)}")
        return Assessment()
    for case, error in found.failed.items():
        training.warn(f"{case} is left out of calibration, postprocessing and judge: {error}")
    return found


def _observe_source_cases(training: Training, found: Assessment) -> None:
    config, held_out = training.config, training.held_out
    path, network = training.output, training.learner.network
    run = runs.Run(path, config, training.plan, runs.read_splits(path), {})
    # A copy, because predicting by batch statistics would change the network.
    networks = [copy.deepcopy(network).eval()]
    # Of the plain network: neither adapted, nor told which of several datasets an image is like.
    settings = choose_adapter(config.predict, "none").model_copy(update={"task": None, "postprocess": True})
    segmenter = Segmenter([run], settings, training.fabric.device.type, networks)
    chosen = held_out.first_by_turns(config.calibration.cases)
    if chosen and config.calibration.kind != "none":
        found.calibration = calibrate(segmenter, chosen, held_out, config.calibration)
        found.failed |= found.calibration["failed"]
    if config.postprocessing.fragments == "learned" and not training.plan.regions:
        found.postprocessing = _learn_postprocessing(segmenter, training, found.failed)
        learned = Postprocessing.model_validate(found.postprocessing)
        # What is to be expected of a mask is to be expected of the one that leaves.
        segmenter.postprocessing = learned if config.predict.postprocess else Postprocessing()
    if config.judge.detectors:
        references = training.trained_on.first_by_turns(config.judge.cases)
        others = held_out.first_by_turns(config.judge.held_out_cases)
        found.judge, unseen = learn_references(segmenter, references, others, held_out, config.judge)
        found.failed |= unseen
        if found.judge is None:
            training.warn("too few source patients to judge masks by: predictions will have no verdicts")


def _learn_postprocessing(segmenter: Segmenter, training: Training, failed: dict[str, str]) -> dict[str, Any]:
    """Return what postprocessing.json holds: classes in one piece, and what taking their fragments out gains."""
    settings, held_out, trained_on = training.config.postprocessing, training.held_out, training.trained_on

    def read_labels() -> Iterator[tuple[LabelMap, list[int]]]:
        for case in trained_on.first_by_turns(settings.labels):
            yield trained_on.label_of(case).array[0], [*trained_on.known_to(case)]

    def segment_held_out() -> Iterator[tuple[LabelMap, LabelMap, list[int]]]:
        for case in held_out.first_by_turns(settings.cases):
            try:
                truth = held_out.label_of(case).array[0]
                yield segmenter.segment(case.image()).label.array[0], truth, [*held_out.known_to(case)]
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost a finished training
                failed[case.id] = case.without_folders(describe_error(error))

    sizes = (settings.smaller_than,) if settings.smaller_than else SIZES
    single = find_single_classes(read_labels(), sizes)
    gains = measure_gain(segment_held_out() if any(single.values()) else (), single)
    size, means = choose_size(gains)
    kept = tuple(index for index, gain in gains[size].items() if gain >= 0)
    names = training.plan.classes
    return Postprocessing(classes=kept, smaller_than=size).model_dump() | {
        "without_fragments": [names[index] for index in kept],
        "in_one_piece": [names[index] for index in single[size]],
        "dice_gained": {names[index]: round(gain, 5) for index, gain in gains[size].items()},
        "mean_dice_gained_below": {f"{size:g}": round(mean, 5) for size, mean in means.items()},
    }
