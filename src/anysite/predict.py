"""Predicting a batch of cases into a folder: masks, probabilities, and a manifest of what is done."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from anysite import __version__, atomic, runs
from anysite.data import files
from anysite.data.case import Case
from anysite.data.volume import Volume
from anysite.errors import AnysiteError, ConfigError, DataError, FileFormatError
from anysite.runs import Run
from anysite.segment import Prediction, Segmenter

MANIFEST = "predictions.json"


@dataclass(frozen=True)
class CaseOutcome:
    """What became of one case: "done", "failed" with an error text, or "skipped" as done before."""

    case: Case
    status: str
    seconds: float = 0.0
    error: str = ""


def select_part(cases: Sequence[Case], part: str) -> tuple[Case, ...]:
    """Return every n-th case: part "2/8" is the second of eight shares.

    Raises:
        ConfigError: not of the form I/N with 1 <= I <= N.
    """
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--part {part}", expected="I/N with 1 <= I <= N, such as 2/8")
    return tuple(cases[int(index) - 1 :: int(count)])


def predict(
    run_folders: Sequence[Run],
    cases: Sequence[Case],
    output: Path,
    *,
    flips: bool | None = None,
    save_probabilities: bool = False,
    part: str = "1/1",
    dataset: dict[str, Any] | None = None,
    accelerator: str = "auto",
) -> Iterator[CaseOutcome]:
    """Segment cases one by one into `output`, yielding what became of each.

    A mask is written beside others under its case id, on the image's grid and in the image's kind of file,
    read back, and only then entered in the manifest as done; a case done before by the same runs is skipped.
    A case that fails is entered with its error and the rest goes on.

    Raises:
        DataError: two cases with one id.
        ConfigError: a malformed part, or an output folder where a mask would replace an image or label.
        FileFormatError: the output folder cannot be written.
        RunError: runs that cannot be averaged.
    """
    _require_unique(cases)
    _require_apart(cases, output)
    settings = run_folders[0].config.predict
    if flips is not None:
        settings = settings.model_copy(update={"flips": flips})
    path = manifest_path(output, part)
    origin = {
        "runs": [run.manifest["files"][runs.WEIGHTS] for run in run_folders],
        "settings": settings.model_dump(),
    }
    manifest = _open_manifest(path, runs.fingerprint(origin))
    manifest |= {"anysite": __version__, "created": runs.now(), "dataset": dataset or {}}
    manifest["runs"] = [_describe_run(run) for run in run_folders]
    manifest["settings"] = settings.model_dump(mode="json")
    _write_manifest(path, manifest)
    segmenter: Segmenter | None = None
    for case in select_part(cases, part):
        if _is_done(manifest["cases"].get(case.id), output, save_probabilities):
            yield CaseOutcome(case, "skipped")
            continue
        segmenter = segmenter or Segmenter(run_folders, settings, accelerator)
        began = time.monotonic()
        entry = _describe_case(case, run_folders, output)
        try:
            entry |= _predict_case(segmenter, case, output, save_probabilities)
            outcome = CaseOutcome(case, "done", time.monotonic() - began)
        except AnysiteError as error:
            outcome = CaseOutcome(case, "failed", time.monotonic() - began, str(error))
            entry |= {"status": "failed", "error": _without_folders(str(error), case, output)}
            # A mask of an earlier run would pass for this one's.
            _mask_path(case, output).unlink(missing_ok=True)
            _probabilities_path(case, output).unlink(missing_ok=True)
        entry["seconds"] = round(outcome.seconds, 3)
        manifest["cases"][case.id] = entry
        _write_manifest(path, manifest)
        yield outcome


def manifest_path(output: Path, part: str = "1/1") -> Path:
    """Return where the manifest of one part lies; parts run at once and must not share a file."""
    return output / (MANIFEST if part == "1/1" else f"predictions.{part.replace('/', '-of-')}.json")


def read_manifests(folder: Path) -> dict[str, Any]:
    """Return the manifest of a prediction folder, all its parts joined.

    Raises:
        FileFormatError: no manifest is there, or it is not one.
        DataError: the parts were written by different runs.
    """
    paths = sorted(Path(folder).glob("predictions*.json"))
    if not paths:
        raise FileFormatError(f"no {MANIFEST}", where=folder, expected="a folder written by anysite predict")
    parts = [_read_manifest(path) for path in paths]
    if len({part.get("origin") for part in parts}) > 1:
        raise DataError(
            f"{', '.join(path.name for path in paths)} of different runs or settings",
            where=folder,
            fix="predict every part with the same runs, or delete the manifests that are out of date",
        )
    cases = {name: entry for part in parts for name, entry in part["cases"].items()}
    return {"runs": [], **parts[0], "cases": cases}


def write_probabilities(probabilities: Volume, path: Path) -> None:
    """Write `(K, *S)` probabilities as `.npz` with the array "probabilities", atomically.

    Raises:
        FileFormatError: the file cannot be written.
    """
    try:
        with atomic.replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, probabilities=probabilities.array.astype(np.float16))
    except OSError as error:
        raise FileFormatError(f"cannot be written ({error.strerror})", where=path) from error


def read_probabilities(path: Path) -> Float[np.ndarray, "k *s"]:
    """Read what `write_probabilities` wrote, in float32.

    Raises:
        FileFormatError: the file is missing or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            return content["probabilities"].astype(np.float32)
    except (OSError, ValueError, KeyError) as error:
        raise FileFormatError(f"not readable as probabilities ({error})", where=path) from error


def mask_suffix(case: Case) -> str:
    """Return the suffix of a case's mask: its image's own, or PNG where that kind would alter indices."""
    suffix = files.suffix_of(case.image_paths[0])
    return ".png" if suffix in (".jpg", ".jpeg") else suffix


def _predict_case(segmenter: Segmenter, case: Case, output: Path, save_probabilities: bool) -> dict[str, Any]:
    prediction: Prediction = segmenter.segment(case.image())
    mask = _mask_path(case, output)
    files.write_label(prediction.label, mask)
    if save_probabilities:
        write_probabilities(prediction.probabilities, _probabilities_path(case, output))
    return {"status": "done", "mask": mask.name, "sha256": atomic.sha256(mask), "error": None}


def _describe_case(case: Case, run_folders: Sequence[Run], output: Path) -> dict[str, Any]:
    roles = {role for run in run_folders for role, ids in run.splits.items() if case.id in ids}
    # A case that any member of an ensemble was trained on is a training case.
    split = "training" if "training" in roles else "in_domain" if "held_out" in roles else "unseen"
    return {
        "images": [_locate(path, output) for path in case.image_paths],
        "label": _locate(case.label_path, output) if case.label_path else None,
        "patient": case.patient,
        "domain": case.domain,
        "split": split if roles else "unknown",
    }


def _locate(path: Path, output: Path) -> str:
    """Return where a file lies as seen from the prediction folder, so that both may move together."""
    try:
        return os.path.relpath(path, output)
    except ValueError:  # another drive on Windows
        return str(path.absolute())


def _describe_run(run: Run) -> dict[str, Any]:
    known = ("preset", "dataset", "train_domains", "versions", "commit", "seconds", "steps", "threads")
    return {
        "path": run.path.name,
        "seed": run.config.seed,
        "config": run.config.model_dump(mode="json"),
        "plan": run.plan.model_dump(mode="json"),
        **{key: run.manifest[key] for key in known if key in run.manifest},
    }


def _open_manifest(path: Path, origin: str) -> dict[str, Any]:
    """Return the manifest so far, or an empty one where other runs or settings wrote it."""
    content = _read_manifest(path) if path.is_file() else {}
    return content if content.get("origin") == origin else {"origin": origin, "cases": {}}


def _read_manifest(path: Path) -> dict[str, Any]:
    content = atomic.read_json(path)
    cases = content.get("cases") if isinstance(content, dict) else None
    if not isinstance(cases, dict) or not all(
        isinstance(entry, dict)
        and entry.get("status") in ("done", "failed")
        and ("mask" if entry["status"] == "done" else "error") in entry
        for entry in cases.values()
    ):
        raise FileFormatError(
            "not a manifest of predictions", where=path, fix="delete it to predict every case anew"
        )
    return content


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    try:
        atomic.write_json(path, manifest)
    except OSError as error:
        raise FileFormatError(
            f"cannot be written ({error.strerror})", where=path, fix="free space or choose another folder"
        ) from error


def _is_done(entry: dict[str, Any] | None, output: Path, save_probabilities: bool) -> bool:
    if not entry or entry.get("status") != "done":
        return False
    mask = output / entry["mask"]
    if save_probabilities and not mask.with_name(f"{files.stem_of(mask)}.npz").is_file():
        return False
    return mask.is_file() and atomic.sha256(mask) == entry.get("sha256")


def _mask_path(case: Case, output: Path) -> Path:
    return output / f"{case.id}{mask_suffix(case)}"


def _probabilities_path(case: Case, output: Path) -> Path:
    return output / f"{case.id}.npz"


def _require_apart(cases: Sequence[Case], output: Path) -> None:
    folder = output.resolve()
    for case in cases:
        mask = _mask_path(case, folder)
        labels = (case.label_path,) if case.label_path else ()
        for path in (*case.image_paths, *labels):
            if path.name == mask.name and path.resolve() == mask:
                raise ConfigError(
                    f"the mask of case {case.id!r} would replace {path.name}",
                    where=output,
                    fix="choose another output folder",
                )


def _require_unique(cases: Sequence[Case]) -> None:
    seen: dict[str, Case] = {}
    for case in cases:
        if case.id in seen:
            raise DataError(
                f"two cases named {case.id!r}: {case.image_paths[0].name} and {seen[case.id].image_paths[0].name}",
                fix="rename one, since masks are named after cases",
            )
        seen[case.id] = case


def _without_folders(text: str, case: Case, output: Path) -> str:
    """Keep folder names, which may identify people, out of what is stored."""
    text = text.replace(str(_mask_path(case, output)), _mask_path(case, output).name)
    for path in (*case.image_paths, *((case.label_path,) if case.label_path else ())):
        text = text.replace(str(path), path.name)
    return text
