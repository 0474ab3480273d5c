"""The verbs of the command line, one topic a file; PyTorch is imported only inside those that compute."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import typer

from anysite.errors import ConfigError

DatasetPath = Annotated[
    Path,
    typer.Argument(metavar="DATASET", help="CSV or JSON list, <site>/{images,masks}, nnU-Net or BIDS folder"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="change a setting, such as train.steps=500"),
]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", metavar="MODULE:CLASS", help="trust a class outside anysite")
]
RunOutput = Annotated[Path, typer.Option("--output", help="the run folder to write")]
Preset = Annotated[str, typer.Option(help="a preset's name or a .toml file")]
TestDomains = Annotated[list[str] | None, typer.Option(help="a site to keep out of training altogether")]
Seed = Annotated[int | None, typer.Option(help="of everything random")]
Budget = Annotated[
    str | None, typer.Option(help="wall-clock time, such as 90s, 10m or 2h; chooses the steps")
]
Resume = Annotated[bool, typer.Option("--resume", help="continue an interrupted run with its own settings")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]


def parse_duration(text: str) -> float:
    """Return seconds from "90", "90s", "10m" or "2h".

    Raises:
        ConfigError: another form, or no time at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h)?", text.strip())
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"] if match else 0.0
    if not 0 < seconds < math.inf:
        raise ConfigError(f"--budget {text}", expected="a time such as 90s, 10m or 2h")
    return seconds


def trust(plugins: list[str] | None) -> None:
    """Let the named classes outside anysite be loaded."""
    from anysite import registry

    for plugin in plugins or []:
        registry.trust(plugin)
