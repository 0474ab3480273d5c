"""CSV manifests: a row a case, with its image, and what else is known of it."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from pathlib import Path

from anysite.data.case import Case
from anysite.errors import DataError

# What other programs call the columns of a manifest: GaNDLF, BIDS, and common usage.
COLUMN_NAMES = {
    "case": ("subjectid", "case_id", "caseid"),
    "patient": (
        "patient_id",
        "patientid",
        "patient_name",
        "participant_id",
        "participant",
        "subject",
        "subject_id",
    ),
    "domain": (
        "site",
        "center",
        "centre",
        "hospital",
        "institution",
        *(f"{place}_{what}" for place in ("site", "center", "centre", "hospital") for what in ("name", "id")),
    ),
    "label": ("mask", "segmentation", "ground_truth"),
}
# What a column of people or places is called: one that went unnoticed would let a patient into training and test.
TELLING = {"patient": r"patient|subject|participant", "domain": r"site|cent(er|re)|hospital|institution"}


def read_manifest(path: Path) -> list[Case]:
    """List the cases of a CSV manifest.

    Raises:
        DataError: not UTF-8, not CSV, columns or cells missing, or a case named twice.
    """
    folder = path.parent
    columns, rows = read_table(path)
    for column in ("case", "image"):
        if column not in columns:
            raise DataError(
                f"no column {column!r} among {', '.join(columns)}",
                where=path,
                expected="the columns case and image; patient, domain, label, image_1, ... and task if known",
            )
    for column, telling in TELLING.items():
        alike = [name for name in columns if re.search(telling, name) and name not in TELLING]
        if alike and column not in columns:
            raise DataError(
                f"the column {alike[0]!r}, which may tell the {column}", where=path, expected=column,
                fix=f"name it {column} if it is that, else give it a name that does not hint at it",
            )  # fmt: skip
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
    return cases


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
        columns = _standard_names(
            [re.sub(r"[\s-]+", "_", column.strip().lower()) for column in table.fieldnames or []]
        )
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
