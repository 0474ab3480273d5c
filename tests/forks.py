"""Processes that are killed, stopped and set against each other; run as a program, which prints what became of them.

PyTorch is imported once; every training or prediction is a fork of this program, so that its end is a real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from anysite import atomic, cli, config, loop, runs, train
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.errors import AnysiteError
from anysite.rows import read_rows, write_rows

EVERY = 3
SETTINGS = [
    *("network.width=4", "network.depth=2", "plan.patch_size=[16, 16]", "train.batch_size=1"),
    *("train.threads=1", "train.precision=32-true", "train.validation_cases=0", "train.steps=12"),
    *(f"train.checkpoint_every={EVERY}", "judge.detectors={}", "calibration.kind=none"),
    *("predict.flips=false", "predict.precision=32-true"),
]
COMMAND_SETTINGS = [f"--set={setting}" for setting in SETTINGS]


class Child:
    """A fork that runs a function; what the function writes to the pipe it is given arrives in `heard`."""

    def __init__(self, function: Callable[[int], int]) -> None:
        self.reading, writing = os.pipe()
        self.process, self.heard, self.code = os.fork(), b"", 0
        if self.process == 0:
            os.close(self.reading)
            code = 99
            try:
                code = function(writing)
            finally:
                os._exit(code)
        os.close(writing)

    def listen(self, seconds: float, until: bytes = b"") -> bool:
        """Hear until a byte arrives or the time is over; return False once the child has ended."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([self.reading], [], [], left)
            if ready:
                heard = os.read(self.reading, 4096)
                self.heard += heard
                if not heard:
                    return False
                if until and until in heard:
                    return True
        return True

    def end(self, number: int | None = None) -> int:
        """Send a signal, wait for the end, and return the exit code, negative for a signal."""
        if number is not None:
            os.kill(self.process, number)
        while self.listen(60):
            pass
        os.close(self.reading)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def train_once(data: Path, output: Path, tell: int, freeze_at: int = 0, halfway: bool = False) -> int:
    """Train or resume, telling every step; stand still at the given write, before it or with half of it on disk."""
    count = 0

    def freezing(real: Callable[..., Any], paths: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == freeze_at:
                if halfway and paths:
                    real(*arguments, **named)
                    os.truncate(arguments[1], Path(arguments[1]).stat().st_size // 2)
                os.write(tell, b"F")
                time.sleep(60)
            return real(*arguments, **named)

        return call

    def report(progress: loop.Progress) -> None:
        os.write(tell, bytes([progress.step]))

    with (
        mock.patch.object(os, "fsync", freezing(os.fsync, False)),
        mock.patch.object(os, "replace", freezing(os.replace, False)),
        mock.patch.object(runs, "save_file", freezing(runs.save_file, True)),
    ):
        train.train(
            open_dataset(data), config.load("baseline", SETTINGS), output, resume=True, on_progress=report
        )
    os.write(tell, b"D")
    return 0


def call(arguments: list[str], output: Path) -> int:
    """Run a command as its own program would, and return its exit code."""
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: PTH123, SIM115
    sys.argv = ["anysite", *arguments]
    from rich.console import Console

    from anysite import console

    console.output, console.errors = Console(file=sys.stdout), Console(file=sys.stderr, soft_wrap=True)
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def check_state(run: Path, heard: bytes) -> str:
    """Return what is wrong with the folder of a training that was killed, empty where nothing is."""
    try:
        if not (run / runs.MANIFEST).is_file():
            return "" if not heard.strip(b"F") else "steps, but no manifest"
        done, steps = 0, [byte for byte in heard if byte <= 12]
        if (run / runs.CHECKPOINT).is_file():
            done = runs.load_tensors(run / runs.CHECKPOINT)[1]["step"]
        if runs.is_finished(run):
            runs.open_run(run).network()
            done = 12
        for read in (runs.read_config, runs.read_plan, runs.read_splits):
            read(run)
    except AnysiteError as error:
        return str(error)
    lost = max(steps, default=0) - done
    return f"{lost} steps lost" if lost > EVERY else ""


def sweep_kills(data: Path, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill trainings at random times and inside random writes, each run a few times before it may end."""
    chooser, faults, killed, inside, ended = random.Random(seed), [], 0, 0, 0
    reference = folder / "reference"
    began = time.monotonic()
    assert Child(lambda tell: train_once(data, reference, tell)).end() == 0
    usual_s = time.monotonic() - began
    expected = [atomic.sha256(reference / name) for name in (runs.WEIGHTS, runs.LOG)]
    while killed < kills:
        run = folder / f"run{ended}"
        for _ in range(chooser.randint(1, 4)):
            forced = killed % 2 == 1
            at, halfway = chooser.randint(1, 30) if forced else 0, chooser.random() < 0.5
            child = Child(lambda tell, at=at, half=halfway: train_once(data, run, tell, at, half))  # noqa: B023
            alive = child.listen(30, until=b"F") if forced else child.listen(chooser.uniform(0, usual_s))
            code = child.end(signal.SIGKILL if alive else None)
            if code not in (0, -signal.SIGKILL):
                faults.append(f"exit code {code}")
            if code == -signal.SIGKILL:
                killed, inside = killed + 1, inside + forced
            if fault := check_state(run, child.heard):
                faults.append(fault)
            if code == 0 or killed == kills:
                break
        code = Child(lambda tell: train_once(data, run, tell)).end()  # noqa: B023
        ended += 1
        if code or [atomic.sha256(run / name) for name in (runs.WEIGHTS, runs.LOG)] != expected:
            faults.append(f"run {ended}: exit code {code} or other weights than without a kill")
        if left := [path.name for path in run.rglob("*.partial-*")] + [*run.glob(runs.CHECKPOINT)]:
            faults.append(f"left behind: {left}")
    return {"kills": killed, "inside_a_write": inside, "runs_compared": ended, "faults": faults}


def sweep_signals(data: Path, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Send SIGTERM or SIGINT to trainings of the command line; every third gets a second one at once."""
    chooser, faults, codes, slowest = random.Random(seed), [], [], 0.0
    command = ["train", str(data), *COMMAND_SETTINGS, "--set=train.steps=100000", "--resume"]
    for index in range(count):
        run, number = folder / f"signal{index}", chooser.choice((signal.SIGTERM, signal.SIGINT))
        log = folder / f"signal{index}.txt"
        child = Child(lambda tell: call([*command, "--output", str(run)], log))  # noqa: B023
        while not list(run.glob(runs.CHECKPOINT)):
            child.listen(0.02)
        child.listen(chooser.uniform(0, 0.2))
        began, twice = time.monotonic(), index % 3 == 2
        if twice:
            os.kill(child.process, number)
        code = child.end(number)
        slowest = max(slowest, time.monotonic() - began)
        codes.append(code)
        # The second one may arrive while the first is still waiting to be delivered, and counts as one with it.
        allowed = (3, 130, -signal.SIGTERM) if twice else (3,)
        if code not in allowed:
            faults.append(f"exit code {code} after {number.name}: {log.read_text()[-300:]}")
        if "Traceback" in log.read_text():
            faults.append(log.read_text()[-500:])
        step = runs.load_tensors(run / runs.CHECKPOINT)[1]["step"]
        if code == 3 and f"stopped after step {step} of" not in " ".join(log.read_text().split()):
            faults.append(f"step {step} saved: {log.read_text()[-300:]}")
        if list(run.rglob("*.partial-*")) and not twice:
            faults.append("temporary files")
    return {"signals": count, "codes": codes, "slowest_s": round(slowest, 2), "faults": faults}


def sweep_races(data: Path, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Start two processes at once on one run folder, one prediction folder, or one file of rows."""
    chooser, faults, refused = random.Random(seed), [], 0
    reference, masks = folder / "race_reference", folder / "race_masks"
    train_command = ["train", str(data), *COMMAND_SETTINGS, "--output"]
    assert Child(lambda tell: call([*train_command, str(reference)], folder / "log.txt")).end() == 0
    predict = ["predict", str(reference), str(data), "--include-training", "--output"]
    assert Child(lambda tell: call([*predict, str(masks)], folder / "log.txt")).end() == 0
    weights = atomic.sha256(reference / runs.WEIGHTS)
    expected = {path.name: atomic.sha256(path) for path in masks.glob("*.png")}
    for index in range(count):
        place, log = folder / f"race{index}", folder / f"race{index}.txt"
        kind = ("train", "predict", "rows")[index % 3]

        def work(
            tell: int, index: int = index, kind: str = kind, place: Path = place, log: Path = log
        ) -> int:
            if kind == "rows":
                return append(place / "rows.jsonl", os.getpid())
            return call([*(train_command if kind == "train" else predict), str(place)], log)

        children = [Child(work)]
        time.sleep(chooser.choice((0, 0, chooser.uniform(0, 0.4))))
        children.append(Child(work))
        codes = sorted(child.end() for child in children)
        text = log.read_text() if log.exists() else ""
        refused += codes == [0, 2]
        if codes not in ([0, 0], [0, 2]) or "Traceback" in text:
            faults.append(f"{kind}: exit codes {codes}: {text[-300:]}")
        if codes == [0, 2] and "in use by another process" not in text and "already there" not in text:
            faults.append(f"{kind}: {text[-300:]}")
        if kind == "train" and atomic.sha256(runs.open_run(place).path / runs.WEIGHTS) != weights:
            faults.append("other weights")
        if kind == "predict" and {p.name: atomic.sha256(p) for p in place.glob("*.png")} != expected:
            faults.append("other masks")
        if kind == "rows" and (rows := len(read_rows(place / "rows.jsonl"))) != 40:
            faults.append(f"{rows} of 40 rows")
        if left := [path.name for path in place.rglob(".*") if path.name != ".lock"]:
            faults.append(f"left behind: {left}")
    return {"races": count, "refused": refused, "faults": faults}


def append(path: Path, name: int) -> int:
    """Add rows to a file of rows one by one, as a benchmark does after every job."""
    for index in range(20):
        with atomic.locked(path, wait=True):
            rows = read_rows(path) if path.is_file() else []
            write_rows(path, [*rows, {"metric": "dice", "value": 0.5, "case": f"{name}-{index}"}])
    return 0


def main() -> None:
    """Run the sweeps with the given numbers: FOLDER KILLS SIGNALS RACES SEED."""
    folder, (kills, signals, races, seed) = Path(sys.argv[1]), map(int, sys.argv[2:])
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        data = write_phantom(folder / "data", patients_per_site=2, size=32, sites=("north", "east"))
        results = {
            name: sweep(data, folder, count, seed)
            for name, sweep, count in (
                ("kills", sweep_kills, kills),
                ("signals", sweep_signals, signals),
                ("races", sweep_races, races),
            )
            if count
        }
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
