"""From masks to rows, from rows to a page, and from methods to rows."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import typer

from anysite.commands import AsJson, DatasetPath, Overrides, Plugins, parse_duration, trust
from anysite.errors import BatchError, ConfigError


def evaluate(
    predictions: Annotated[
        Path, typer.Argument(metavar="PREDICTIONS", help="folder of masks named after cases")
    ],
    dataset: DatasetPath,
    tolerance: Annotated[float, typer.Option(help="of the surface Dice, in mm or px", min=0)] = 2.0,
    json: AsJson = False,
) -> None:
    """Score masks against labels on the native grid; writes rows.jsonl and summary.json beside the masks."""
    from anysite import atomic, console
    from anysite import evaluate as evaluation
    from anysite.data.layouts import open_dataset

    if not math.isfinite(tolerance):
        raise ConfigError(f"--tolerance {tolerance}", expected="a distance in mm or px")
    result = evaluation.evaluate(predictions, open_dataset(dataset), tolerance=tolerance)
    console.as_json(atomic.read_json(predictions / evaluation.SUMMARY)) if json else console.show_evaluation(
        result
    )
    if result.failed:
        raise BatchError(
            f"{len(result.failed)} cases could not be scored",
            fix=f"the reasons are in {predictions / evaluation.SUMMARY}",
        )


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="prediction folders, files of rows (.jsonl), run folders, checks (.json of anysite check)",
        ),
    ],
    output: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="of the page")] = "",
    pictures: Annotated[int, typer.Option(min=0, help="cases with a picture in the list")] = 200,
    volumes: Annotated[int, typer.Option(min=0, help="cases in the 3-D viewer, lowest Dice first")] = 24,
) -> None:
    """Turn rows, predictions, runs and checks into one self-contained HTML page."""
    from anysite import console
    from anysite.report import write_report

    write_report(paths, output, title, pictures=pictures, volumes=volumes)
    console.say(f"report written to {output}")


def benchmark(
    dataset: DatasetPath,
    output: Annotated[Path, typer.Option(help="rows as JSON lines; jobs whose rows are there are skipped")],
    methods: Annotated[str, typer.Option(help="presets, separated by commas")] = "baseline",
    seeds: Annotated[str, typer.Option(help="separated by commas")] = "0,1,2",
    protocol: Annotated[str, typer.Option(help="leave-one-out, train-on-one or pooled")] = "leave-one-out",
    test_domain: Annotated[
        list[str] | None, typer.Option(help="leave out only this site (repeatable)")
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="metrics to keep rows of, separated by commas; verdict keeps every score")
    ] = "dice",
    labels: Annotated[
        str,
        typer.Option(
            help="learn from so many labelled patients, such as 1,2,5,all; fewer are a subset of more"
        ),
    ] = "all",
    corruptions: Annotated[
        str,
        typer.Option(
            help="also score corrupted copies of held-out images: all, or names separated by commas"
        ),
    ] = "",
    severities: Annotated[str, typer.Option(help="of the corruptions, 1 to 5")] = "1,2,3,4,5",
    others: Annotated[
        list[Path] | None,
        typer.Option(help="also judge images of this other dataset, which should be rejected (repeatable)"),
    ] = None,
    adapt: Annotated[
        str,
        typer.Option(
            help="score all images also with these adapters, separated by commas; NAME:always without checks"
        ),
    ] = "none",
    members: Annotated[
        int, typer.Option(help="networks of every job, whose probabilities are averaged: an ensemble")
    ] = 1,
    set_: Overrides = None,
    normalisation: Annotated[
        str,
        typer.Option(help="eval, or batch: batch normalisation by test statistics, named with every result"),
    ] = "eval",
    budget: Annotated[str | None, typer.Option(help="wall-clock time of each training")] = None,
    parallel: Annotated[
        int, typer.Option(help="jobs at once, sharing the cores; 0: in this process, one by one")
    ] = 1,
    keep_runs: Annotated[Path | None, typer.Option(help="keep run folders and masks here")] = None,
    plugin: Plugins = None,
) -> None:
    """Train and score methods over sites and seeds; one row a case, class and metric."""
    trust(plugin)
    from anysite import benchmark as benchmarking
    from anysite import console
    from anysite.data.layouts import open_dataset

    numbers = _whole_numbers("--seeds", seeds)
    counts = [None if part == "all" else _whole_numbers("--labels", part)[0] for part in labels.split(",")]
    overrides = [
        *(set_ or []),
        *([f"predict.normalisation={normalisation}"] if normalisation != "eval" else []),
    ]
    jobs = benchmarking.list_jobs(
        open_dataset(dataset), dataset, methods.split(","), numbers, protocol,
        overrides, None if budget is None else parse_duration(budget), test_domain or [], metrics.split(","),
        counts, corruptions.split(",") if corruptions else [], _whole_numbers("--severities", severities),
        others or [], adapt.split(","), members,
    )  # fmt: skip
    began, failed = time.monotonic(), 0
    waiting = benchmarking.unfinished(jobs, output)
    console.say(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done before")
    if outdated := benchmarking.count_outdated(waiting, output):
        console.say(f"{outdated} were made of other labels or images than are there now, and are done again")
    if strangers := benchmarking.count_others(jobs, output):
        console.say(
            f"{output} also has rows of {strangers} of these jobs from other settings or another budget, which a "
            "report cannot tell apart; give --output another file to keep them so"
        )
    outcomes = benchmarking.benchmark(waiting, output, parallel=parallel, keep_runs=keep_runs)
    for finished, outcome in enumerate(outcomes, start=1):
        failed += bool(outcome.error)
        left = (time.monotonic() - began) / finished * (len(waiting) - finished)
        console.show_job(outcome, finished, len(waiting), left)
    if failed:
        raise BatchError(
            f"{failed} of {len(waiting)} jobs failed",
            fix="run the same command again after mending the cause",
        )


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}", expected="whole numbers separated by commas") from None
