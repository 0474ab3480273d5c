"""Fitting a run's temperature on held-out source patients, once it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from anysite.calibration import (
    Temperature,
    allow_unknown,
    fit_temperature,
    fold_unknown,
    score_calibration,
    select_band,
)
from anysite.data.case import Case, Dataset
from anysite.errors import DataError, GeometryError, describe_error
from anysite.segment import Segmenter
from anysite.settings import CalibrationSettings

VOXELS_A_CASE = 20_000


def calibrate(
    segmenter: Segmenter, cases: Sequence[Case], dataset: Dataset, settings: CalibrationSettings
) -> dict[str, Any]:
    """Return what calibration.json holds: the temperature, what it was fitted on, and the error before and after.

    A case that fails is left out and named. The errors are those of the
    cases it was fitted on, so that they say whether it fits and not what it gains elsewhere.

    Args:
        segmenter: Of the run, not calibrated yet.
        cases: Held-out cases with labels.
        dataset: What they are of.
        settings: How.
    """
    plan = segmenter.plan
    overlapping = bool(plan.regions)
    samples: list[tuple[np.ndarray, np.ndarray, Sequence[int]]] = []
    failed: dict[str, str] = {}
    for case in cases:
        try:
            samples.append((*sample_voxels(segmenter, case, dataset), dataset.known_to(case)))
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost a finished training
            failed[case.id] = case.without_folders(describe_error(error))
    none = np.empty((plan.outputs, 0), np.float32)
    chances = np.concatenate([none, *(chances for chances, _, _ in samples)], 1)
    # Logits are divided before anything is folded, in prediction as here.
    allowed = [allow_unknown(truth, known, overlapping) for _, truth, known in samples]
    kind = settings.kind
    if kind == "auto":  # networks may be sure of one organ and not of another
        kind = "per_class" if len({dataset.known_to(case) for case in dataset.cases}) > 1 else "global"
    temperature = fit_temperature(
        chances,
        np.concatenate([none > 0, *allowed], 1),
        overlapping=overlapping,
        per_class=kind == "per_class",
    )
    truth = np.concatenate([none > 0, *(truth for _, truth, _ in samples)], 1)

    def error_of(tempered: Temperature) -> float | None:
        folded = [
            fold_unknown(tempered.apply(part, overlapping), known, overlapping) for part, _, known in samples
        ]
        scores = score_calibration(
            np.concatenate([none, *folded], 1), truth, overlapping=overlapping, metrics=["ece"]
        )
        return scores["ece"]

    return {
        "temperature": list(temperature.values),
        "kind": kind,
        "cases": [case.id for case in cases if case.id not in failed],
        "failed": failed,
        "voxels": chances.shape[1],
        "expected_calibration_error": {"before": error_of(Temperature()), "after": error_of(temperature)},
    }


def sample_voxels(
    segmenter: Segmenter, case: Case, dataset: Dataset
) -> tuple[Float[np.ndarray, "k n"], Bool[np.ndarray, "k n"]]:
    """Return the probabilities and the truth of up to 20,000 random voxels near anything predicted or true.

    Raises:
        DataError: the case cannot be read, or its probabilities are not finite.
        GeometryError: image and label do not lie on one grid.
    """
    prediction = segmenter.segment(case.image())
    chances = prediction.raw.array
    if not np.isfinite(chances).all():
        raise DataError("probabilities that are not finite", where=case.id)
    label, known = dataset.label_of(case), dataset.known_to(case)
    if not label.same_grid(prediction.label):
        raise GeometryError(
            f"a label of shape {label.shape}", where=case.id, expected=f"{prediction.label.shape}"
        )
    found = np.where(np.isin(prediction.label.array[0], known), prediction.label.array[0], 0)
    band = select_band(found, label.array[0], label.spacing)
    voxels = np.flatnonzero(band)
    if len(voxels) > VOXELS_A_CASE:
        voxels = np.random.default_rng(0).choice(voxels, VOXELS_A_CASE, replace=False)
    return (
        chances.reshape(len(chances), -1)[:, voxels],
        segmenter.plan.as_maps(label.array[0].ravel()[voxels]),
    )
