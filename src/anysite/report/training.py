"""What a run folder tells of its training: losses and diagnostics over the steps, and pictures of what it draws."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from anysite import atomic
from anysite.errors import FileFormatError
from anysite.report.charts import trace_plot

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
class Preview:
    """Pictures that an objective left, with the names of their columns, as a data address."""

    name: str
    columns: tuple[str, ...]
    address: Markup


@dataclass(frozen=True)
class Training:
    """One run folder."""

    name: str
    facts: RunFacts
    traces: tuple[tuple[str, Markup], ...]
    previews: tuple[Preview, ...]


def read_training(path: Path) -> Training:
    """Read a run folder, finished or not.

    Raises:
        FileFormatError: its manifest or log is not what it should be.
    """
    try:
        facts = RunFacts.model_validate(atomic.read_json(path / MANIFEST))
    except ValidationError as error:
        raise FileFormatError(str(error.errors()[0]["msg"]), where=path / MANIFEST) from None
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


def _previews(path: Path) -> list[Preview]:
    previews = []
    for file in sorted(path.glob("preview_*.png")):
        with Image.open(file) as picture:
            columns = tuple(picture.info.get("columns", "").split(", "))
        address = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
        previews.append(Preview(file.stem.removeprefix("preview_"), columns, Markup.escape(address)))
    return previews
