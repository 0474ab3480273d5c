"""What test-time reflection needs, learned for a run that is finished; its network stays bit by bit what it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from anysite import registry, runs
from anysite.data.case import Dataset
from anysite.errors import RunError
from anysite.loop import Progress
from anysite.settings import (
    CalibrationSettings,
    JudgeSettings,
    PostprocessingSettings,
    PretrainSettings,
)
from anysite.splits import split
from anysite.train import train

FOLDER = "reflecting"


def reflect(
    dataset: Dataset,
    path: Path,
    settings: Mapping[str, Any] | None = None,
    *,
    steps: int | None = None,
    replace: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> runs.Run:
    """Learn a synthesiser and an autoencoder of masks from a finished run's own training cases, into its folder.

    Interrupted, it continues when called again.

    Args:
        dataset: The one that the run was trained on.
        path: The run folder.
        settings: Of the objective `reflection`.
        steps: None: as many as the run was trained for.
        replace: Learn anew where the run has them already.

    Raises:
        RunError: no finished training, another dataset, the run has them already, or another process works on it.
        ConfigError: settings that do not exist or do not fit.
        TrainingError: a loss or gradient that is not finite.
        InterruptedTraining: SIGTERM or SIGINT arrived; a checkpoint was saved.
    """
    run = runs.open_run(path)
    with runs.locked(run.path):
        return _reflect(dataset, run, settings, steps, replace, on_progress)


def _reflect(
    dataset: Dataset,
    run: runs.Run,
    settings: Mapping[str, Any] | None,
    steps: int | None,
    replace: bool,
    on_progress: Callable[[Progress], None],
) -> runs.Run:
    path = run.path
    if runs.is_pretraining(run):
        raise RunError("a pretraining, which segments nothing", where=path, expected="a run of anysite train")
    registry.build("objective", "reflection", **(settings or {}))
    if runs.REFLECTION in run.manifest["files"] and not replace:
        raise RunError(
            "a run that has learned to reflect already", where=path, fix="add --replace to learn it anew"
        )
    found, recorded = split(dataset, run.config).as_ids(), run.splits
    if found != recorded:
        raise RunError(
            f"a dataset with {len(found['training'])} training cases",
            where=dataset.name,
            expected=f"the {len(recorded['training'])} that {path} was trained on",
            fix="give the dataset of that training, unchanged",
        )
    config = run.config.model_copy(
        update={
            "objectives": {"reflection": dict(settings or {})},
            "pretrained": str(run.path),
            "pretrain": PretrainSettings(),
            "calibration": CalibrationSettings(kind="none"),
            "postprocessing": PostprocessingSettings(fragments="kept"),
            "judge": JudgeSettings(detectors={}),
            "train": run.config.train.model_copy(
                # The network does not change, so that nothing is to be validated.
                update={
                    "steps": steps or run.manifest.get("steps", run.config.train.steps),
                    "diagnose_every": 0,
                    "validation_cases": 0,
                }
            ),
        }
    )
    output = run.path / FOLDER
    if (output / runs.MANIFEST).is_file():
        kept = runs.read_config(output)
        if kept.objectives != config.objectives or kept.train != config.train:
            shutil.rmtree(output)
    learned = train(dataset, config, output, resume=True, on_progress=on_progress, plan=run.plan)
    runs.take_reflection(run.path, learned.path)
    shutil.rmtree(output)
    return runs.open_run(path)
