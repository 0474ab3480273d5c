"""The training loop: batches in, gradient steps, validation, checkpoints; a stop at any step loses nothing."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from anysite import atomic, runs
from anysite.config import Config
from anysite.data.case import Dataset
from anysite.errors import InterruptedTraining, RunError, TrainingError
from anysite.learner import Learner
from anysite.networks import encoder_tensors
from anysite.objectives import Step
from anysite.patches import Batch, PatchSampler
from anysite.plan import Plan
from anysite.previews import write_preview
from anysite.scalars import ScalarWriter
from anysite.settings import TrainSettings
from anysite.validation import prepare_validation, validate

MEASURED_STEPS = 6
PREVIEWED = 4
AVERAGED_BATCHES = 50  # that batch normalisation learns its statistics from anew


@dataclass(frozen=True)
class Progress:
    """How far training has come, for a progress bar; `note` is a warning instead."""

    step: int
    steps: int
    loss: float
    dice: float | None
    seconds_left: float
    note: str = ""


@dataclass(eq=False)
class Training:
    """One process's share of a training.

    Attributes:
        circumstances: What a resumed training must share with the interrupted one to be bit-identical.
        data: Digest of the prepared training cases; a checkpoint of other data is refused.
        steps: How many there will be; `step` of them are done.
        waited_s: Seconds in which the network had no batch to work on.
    """

    fabric: Fabric
    config: Config
    plan: Plan
    learner: Learner
    sampler: PatchSampler
    trained_on: Dataset
    held_out: Dataset
    output: Path
    data: str
    circumstances: dict[str, Any]
    on_progress: Callable[[Progress], None] = lambda progress: None
    steps: int = 0
    step: int = 0
    dice: float | None = None
    waited_s: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings: TrainSettings = self.config.train
        optimizer = torch.optim.AdamW(
            group_parameters(self.learner, self.settings.encoder_rate_factor),
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
        )
        self.wrapped, self.optimizer = self.fabric.setup(self.learner, optimizer)
        self.steps = self.settings.steps
        # Flat minima are better at sites unseen (Cha et al., 2021, https://arxiv.org/abs/2102.08604).
        self.average = AveragedModel(self.learner.network) if self.settings.average_share else None
        self.began, self.earlier_s = time.monotonic(), 0.0  # of this process, and of those that it continues

    def run(self) -> None:
        """Train from `step` up to `steps`, validating and saving on the way.

        Raises:
            TrainingError: a loss or gradient is not finite; the last checkpoint stays.
            InterruptedTraining: a signal arrived; a checkpoint was saved.
        """
        cases = self._leads() and prepare_validation(self.held_out, self.plan, self.settings.validation_cases)
        began, first = time.monotonic(), self.step
        with listening() as stop, self._curves() as curves:
            for batch in self.batches():
                values = self.take_step(batch)
                if self.step == self.steps:
                    self._take_average()
                if cases and (self.step % self.settings.validate_every == 0 or self.step == self.steps):
                    with self.fabric.autocast():
                        batch_size = self.config.predict.batch_size
                        self.dice = validate(self.learner.network, cases, self.plan, batch_size)
                    if self.dice is not None:
                        values["dice"] = self.dice
                self._record(values, curves)
                left_s = (self.steps - self.step) * (time.monotonic() - began) / (self.step - first)
                self.on_progress(Progress(self.step, self.steps, values["total"], self.dice, left_s))
                unfinished = self.step < self.steps
                stopping = unfinished and self._agree(stop.is_set())
                if unfinished and (stopping or self.step % self.settings.checkpoint_every == 0):
                    self.save()
                if stopping:
                    raise InterruptedTraining(
                        f"stopped after step {self.step} of {self.steps}; the state is saved",
                        where=self.output,
                        fix="continue with anysite train --resume",
                    )
        self._write_log()
        if self._leads():
            self._write_previews()

    def batches(self) -> Iterator[Batch]:
        """Yield the batch of every step to come, prepared ahead; count how long the network waits for them."""
        ahead = self.settings.prefetch
        if ahead is None:  # on a CPU the thread would take from the network more time than it saves
            ahead = self.fabric.device.type != "cpu"
        waiting = time.monotonic()
        for batch in self.sampler.batches(range(self.step, self.steps), ahead=ahead):
            self.waited_s += time.monotonic() - waiting
            yield batch.to(self.fabric.device)
            waiting = time.monotonic()

    def take_step(self, batch: Batch) -> dict[str, float]:
        """Learn from one batch, and return every loss, the gradient's norm and the learning rate.

        Raises:
            TrainingError: a loss or gradient that is not finite; the weights are left as they were.
        """
        # Reseeding makes dropout and objectives functions of the step too: there is no random state to save.
        torch.manual_seed(_derive_seed(self.config.training_seed, self.fabric.global_rank, self.step))
        rate = learning_rate(self.step, self.steps, self.settings)
        lasts = self.settings.encoder_rate_steps is None or self.step < self.settings.encoder_rate_steps
        for group in self.optimizer.param_groups:
            group["lr"] = rate * (group.get("factor", 1.0) if lasts else 1.0)
        self.learner.train()
        image = batch.image.contiguous(memory_format=self.learner.network.memory_format)
        every = self.settings.diagnose_every
        compare = bool(every) and self.step % every == 0
        losses: dict[str, Tensor] = self.wrapped(
            image, batch.label, batch.domain, self.step / self.steps, compare, batch.known
        )
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
        self.step += 1
        if self.average is not None and self.step > (1 - self.settings.average_share) * self.steps:
            self.average.update_parameters(self.learner.network)
        return values | {"gradient_norm": norm, "learning_rate": rate}

    def fit_budget(self, left_s: Callable[[], float]) -> None:
        """Choose how many steps fit, from the time of a few steps whose effects are then undone."""
        before = {name: t.clone() for name, t in self.learner.state_dict().items()}
        marks: list[float] = []
        for step in range(MEASURED_STEPS):
            self.take_step(self.sampler.batch(step).to(self.fabric.device))
            marks.append(time.monotonic())
        self.step = 0
        self.learner.load_state_dict(before)
        self.optimizer.state.clear()
        if self.average is not None:
            self.average.n_averaged.zero_()
        step_s = (marks[-1] - marks[1]) / (len(marks) - 2)
        if self.config.pretrain.objectives and left_s() <= 0:
            note = "the pretraining used up the budget; the training takes one step"
            self.on_progress(Progress(0, 1, math.nan, None, math.nan, note))
        # A tenth of what is left goes to validation, checkpoints and the final files.
        self.steps = int(self.fabric.broadcast(torch.tensor(max(1, int(0.9 * left_s() / step_s)))))

    def warn(self, note: str) -> None:
        """Tell the user something that does not stop the training."""
        self.on_progress(Progress(self.step, self.steps, math.nan, self.dice, math.nan, note))

    def save(self) -> None:
        """Write a checkpoint that `restore` continues from.

        Raises:
            RunError: it cannot be written; the former one stays.
        """
        if not self._leads():
            return
        tensors = {f"learner.{name}": t for name, t in self.learner.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": t for name, t in state.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": t for name, t in self.average.state_dict().items()}
        facts = {"step": self.step, "steps": self.steps, "dice": self.dice, "data": self.data}
        facts["seconds"] = self.earlier_s + time.monotonic() - self.began
        self._write_log()  # first: a checkpoint without its log could not be continued
        runs.save_tensors(
            self.output / runs.CHECKPOINT, tensors, facts | {"circumstances": self.circumstances}
        )

    def restore(self) -> None:
        """Continue from the checkpoint.

        Raises:
            RunError: it is damaged, or belongs to other data.
        """
        tensors, facts = runs.load_tensors(self.output / runs.CHECKPOINT)
        if facts["data"] != self.data:
            raise RunError(
                "training cases that differ from those the checkpoint was trained on",
                where=self.output,
                fix="restore the dataset, or start a new run",
            )
        former = facts["circumstances"]
        changed = [
            f"{k} was {former.get(k)}, is {v}" for k, v in self.circumstances.items() if former.get(k) != v
        ]
        if changed:
            note = f"resumed, but not bit-identically: {'; '.join(changed)}"
            self.on_progress(Progress(facts["step"], facts["steps"], math.nan, None, math.nan, note))
        state: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("optimizer.")]:
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensors.pop(name)
        names = [name for name in tensors if name.startswith("average.")]
        if self.average is not None and names:  # a checkpoint of before there were averages has none
            self.average.load_state_dict({n.removeprefix("average."): tensors.pop(n) for n in names})
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.learner.load_state_dict({name.removeprefix("learner."): t for name, t in tensors.items()})
        self.step, self.steps, self.dice = facts["step"], facts["steps"], facts["dice"]
        self.earlier_s = facts.get("seconds", 0.0)
        lines = (self.output / runs.LOG).read_text(encoding="utf-8").splitlines()
        self.log = [entry for line in lines if (entry := json.loads(line))["step"] <= self.step]

    def _take_average(self) -> None:
        """Put the averaged weights into the network, and statistics of batches that belong to them."""
        if self.average is None:
            return
        self.learner.network.load_state_dict(self.average.module.state_dict())
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.learner.modules()):
            last = range(max(0, self.steps - AVERAGED_BATCHES), self.steps)
            images = (self.sampler.batch(step).image for step in last)
            update_bn(images, self.learner.network, self.fabric.device)

    def _agree(self, stop: bool) -> bool:
        """Tell whether any process was asked to stop: one that left alone would block the others for ever."""
        if self.fabric.world_size == 1:
            return stop
        asked = self.fabric.all_reduce(torch.tensor(float(stop), device=self.fabric.device), reduce_op="sum")
        assert isinstance(asked, Tensor)
        return bool(asked > 0)

    def _leads(self) -> bool:
        return self.fabric.is_global_zero

    def _require_finite(
        self, what: str, value: float, batch: Batch, rate: float, losses: dict[str, float]
    ) -> None:
        if math.isfinite(value):
            return
        terms = ", ".join(f"{name} {loss:g}" for name, loss in losses.items())
        raise TrainingError(
            f"{what} {value} at step {self.step + 1} (learning rate {rate:.3g}; {terms}) "
            f"on cases {', '.join(dict.fromkeys(batch.case_ids))}",
            where=self.output,
            expected="finite numbers",
            fix="check these cases with anysite check, or start a new run with a lower train.learning_rate",
        )

    def _record(self, values: dict[str, float], curves: ScalarWriter | None) -> None:
        if curves is None:
            return
        self.log.append({"step": self.step, **{k: float(f"{v:.6g}") for k, v in values.items()}})
        curves.add(self.step, values)

    def _write_log(self) -> None:
        if self._leads():
            text = "".join(json.dumps(entry) + "\n" for entry in self.log)
            atomic.write_text(self.output / runs.LOG, text)

    @torch.no_grad()
    def _write_previews(self) -> None:
        """Write what objectives have to show of the last batch as pictures, one row a sample."""
        batch = self.sampler.batch(self.steps - 1).to(self.fabric.device)
        image = batch.image.contiguous(memory_format=self.learner.network.memory_format)
        self.learner.eval()
        with self.fabric.autocast():
            step = Step(image, batch.label, batch.domain, 1.0, self.learner.network)
            shown = {name: objective.preview(step) for name, objective in self.learner.named_objectives()}
        for name, images in shown.items():
            if images:
                colour = self.plan.network_channels == self.plan.channels == 3
                few = {column: image[:PREVIEWED] for column, image in images.items()}
                write_preview(self.output / f"preview_{name}.png", few, colour)

    def _curves(self) -> AbstractContextManager[ScalarWriter | None]:
        return ScalarWriter(self.output / "tensorboard", self.step + 1) if self._leads() else nullcontext()


def group_parameters(learner: Learner, encoder_factor: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: the encoder with a factor on its learning rate, and the rest."""
    if encoder_factor == 1:
        return [{"params": list(learner.parameters())}]
    encoder = encoder_tensors(learner.network)
    chosen = {id(p) for name, p in learner.network.named_parameters() if name in encoder}
    return [
        {"params": [p for p in learner.parameters() if id(p) not in chosen], "factor": 1.0},
        {"params": [p for p in learner.parameters() if id(p) in chosen], "factor": encoder_factor},
    ]


def learning_rate(step: int, steps: int, settings: TrainSettings) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine, polynomial (0.9) or constant."""
    warmup = min(settings.warmup_steps, steps // 10)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - warmup))  # measuring a budget takes steps of its own
    if settings.schedule == "cosine":
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    return settings.learning_rate * ((1 - share) ** 0.9 if settings.schedule == "polynomial" else 1.0)


@contextmanager
def listening() -> Iterator[threading.Event]:
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


def _derive_seed(seed: int, rank: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{rank}/{step}".encode()).digest()[:7])
