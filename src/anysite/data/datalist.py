"""Datalists: JSON that names the files of every case, as MONAI and the Medical Segmentation Decathlon have it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from anysite import atomic
from anysite.data import files
from anysite.data.case import Case
from anysite.errors import DataError, describe_invalid

EXPECTED = '{"training": [{"image": "a.nii.gz", "label": "a_label.nii.gz"}, ...]}'


class ListedImage(BaseModel):
    """One case of a datalist; other keys, such as fold, are ignored."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)
    image: str | list[str]
    label: str | None = None
    case: str = Field("", validation_alias=AliasChoices("case", "id"))
    patient: str = Field("", validation_alias=AliasChoices("patient", "patient_id", "subject", "subject_id"))
    domain: str = Field("", validation_alias=AliasChoices("domain", "site", "center", "centre"))


def is_datalist(path: Path) -> bool:
    """Tell whether a path is a JSON file that lists training cases."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    content = atomic.read_json(path)
    return isinstance(content, dict) and isinstance(content.get("training"), list)


def tells_of_people(path: Path) -> bool:
    """Tell whether a datalist names patients or sites, or labelled cases to hold out."""
    if not is_datalist(path):
        return False
    content = atomic.read_json(path)
    own = {
        str(choice)
        for name in ("patient", "domain")
        if isinstance(alias := ListedImage.model_fields[name].validation_alias, AliasChoices)
        for choice in alias.choices
    }
    held_out = content.get("validation")
    labelled = isinstance(held_out, list) and any(
        isinstance(entry, dict) and entry.get("label") for entry in held_out
    )
    return labelled or any(isinstance(entry, dict) and own & entry.keys() for entry in content["training"])


def read_datalist(path: Path, default_domain: str) -> list[Case]:
    """Return the training cases and those for validation, which are held out; paths are relative to the file.

    A case is named after its label, or its first image, where the list gives it no name.

    Raises:
        DataError: an entry of another form, or two cases of one name.
    """
    content: dict[str, Any] = atomic.read_json(path)
    cases = []
    for key in ("training", "validation"):
        listed_cases = content.get(key) or []
        if not isinstance(listed_cases, list):
            raise DataError(f"{key}: {type(listed_cases).__name__}", where=path, expected="a list of images")
        for index, entry in enumerate(listed_cases):
            try:
                listed = ListedImage.model_validate({"image": entry} if isinstance(entry, str) else entry)
            except ValidationError as error:
                found = f"{key}.{index}.{describe_invalid(error)}"
                raise DataError(found, where=path, expected=EXPECTED) from None
            images = [listed.image] if isinstance(listed.image, str) else listed.image
            if not images:
                raise DataError(f"{key}.{index} without an image", where=path, expected=EXPECTED)
            named = files.stem_of(Path(listed.label or images[0]))
            name = listed.case or (named if listed.label else named.removesuffix("_0000"))
            cases.append(
                Case(
                    name,
                    listed.patient or name,
                    listed.domain or default_domain,
                    tuple(path.parent / image for image in images),
                    path.parent / listed.label if listed.label else None,
                    held_out=key == "validation",
                )
            )
    twice = [name for name, count in Counter(case.id for case in cases).items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} names of two cases: {', '.join(twice[:5])}",
            where=path,
            fix='give every entry a "case" of its own',
        )
    return cases
