"""The manifest of a prediction folder: what is done, from which images, and which files are its own."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from anysite import atomic
from anysite.data import files
from anysite.data.case import Case, Dataset
from anysite.errors import ConfigError, DataError, FileFormatError
from anysite.judgement import DECISIONS

MANIFEST, MANIFESTS = "predictions.json", "predictions*.json"
JOURNAL = ".journal"  # after the manifest's name: lines of what changed since it was written
UNADAPTED_FOLDER = "unadapted"  # the folder of masks without test-time adaptation
DRAWINGS_FOLDER = "drawings"  # the folder of what is drawn from masks before and after it
Entry = TypeVar("Entry")


class Manifest:
    """The manifest of one part of a prediction folder.

    Every change is a line of a journal beside it at once, so that the thousandth case costs no more than the first;
    `write` stores the whole anew, and the journal is gone. `read_content` reads both.

    "files" lists what this and earlier runs wrote, with the digest; a file listed by no manifest of the folder
    is somebody else's, and is neither replaced nor deleted.

    Raises:
        FileFormatError: a manifest that lies there is not one.
    """

    def __init__(self, output: Path, part: str, origin: str, facts: dict[str, Any]) -> None:
        self.output, self.path = output, manifest_path(output, part)
        self.digests: dict[str, set[str | None]] = {}
        for path in output.glob(MANIFESTS):
            for name, digest in _files_of(_read_manifest(path)).items():
                self.digests.setdefault(name, set()).add(digest)
        previous = _read_manifest(self.path) if self.path.is_file() else {"cases": {}}
        self.files = _files_of(previous)
        self.cases = previous["cases"] if previous.get("origin") == origin else {}
        self.content = {"origin": origin, **facts, "cases": self.cases, "files": self.files}
        self._journal = _journal_of(self.path)
        self._changed: dict[str, str | None] = {}
        self._gone: set[str] = set()

    def require_free(self, names: Iterable[str]) -> None:
        """Refuse to replace files that no manifest of the folder lists.

        Raises:
            ConfigError: there is such a file.
        """

        def is_taken(path: Path) -> bool:
            # A file where a folder has to be is in the way as well.
            return path.exists() or (path.parent != self.output and path.parent.is_file())

        others = [name for name in names if name not in self.digests and is_taken(self.output / name)]
        if others:
            more = f" and {len(others) - 1} more files" if len(others) > 1 else ""
            raise ConfigError(
                f"{others[0]}{more} would be replaced, but anysite predict did not write them",
                where=self.output,
                fix="choose another output folder, or move those files away",
            )

    def sweep(self, names: Iterable[str]) -> None:
        """Delete what a killed process left half-written of files that only this part writes."""
        by_folder: dict[Path, set[str]] = {}
        for name in names:
            by_folder.setdefault((self.output / name).parent, set()).add(Path(name).name)
        for folder, own in by_folder.items():
            atomic.sweep(folder, own)

    def is_done(self, case: Case, save_probabilities: bool) -> bool:
        """Tell whether the files of a case lie there as they were written, from the very same image."""
        entry = self.cases.get(case.id)
        if not entry or entry["status"] != "done":
            return False
        written = {entry["mask"]: entry.get("sha256")}
        if save_probabilities:
            written[probabilities_name(case)] = self.files.get(probabilities_name(case))
        try:
            return (
                all(atomic.sha256(self.output / name) == digest for name, digest in written.items())
                and image_digests(case) == entry.get("image_sha256")
            )  # fmt: skip
        except OSError:  # one of them is gone
            return False

    def claim(self, names: Iterable[str]) -> None:
        """List files before they are written, so that those of an interrupted call are known as its own."""
        new = [name for name in names if name not in self.files]
        for name in new:
            self._list(name, None)
        if new:
            self._append({})

    def add_file(self, name: str) -> str:
        """List a file just written, and return its digest."""
        digest = atomic.sha256(self.output / name)
        self._list(name, digest)
        self.digests.setdefault(name, set()).add(digest)
        return digest

    def remove_files(self, names: Iterable[str]) -> None:
        """Delete files of earlier calls, unless they were altered since."""
        for name in names:
            path = self.output / name
            if path.is_file() and atomic.sha256(path) in self.digests.get(name, ()):
                path.unlink()
            if not path.exists() and name in self.files:
                del self.files[name]
                self._changed.pop(name, None)
                self._gone.add(name)

    def enter(self, case: Case, entry: dict[str, Any]) -> None:
        """Say what became of a case.

        Raises:
            FileFormatError: it cannot be written.
        """
        self.cases[case.id] = entry
        self._append({case.id: entry})

    def write(self) -> None:
        """Store the whole manifest.

        Raises:
            FileFormatError: it cannot be written.
        """
        atomic.write_json(self.path, self.content)
        self._journal.unlink(missing_ok=True)
        self._changed, self._gone = {}, set()

    def _list(self, name: str, digest: str | None) -> None:
        self.files[name] = self._changed[name] = digest
        self._gone.discard(name)

    def _append(self, cases: dict[str, Any]) -> None:
        lines: list[dict[str, Any]] = (
            [] if self._journal.exists() else [{"extends": atomic.sha256(self.path)}]
        )
        lines.append({"cases": cases, "files": self._changed, "gone": sorted(self._gone)})
        atomic.append(self._journal, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        self._changed, self._gone = {}, set()


def manifest_path(output: Path, part: str = "1/1") -> Path:
    """Return where the manifest of one part lies; parts run at once and must not share a file."""
    return output / (MANIFEST if part == "1/1" else f"predictions.{part.replace('/', '-of-')}.json")


def read_content(path: Path) -> Any:
    """Return what a manifest says, with what was entered since it was written whole.

    Raises:
        FileFormatError: the file is missing or is not JSON.
    """
    content, journal = atomic.read_json(path), _journal_of(path)
    sound = isinstance(content, dict) and all(isinstance(content.get(n), dict) for n in ("cases", "files"))
    if not sound or not journal.is_file():
        return content
    first, *lines = journal.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    # One that extends a manifest that is there no more is out of date; a last line may have been cut off.
    if _parse(first).get("extends") == atomic.sha256(path):
        for change in itertools.takewhile(_is_change, map(_parse, lines)):
            content["cases"].update(change["cases"])
            content["files"].update(change["files"])
            for name in change["gone"]:
                content["files"].pop(name, None)
    return content


def _parse(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_change(content: dict[str, Any]) -> bool:
    return (
        isinstance(content.get("cases"), dict)
        and isinstance(content.get("files"), dict)
        and isinstance(content.get("gone"), list)
        and all(isinstance(name, str) for name in content["gone"])
    )


def _journal_of(path: Path) -> Path:
    return path.with_name(path.name + JOURNAL)


def read_manifests(folder: Path, origin: str | None = None) -> dict[str, Any]:
    """Return the manifest of a prediction folder, all its parts joined, or those of one origin.

    Raises:
        FileFormatError: no manifest is there, or it is not one.
        DataError: the parts were written by different runs.
    """
    paths = sorted(Path(folder).glob(MANIFESTS))
    if not paths:
        raise FileFormatError(f"no {MANIFEST}", where=folder, expected="a folder written by anysite predict")
    parts = [_read_manifest(path) for path in paths]
    if origin is not None:
        parts = [part for part in parts if part.get("origin") == origin]
    if len({part.get("origin") for part in parts}) > 1:
        raise DataError(
            f"{', '.join(path.name for path in paths)} of different runs or settings",
            where=folder,
            fix="predict every part with the same runs, or delete the manifests that are out of date",
        )
    cases = join_parts([part["cases"] for part in parts], lambda entry: entry["status"])
    listed = {name: digest for part in parts for name, digest in _files_of(part).items()}
    return {"runs": [], **parts[0], "cases": cases, "files": listed}


def join_parts(parts: Iterable[Mapping[str, Entry]], status_of: Callable[[Entry], str]) -> dict[str, Entry]:
    """Return the entries of several manifests; of a case that failed in one and is done in another the latter."""
    joined: dict[str, Entry] = {}
    for part in parts:
        for name, entry in part.items():
            if name not in joined or status_of(entry) == "done" or status_of(joined[name]) != "done":
                joined[name] = entry
    return joined


def mask_name(case: Case, kind: str = "auto") -> str:
    """Return the file name of a case's mask, of a kind that `PredictSettings.format` knows."""
    return f"{case.id}{mask_suffix(case, kind)}"


def unadapted_name(mask: str) -> str:
    """Return where a mask lies as it was without test-time adaptation."""
    return f"{UNADAPTED_FOLDER}/{mask}"


def drawings_name(case: Case) -> str:
    """Return where the picture lies of what is drawn from a case's masks before and after adaptation."""
    return f"{DRAWINGS_FOLDER}/{case.id}.png"


def mask_suffix(case: Case, kind: str = "auto") -> str:
    """Return the suffix of a case's mask.

    By itself that is its image's own, or one that alters no index and is one file; of DICOM images NIfTI, of DICOM
    pictures PNG.
    """
    if kind != "auto":
        return ".nii.gz" if kind == "nifti" else files.DICOM
    path = case.image_paths[0]
    suffix = files.suffix_of(path)
    if suffix == files.DICOM:
        return ".png" if files.is_picture(path) else ".nii.gz"
    return {".jpg": ".png", ".jpeg": ".png", ".mhd": ".mha"}.get(suffix, suffix)


def probabilities_name(case: Case) -> str:
    """Return the file name of a case's probabilities."""
    return f"{case.id}.npz"


def image_digests(case: Case) -> list[str]:
    """Return the SHA-256 of every image file of a case."""
    return [files.digest_of(path) for path in case.image_paths]


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """Return what a manifest says of the dataset that was predicted."""
    return {
        "name": dataset.name,
        "classes": list(dataset.classes),
        "label_values": list(dataset.label_values),
        **({"tasks": {name: task.indices for name, task in dataset.tasks.items()}} if dataset.tasks else {}),
    }


def describe_case(case: Case, output: Path) -> dict[str, Any]:
    """Return what a manifest says of a case before it is predicted."""
    return {
        "images": [_locate(path, output) for path in case.image_paths],
        "label": _locate(case.label_path, output) if case.label_path else None,
        "patient": case.patient,
        "domain": case.domain,
        **({"task": case.task} if case.task else {}),
    }


def _locate(path: Path, output: Path) -> str:
    """Return where a file lies as seen from the prediction folder, so that both may move together."""
    try:
        return os.path.relpath(path.parent.resolve() / path.name, output.resolve())
    except ValueError:  # another drive on Windows
        return str(path.absolute())


def _files_of(manifest: dict[str, Any]) -> dict[str, str | None]:
    masks = {e["mask"]: e.get("sha256") for e in manifest["cases"].values() if e["status"] == "done"}
    return masks | manifest.get("files", {})


def _is_name(mask: Any) -> bool:
    """Tell whether this names a file in the folder, and none elsewhere."""
    return isinstance(mask, str) and not Path(mask).is_absolute() and ".." not in Path(mask).parts


def _is_verdict(verdict: Any) -> bool:
    return verdict is None or (
        isinstance(verdict, dict)
        and verdict.get("decision") in DECISIONS
        and isinstance(verdict.get("reasons"), list)
        and isinstance(verdict.get("scores"), dict)
        and all(value is None or isinstance(value, int | float) for value in verdict["scores"].values())
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    content = read_content(path)
    cases = content.get("cases") if isinstance(content, dict) else None
    if (
        not isinstance(cases, dict)
        or not isinstance(content.get("origin"), str | None)
        or not isinstance(content.get("files", {}), dict)
        or not all(
            isinstance(entry, dict)
            and entry.get("status") in ("done", "failed")
            and (_is_name(entry.get("mask")) if entry["status"] == "done" else "error" in entry)
            and _is_verdict(entry.get("verdict"))
            for entry in cases.values()
        )
        or not all(isinstance(digest, str | None) for digest in _files_of(content).values())
    ):
        raise FileFormatError(
            "not a manifest of predictions", where=path, fix="delete it to predict every case anew"
        )
    return content
