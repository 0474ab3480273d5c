"""What the classes of a dataset are: declared in its dataset.json, or found in its labels."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from anysite import atomic
from anysite.data.case import Dataset
from anysite.errors import DataError, LabelError


class ListedCase(BaseModel):
    """The files of a case named in nnU-Net's dataset.json instead of by file name."""

    images: list[str] = Field(min_length=1)
    label: str | None = None


class Declaration(BaseModel):
    """What dataset.json says of a dataset; other keys are ignored."""

    model_config = ConfigDict(extra="ignore")
    name: str = ""
    labels: dict[str, NonNegativeInt | list[NonNegativeInt] | str] = {}
    regions_class_order: list[NonNegativeInt] = []
    channel_names: dict[str, str] = {}
    modality: dict[str, str] | str = {}
    licence: str = ""
    license: str = ""
    link: str = ""
    reference: str = ""
    file_ending: str = ""
    dataset: dict[str, ListedCase] = {}


def read_declaration(path: Path) -> Declaration:
    """Read a dataset.json; an empty declaration where there is none.

    Raises:
        DataError: a key has another form.
    """
    if not path.is_file():
        return Declaration()
    try:
        return Declaration.model_validate(atomic.read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{key} is {first['input']!r}: {first['msg']}", where=path) from None


def declare_classes(dataset: Dataset, declaration: Declaration, path: Path) -> Dataset:
    """Return the dataset with the classes, and for overlapping ones the regions, of its declaration.

    Raises:
        LabelError: no background, two classes of one value, or regions without an order.
    """
    labels = declaration.labels
    if all(isinstance(value, str) and key.isdecimal() for key, value in labels.items()):
        labels = {
            str(name): int(value) for value, name in labels.items()
        }  # the Decathlon's {"0": "background"}
    listed = [v for value in labels.values() for v in (value if isinstance(value, list) else [value])]
    if large := [value for value in listed if isinstance(value, int) and value >= 2**31]:
        raise LabelError(f"label value {large[0]}", where=path, expected="values below 2^31")
    background = (
        "background" if "background" in labels else next((n for n, v in labels.items() if v == 0), None)
    )
    regions = {name: value for name, value in labels.items() if name != background}
    by_value = {
        value[0] if isinstance(value, list) else value: name
        for name, value in regions.items()
        if _single(value)
    }
    first = labels.get(background or "")
    if not isinstance(first, int) or any(isinstance(value, str) for value in labels.values()):
        raise LabelError(f"labels {labels}", where=path, expected='{"background": 0, "name": 1}')
    if "ignore" in labels:
        raise LabelError(
            "an ignore label", where=path, expected="a class for every voxel", fix="remap those voxels"
        )
    overlapping = any(isinstance(value, list) for value in regions.values())
    members = [tuple(value) if isinstance(value, list) else (value,) for value in regions.values()]
    values = (first, *sorted({value for region in members for value in region}))
    if len(set(values)) < len(values) or (not overlapping and len(values) < len(labels)):
        raise LabelError(
            f"one value for two classes among {labels}", where=path, expected="a value for each class"
        )
    classes = (str(background), *(by_value.get(value, f"class_{value}") for value in values[1:]))
    dataset = replace(dataset, classes=classes, label_values=values)
    if not overlapping:
        return dataset
    order = declaration.regions_class_order
    if len(order) != len(members) or any(c not in region for c, region in zip(order, members, strict=True)):
        raise LabelError(
            f"regions_class_order {order} for the regions {members}",
            where=path,
            expected="for each region the one of its values that it is written as, larger regions first",
        )
    return replace(
        dataset,
        regions=tuple(tuple(values.index(value) for value in region) for region in members),
        region_names=tuple(regions),
        region_classes=tuple(values.index(value) for value in order),
    )


def _single(value: int | str | list[int]) -> bool:
    return isinstance(value, int) or (isinstance(value, list) and len(value) == 1)


BLOCK_VOXELS = 2**22  # counted at a time
MOST_INFERRED = 254  # a mask with smoothed edges has every grey value up to 255, its white


def infer_classes(values: Collection[int], where: object = "") -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Name the classes that label `values` stand for: (classes, label values), 0 being the background.

    Raises:
        LabelError: only background, or values too far apart to be class indices.
    """
    if not values:
        raise LabelError(
            "no label to find the classes in",
            where=where,
            expected="labels of a site that is not a test site",
            fix='declare them in dataset.json beside the data: "labels": {"background": 0, "name": value}',
        )
    found, highest = sorted(values), max(values)
    if found == [0, 255]:
        return ("background", "foreground"), (0, 255)
    # Class indices leave few gaps; grey values, instance numbers and colours leave many, or fill a byte.
    if 1 <= highest <= MOST_INFERRED and len({0, *found}) > (highest + 1) / 2:
        return ("background", *(f"class_{i}" for i in range(1, highest + 1))), tuple(range(highest + 1))
    listing = ", ".join(map(str, found[:20])) + (f", ... ({len(found)} values)" if len(found) > 20 else "")
    raise LabelError(
        f"label values {listing}, and no declared classes",
        where=where,
        expected=f"0 and 255, or class indices 0, 1, 2, ... to {MOST_INFERRED} at most with few gaps",
        fix='declare them in dataset.json beside the data: "labels": {"background": 0, "name": value}',
    )


def count_values(label: np.ndarray) -> dict[int, int]:
    """Count the voxels of each value in a label array of non-negative integers."""
    if label.max() < 2**20:  # counting needs no sort
        flat, bins = label.ravel(), int(label.max()) + 1
        parts = (flat[start : start + BLOCK_VOXELS] for start in range(0, flat.size, BLOCK_VOXELS))
        counts = np.zeros(bins, np.int64)
        for part in parts:
            counts += np.bincount(part, minlength=bins)
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    values, counts = np.unique(label, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
