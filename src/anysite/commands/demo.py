"""A made-up dataset, and the demonstration: every main verb in turn on it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from anysite.commands.data import check
from anysite.commands.prediction import predict
from anysite.commands.results import evaluate, report
from anysite.commands.training import train
from anysite.errors import ConfigError, RejectedMasks


def phantom(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="where to write it, new or empty")],
    dimension: Annotated[int, typer.Option(help="2 for pictures, 3 for volumes")] = 2,
    patients: Annotated[int, typer.Option(help="of every site; every third has two cases")] = 12,
    size: Annotated[
        int | None, typer.Option(help="pixels along a side; default: 128, or 48 slices in 3-D")
    ] = None,
    site: Annotated[list[str] | None, typer.Option(help="only this site (repeatable)")] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
) -> None:
    """Write a made-up dataset of four sites with labels, to try things on."""
    from anysite import console
    from anysite.data import phantom
    from anysite.data.layouts import open_dataset

    phantom.write_phantom(
        folder, dimension=dimension, patients_per_site=patients, size=size, seed=seed,
        sites=site or tuple(phantom.SITES),
    )  # fmt: skip
    dataset = open_dataset(folder)
    console.say(f"{len(dataset.cases)} cases of {', '.join(dataset.domains)} written to {folder}")


def demo(
    output: Annotated[
        Path | None, typer.Option(help="folder for everything; default: demo, or demo_3d")
    ] = None,
    dimension: Annotated[int, typer.Option(help="2 for pictures, 3 for volumes")] = 2,
    budget: Annotated[str, typer.Option(help="time for training")] = "150s",
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
) -> None:
    """The whole chain on a made-up dataset: train on three sites, test on a fourth, end in an HTML report."""
    from anysite import console
    from anysite.data.phantom import write_phantom

    if dimension not in (2, 3):
        raise ConfigError(f"--dimension {dimension}", expected="2 or 3")
    output = output or Path("demo" if dimension == 2 else "demo_3d")
    began = time.monotonic()
    data, run, masks, found, page = (
        output / f"phantom_{dimension}d",
        output / "run",
        output / "masks",
        output / "check.json",
        output / "report.html",
    )
    if not (data / "index.csv").is_file():
        write_phantom(data, dimension=dimension, patients_per_site=20, seed=seed)
    console.say(f"1. anysite check {data} --output {found}")
    check(data, found)
    console.say(f"\n2. anysite train {data} --output {run} --test-domain west --budget {budget} --resume")
    train(data, run, test_domain=["west"], budget=budget, seed=seed, resume=True)
    console.say(f"\n3. anysite predict {run} {data} --output {masks}")
    try:
        predict([run, data], masks)
    except RejectedMasks as error:  # as it should be, at a site that was never seen
        console.say(str(error))
    console.say(f"\n4. anysite evaluate {masks} {data}")
    evaluate(masks, data)
    console.say(f"\n5. anysite report {found} {run} {masks} --output {page}")
    report([found, run, masks], page)
    console.say(f"\nDone in {console.format_seconds(time.monotonic() - began)}. Open {page} in a browser.")
