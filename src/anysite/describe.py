"""Telling what a path holds, without computing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anysite import atomic
from anysite.data import files
from anysite.data.layouts import is_dataset, open_dataset
from anysite.errors import FileFormatError
from anysite.manifest import MANIFESTS, read_content


def describe(path: Path) -> dict[str, Any]:
    """Return what a run folder, prediction folder, dataset or image file holds, JSON-able.

    Raises:
        FileFormatError: nothing lies there.
        AnysiteError: what lies there cannot be read.
    """
    path = Path(path)
    if not files.exists(path):
        raise FileFormatError("no such file or folder", where=path)
    if (path / "run.json").is_file():
        return _describe_run(path)
    if path.is_dir() and any(path.glob(MANIFESTS)):
        return _describe_predictions(path)
    if files.suffix_of(path) and not is_dataset(path):
        volume = files.read(path)
        return {
            "kind": "image",
            "shape": list(volume.shape),
            "channels": volume.array.shape[0],
            "spacing": [round(s, 4) for s in volume.spacing],
            "unit": volume.unit,
            "axes": volume.axes,
            "values": [float(volume.array.min()), float(volume.array.max())],
        }
    dataset = open_dataset(path)
    return {
        "kind": "dataset",
        "name": dataset.name,
        "classes": list(dataset.classes),
        "sites": {d: sum(c.domain == d for c in dataset.cases) for d in dataset.domains},
        "patients": len({case.patient for case in dataset.cases}),
        "labelled": len(dataset.labelled),
        **dataset.provenance,
    }


def _describe_run(path: Path) -> dict[str, Any]:
    manifest, plan, splits = (_read_object(path / f"{name}.json") for name in ("run", "plan", "splits"))
    shown = (
        "anysite",
        "dataset",
        "preset",
        "train_domains",
        "finished",
        "steps",
        "seconds",
        "threads",
        "commit",
        "started_from",
    )
    learned = path / "postprocessing.json"  # absent of a run that learned none
    rule = _read_object(learned) if learned.is_file() else {"without_fragments": []}
    return {
        "kind": "run",
        **{key: manifest[key] for key in shown if key in manifest},
        "cases": {role: len(_require(ids, list, path / "splits.json")) for role, ids in splits.items()},
        **{key: plan.get(key) for key in ("classes", "patch_size", "spacing", "reasons")},
        "no_fragments_of": rule.get("without_fragments"),
        "fragments_below": rule.get("smaller_than"),
    }


def _describe_predictions(path: Path) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for part in sorted(path.glob(MANIFESTS)):
        content = _require(read_content(part), dict, part)
        entries |= _require(content.get("cases", {}), dict, part)
    states = [entry.get("status", "unknown") for entry in entries.values() if isinstance(entry, dict)]
    return {"kind": "predictions", "cases": {state: states.count(state) for state in dict.fromkeys(states)}}


def _read_object(path: Path) -> dict[str, Any]:
    return _require(atomic.read_json(path), dict, path)


def _require(content: Any, kind: type, path: Path) -> Any:
    if not isinstance(content, kind):
        wanted = {dict: "a JSON object", list: "a list of names"}[kind]
        raise FileFormatError(f"not {wanted}", where=path, fix="restore the folder from its source")
    return content
