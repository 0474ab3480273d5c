"""What a result was made with: configuration, plan, versions, commits and seeds, as plain entries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from anysite.report.format import duration, without_folders
from anysite.report.read import Row
from anysite.report.summary import mean_of_runs

Entries = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class RunFacts:
    """One trained network behind a prediction; `plan` holds name, value and reason."""

    name: str
    facts: Entries
    plan: tuple[tuple[str, str, str], ...]
    config: Entries
    versions: Entries


def describe_run(run: dict[str, Any]) -> RunFacts:
    """Turn one entry of `predictions.json`'s runs into texts without absolute paths."""
    parts = ("config", "plan", "versions")
    return RunFacts(
        name=_text(run.get("preset") or "run"),
        facts=flatten({key: value for key, value in run.items() if key not in parts}),
        plan=_plan(run.get("plan")),
        config=flatten(run.get("config") or {}),
        versions=flatten(run.get("versions") or {}),
    )


def describe_rows(rows: Sequence[Row]) -> Entries:
    """List the commits, digests and seeds that occur in rows, and what their runs cost on average."""
    return tuple(
        (name, ", ".join(values))
        for name, values in (
            ("Commit", _distinct(row.commit for row in rows)),
            ("Weights and settings digest", _distinct(row.config for row in rows)),
            ("Overrides", _distinct(without_folders(row.overrides) for row in rows)),
            ("Seeds", _distinct(row.seed for row in rows)),
            *describe_costs(rows),
        )
        if values
    )


def describe_costs(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """List what a training and a predicted case cost on average, as far as the rows say it."""
    seconds, steps, memory, case_s = (
        mean_of_runs(rows, metric)
        for metric in ("train_seconds", "train_steps", "peak_memory", "predict_seconds_per_case")
    )
    training = [] if seconds is None else [duration(seconds)]
    training += [] if steps is None else [f"{steps:.0f} steps"]
    training += [] if memory is None else [f"{memory:.0f} MB"]
    return [
        ("A training", training),
        ("A predicted case", [] if case_s is None else [duration(case_s)]),
    ]


def flatten(content: Any, prefix: str = "") -> Entries:
    """Write nested settings as `section.name` and value."""
    if isinstance(content, dict) and content:
        inner = (flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in content.items())
        return tuple(entry for entries in inner for entry in entries)
    return ((prefix, _text(content)),) if prefix else ()


def _plan(plan: Any) -> tuple[tuple[str, str, str], ...]:
    """Return name and value of every choice, and behind them the reasons."""
    if not isinstance(plan, dict):
        return ()
    reasons = plan.get("reasons")
    entries = [(str(name), _text(value), "") for name, value in plan.items() if name != "reasons"]
    if isinstance(reasons, list):
        entries.extend(("", "", _text(reason)) for reason in reasons)
    return tuple(entries)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return without_folders(value)
    if isinstance(value, (list, tuple)) and all(not isinstance(item, (dict, list)) for item in value):
        return ", ".join(_text(item) for item in value)
    if value is None:
        return "none"
    return without_folders(json.dumps(value, ensure_ascii=False))


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted({value for value in values if value})
