"""What a run folder tells of its training: losses and diagnostics over the steps, and pictures of what it draws."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, ValidationError

from anysite import atomic
from anysite.errors import FileFormatError, describe_invalid
from anysite.report.charts import trace_plot
from anysite.report.previews import Preview, read_preview

MANIFEST, LOG = "run.json", "log.jsonl"
FIRST = ("total", "dice", "supervised")
LEAST_POINTS = 2


class RunFacts(BaseModel):
    """What `run.json` says, as far as the report shows it."""

    model_config = ConfigDict(extra="ignore")

    kind: str = "segmentation"
    preset: str = ""
    dataset: str = ""
    train_domains: list[str] = []
    steps: int | None = None
    seconds: float | None = None
    finished: bool = False


@dataclass(frozen=True)
class Training:
    """One run folder."""

    name: str
    facts: RunFacts
    traces: tuple[tuple[str, Markup], ...]
    previews: tuple[tuple[str, Preview], ...]


def read_training(path: Path) -> Training:
    """Read a run folder, finished or not.

    Raises:
        FileFormatError: its manifest or log is not what it should be.
    """
    try:
        facts = RunFacts.model_validate(atomic.read_json(path / MANIFEST))
    except ValidationError as error:
        raise FileFormatError(describe_invalid(error), where=path / MANIFEST) from None
    return Training(path.resolve().name, facts, tuple(_traces(path / LOG)), tuple(_previews(path)))


def _traces(path: Path) -> list[tuple[str, Markup]]:
    if not path.is_file():
        return []
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        values: dict[str, list[tuple[float, float]]] = {}
        for entry in entries:
            step = entry.pop("step")
            for name, value in entry.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    values.setdefault(name, []).append((step, value))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FileFormatError(f"not a training's log ({error})", where=path) from None
    names = sorted(values, key=lambda name: (name not in FIRST, name))
    return [
        (name.replace("_", " "), trace_plot(values[name], f"{name} over the steps"))
        for name in names
        if len(values[name]) >= LEAST_POINTS
    ]


def _previews(path: Path) -> list[tuple[str, Preview]]:
    files = {file.stem.removeprefix("preview_"): file for file in sorted(path.glob("preview_*.png"))}
    return [(name, shown) for name, file in files.items() if (shown := read_preview(file)) is not None]
