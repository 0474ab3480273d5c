"""Finding the cases of a dataset: CSV manifests, nnU-Net folders, folders of images and masks."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from anysite import atomic
from anysite.data import bids, datalist, files, joint
from anysite.data.case import Case, Dataset
from anysite.data.classes import Declaration, count_values, declare_classes, infer_classes, read_declaration
from anysite.errors import DataError, LabelError

MANIFESTS = ("index.csv", "dataset.csv", "manifest.csv")
MAX_DEPTH = 5  # of folders of DICOM: patients, studies, series
MASK_FOLDERS = ("masks", "labels")
DATALISTS = ("dataset.json", "datalist.json")
EXPECTED = (
    f"a CSV manifest ({', '.join(MANIFESTS)}), an nnU-Net folder (dataset.json, imagesTr, labelsTr), a datalist "
    "(JSON with training), BIDS (dataset_description.json, sub-*, derivatives), <site>/images and <site>/masks, "
    "or a JSON file that lists datasets"
)
# What other programs call the columns of a manifest: GaNDLF, BIDS, and common usage.
COLUMN_NAMES = {
    "case": ("subjectid", "case_id", "caseid"),
    "patient": ("patient_id", "patientid", "participant_id", "subject", "subject_id"),
    "domain": ("site", "center", "centre", "hospital"),
    "label": ("mask", "segmentation", "ground_truth"),
}


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
    images = _images_below(path) if path.is_dir() else _series_of(path) if files.suffix_of(path) else {}
    if not images:
        raise DataError(
            f"no images: {_listing(path)}",
            where=path,
            expected=f"image files ({files.KNOWN}), {EXPECTED}",
            fix="convert other formats to NIfTI, PNG or TIFF",
        )
    domain = (path if path.is_dir() else path.parent).resolve().name
    return tuple(Case(id, id, domain, paths) for id, paths in _channels(images).items())


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
    if (path / "imagesTr").is_dir() and (path / "dataset.json").is_file():
        return _from_nnunet
    if path.name in ("imagesTr", "imagesTs") and (path.parent / "dataset.json").is_file():
        return _from_nnunet
    if any(datalist.is_datalist(path / name) for name in DATALISTS):
        return _from_datalist
    if bids.is_bids(path):
        return _from_bids
    if (path / "images").is_dir() or any(_sites_in(path)):
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
    folder = path.parent
    columns, rows = read_table(path)
    for column in ("case", "image"):
        if column not in columns:
            raise DataError(
                f"no column {column!r} among {', '.join(columns)}",
                where=path,
                expected="the columns case and image; patient, domain, label, image_1, ... and task if known",
            )
    more = sorted((c for c in columns if re.fullmatch(r"image_\d+", c)), key=lambda c: int(c[6:]))
    if more != [f"image_{i}" for i in range(1, len(more) + 1)]:
        raise DataError(
            f"channel columns {', '.join(more)}", where=path, expected="image, image_1, image_2, ..."
        )
    cases, lines = [], defaultdict(list)
    for line, row in rows:
        for column in ("case", "image", "patient", "domain"):
            if column in columns and not row[column]:
                raise DataError(
                    f"no {column} in line {line}", where=path, fix="fill it in or drop the column"
                )
        images = [row[column] for column in ("image", *more)]
        while not images[-1]:
            images.pop()
        if "" in images:
            raise DataError(
                f"a channel is missing in line {line}", where=path, expected="channels without gaps"
            )
        lines[row["case"]].append(line)
        cases.append(
            Case(
                row["case"],
                row.get("patient") or row["case"],
                row.get("domain") or folder.resolve().name,
                tuple(folder / image for image in images),
                folder / row["label"] if row.get("label") else None,
                row.get("task", ""),
            )
        )
    twice = [f"{id} (lines {', '.join(map(str, where))})" for id, where in lines.items() if len(where) > 1]
    if twice:
        raise DataError(
            f"{len(twice)} case identifiers used twice: {'; '.join(twice[:10])}", where=path, fix="rename one"
        )
    return _dataset(folder, cases, read_declaration(folder / "dataset.json"))


def read_table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Read a CSV manifest: its columns, in lower case, and each row with its line number.

    Raises:
        DataError: not UTF-8, not CSV, or two columns of one name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"not readable ({error})", where=path, expected="CSV in UTF-8") from None
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    rows = []
    try:
        table = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
        columns = _standard_names([column.strip().lower() for column in table.fieldnames or []])
        table.fieldnames = columns
        for row in table:
            if None in row:
                raise DataError(f"line {table.line_num} has more fields than the header", where=path)
            rows.append((table.line_num, {name: (cell or "").strip() for name, cell in row.items()}))
    except csv.Error as error:
        raise DataError(f"not readable as CSV ({error})", where=path) from None
    if len(set(columns)) < len(columns):
        raise DataError(f"two columns of one name among {', '.join(columns)}", where=path)
    return columns, rows


def _standard_names(columns: list[str]) -> list[str]:
    """Return the columns under our names, where a table has them under another program's."""
    renamed = {
        column: "image" if number == "0" else f"image_{number}"
        for column in columns
        if (match := re.fullmatch(r"(?:channel|modality|image)_(\d+)", column)) and (number := match[1])
        if "image" not in columns
    }
    for name, others in COLUMN_NAMES.items():
        other = next((column for column in others if column in columns), None)
        if other is not None and name not in columns:
            renamed[other] = name
    return [renamed.get(column, column) for column in columns]


def _from_nnunet(path: Path) -> Dataset:
    folder, images = (path, "imagesTr") if (path / "imagesTr").is_dir() else (path.parent, path.name)
    declaration = read_declaration(folder / "dataset.json")
    if declaration.dataset and images == "imagesTr":
        found = {
            id: (
                tuple(folder / image for image in entry.images),
                folder / entry.label if entry.label else None,
            )
            for id, entry in declaration.dataset.items()
        }
    else:
        found = _paired(folder / images, folder / images.replace("images", "labels"), declaration.file_ending)
    mapping = _site_mapping(folder)
    unmapped = [id for id in found if id not in mapping]
    if mapping and unmapped and images == "imagesTr":
        raise DataError(
            f"{len(unmapped)} cases without a site, such as {', '.join(unmapped[:5])}",
            where=folder,
            fix="add them to domain_mapping*.json",
        )
    default = declaration.name or folder.resolve().name
    cases = [Case(id, id, mapping.get(id, default), *paths) for id, paths in found.items()]
    return _dataset(folder, cases, declaration)


def _site_mapping(folder: Path) -> dict[str, str]:
    sites: dict[str, str] = {}
    for path in sorted(folder.glob("domain_mapping*.json")):
        content = atomic.read_json(path)
        if not isinstance(content, dict):
            raise DataError("not an object", where=path, expected="{case: site} or {site: [cases]}")
        for key, value in content.items():
            pairs = [(case, key) for case in value] if isinstance(value, list) else [(key, value)]
            for case, site in pairs:
                if sites.setdefault(str(case), str(site)) != str(site):
                    raise DataError(f"case {case} at the sites {sites[str(case)]} and {site}", where=path)
    return sites


def _from_folders(path: Path) -> Dataset:
    sites = [path] if (path / "images").is_dir() else _sites_in(path)
    cases = []
    for site in sites:
        masks = [site / name for name in MASK_FOLDERS if (site / name).is_dir()]
        if len(masks) > 1:
            raise DataError("both masks and labels", where=site, fix="keep the folder that holds the labels")
        found = _paired(site / "images", masks[0] if masks else None)
        cases += [Case(id, id, site.resolve().name, *paths) for id, paths in found.items()]
    if len({case.id for case in cases}) < len(cases):  # one file name at two sites is two patients
        named = [f"{case.domain}_{case.id}" for case in cases]
        cases = [replace(case, id=id, patient=id) for case, id in zip(cases, named, strict=True)]
        twice = {id for id in named if named.count(id) > 1}
        if twice:
            raise DataError(f"two cases called {', '.join(sorted(twice))}", where=path, fix="rename one")
    return _dataset(path, cases, read_declaration(path / "dataset.json"))


def _images_below(folder: Path) -> dict[str, Path]:
    """Return the images to segment in a folder by case: files, and each series of DICOM in it or in folders below."""
    loose = [path for path in _images_in(folder) if not path.is_dir()]
    others = [path for path in loose if files.suffix_of(path) != files.DICOM or path.suffix.lower() == ".zip"]
    found = [(files.stem_of(path), path) for path in others if path.suffix.lower() != ".zip"]
    for path in (path for path in others if path.suffix.lower() == ".zip"):
        found += _series_of(path).items()
    if len(others) < len(loose):
        found += _series_of(folder).items()
    for below in _dicom_folders(folder, MAX_DEPTH):
        prefix = "_".join(below.relative_to(folder).parts[:-1])
        found += [(f"{prefix}_{id}" if prefix else id, path) for id, path in _series_of(below).items()]
    return _unique(found)


def _dicom_folders(folder: Path, depth: int) -> list[Path]:
    """List the folders below that hold DICOM files directly."""
    found = []
    for path in sorted(folder.iterdir()):
        if depth and path.is_dir() and not path.name.startswith("."):
            found += [*([path] if files.suffix_of(path) else []), *_dicom_folders(path, depth - 1)]
    return found


def _series_of(path: Path) -> dict[str, Path]:
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


def _paired(
    images: Path, labels: Path | None, ending: str = ""
) -> dict[str, tuple[tuple[Path, ...], Path | None]]:
    """Return the image files and the label file of every case in a pair of folders."""
    label_paths = _by_stem(_images_in(labels, ending)) if labels and labels.is_dir() else {}
    channels = _channels(_by_stem(_images_in(images, ending)), label_paths)
    orphans = [label.name for id, label in label_paths.items() if id not in channels]
    if orphans:
        raise DataError(
            f"{len(orphans)} labels without an image, such as {', '.join(orphans[:5])}",
            where=labels,
            expected=f"images of the same name, or with _0000, _0001, ... for each channel, in {images.name}",
        )
    return {id: (paths, label_paths.get(id)) for id, paths in channels.items()}


def _channels(stems: Mapping[str, Path], labels: Collection[str] = ()) -> dict[str, tuple[Path, ...]]:
    """Group files by case: by _0000, _0001, ... if every name counts up so, else one file is one case."""
    groups: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for stem, path in stems.items():
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        if match is None or stem in labels:
            return {stem: (path,) for stem, path in stems.items()}
        groups[match[1]].append((match[2], path))
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


def _images_in(folder: Path, ending: str = "") -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and _ends(path, ending) and files.suffix_of(path)
    )


def _ends(path: Path, ending: str) -> bool:
    # A folder that stands for the files of a series has no ending of its own.
    return path.name.endswith(ending) or (path.is_dir() and ending in (".dcm", ".zip"))


def _sites_in(folder: Path) -> list[Path]:
    return sorted(images.parent for images in folder.glob("*/images") if images.is_dir())


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
