"""What a dataset or any other path holds, and what there is to choose from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from anysite.commands import AsJson, DatasetPath
from anysite.errors import ConfigError


def check(
    dataset: DatasetPath,
    output: Annotated[
        Path | None, typer.Option(help="also write it as this .html page, or .json file for anysite report")
    ] = None,
    json: AsJson = False,
) -> None:
    """List every problem of a dataset at once, with the file, what was found and what to do."""
    from anysite import atomic, console
    from anysite.data.check import inspect_dataset

    if output is not None and output.suffix.lower() not in (".html", ".htm", ".json"):
        raise ConfigError(f"--output {output}", expected="a file ending in .html or .json")
    inspection = inspect_dataset(dataset)
    console.as_json(inspection) if json else console.show_inspection(inspection)
    if output is not None and output.suffix.lower() == ".json":
        atomic.write_json(output, dataclasses.asdict(inspection))
    elif output is not None:
        from anysite.report.inspection import write_inspection

        write_inspection(inspection, output, dataset.resolve().name)
    if any(problem.severity == "error" for problem in inspection.problems):
        raise typer.Exit(1)


def methods(json: AsJson = False) -> None:
    """List networks, objectives, detectors, adapters and presets with their settings."""
    from anysite import config, console, registry

    listed = [registry.describe(kind, name) for kind, names in registry.TABLES.items() for name in names]
    if json:
        console.as_json({"methods": listed, "presets": config.preset_names()})
        return
    wide = max(len(method.name) for method in listed) + 2
    for kind, names in registry.TABLES.items():
        console.say(f"{kind}s")
        for method in (m for m in listed if m.kind == kind and m.name in names):
            console.say(f"  {method.name:{wide}}{method.headline}")
            if method.settings:
                console.say(f"  {'':{wide}}" + ", ".join(f"{k}={v}" for k, v in method.settings.items()))
    console.say("presets\n  " + ", ".join(config.preset_names()))


def info(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="a run folder, a prediction folder, a dataset or an image")
    ],
    json: AsJson = False,
) -> None:
    """Tell what a path holds."""
    from anysite import console
    from anysite.describe import describe

    content = describe(path)
    if json:
        console.as_json(content)
        return
    for name, value in content.items():
        console.say(f"{name:16}{value}")
