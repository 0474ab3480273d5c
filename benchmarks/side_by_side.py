"""Two sides of a comparison in processes of their own that take turns, so that neither's settings help the other."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from anysite import atomic, provenance

Advance = Callable[[], Any]


def report_dimensions(compare: Callable[[int], dict[str, Any]], output: Path | None, **facts: Any) -> None:
    """Print the row that `compare` makes for two and for three dimensions, and write both to `output`."""
    rows = []
    for dimension in (2, 3):
        row = compare(dimension) | facts | {"commit": provenance.commit()}
        print(row, flush=True)
        rows.append(row)
    if output:
        atomic.write_json(output, rows)


class Side:
    """A process that prepared itself by `prepare(*arguments)` and repeats what that returned on demand."""

    def __init__(self, prepare: Callable[..., Advance], arguments: Sequence[Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, prepare, tuple(arguments)), daemon=False)
        self.process.start()
        self.connection.recv()

    def run(self, times: int) -> tuple[float, Any]:
        """Return the mean seconds of so many calls, and what the last one returned."""
        self.connection.send(times)
        return self.connection.recv()

    def stop(self) -> int:
        """End the process, and return its peak memory in MB."""
        self.connection.send(0)
        peak_mb = self.connection.recv()
        self.process.join()
        return peak_mb


@contextmanager
def taking_turns(
    sides: Mapping[str, tuple[Callable[..., Advance], Sequence[Any]]],
) -> Iterator[dict[str, Side]]:
    """Start every side, and end them all."""
    started: dict[str, Side] = {}
    try:
        for name, (prepare, arguments) in sides.items():
            started[name] = Side(prepare, arguments)
        yield started
    finally:
        for side in started.values():
            if side.process.is_alive():
                side.process.kill()


def _serve(connection: Connection, prepare: Callable[..., Advance], arguments: tuple[Any, ...]) -> None:
    advance = prepare(*arguments)
    connection.send("ready")
    while times := connection.recv():
        began = time.perf_counter()
        result = None
        for _ in range(times):
            result = advance()
        connection.send(((time.perf_counter() - began) / times, result))
    connection.send(round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
