"""Several datasets as one to be trained on jointly: what each of them labels, in the classes of all.

After Karimi and Gholipour, 2022: one network for several organs and modalities, which is not told which dataset an
image is of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from anysite.data.case import Dataset, Task
from anysite.errors import DataError, describe_invalid

AUTOMATIC = re.compile(r"foreground|class_\d+")  # names that say nothing beyond their dataset
ORGAN = "organ"


class Listed(BaseModel):
    """One of the datasets; `labels` gathers its label values into structures, and the rest is background."""

    model_config = ConfigDict(extra="forbid")
    path: str
    labels: dict[str, NonNegativeInt | list[NonNegativeInt]] | None = None


class JointDeclaration(BaseModel):
    """A file that lists datasets.

    Attributes:
        structures: "own": a class for every structure, one for two datasets where they name it alike. "shared":
            one class for whatever organ an image is about, as in the paper.
    """

    model_config = ConfigDict(extra="forbid")
    name: str
    structures: Literal["own", "shared"] = "own"
    datasets: dict[str, Listed] = Field(min_length=1)


def is_joint(path: Path) -> bool:
    """Tell whether a path is a file that lists datasets."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "datasets" in content


def read_joint(path: Path) -> tuple[JointDeclaration, dict[str, Path]]:
    """Return what the file says, and the folder of every dataset, named relative to the file.

    Raises:
        DataError: a key is missing, unknown or has another form, or a name cannot be part of a case's.
    """
    try:
        declaration = JointDeclaration.model_validate_json(path.read_text(encoding="utf-8-sig"))
    except ValidationError as error:
        expected = '{"name", "datasets": {name: {"path"}}}'
        raise DataError(describe_invalid(error), where=path, expected=expected) from None
    for name in declaration.datasets:
        if not re.fullmatch(r"[\w-]+", name):
            raise DataError(f"dataset {name!r}", where=path, expected="a name of letters, digits, _ and -")
    folders = {name: path.parent / listed.path for name, listed in declaration.datasets.items()}
    for name, folder in folders.items():
        if is_joint(folder):
            raise DataError(
                f"datasets.{name} is a list itself",
                where=path,
                expected="a dataset",
                fix="list its datasets here",
            )
    return declaration, folders


def join(declaration: JointDeclaration, datasets: Mapping[str, Dataset], where: Path) -> Dataset:
    """Return all cases as one dataset; `classes` is empty where a dataset's are not known yet.

    Cases, patients and sites are named after their dataset, so that those of two never meet, except patients of whom
    one image is in several datasets, such as one folder listed with the labels of each of two readers.

    Raises:
        DataError: overlapping classes, or a listed value that the dataset does not declare.
    """
    people = _name_people(datasets)
    cases = [
        replace(
            case, id=f"{name}_{case.id}", patient=people[name, case.patient], domain=f"{name}/{case.domain}",
            task=name,
        )
        for name, dataset in datasets.items()
        for case in dataset.cases
    ]  # fmt: skip
    ids = [case.id for case in cases]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise DataError(f"two cases called {twice}", where=where, fix="rename a dataset")
    known = {name: _structures(name, declaration, dataset, where) for name, dataset in datasets.items()}
    if not all(dataset.classes for dataset in datasets.values()):
        undeclared = {name: Task((), {}) for name in datasets}
        return Dataset(declaration.name, tuple(cases), (), (), tasks=undeclared)
    names = list(dict.fromkeys(structure for structures in known.values() for structure in structures))
    classes = ("background", *names)
    tasks = {
        name: Task(
            classes=(0, *sorted({classes.index(structure) for structure in structures})),
            indices=dict.fromkeys(datasets[name].label_values, 0)
            | {value: classes.index(s) for s, values in structures.items() for value in values},
        )
        for name, structures in known.items()
    }
    return Dataset(declaration.name, tuple(cases), classes, tuple(range(len(classes))), tasks=tasks)


def _name_people(datasets: Mapping[str, Dataset]) -> dict[tuple[str, str], str]:
    """Return a name for every patient of every dataset, one for all who share an image file, if by way of others."""
    people: dict[tuple[str, str], str] = {}
    owners: dict[Path, str] = {}
    for name, dataset in datasets.items():
        for case in dataset.cases:
            person = people.setdefault((name, case.patient), f"{name}/{case.patient}")
            for path in (path.resolve() for path in case.image_paths):
                former = owners.setdefault(path, person)
                if former == person:
                    continue
                people = {key: former if own == person else own for key, own in people.items()}
                owners = {file: former if own == person else own for file, own in owners.items()}
                person = former
    return people


def _structures(
    name: str, declaration: JointDeclaration, dataset: Dataset, where: Path
) -> dict[str, tuple[int, ...]]:
    """Return the label values of every structure of one dataset."""
    if dataset.regions:
        raise DataError(
            f"overlapping classes in {name}",
            where=where,
            expected="datasets whose classes exclude each other",
        )
    listed = declaration.datasets[name].labels
    if listed is not None:
        found = {key: tuple(value) if isinstance(value, list) else (value,) for key, value in listed.items()}
        values = [value for group in found.values() for value in group]
        unknown = sorted(set(values) - set(dataset.label_values)) if dataset.label_values else []
        if "background" in found or not found:
            raise DataError(
                f"structures {', '.join(found) or 'none'}", where=f"{where}: datasets.{name}.labels",
                expected="at least one beside the background, which needs no naming",
            )  # fmt: skip
        if unknown or len(set(values)) < len(values) or 0 in values:
            raise DataError(
                f"label values {unknown or values}", where=f"{where}: datasets.{name}.labels",
                expected="values of the dataset's foreground, each in one structure",
            )  # fmt: skip
    else:
        pairs = list(zip(dataset.classes, dataset.label_values, strict=True))[1:]
        found = {f"{name}_{key}" if AUTOMATIC.fullmatch(key) else key: (value,) for key, value in pairs}
    if declaration.structures == "shared" and found:
        return {ORGAN: tuple(value for values in found.values() for value in values)}
    return found
