"""Work in processes of their own: a violent end is named, and none outlives whoever started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, TypeVar

from anysite.errors import WorkerError, describe_error

GRACE_S = 30.0  # from being asked to stop to being killed: a training finishes its step and saves

Result = TypeVar("Result")


class Workers:
    """Runs functions in fresh processes; on leaving the block the ones still at work are asked to stop."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: set[BaseProcess] = set()
        self.stopping = False

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Return what `function(*arguments)` returns in a process of its own; threads may call this at once.

        Raises:
            WorkerError: the function raised an error, or its process was killed or ended without an answer.
        """
        # A fresh process: a forked one would inherit the parent's threads in an undefined state.
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, function, arguments), daemon=True)
        with self.lock:
            if self.stopping:
                raise WorkerError("not started, because the others were stopped")
            process.start()
            self.running.add(process)
        done = False
        answer: Any = None
        sender.close()  # so that the end of the process ends the waiting
        try:
            with suppress(EOFError, OSError):
                done, answer = receiver.recv()  # from our own process
        finally:
            receiver.close()
            _end(process, GRACE_S)
            self.running.discard(process)
        if done:
            return answer
        raise WorkerError(answer) if answer else _describe_end(process.exitcode)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            self.stopping = True
            running = list(self.running)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE_S
        for process in running:  # their threads see them end
            if not connection.wait([process.sentinel], max(0, deadline - time.monotonic())):
                process.kill()


def _end(process: BaseProcess, grace_s: float) -> None:
    process.join(grace_s)
    if process.is_alive():
        process.kill()
        process.join()


def _describe_end(code: int | None) -> WorkerError:
    if code is None or code >= 0:
        return WorkerError(f"its process ended with exit code {code} and without an answer")
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if name == "SIGKILL":
        return WorkerError(
            "its process was killed by SIGKILL, likely out of memory",
            fix="run fewer jobs at once, lower train.batch_size, or find more memory",
        )
    return WorkerError(f"its process was ended by {name}")


def _work(sender: connection.Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Answer with what the function returns or the text of its error."""
    if hasattr(os, "setpgid"):  # Ctrl-C reaches the parent, which then asks each process to stop, once
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = True, function(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent goes on with other work
        answer = False, describe_error(error)
    sender.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves, temporary folders are removed
    time.sleep(GRACE_S)
    os._exit(1)
