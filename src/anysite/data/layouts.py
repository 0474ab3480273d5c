"""Which layout a dataset has, and the dataset it holds."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from anysite.data import bids, datalist, files, joint
from anysite.data.case import Case, Dataset
from anysite.data.classes import Declaration, count_values, declare_classes, infer_classes, read_declaration
from anysite.data.csv_manifest import read_manifest
from anysite.data.folders import (
    find_folder_cases,
    group_channels,
    list_images_below,
    list_series_images,
    list_sites,
)
from anysite.data.nnunet import find_nnunet_cases
from anysite.errors import DataError, LabelError

MANIFESTS = ("index.csv", "dataset.csv", "manifest.csv")
DATALISTS = ("dataset.json", "datalist.json")
EXPECTED = (
    f"a CSV manifest ({', '.join(MANIFESTS)}), an nnU-Net folder (dataset.json, imagesTr, labelsTr), a datalist "
    "(JSON with training), BIDS (dataset_description.json, sub-*, derivatives), <site>/images and <site>/masks, "
    "or a JSON file that lists datasets"
)


def open_dataset(path: Path, unseen: Collection[str] = ()) -> Dataset:
    """Open the dataset at `path`: a CSV manifest, an nnU-Net v2 folder, folders of images and masks, or several.

    Only where no dataset.json declares the classes are the label files read, to find their values; those of
    the sites `unseen`, which are kept for testing, are not.

    Raises:
        DataError: nothing known lies there, or the layout contradicts itself.
        LabelError: undeclared classes that cannot be told from the label values.
    """
    if joint.is_joint(path := Path(path)):
        declaration, folders = joint.read_joint(path)
        opened = {
            name: open_dataset(folder, {domain.removeprefix(f"{name}/") for domain in unseen})
            for name, folder in folders.items()
        }
        return joint.join(declaration, opened, path)
    dataset = find_cases(path)
    if dataset.classes:
        return dataset
    if not dataset.labelled:
        raise LabelError(
            "no label files and no declared classes",
            where=path,
            fix='add dataset.json with "labels": {"background": 0, "name": 1}',
        )
    seen = [case for case in dataset.labelled if case.domain not in unseen]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda case: set(count_values(case.label().array)), seen)
        classes, label_values = infer_classes(set().union(*found), where=path)
    return replace(dataset, classes=classes, label_values=label_values)


def open_images(path: Path) -> tuple[Case, ...]:
    """List the images to segment at `path`: a dataset, a folder of image files, or one image file.

    Raises:
        DataError: nothing that can be read lies there.
    """
    path = _existing(path)
    if _layout(path):
        return find_cases(path).cases
    images: dict[str, Path] = {}
    if path.is_dir():
        images = list_images_below(path)
    elif files.suffix_of(path):
        images = list_series_images(path)
    if not images:
        raise DataError(
            f"no images: {_listing(path)}",
            where=path,
            expected=f"image files ({files.KNOWN}), {EXPECTED}",
            fix="convert other formats to NIfTI, PNG or TIFF",
        )
    domain = (path if path.is_dir() else path.parent).resolve().name
    return tuple(Case(id, id, domain, paths) for id, paths in group_channels(images).items())


def is_dataset(path: Path) -> bool:
    """Tell whether a path has one of the layouts of a dataset."""
    return Path(path).exists() and _layout(Path(path)) is not None


def find_cases(path: Path) -> Dataset:
    """List a dataset's cases without reading an image; `classes` is empty where none are declared.

    Raises:
        DataError: nothing known lies there, or the layout contradicts itself.
    """
    path = _existing(path)
    read = _layout(path)
    if read is None:
        raise DataError(
            f"no dataset: {_listing(path)}",
            where=path,
            expected=EXPECTED,
            fix="rename the folders, or write index.csv with the columns case, patient, domain, image, label",
        )
    dataset = read(path)
    if not dataset.cases:
        raise DataError("a dataset without cases", where=path, expected="at least one image")
    for case in dataset.cases:
        if re.search(r"[/\\\x00]|^\.*$", case.id):
            raise DataError(f"case {case.id!r}", where=path, expected="an identifier that can name a file")
    return dataset


def _layout(path: Path) -> Callable[[Path], Dataset] | None:
    if path.is_file():
        if path.suffix.lower() == ".csv":
            return _from_manifest
        return _from_list if joint.is_joint(path) else _from_datalist if datalist.is_datalist(path) else None
    if any((path / name).is_file() for name in MANIFESTS):
        return _from_manifest
    if datalist.tells_of_people(path / "dataset.json"):
        return _from_datalist
    if (path / "imagesTr").is_dir() and (path / "dataset.json").is_file():
        return _from_nnunet
    if path.name in ("imagesTr", "imagesTs") and (path.parent / "dataset.json").is_file():
        return _from_nnunet
    if any(datalist.is_datalist(path / name) for name in DATALISTS):
        return _from_datalist
    if bids.is_bids(path):
        return _from_bids
    if (path / "images").is_dir() or any(list_sites(path)):
        return _from_folders
    return None


def _from_list(path: Path) -> Dataset:
    declaration, folders = joint.read_joint(path)
    return joint.join(declaration, {name: find_cases(folder) for name, folder in folders.items()}, path)


def _from_datalist(path: Path) -> Dataset:
    if path.is_dir():
        path = next(path / name for name in DATALISTS if datalist.is_datalist(path / name))
    declaration = read_declaration(path)
    domain = declaration.name or path.resolve().parent.name
    return _dataset(path.parent, datalist.read_datalist(path, domain), declaration)


def _from_bids(path: Path) -> Dataset:
    declaration = read_declaration(path / "dataset.json")
    if not declaration.labels:
        declaration = declaration.model_copy(update={"labels": bids.read_class_names(path)})
    return _dataset(path, bids.find_cases(path, declaration.name or path.resolve().name), declaration)


def _from_manifest(path: Path) -> Dataset:
    if path.is_dir():
        path = next(path / name for name in MANIFESTS if (path / name).is_file())
    return _dataset(path.parent, read_manifest(path), read_declaration(path.parent / "dataset.json"))


def _from_nnunet(path: Path) -> Dataset:
    folder, images = (path, "imagesTr") if (path / "imagesTr").is_dir() else (path.parent, path.name)
    declaration = read_declaration(folder / "dataset.json")
    return _dataset(folder, find_nnunet_cases(folder, images, declaration), declaration)


def _from_folders(path: Path) -> Dataset:
    return _dataset(path, find_folder_cases(path), read_declaration(path / "dataset.json"))


def _dataset(folder: Path, cases: Iterable[Case], declaration: Declaration) -> Dataset:
    modality = declaration.modality or declaration.channel_names
    provenance = {
        "licence": declaration.licence or declaration.license,
        "link": declaration.link or declaration.reference,
        "modality": modality if isinstance(modality, str) else ", ".join(modality.values()),
    }
    dataset = Dataset(
        declaration.name or folder.resolve().name,
        tuple(cases),
        (),
        (),
        provenance={key: value for key, value in provenance.items() if value},
    )
    return declare_classes(dataset, declaration, folder / "dataset.json") if declaration.labels else dataset


def _existing(path: Path) -> Path:
    if not files.exists(path):
        raise DataError("no such file or folder", where=path, expected=EXPECTED)
    return Path(path)


def _listing(path: Path) -> str:
    if path.is_file():
        return f"a file called {path.name}"
    names = sorted(p.name for p in path.iterdir())
    return f"the folder holds {', '.join(names[:6]) or 'nothing'}{', ...' if len(names) > 6 else ''}"
