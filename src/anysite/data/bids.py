"""BIDS datasets whose segmentations lie in derivatives: https://bids-specification.readthedocs.io."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from anysite.data import files
from anysite.data.case import Case
from anysite.errors import DataError

# What a derivative may add to the name of the image it was made from.
ADDED = frozenset({"space", "desc", "label", "res", "den", "atlas", "seg", "hemi"})
SITE_COLUMNS = ("site", "domain", "center", "centre", "institution", "scanner")
LABEL_SUFFIXES = ("dseg", "mask")


def is_bids(folder: Path) -> bool:
    """Tell whether a folder is the root of a BIDS dataset."""
    return (folder / "dataset_description.json").is_file() and any(folder.glob("sub-*"))


def find_cases(folder: Path, default_domain: str) -> list[Case]:
    """Return a case for every session, or run and so on, of every subject.

    Images of one session that differ in their suffix alone (T1w, FLAIR) are its channels, in alphabetical
    order. Its label is the one `dseg` or `mask` of the same subject and session below `derivatives`. The site
    comes from participants.tsv.

    Raises:
        DataError: sessions with other channels than most, or two labels for one image.
    """
    images: dict[tuple[str, ...], dict[str, Path]] = defaultdict(dict)
    for path in _images_in(folder.glob("sub-*")):
        entities, suffix = _parse(path)
        if suffix not in LABEL_SUFFIXES:
            images[entities][suffix] = path
    channels = sorted({suffix for found in images.values() for suffix in found})
    for entities, found in images.items():
        if sorted(found) != channels:
            raise DataError(
                f"{'_'.join(entities)} has {', '.join(sorted(found))}",
                where=folder,
                expected=f"{', '.join(channels)} as the others have, to be the channels of a case",
                fix="write index.csv with the columns case, patient, domain, image, label",
            )
    labels = _find_labels(folder, images.keys())
    sites = _read_sites(folder / "participants.tsv")
    unknown = sorted({entities[0] for entities in images} - sites.keys()) if sites else []
    if unknown:
        raise DataError(
            f"no row for {', '.join(unknown[:5])}", where=folder / "participants.tsv",
            expected="a site for every subject, since others have one", fix="add the rows",
        )  # fmt: skip
    return [
        Case(
            "_".join(entities),
            entities[0],
            sites.get(entities[0], default_domain),
            tuple(found[suffix] for suffix in channels),
            labels.get(entities),
        )
        for entities, found in sorted(images.items())
    ]


def read_class_names(folder: Path) -> dict[str, int]:
    """Return the classes that the `dseg.tsv` of a derivative names; empty where there is none.

    Raises:
        DataError: two of them that differ, or a table without the columns index and name.
    """
    found: dict[str, int] = {}
    for path in sorted(folder.glob("derivatives/**/*dseg.tsv")):
        rows = _read_table(path)
        try:
            names = {row["name"]: int(row["index"]) for row in rows}
        except (KeyError, ValueError):
            raise DataError("no class names", where=path, expected="the columns index and name") from None
        if 0 not in names.values():
            names = {"background": 0, **names}
        if found and names != found:
            raise DataError("other classes than in another dseg.tsv", where=path, expected=str(found)[:200])
        found = names
    return found


def _find_labels(folder: Path, images: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], Path]:
    labels: dict[tuple[str, ...], Path] = {}
    known = set(images)
    for path in _images_in(folder.glob("derivatives/**/sub-*")):
        entities, suffix = _parse(path)
        own = tuple(entity for entity in entities if entity.split("-")[0] not in ADDED)
        if suffix not in LABEL_SUFFIXES or own not in known:
            continue
        other = labels.setdefault(own, path)
        if other != path:
            raise DataError(
                f"two segmentations of {'_'.join(own)}: {other.name} and {path.name}",
                where=path.parent,
                expected="one dseg or mask for every image",
                fix="write index.csv with the columns case, patient, domain, image, label",
            )
    return labels


def _images_in(subjects: Iterable[Path]) -> list[Path]:
    found = {path for subject in subjects if subject.is_dir() for path in subject.rglob("sub-*")}
    return sorted(path for path in found if files.suffix_of(path) and path.is_file())


def _parse(path: Path) -> tuple[tuple[str, ...], str]:
    """Return the entities (`sub-01`, `ses-2`, ...) and the suffix (`T1w`) of a file name."""
    *entities, suffix = files.stem_of(path).split("_")
    if not all(re.fullmatch(r"[a-zA-Z]+-[a-zA-Z0-9+.-]+", entity) for entity in entities):
        raise DataError(f"the name {path.name}", where=path.parent, expected="sub-01_ses-02_T1w and the like")
    return tuple(entities), suffix


def _read_sites(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    rows = _read_table(path)
    column = next((name for name in SITE_COLUMNS if rows and name in rows[0]), None)
    if column is None:
        return {}
    missing = [row.get("participant_id", "?") for row in rows if not row[column] or row[column] == "n/a"]
    if missing:
        raise DataError(
            f"no {column} for {', '.join(missing[:5])}", where=path, fix="fill it in or drop the column"
        )
    return {
        f"sub-{row['participant_id'].removeprefix('sub-')}": row[column]
        for row in rows
        if row.get("participant_id")
    }


def _read_table(path: Path) -> list[dict[str, str]]:
    try:
        table = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(), delimiter="\t")
        return [{(k or "").strip().lower(): (v or "").strip() for k, v in row.items()} for row in table]
    except (OSError, UnicodeDecodeError, csv.Error, AttributeError) as error:
        raise DataError(f"not readable ({error})", where=path, expected="tab-separated UTF-8") from None
