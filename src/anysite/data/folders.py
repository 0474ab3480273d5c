"""Folders of images and masks, and which files in them are one case."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from anysite.data import files
from anysite.data.case import Case
from anysite.errors import DataError

MAX_DEPTH = 5  # of folders of DICOM: patients, studies, series
MAX_CHANNELS = 8  # of one unlabelled case alone, by the numbers of its files
MASK_FOLDERS = ("masks", "labels")


def find_folder_cases(path: Path) -> list[Case]:
    """List the cases of `<site>/images` and `<site>/masks`, or of one site's two folders.

    Raises:
        DataError: labels without an image, or two cases of one name.
    """
    sites = [path] if (path / "images").is_dir() else list_sites(path)
    cases = []
    for site in sites:
        masks = [site / name for name in MASK_FOLDERS if (site / name).is_dir()]
        if len(masks) > 1:
            raise DataError("both masks and labels", where=site, fix="keep the folder that holds the labels")
        found = pair_files(site / "images", masks[0] if masks else None)
        cases += [Case(id, id, site.resolve().name, *paths) for id, paths in found.items()]
    if len({case.id for case in cases}) < len(cases):  # one file name at two sites is two patients
        named = [f"{case.domain}_{case.id}" for case in cases]
        cases = [replace(case, id=id, patient=id) for case, id in zip(cases, named, strict=True)]
        twice = {id for id in named if named.count(id) > 1}
        if twice:
            raise DataError(f"two cases called {', '.join(sorted(twice))}", where=path, fix="rename one")
    return cases


def list_images_below(folder: Path) -> dict[str, Path]:
    """Return the images to segment in a folder by case: files, and each series of DICOM in it or in folders below."""
    loose = [path for path in list_images(folder) if not path.is_dir()]
    others = [path for path in loose if files.suffix_of(path) != files.DICOM or path.suffix.lower() == ".zip"]
    found = [(files.stem_of(path), path) for path in others if path.suffix.lower() != ".zip"]
    for path in (path for path in others if path.suffix.lower() == ".zip"):
        found += list_series_images(path).items()
    if len(others) < len(loose):
        found += list_series_images(folder).items()
    for below in _dicom_folders(folder, MAX_DEPTH):
        prefix = "_".join(below.relative_to(folder).parts[:-1])
        found += [
            (f"{prefix}_{id}" if prefix else id, path) for id, path in list_series_images(below).items()
        ]
    return _unique(found)


def _dicom_folders(folder: Path, depth: int) -> list[Path]:
    """List the folders below that hold DICOM files directly."""
    found = []
    for path in sorted(folder.iterdir()):
        if depth and path.is_dir() and not path.name.startswith("."):
            found += [*([path] if files.suffix_of(path) else []), *_dicom_folders(path, depth - 1)]
    return found


def list_series_images(path: Path) -> dict[str, Path]:
    """Return the image of a path; of DICOM each series by its number, and none where it holds other objects."""
    if files.suffix_of(path) != files.DICOM or files.has_choice(path):
        return {files.stem_of(path): path}
    try:
        numbers = files.list_series(path)
    except DataError:  # one bad case stops no batch: reading it says what is wrong
        return {files.stem_of(path): path}
    if not numbers:
        return {}
    if len(numbers) == 1:
        return {files.stem_of(path): path}
    chosen = [path.with_name(f"{path.name}#{number}") for number in numbers]
    return {files.stem_of(one): one for one in chosen}


def pair_files(
    images: Path, labels: Path | None, ending: str = ""
) -> dict[str, tuple[tuple[Path, ...], Path | None]]:
    """Return the image files and the label file of every case in a pair of folders."""
    label_paths = _by_stem(list_images(labels, ending)) if labels and labels.is_dir() else {}
    channels = group_channels(_by_stem(list_images(images, ending)), label_paths)
    orphans = [label.name for id, label in label_paths.items() if id not in channels]
    if orphans:
        raise DataError(
            f"{len(orphans)} labels without an image, such as {', '.join(orphans[:5])}",
            where=labels,
            expected=f"images of the same name, or with _0000, _0001, ... for each channel, in {images.name}",
        )
    return {id: (paths, label_paths.get(id)) for id, paths in channels.items()}


def group_channels(stems: Mapping[str, Path], labels: Collection[str] = ()) -> dict[str, tuple[Path, ...]]:
    """Group files by case: by _0000, _0001, ... if every name counts up so, else one file is one case.

    One series of more than `MAX_CHANNELS` numbers without a label is of pictures, not of channels.
    """
    groups: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for stem, path in stems.items():
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        if match is None or stem in labels:
            return {stem: (path,) for stem, path in stems.items()}
        groups[match[1]].append((match[2], path))
    if not labels and len(groups) == 1 and len(stems) > MAX_CHANNELS:
        return {stem: (path,) for stem, path in stems.items()}
    for numbered in groups.values():
        if [number for number, _ in sorted(numbered)] != [f"{i:04d}" for i in range(len(numbered))]:
            return {stem: (path,) for stem, path in stems.items()}
    return {id: tuple(path for _, path in sorted(numbered)) for id, numbered in groups.items()}


def _by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    return _unique((files.stem_of(path), path) for path in paths)


def _unique(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    stems: dict[str, Path] = {}
    for stem, path in named:
        other = stems.setdefault(stem, path)
        if other is not path:
            raise DataError(
                f"{other.name} and {path.name} have one name", where=path.parent, fix="rename one"
            )
    return stems


def list_images(folder: Path, ending: str = "") -> list[Path]:
    """List the images in a folder, and folders or archives that stand for one."""
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and _ends(path, ending) and files.suffix_of(path)
    )


def _ends(path: Path, ending: str) -> bool:
    # A folder that stands for the files of a series has no ending of its own.
    return path.name.endswith(ending) or (path.is_dir() and ending in (".dcm", ".zip"))


def list_sites(folder: Path) -> list[Path]:
    """List the folders below that hold a folder of images."""
    return sorted(images.parent for images in folder.glob("*/images") if images.is_dir())
