"""Curves for TensorBoard, in files whose names tell neither host nor user, as its own writer's do."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from anysite.errors import RunError

FLUSH_EVERY_S = 30.0


class ScalarWriter:
    """Writes an event file into a folder; what TensorBoard knows of later steps than `first_step` is replaced.

    Raises:
        RunError: the file cannot be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.path = folder / f"events.out.tfevents.{time.time_ns() // 1000:017d}.{os.getpid()}"
        with self._named():
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("xb")
        self.records, self.flushed = RecordWriter(self.file), time.monotonic()
        start = SessionLog(status=SessionLog.START)
        try:
            self._write(file_version="brain.Event:2")
            self._write(step=first_step, session_log=start)
        except RunError:
            with suppress(OSError):
                self.file.close()
            raise

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to the curve of every name."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=Summary(value=points))
        if time.monotonic() - self.flushed > FLUSH_EVERY_S:
            with self._named():
                self.file.flush()
            self.flushed = time.monotonic()

    def __enter__(self) -> ScalarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._named():
            self.file.close()

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        with self._named():
            self.records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot be written ({error.strerror or error})",
                where=self.path,
                fix="free space or choose another folder",
            ) from error
