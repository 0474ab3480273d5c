"""Training: from labelled source sites to a run folder, on Lightning Fabric."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from anysite import compute, registry, runs
from anysite.assess import assess
from anysite.axes import choose_flip_axes
from anysite.config import Config, differing_settings
from anysite.data.case import Dataset
from anysite.data.check import require_sound
from anysite.errors import ConfigError, RunError
from anysite.judge import Judge
from anysite.learner import build_learner, needs_labels
from anysite.loop import Progress, Training
from anysite.networks import Network, encoder_tensors
from anysite.patches import PatchSampler, PreparedCases, choose_batch_size
from anysite.plan import Plan
from anysite.planning import learn_plan
from anysite.settings import PretrainSettings
from anysite.sides import find_mirrored_sides
from anysite.splits import Splits, split
from anysite.transfer import (
    cases_seen,
    compare_intensities,
    locate_start,
    open_start,
    require_unseen,
    transfer,
)


def train(
    dataset: Dataset,
    config: Config,
    output: Path,
    *,
    budget_s: float | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    facts: dict[str, Any] | None = None,
    plan: Plan | None = None,
) -> runs.Run:
    """Train on every site of `dataset` but the configured test sites, and write a run folder.

    Where no configured objective needs labels, all images are learned from and the labels disregarded.

    Args:
        budget_s: Wall-clock seconds; the number of steps is then chosen from the measured time of a step.
        resume: Continue an interrupted run; on CPU the result is bit-identical to an uninterrupted one. Where none
            is there, one is started.
        facts: Anything to keep in the run's manifest, such as the preset's name.
        plan: To follow instead of learning one from the training cases.

    Raises:
        ConfigError: settings that do not fit each other or the data.
        FaultyDataError: errors in files of training sites, all of them listed; test sites are not read.
        DataError: cases that cannot be used.
        RunError: `output` already holds a run that is not to be resumed, or cannot be.
        TrainingError: a loss or gradient that is not finite.
        InterruptedTraining: SIGTERM or SIGINT arrived; a checkpoint was saved.
    """
    config = locate_start(config, Path(output))
    job = _Job(
        dataset, config, Path(output), budget_s, resume, time.monotonic(), on_progress, facts or {}, plan
    )
    if resume and (job.output / runs.CONFIG).is_file():
        job = replace(job, kept=runs.read_config(job.output))
    if not needs_labels(job.kept or config):
        job = replace(job, dataset=dataset.without_labels())
    fabric = start_fabric(job.kept or config)
    with runs.locked(job.output) if fabric.is_global_zero else nullcontext():
        if fabric.is_global_zero:
            runs.tidy(job.output)
            _start(job)
        fabric.barrier()
        if not _is_finished(job):
            _fit(fabric, job)
    return runs.open_run(job.output)


@dataclass(frozen=True, eq=False)
class _Job:
    """What `train` was asked to do."""

    dataset: Dataset
    config: Config
    output: Path
    budget_s: float | None
    resume: bool
    started: float
    on_progress: Callable[[Progress], None]
    facts: dict[str, Any]
    plan: Plan | None = None
    kept: Config | None = None

    def warn(self, note: str) -> None:
        """Tell the user something that does not stop the training."""
        self.on_progress(Progress(0, 0, math.nan, None, math.nan, note))


def _is_finished(job: _Job) -> bool:
    return job.resume and (job.output / runs.MANIFEST).is_file() and runs.is_finished(job.output)


def _start(job: _Job) -> None:
    """Learn the plan and write what is known before training, unless an interrupted run is there."""
    if (job.output / runs.MANIFEST).is_file():
        _require_resumable(job)
        return
    splits = split(job.dataset, job.config)
    if splits.dropped:
        job.warn(f"{len(splits.dropped)} cases train nowhere, because their patient is also at a test site")
    if job.config.train.unlabelled_share and not splits.unlabelled and not job.dataset.unlabelled:
        job.warn(
            "no image of the training sites is without a label, so that train.unlabelled_share does nothing"
        )
    threads = compute.use_threads(job.config.train.threads)
    if job.plan is None:  # who brings a plan has read the files
        seen = {case.id for part in (splits.training, splits.held_out) for case in part.cases} | {
            case.id for case in splits.unlabelled
        }
        require_sound(job.dataset.with_cases(case for case in job.dataset.cases if case.id in seen), threads)
    plan = job.plan or learn_plan(splits.training, job.config.plan, threads)
    structures = plan.region_names or plan.classes
    if sides := find_mirrored_sides(job.config.augment, plan.axes[-plan.dimension :], structures):
        axes = choose_flip_axes(job.config.augment, plan.dimension)
        kept = ",".join(str(axis) for axis in axes if axis != sides.axis)
        job.warn(
            f"{sides.one} and {sides.other}: training mirrors left and right; where only their side tells them "
            f"apart, start anew with --set augment.flip_axes=[{kept}]"
        )
    domains = splits.learned_domains
    if job.config.predict.task:
        plan.for_task(job.config.predict.task)
    learner = build_learner(job.config, plan, domains)  # so that a wrong setting leaves no run folder behind
    choose_flip_axes(job.config.augment, plan.dimension)
    mixes = job.config.augment.enabled and job.config.augment.amplitude_mixing > 0
    if choose_batch_size(job.config.train, plan) == 1 and (mixes or "ram_dsir" in job.config.objectives):
        job.warn(
            "a batch of one image has none to mix amplitudes with, so that nothing is mixed; "
            "train.batch_size=2 is the least that mixes"
        )
    _check_start(job, splits, learner.network, plan)
    Judge(job.config.judge)  # as above
    pretrained = splits.images.domains if job.config.pretrain.objectives else ()
    facts = {
        "kind": "pretraining" if job.dataset.unlabelled else "segmentation",
        "dataset": job.dataset.name,
        # With few labelled patients a site may have none that is trained on; its held-out patients stay in domain.
        "train_domains": list(dict.fromkeys((*splits.source_domains, *splits.learned_domains, *pretrained))),
        "budget_s": job.budget_s,
        **job.facts,
    }
    runs.start(job.output, job.config, plan, splits.as_ids(), **facts)


def _require_resumable(job: _Job) -> None:
    """Say which settings are ignored, and refuse what would not be the same training.

    Raises:
        RunError: no resuming was asked for, or the dataset gives other splits than the run had.
    """
    if job.kept is None:
        raise RunError(
            "a run is already there", where=job.output, fix="add --resume, or choose another --output"
        )
    ignored = differing_settings(job.config, job.kept)
    if ignored:
        job.warn(f"resuming with the run's own settings; ignored: {', '.join(ignored)}")
    budget_s = runs.read_manifest(job.output).get("budget_s")
    if job.budget_s is not None and job.budget_s != budget_s:
        job.warn(f"resuming with the run's own {_describe_budget(budget_s)}; --budget is ignored")
    if not _is_finished(job) and split(job.dataset, job.kept).as_ids() != runs.read_splits(job.output):
        raise RunError(
            "training cases that differ from those the run was started with",
            where=job.output,
            fix="restore the dataset, or start a new run",
        )


def _describe_budget(budget_s: float | None) -> str:
    return "number of steps" if budget_s is None else f"budget of {budget_s:g} s"


def _fit(fabric: Fabric, job: _Job) -> None:
    """Train with the configuration and plan of the run folder, whichever process wrote them."""
    config = runs.read_config(job.output)
    threads = compute.use_threads(config.train.threads)
    compute.keep_freed_memory()
    training = build_training(fabric, job.dataset, config, job.output, job.on_progress, threads)
    if (job.output / runs.CHECKPOINT).is_file():
        training.restore()
    else:
        _load_start(fabric, job, training)
        if (budget_s := runs.read_manifest(job.output).get("budget_s")) is not None:
            training.fit_budget(lambda: budget_s - (time.monotonic() - job.started))
    began = time.monotonic()
    training.run()
    trained = time.monotonic()
    if fabric.is_global_zero:
        training.save()  # what follows takes a while, and an end of it must not cost the training
        found = assess(training)
        now = time.monotonic()
        facts = {
            "steps": training.steps,
            "seconds": round(training.earlier_s + now - job.started, 1),
            "seconds_judging": round(now - trained, 1),
            "share_of_time_waiting_for_batches": round(training.waited_s / max(trained - began, 1e-9), 4),
            "threads": threads,
            "encoder": sorted(encoder_tensors(training.learner.network)),
        }
        if found.judge is not None:
            used = training.held_out.first_by_turns(config.judge.held_out_cases)
            facts["judge_learned_from"] = [case.id for case in used]
        reflection = dict(training.learner.named_objectives()).get("reflection")
        runs.finish(
            job.output, training.learner.network, found.calibration, found.judge, reflection,
            found.postprocessing, **facts,
        )  # fmt: skip
    fabric.barrier()


def _check_start(job: _Job, splits: Splits, network: Network, plan: Plan) -> None:
    """Find out before anything is written whether the weights to start from exist, fit and may be used.

    Raises:
        ConfigError: they do not, or a pretraining would need labels.
    """
    config = job.config
    adapt = config.predict.adapt
    if adapt.method != "none":
        name = registry.AUTO_ADAPTER if adapt.method == "auto" else adapt.method
        registry.build("adapter", name, **adapt.settings)
    for name, settings in config.pretrain.objectives.items():
        registry.build("objective", name, **settings)  # so that a wrong setting is found now
        if registry.find("objective", name).needs_label:
            raise ConfigError(f"objective {name!r}, which needs labels", where="pretrain.objectives")
    if config.pretrained is not None:
        if config.pretrain.objectives:
            raise ConfigError("both pretrained and pretrain.objectives", expected="one of the two")
        run = open_start(config.pretrained, job.output)
        transfer(run, network)
        if mismatch := compare_intensities(run.plan, plan):
            job.warn(mismatch)
        if doubtful := require_unseen(run, job.dataset, splits):
            job.warn(
                f"{run.path.name} learned from another dataset in which {len(doubtful)} cases have the ids of cases "
                f"held out or tested here, such as {doubtful[0]}; if they are the same images, results will be too good"
            )


def _load_start(fabric: Fabric, job: _Job, training: Training) -> None:
    """Put the weights of an earlier run, or of a pretraining done now, into the network; note what was taken."""
    config = training.config
    if config.pretrain.objectives:
        run = _pretrain(fabric, job, training)
    elif config.pretrained is not None:
        run = open_start(config.pretrained, job.output)
    else:
        return
    seen = {dataset: sorted(ids) for dataset, ids in cases_seen(run).items()}
    started_from = {"run": run.path.name, "seen": seen, **asdict(transfer(run, training.learner.network))}
    if fabric.is_global_zero:
        runs.note(job.output, started_from=started_from)


def _pretrain(fabric: Fabric, job: _Job, training: Training) -> runs.Run:
    """Learn from the images of the training sites, labelled or not, on the plan of the training to come."""
    if fabric.world_size > 1:
        raise ConfigError(
            "pretrain.objectives with several processes",
            expected="one process",
            fix="run anysite pretrain first, and train with --set pretrained=RUN",
        )
    config, stage = training.config, training.config.pretrain
    settings = config.train.model_copy(
        update={
            "steps": stage.steps, "learning_rate": stage.learning_rate, "validation_fraction": 0.0,
            "batch_size": stage.batch_size or config.train.batch_size, "labelled_patients": None,
            "encoder_rate_factor": 1.0, "unlabelled_share": 0.0,
        }
    )  # fmt: skip
    alone = {
        "objectives": stage.objectives,
        "pretrain": PretrainSettings(),
        "test_domains": (),
        "train": settings,
    }
    return train(
        split(job.dataset, config).images,
        config.model_copy(update=alone),
        job.output / "pretraining",
        resume=True,
        on_progress=job.on_progress,
        plan=training.plan,
    )


def build_training(
    fabric: Fabric,
    dataset: Dataset,
    config: Config,
    output: Path,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    threads: int = 0,
) -> Training:
    """Prepare the cases, the network and the objectives of the run folder `output`, up to the first step.

    Raises:
        DataError: cases that cannot be used.
        ConfigError: unknown or unfitting settings of network or objectives.
    """
    plan, splits = runs.read_plan(output), split(dataset, config)
    domains = splits.learned_domains
    memory_gb = config.train.cache_memory_gb
    cases = PreparedCases(splits.training, plan, domains, memory_gb, splits.unlabelled)
    sampler = PatchSampler(
        cases.cases, plan, config.train, config.augment, config.training_seed, fabric.global_rank,
        fabric.world_size,
    )  # fmt: skip
    torch.manual_seed(config.training_seed)
    learner = build_learner(config, plan, domains)
    for module in learner.modules():  # also the teacher that an objective may keep
        if isinstance(module, Network):
            module.to(memory_format=module.memory_format)  # pyright: ignore[reportCallIssue]
    circumstances = {
        "threads": threads,
        "torch": torch.__version__,
        "precision": compute.choose_precision(config.train.precision, fabric.device.type),
        "processes": fabric.world_size,
        "device": fabric.device.type,
    }
    return Training(
        fabric,
        config,
        plan,
        learner,
        sampler,
        splits.training,
        splits.held_out,
        output,
        cases.fingerprint(),
        circumstances,
        on_progress,
    )


def start_fabric(config: Config) -> Fabric:
    """Return Fabric on the configured devices, in the precision the processor is good at.

    Raises:
        ConfigError: several devices without torchrun.
    """
    accelerator = compute.choose_accelerator(config.train.accelerator)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=accelerator,
        devices=config.train.devices,
        strategy=_choose_strategy(config.train.devices),
        precision=compute.choose_precision(config.train.precision, accelerator),  # pyright: ignore[reportArgumentType]
    )
    fabric.launch()
    return fabric


def _choose_strategy(devices: int) -> str:
    """Return "ddp" where torchrun started this process."""
    if "LOCAL_RANK" in os.environ:
        return "ddp_find_unused_parameters_true"  # a pretraining has no use for the network's decoder
    if devices > 1:
        raise ConfigError(
            f"{devices}",
            where="train.devices",
            expected="one process a device",
            fix=f"start it as torchrun --nproc-per-node={devices} -m anysite train ...",
        )
    return "auto"
