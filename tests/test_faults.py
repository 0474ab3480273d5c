"""Kills, signals, two writers, full disks, failing writes, dead workers: no work is lost, nothing half is left."""

from __future__ import annotations

import builtins
import errno
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from anysite import atomic, benchmark, runs
from anysite.data import files
from anysite.data.case import Dataset
from anysite.data.phantom import write_phantom
from anysite.data.probabilities import write_probabilities
from anysite.data.volume import Volume
from anysite.errors import AnysiteError, DataError, WorkerError
from anysite.experiment import Job
from anysite.manifest import Manifest
from anysite.patches import PreparedCases
from anysite.planning import learn_plan
from anysite.previews import write_preview
from anysite.report import write_report
from anysite.rows import read_rows, write_rows
from anysite.scalars import ScalarWriter
from anysite.verdicts import write_verdicts
from anysite.workers import Workers
from conftest import SMALL, small_config
from test_cli import call

resource = pytest.importorskip("resource")  # and forks: not on Windows

TINY = [f"--set={s}" for s in (*SMALL, "train.steps=2", "train.validation_cases=0", "calibration.kind=none")]


def run_forks(folder: Path, *numbers: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("forks.py")), str(folder), *map(str, numbers)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of a few killed, stopped and simultaneous processes."""
    return run_forks(tmp_path_factory.mktemp("few"), 6, 3, 3, 0)


def test_a_killed_training_loses_an_interval_at_most_and_ends_bit_identically(few: dict[str, Any]) -> None:
    assert few["kills"]["kills"] == 6
    assert few["kills"]["inside_a_write"] == 3
    assert few["kills"]["faults"] == []


def test_a_signal_saves_and_exits_with_3(few: dict[str, Any]) -> None:
    assert few["signals"]["codes"][:2] == [3, 3]
    assert few["signals"]["faults"] == []


def test_of_two_writers_one_is_refused_or_waits(few: dict[str, Any]) -> None:
    assert few["races"]["races"] == 3
    assert few["races"]["faults"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "numbers"), [("kills", (200, 0, 0)), ("signals", (0, 50, 0)), ("races", (0, 0, 100))]
)
def test_many_kills_signals_and_races(tmp_path: Path, name: str, numbers: tuple[int, int, int]) -> None:
    result = run_forks(tmp_path, *numbers, 1)[name]
    assert result["faults"] == []
    assert result[name] == sum(numbers)


# Locks and what killed processes leave


def test_a_lock_is_refused_or_waited_for_and_leaves_no_file(tmp_path: Path) -> None:
    path, events = tmp_path / "rows.jsonl", []
    with atomic.locked(path):
        with (
            pytest.raises(DataError, match=r"rows\.jsonl: in use by another process\. Wait"),
            atomic.locked(path),
        ):
            pytest.fail("two holders")

        def wait() -> None:
            with atomic.locked(path, wait=True):
                events.append("second")

        other = threading.Thread(target=wait)
        other.start()
        events.append("first")
    other.join(60)
    assert events == ["first", "second"]
    assert not list(tmp_path.iterdir())


def test_the_next_holder_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    names = [".1.partial-0a1b2c3d-rows.jsonl", ".22.partial-ffffffff-mask.nii.gz"]
    kept = ["rows.jsonl", ".partial-notes", ".1.partial-xyz-rows.jsonl", ".hidden"]
    for name in (*names, *kept):
        (tmp_path / name).write_text("x")
    with atomic.locked(tmp_path / "rows.jsonl"):
        assert not (tmp_path / names[0]).exists()
        assert (tmp_path / names[1]).exists()  # perhaps another process is writing that mask
    atomic.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_checkpoint_left_by_a_kill_after_the_end_is_removed(phantom: Dataset, tmp_path: Path) -> None:
    from anysite.train import train

    settings = small_config("train.steps=2", "train.validation_cases=0", "calibration.kind=none")
    train(phantom, settings, tmp_path)
    (tmp_path / runs.CHECKPOINT).write_bytes(b"x")
    (tmp_path / ".9.partial-00000000-weights.safetensors").write_bytes(b"x")
    train(phantom, settings, tmp_path, resume=True)
    assert not (tmp_path / runs.CHECKPOINT).exists()
    assert not list(tmp_path.glob(".*partial*"))


def test_ctrl_c_outside_a_training_is_one_line(phantom_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anysite.data.check.inspect_dataset", interrupt)
    result = call("check", phantom_folder)
    assert result.code == 130
    assert result.err.strip().splitlines()[-1].startswith("error: interrupted. Run it again")
    assert "Traceback" not in result.err


# Disks that are full, limited or read-only

RANDOM = np.random.default_rng(0)
LABEL = Volume(RANDOM.integers(0, 9, (1, 24, 24, 24)).astype(np.int32), np.eye(4))
PICTURE = Volume.of_pixels(RANDOM.integers(0, 9, (1, 128, 128)).astype(np.int32))
CHANCES = Volume(RANDOM.random((2, 24, 24, 24)), np.eye(4))
MANY = [f"case {i}" for i in range(1000)]
ROW = {"dataset": "d", "method": "m", "domain": "x", "case": "c", "patient": "p", "class": "o", "metric": "dice",
       "value": 0.5, "split": "unseen"}  # fmt: skip
VERDICT = {"decision": "review", "reasons": ["odd"], "predicted_dice": None, "scores": {"entropy": 2.0}}


def write_manifest(path: Path) -> None:
    manifest = Manifest(path.parent, "1/1", "origin", {})
    manifest.write()
    manifest.claim(MANY)


def write_page(path: Path) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as rows:  # where there is space
        rows.write(json.dumps(ROW) + "\n")
        rows.flush()
        write_report([Path(rows.name)], path, "")


def write_curves(path: Path) -> None:
    with ScalarWriter(path.parent / "tensorboard", 1) as writer:
        for step in range(5000):
            writer.add(step, {"loss": 1.0, "a rather long name of a curve": 2.0})


WRITERS: dict[str, Callable[[Path], object]] = {
    "checkpoint.safetensors": lambda path: runs.save_tensors(path, {"x": torch.ones(100_000)}),
    "splits.json": lambda path: atomic.write_json(path, MANY),
    "log.jsonl": lambda path: atomic.write_text(path, "x" * 200_000),
    "preview_x.png": lambda path: write_preview(path, {"a": 2 * torch.rand(1, 3, 200, 200) - 1}, True),
    "mask.nii.gz": lambda path: files.write_label(LABEL, path),
    "mask.nii": lambda path: files.write_label(LABEL, path),
    "mask.png": lambda path: files.write_label(PICTURE, path),
    "mask.tif": lambda path: files.write_label(PICTURE, path),
    "case.npz": lambda path: write_probabilities(CHANCES, path),
    "verdicts.json": lambda path: write_verdicts(path.parent, dict.fromkeys(MANY, VERDICT)),
    "predictions.json": write_manifest,
    "rows.jsonl": lambda path: write_rows(path, [ROW] * 500),
    "report.html": write_page,
    "phantom": lambda path: write_phantom(path, patients_per_site=1, size=64, sites=("north",)),
    "tensorboard": write_curves,
}


@contextmanager
def short_files(folder: Path) -> Iterator[None]:
    """No file may grow beyond a few bytes, as under a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Nothing is left of the file system; that of `folder`, which is small."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting needs rights that this process lacks")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)  # a file may still be open


def require_a_named_error(write: Callable[[Path], object], path: Path, broken: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    if path.name not in ("tensorboard", "predictions.json", "phantom"):
        path.write_text("old")
    if path.name == "predictions.json":
        Manifest(path.parent, "1/1", "origin", {}).write()
    before = {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}
    with broken, pytest.raises(AnysiteError) as caught:
        write(path)
    if path.name == "mask.nii":
        gc.collect()
    assert "cannot be written (" in str(caught.value)
    assert str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)
    after = {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}
    assert before == after
    assert not list(path.parent.rglob("*.partial-*"))
    assert not (path / "index.csv").exists()  # of a phantom, which is there once all of its images are


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # nibabel leaves a file open
@pytest.mark.parametrize("name", WRITERS)
def test_a_quota_is_named_and_the_old_file_stays(tmp_path: Path, name: str) -> None:
    require_a_named_error(WRITERS[name], tmp_path / "out" / name, short_files(tmp_path))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # nibabel leaves a file open
@pytest.mark.parametrize("fault", [full_disk, read_only])
def test_a_disk_full_or_read_only_is_named_and_the_old_files_stay(small_disk: Path, fault: Any) -> None:
    for name, write in WRITERS.items():
        if name != "tensorboard" or fault is read_only:  # which has no final file to be replaced
            require_a_named_error(write, small_disk / name.replace(".", "_") / name, fault(small_disk))


def test_no_space_for_prepared_cases_is_named(
    phantom: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = learn_plan(phantom, small_config().plan, 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with short_files(tmp_path), pytest.raises(DataError, match=r"prepared cases cannot be written .*TMPDIR"):
        PreparedCases(phantom, plan, phantom.domains, memory_gb=0)
    assert not list(tmp_path.rglob("*.npy"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(DataError, match="prepared cases cannot be written"):
        PreparedCases(phantom, plan, phantom.domains, memory_gb=0)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "tensorboard"])
def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").write_text("a letter")
    with pytest.raises((AnysiteError, FileExistsError)) as caught:  # the command line names the latter's path
        WRITERS[name](tmp_path / "out" / name)
    assert str(tmp_path / "out") in str(caught.value)
    assert (tmp_path / "out").read_text() == "a letter"


# The k-th operation on files fails


class Faulty:
    """Counts operations that change files, and lets the k-th one fail."""

    def __init__(self, fail_at: int = 0, number: int = errno.ENOSPC) -> None:
        self.count, self.fail_at, self.number = 0, fail_at, number

    def step(self, path: object = None) -> None:
        self.count += 1
        if self.count == self.fail_at:
            raise OSError(self.number, os.strerror(self.number), *([os.fspath(path)] if path else []))  # pyright: ignore[reportArgumentType, reportCallIssue]

    @contextmanager
    def in_force(self) -> Iterator[None]:
        fault, real_open, real_os_open = self, builtins.open, os.open

        class Watched:
            def __init__(self, file: Any) -> None:
                self.file = file

            def write(self, data: Any) -> Any:
                fault.step()
                return self.file.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def __enter__(self) -> Watched:
                return self

            def __exit__(self, *error: object) -> None:
                self.file.close()

            def __iter__(self) -> Any:
                return iter(self.file)

        def opening(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wxa+"):
                return real_open(file, mode, *arguments, **named)
            fault.step(file)
            return Watched(real_open(file, mode, *arguments, **named))

        def os_opening(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR):
                fault.step(path)
            return real_os_open(path, flags, *arguments, **named)

        def before(real: Callable[..., Any], names_path: bool) -> Callable[..., Any]:
            def operate(first: Any, *arguments: Any, **named: Any) -> Any:
                fault.step(first if names_path else None)
                return real(first, *arguments, **named)

            return operate

        with (
            mock.patch.object(builtins, "open", opening),
            mock.patch.object(io, "open", opening),
            mock.patch.object(os, "open", os_opening),
            mock.patch.object(os, "fsync", before(os.fsync, False)),
            mock.patch.object(os, "replace", before(os.replace, True)),
            mock.patch.object(os, "mkdir", before(os.mkdir, True)),
        ):
            yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "data"
    return write_phantom(folder, patients_per_site=2, size=32, sites=("north", "east"))


@pytest.fixture(scope="module")
def finished(data: Path) -> tuple[Path, Path]:
    """A run and its masks, to compare with."""
    run, masks = data.parent / "run", data.parent / "masks"
    assert call("train", data, "--output", run, *TINY).code == 0
    assert (
        call("predict", run, data, "--include-training", "--save-probabilities", "--output", masks).code == 0
    )
    assert call("evaluate", masks, data).code == 0
    return run, masks


def digests(folder: Path) -> dict[str, str]:
    named = ("*.png", "*.npz", "rows.jsonl", "summary.json", runs.WEIGHTS, runs.PLAN, runs.SPLITS)
    return {path.name: atomic.sha256(path) for name in named for path in folder.glob(name)}


def sweep_faults(
    command: Callable[[Path], list[object]], start: Path | None, expected: Path, folder: Path, points: int
) -> int:
    """Let operations fail one at a time, require a named error and no half file, and then that all goes well."""
    total = Faulty()
    if start:
        shutil.copytree(start, folder / "whole")
    with total.in_force():
        assert call(*command(folder / "whole")).code == 0
    chosen = sorted({round(k) for k in np.linspace(1, total.count, min(points, total.count))})
    for k in chosen:
        output = folder / f"fault{k}"
        if start:
            shutil.copytree(start, output)
        before = digests(output) if start else {}
        fault = Faulty(k, (errno.ENOSPC, errno.EIO)[k % 2])
        with fault.in_force():
            result = call(*command(output))
        assert result.code in (0, 1, 2), (k, result)
        if result.code:
            assert result.err.splitlines()[-1].startswith("error: "), (k, result)
            assert os.strerror(fault.number) in result.err, (k, result)
        assert not list(folder.rglob(".*.partial-*")), k
        whole = digests(expected)
        for name, digest in digests(output).items():
            assert digest in (whole[name], before.get(name)), (k, name)
        again = call(*command(output))
        assert (again.code, digests(output)) == (0, whole), (k, again)
        shutil.rmtree(output)
    return len(chosen)


def sweep_command(verb: str, data: Path, finished: tuple[Path, Path], folder: Path, points: int) -> int:
    run, masks = finished
    if verb == "train":
        return sweep_faults(
            lambda out: ["train", data, "--output", out, *TINY, "--resume"], None, run, folder, points
        )
    if verb == "predict":
        more = ["--include-training", "--save-probabilities"]
        reference = folder / "reference"
        shutil.copytree(masks, reference, ignore=shutil.ignore_patterns("rows.jsonl", "summary.json"))
        (place := folder / "sweep").mkdir()
        return sweep_faults(
            lambda out: ["predict", run, data, "--output", out, *more], None, reference, place, points
        )
    return sweep_faults(lambda out: ["evaluate", out, data], masks, masks, folder, points)


@pytest.mark.parametrize(("verb", "points"), [("train", 5), ("predict", 8), ("evaluate", 6)])
def test_an_operation_on_files_that_fails_is_named_and_loses_nothing(
    verb: str, points: int, data: Path, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    assert sweep_command(verb, data, finished, tmp_path, points) == points


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "predict", "evaluate"])
def test_every_operation_on_files_may_fail(
    verb: str, data: Path, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    assert sweep_command(verb, data, finished, tmp_path, 10**6) > 10


# Workers


def test_a_worker_that_is_killed_is_named_and_the_others_go_on() -> None:
    with Workers() as workers:
        with pytest.raises(
            WorkerError, match=r"killed by SIGKILL, likely out of memory\. Run fewer jobs at once"
        ):
            workers.run(signal.raise_signal, signal.SIGKILL)
        with pytest.raises(WorkerError, match="ended by SIGABRT"):
            workers.run(os.abort)
        with pytest.raises(WorkerError, match="exit code 7 and without an answer"):
            workers.run(os._exit, 7)
        with pytest.raises(WorkerError, match="ValueError: invalid literal for int"):
            workers.run(int, "x")
        assert workers.run(sum, [1, 2]) == 3


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


START = (
    "import sys, time, threading; from anysite.workers import Workers\n"
    "if __name__ == '__main__':\n"
    "    workers = Workers()\n"
    "    threading.Thread(target=workers.run, args=(time.sleep, 600), daemon=True).start()\n"
    "    while not workers.running: time.sleep(0.01)\n"
    "    print(next(iter(workers.running)).pid, flush=True); time.sleep(600)\n"
)


def kill_a_parent(number: int, delay_s: float) -> bool:
    """Start a process with a worker, kill the former, and tell whether the latter ends as well."""
    with subprocess.Popen([sys.executable, "-c", START], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        time.sleep(delay_s)
        parent.send_signal(number)
        parent.wait()
    return wait_until(lambda: not is_running(worker))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc for processes")
def test_a_worker_ends_with_its_parent() -> None:
    assert kill_a_parent(signal.SIGKILL, 1.0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc for processes")
def test_no_worker_outlives_any_of_many_parents() -> None:
    chooser = np.random.default_rng(0)
    outcomes = [
        kill_a_parent((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[i % 3], chooser.uniform(0, 1.5))
        for i in range(50)
    ]
    assert outcomes == [True] * 50


def test_leaving_the_block_ends_the_workers() -> None:
    errors: list[str] = []

    def work(workers: Workers) -> None:
        try:
            workers.run(time.sleep, 600)
        except WorkerError as error:
            errors.append(str(error))

    with Workers() as workers:
        thread = threading.Thread(target=work, args=(workers,))
        thread.start()
        assert wait_until(lambda: bool(workers.running))
        process = next(iter(workers.running))
    thread.join(60)
    assert not process.is_alive()
    assert len(errors) == 1
    with pytest.raises(WorkerError, match="others were stopped"):
        workers.run(sum, [1])


@pytest.fixture
def jobs(phantom: Dataset, phantom_folder: Path) -> list[Job]:
    settings = [*SMALL, "train.steps=2", "train.validation_cases=0", "calibration.kind=none"]
    return benchmark.list_jobs(phantom, phantom_folder, ["baseline"], [0], "leave-one-out", settings)


def test_a_benchmark_also_runs_in_one_process(jobs: list[Job], tmp_path: Path) -> None:
    broken = Job(**{**jobs[1].__dict__, "test_domains": ("mars",)})
    outcomes = list(benchmark.benchmark([broken, jobs[0]], tmp_path / "rows.jsonl", parallel=0))
    assert "no site named 'mars'" in outcomes[0].error
    assert outcomes[1].error == ""
    assert len(read_rows(tmp_path / "rows.jsonl")) == len(outcomes[1].rows) > 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc for processes")
def test_a_killed_job_of_a_benchmark_is_named_and_the_next_one_runs(jobs: list[Job], tmp_path: Path) -> None:
    endless = Job(**{**jobs[1].__dict__, "overrides": (*jobs[1].overrides, "train.steps=1000000")})

    def kill() -> None:
        assert wait_until(lambda: bool(list((tmp_path / "kept").rglob("tensorboard/*"))))
        children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children").parent.parent
        found = {int(p) for task in children.iterdir() for p in (task / "children").read_text().split()}
        workers = [p for p in found if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
        assert len(workers) == 1
        os.kill(workers[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcomes = list(
        benchmark.benchmark([endless, jobs[0]], tmp_path / "rows.jsonl", keep_runs=tmp_path / "kept")
    )
    killer.join()
    assert "killed by SIGKILL, likely out of memory" in outcomes[0].error
    assert outcomes[1].error == ""
    assert outcomes[1].rows
