"""Training: from labelled source sites to a run folder, on Lightning Fabric."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from anysite import atomic, compute, runs
from anysite.config import Config, TrainSettings
from anysite.data.case import Dataset
from anysite.errors import ConfigError, DataError, InterruptedTraining, RunError, TrainingError
from anysite.learner import Learner, build_learner
from anysite.patches import Batch, PatchSampler, PreparedCase, PreparedCases, prepare, slide
from anysite.plan import Plan, learn_plan

MEASURED_STEPS = 6


@dataclass(frozen=True)
class Progress:
    """How far training has come, for a progress bar."""

    step: int
    steps: int
    loss: float
    dice: float | None
    seconds_left: float
    note: str = ""


@dataclass(frozen=True)
class Splits:
    """The cases by role; patients never appear in two of them."""

    training: Dataset
    held_out: Dataset
    test: Dataset

    def as_ids(self) -> dict[str, list[str]]:
        """Return the case ids by role."""
        parts = {"training": self.training, "held_out": self.held_out, "test": self.test}
        return {role: [case.id for case in part.cases] for role, part in parts.items()}


def split(dataset: Dataset, config: Config) -> Splits:
    """Keep the test sites out, then hold out source patients; a patient of a test site trains nowhere.

    Raises:
        DataError: an unknown site, or no labelled case left to train on.
    """
    source, test = dataset.leave_out(config.test_domains)
    tested = {case.patient for case in test.cases}
    source = source.with_cases(c for c in source.labelled if c.patient not in tested)
    training, held_out = source.hold_out_patients(config.train.validation_fraction, config.seed)
    if not training.cases:
        raise DataError(
            "no labelled cases to train on",
            where=dataset.name,
            expected="labelled cases of a site that is not a test site",
        )
    return Splits(training, held_out, test)


def train(
    dataset: Dataset,
    config: Config,
    output: Path,
    *,
    budget_s: float | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    facts: dict[str, Any] | None = None,
) -> runs.Run:
    """Train on every site of `dataset` but the configured test sites, and write a run folder.

    Args:
        budget_s: Wall-clock seconds; the number of steps is then chosen from the measured time of a step.
        resume: Continue an interrupted run; on CPU the result is bit-identical to an uninterrupted one.
        facts: Anything to keep in the run's manifest, such as the preset's name.

    Raises:
        ConfigError: settings that do not fit each other or the data.
        DataError: cases that cannot be used.
        RunError: `output` already holds a run, or no checkpoint that `resume` could continue.
        TrainingError: a loss or gradient that is not finite.
        InterruptedTraining: SIGTERM or SIGINT arrived; a checkpoint was saved.
    """
    job = _Job(dataset, config, Path(output), budget_s, resume, time.monotonic(), on_progress, facts or {})
    accelerator = compute.choose_accelerator(config.train.accelerator)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=accelerator,
        devices=config.train.devices,
        strategy=_choose_strategy(config.train.devices),
        precision=compute.choose_precision(config.train.precision, accelerator),  # pyright: ignore[reportArgumentType]
    )
    fabric.launch()
    with runs.locked(job.output) if fabric.is_global_zero else nullcontext():
        if fabric.is_global_zero and not _is_finished(job):
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


def _is_finished(job: _Job) -> bool:
    return job.resume and (job.output / runs.MANIFEST).is_file() and runs.is_finished(job.output)


def _start(job: _Job) -> None:
    """Learn the plan and write what is known before training, unless an interrupted run is there."""
    if (job.output / runs.MANIFEST).is_file():
        if not job.resume:
            raise RunError(
                "a run is already there", where=job.output, fix="add --resume, or choose another --output"
            )
        return
    splits = split(job.dataset, job.config)
    plan = learn_plan(splits.training, job.config.plan, compute.use_threads(job.config.train.threads))
    domains = list(splits.training.domains)
    facts = {"dataset": job.dataset.name, "train_domains": domains, **job.facts}
    runs.start(job.output, job.config, plan, splits.as_ids(), **facts)


def _fit(fabric: Fabric, job: _Job) -> None:
    """Train with the configuration and plan of the run folder, whichever process wrote them."""
    config, plan = runs.read_config(job.output), runs.read_plan(job.output)
    threads = compute.use_threads(config.train.threads)
    compute.keep_freed_memory()
    splits = split(job.dataset, config)
    domains = splits.training.domains
    cases = PreparedCases(splits.training, plan, domains, config.train.cache_memory_gb)
    sampler = PatchSampler(cases.cases, plan, config.train, config.augment, config.seed, fabric.global_rank)
    torch.manual_seed(config.seed)
    learner = build_learner(config, plan, domains)
    learner.network.to(memory_format=learner.network.memory_format)  # pyright: ignore[reportCallIssue]
    training = _Training(fabric, job, config, plan, splits, sampler, learner, threads, cases.fingerprint())
    training.restore()
    training.run()
    if fabric.is_global_zero:
        seconds = time.monotonic() - job.started
        runs.finish(
            job.output, learner.network, steps=training.steps, seconds=round(seconds, 1), threads=threads
        )
    fabric.barrier()


@dataclass(eq=False)
class _Training:
    """One process's training: the loop and its checkpoints."""

    fabric: Fabric
    job: _Job
    config: Config
    plan: Plan
    splits: Splits
    sampler: PatchSampler
    learner: Learner
    threads: int
    data_fingerprint: str
    steps: int = 0
    step: int = 0
    dice: float | None = None
    waited_s: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings: TrainSettings = self.config.train
        optimizer = torch.optim.AdamW(
            self.learner.parameters(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        self.wrapped, self.optimizer = self.fabric.setup(self.learner, optimizer)
        self.steps = self.settings.steps

    def restore(self) -> None:
        """Continue from the checkpoint if there is one, else choose the number of steps."""
        path = self.job.output / runs.CHECKPOINT
        if path.is_file():
            self._load(*runs.load_tensors(path))
        elif self.job.budget_s is not None:
            self.steps = self._fit_budget(self.job.budget_s)

    def run(self) -> None:
        """Train up to the last step, validating and saving on the way."""
        began, first = time.monotonic(), self.step
        validation = self._prepare_validation()
        with _listening() as stop, ThreadPoolExecutor(1) as pool, self._writer() as writer:
            upcoming = self._fetch(pool, self.step)
            while self.step < self.steps:
                waiting = time.monotonic()
                batch = upcoming.result() if isinstance(upcoming, Future) else upcoming()
                self.waited_s += time.monotonic() - waiting
                upcoming = self._fetch(pool, self.step + 1)
                losses = self._take_step(batch.to(self.fabric.device))
                self.step += 1
                if validation and (self.step % self.settings.validate_every == 0 or self.step == self.steps):
                    self.dice = self._validate(validation)
                    losses["dice"] = self.dice
                self._record(losses, writer)
                per_step = (time.monotonic() - began) / (self.step - first)
                left = (self.steps - self.step) * per_step
                self.job.on_progress(Progress(self.step, self.steps, losses["total"], self.dice, left))
                if stop.is_set() and self.step < self.steps:
                    self._save()
                    raise InterruptedTraining(
                        f"stopped after step {self.step} of {self.steps}; the state is saved",
                        where=self.job.output,
                        fix="continue with anysite train --resume",
                    )
                if self.step % self.settings.checkpoint_every == 0 and self.step < self.steps:
                    self._save()
        self._write_log()

    def _take_step(self, batch: Batch) -> dict[str, float]:
        # Reseeding makes dropout and objectives functions of the step too, so that resuming needs no RNG state.
        torch.manual_seed(_derive_seed(self.config.seed, self.fabric.global_rank, self.step))
        rate = learning_rate(self.step, self.steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.learner.train()
        image = batch.image.contiguous(memory_format=self.learner.network.memory_format)
        losses: dict[str, Tensor] = self.wrapped(image, batch.label, batch.domain, self.step / self.steps)
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        self._require_finite("loss", values["total"], batch, rate, values)
        self.fabric.backward(losses["total"])
        clipped = self.fabric.clip_gradients(
            self.wrapped, self.optimizer, max_norm=self.settings.gradient_clip, error_if_nonfinite=False
        )
        norm = float(clipped) if clipped is not None else math.nan
        self._require_finite("gradient norm", norm, batch, rate, values)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.learner.after_step()
        return values | {"gradient_norm": norm, "learning_rate": rate}

    def _require_finite(
        self, what: str, value: float, batch: Batch, rate: float, losses: dict[str, float]
    ) -> None:
        if math.isfinite(value):
            return
        terms = ", ".join(f"{name} {loss:g}" for name, loss in losses.items())
        raise TrainingError(
            f"{what} {value} at step {self.step + 1} (learning rate {rate:.3g}; {terms}) "
            f"on cases {', '.join(dict.fromkeys(batch.case_ids))}",
            where=self.job.output,
            expected="finite numbers",
            fix="check these cases with anysite check, or lower train.learning_rate; the last checkpoint is kept",
        )

    def _fetch(self, pool: ThreadPoolExecutor, step: int) -> Future[Batch] | Callable[[], Batch]:
        if self.settings.prefetch and step < self.steps:
            return pool.submit(self.sampler.batch, step)
        return lambda: self.sampler.batch(step)

    def _fit_budget(self, budget_s: float) -> int:
        """Return how many steps fit, from the time of a few steps whose effects are then undone."""
        before = {name: t.clone() for name, t in self.learner.state_dict().items()}
        marks = []
        for step in range(MEASURED_STEPS):
            self.step = step
            self._take_step(self.sampler.batch(step).to(self.fabric.device))
            marks.append(time.monotonic())
        self.step = 0
        self.learner.load_state_dict(before)
        self.optimizer.state.clear()
        step_s = (marks[-1] - marks[1]) / (len(marks) - 2)
        # A tenth of what is left goes to validation, checkpoints and the final files.
        left_s = 0.9 * (budget_s - (time.monotonic() - self.job.started))
        steps = torch.tensor(max(1, int(left_s / step_s)))
        return int(self.fabric.broadcast(steps))

    def _prepare_validation(self) -> list[PreparedCase]:
        held_out = self.splits.held_out
        if not self.fabric.is_global_zero or not held_out.cases or not self.settings.validation_cases:
            return []
        # Every site in turn, so that a few cases still speak for all of them.
        by_site = [[c for c in held_out.cases if c.domain == domain] for domain in held_out.domains]
        ordered = [cases[i] for i in range(max(map(len, by_site))) for cases in by_site if i < len(cases)]
        return [prepare(c, held_out, self.plan, 0) for c in ordered[: self.settings.validation_cases]]

    def _validate(self, cases: Sequence[PreparedCase]) -> float:
        """Return the mean Dice over cases and foreground classes present, on the plan's grid."""
        self.learner.eval()
        network, plan, predict = self.learner.network, self.plan, self.config.predict
        scores: list[float] = []
        with torch.inference_mode(), self.fabric.autocast():
            for case in cases:
                image = case.image.float().to(self.fabric.device)
                probabilities = slide(
                    image,
                    lambda x: plan.as_probabilities(
                        network(x.contiguous(memory_format=network.memory_format)).float()
                    ),
                    plan,
                    0.25,
                    predict.batch_size,
                )
                scores += _dice_of_maps(probabilities.cpu(), case.label, plan)
        return sum(scores) / max(1, len(scores))

    def _state(self) -> dict[str, Tensor]:
        tensors = {f"learner.{name}": t for name, t in self.learner.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": t for name, t in state.items()}
        return tensors

    def _facts(self) -> dict[str, Any]:
        return {
            "threads": self.threads,
            "torch": torch.__version__,
            "precision": compute.choose_precision(self.settings.precision, self.fabric.device.type),
            "devices": self.fabric.world_size,
            "data": self.data_fingerprint,
        }

    def _save(self) -> None:
        if self.fabric.is_global_zero:
            facts = self._facts() | {"step": self.step, "steps": self.steps, "dice": self.dice}
            runs.save_tensors(self.job.output / runs.CHECKPOINT, self._state(), facts)
            self._write_log()

    def _load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        if facts.get("data") != self.data_fingerprint:
            raise RunError(
                "training cases that differ from those the checkpoint was trained on",
                where=self.job.output,
                fix="restore the dataset, or start a new run",
            )
        changed = [f"{k} was {facts.get(k)}, is {v}" for k, v in self._facts().items() if facts.get(k) != v]
        if changed:
            note = f"resumed, but not bit-identically: {'; '.join(changed)}"
            self.job.on_progress(Progress(facts["step"], facts["steps"], math.nan, None, math.nan, note))
        self.learner.load_state_dict(
            {k.removeprefix("learner."): t for k, t in tensors.items() if k.startswith("learner.")}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.steps, self.dice = facts["step"], facts["steps"], facts["dice"]
        log = self.job.output / runs.LOG
        if log.is_file():
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            self.log = [line for line in lines if line["step"] <= self.step]

    def _record(self, values: dict[str, float], writer: Any) -> None:
        if not self.fabric.is_global_zero:
            return
        self.log.append({"step": self.step, **{k: float(f"{v:.6g}") for k, v in values.items()}})
        if writer is not None:
            for name, value in values.items():
                writer.add_scalar(name, value, self.step)

    def _write_log(self) -> None:
        if self.fabric.is_global_zero:
            atomic.write_text(
                self.job.output / runs.LOG, "".join(json.dumps(line) + "\n" for line in self.log)
            )

    @contextmanager
    def _writer(self) -> Iterator[Any]:
        if not self.fabric.is_global_zero:
            yield None
            return
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.job.output / "tensorboard"), purge_step=self.step + 1)
        try:
            yield writer
        finally:
            writer.close()


def learning_rate(step: int, steps: int, settings: TrainSettings) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine, polynomial (0.9) or constant."""
    warmup = min(settings.warmup_steps, steps // 10)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    if settings.schedule == "cosine":
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    return settings.learning_rate * ((1 - share) ** 0.9 if settings.schedule == "polynomial" else 1.0)


@contextmanager
def _listening() -> Iterator[threading.Event]:
    """Turn the first SIGTERM or SIGINT into an event; a second one acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    former = {number: signal.getsignal(number) for number in numbers}

    def handle(number: int, frame: object) -> None:
        stop.set()
        for each in numbers:
            signal.signal(each, former[each])

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, former[number])


def _dice_of_maps(probabilities: Tensor, label: Tensor, plan: Plan) -> list[float]:
    """Return Dice for every foreground class or region that the label or the prediction has."""
    if plan.regions:
        pairs = [
            (p > 0.5, torch.isin(label, torch.tensor(r)))
            for p, r in zip(probabilities, plan.regions, strict=True)
        ]
    else:
        decided = probabilities.argmax(0)
        pairs = [(decided == k, label == k) for k in range(1, len(plan.classes))]
    sums = [(2 * int((a & b).sum()), int(a.sum()) + int(b.sum())) for a, b in pairs]
    return [both / either for both, either in sums if either]


def _derive_seed(seed: int, rank: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{rank}/{step}".encode()).digest()[:7])


def _choose_strategy(devices: int) -> str:
    """Return "ddp" where torchrun started this process.

    Raises:
        ConfigError: several devices without torchrun.
    """
    if "LOCAL_RANK" in os.environ:
        return "ddp"
    if devices > 1:
        raise ConfigError(
            f"{devices}",
            where="train.devices",
            expected="one process a device",
            fix=f"start it as torchrun --nproc-per-node={devices} -m anysite train ...",
        )
    return "auto"
