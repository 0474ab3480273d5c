"""Rules on labels: their values, their classes and their form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

from anysite.data.case import Dataset
from anysite.data.check.geometry import ENOUGH, USUAL
from anysite.data.check.measures import LabelShape
from anysite.data.check.problems import Problem, of_case, of_dataset
from anysite.data.check.reading import Reading
from anysite.data.classes import infer_classes
from anysite.errors import LabelError

GREY = 8  # unknown values that no annotator draws
RARE = (
    0.05  # share of the labels that a fault concerns at most, if the classes are to be told from the others
)
FULL = 0.99, 0.9  # share of foreground: of the case, and of the median at most
BORDER = 0.9, 0.1  # share of background on the border: of most cases, and of an inverted one at most
SAME = 100  # voxels of foreground that two labels do not share by chance


def infer(dataset: Dataset, readings: Sequence[Reading]) -> tuple[Dataset, list[Problem]]:
    """Return a dataset with the classes its labels show, and what speaks against them.

    Where all labels together make no sense, the values of a few are held against those of the others.
    """
    counted = Counter(value for reading in readings for value in reading.values)
    labels = sum(bool(reading.values) for reading in readings)
    try:
        return _with_classes(dataset, set(counted) or {0}), []
    except LabelError as error:
        problem = of_dataset("undeclared classes", error.found, error.expected, error.fix)
    common = {value for value, count in counted.items() if count > max(1.0, RARE * labels)}
    if labels >= ENOUGH and common:
        try:
            return _with_classes(dataset, common), []
        except LabelError:
            pass
    return dataset, [problem]


def _with_classes(dataset: Dataset, values: set[int]) -> Dataset:
    """Infer the classes, without those between that no label has."""
    named = [(c, v) for c, v in zip(*infer_classes(values), strict=True) if v in values or v == 0]
    return replace(dataset, classes=tuple(c for c, _ in named), label_values=tuple(v for _, v in named))


def check_values(dataset: Dataset, readings: Sequence[Reading]) -> Iterator[Problem]:
    """Yield labels with values that stand for no class."""
    declared = _listed(dataset.label_values, 20)
    for reading in readings:
        file = reading.case.label_path
        unknown = sorted(set(reading.values) - set(dataset.label_values)) if dataset.classes else []
        if not unknown or file is None:
            continue
        if len(unknown) >= GREY and 2 * len(unknown) > len(reading.values):
            yield of_case(
                "grey label", reading.case, file, f"{len(unknown)} values that stand for no class", f"only {declared}",
                "find the label, if this is an image; else export it again without smoothing its edges",
            )  # fmt: skip
        else:
            yield of_case(
                "label values", reading.case, file,
                f"value{'s' if len(unknown) > 1 else ''} {_listed(unknown, 10)}", f"only {declared}",
                "declare the classes in dataset.json or mend the label",
            )  # fmt: skip


def check_labels(dataset: Dataset, readings: Sequence[Reading]) -> Iterator[Problem]:
    """Yield what is missing, and labels whose form is unusual."""
    background = dataset.label_values[0] if dataset.label_values else 0
    yield from _check_presence(dataset, readings, background)
    yield from _check_classes(dataset, readings)
    yield from _check_same(readings, background)
    shaped = [
        (reading, reading.label)
        for reading in readings
        if reading.label is not None and set(reading.values) <= set(dataset.label_values)
    ]
    yield from _check_foreground(shaped, background)
    yield from _check_islands(dataset, shaped)


def _check_presence(dataset: Dataset, readings: Sequence[Reading], background: int) -> Iterator[Problem]:
    for reading in readings:
        case, file = reading.case, reading.case.label_path
        if file is None:
            if dataset.labelled:
                yield of_case(
                    "no label", case, case.image_paths[0], "none", "a label as others have", "add it"
                )
            continue
        if file.suffix.lower() in (".jpg", ".jpeg"):
            yield of_case(
                "lossy label", case, file, "a JPEG, which alters values at edges", "PNG, TIFF or NIfTI",
                "export the label again from its source",
            )  # fmt: skip
        if set(reading.values) == {background}:
            yield of_case(
                "empty label", case, file, "only background", "at least one class",
                "confirm that nothing is to be found there",
            )  # fmt: skip


def _check_classes(dataset: Dataset, readings: Sequence[Reading]) -> Iterator[Problem]:
    for domain in dataset.domains:
        present = {value for r in readings if r.case.domain == domain for value in r.values}
        pairs = list(zip(dataset.classes, dataset.label_values, strict=True))[1:]
        absent = [name for name, value in pairs if value not in present]
        if present and absent:
            yield of_dataset(
                "class never present",
                f"site {domain}: no voxel of {', '.join(absent[:10])}{', ...' if len(absent) > 10 else ''}",
                "every declared class at every site",
                "check that the site labels these classes; otherwise leave it out of training for them",
            )


def _check_same(readings: Sequence[Reading], background: int) -> Iterator[Problem]:
    first: dict[str, Reading] = {}
    for reading in readings:
        foreground = sum(reading.values.values()) - reading.values.get(background, 0)
        file = reading.case.label_path
        if (
            not reading.label_digest
            or file is None
            or foreground < SAME
            or not reading.values.get(background)
        ):
            continue
        other = first.setdefault(reading.label_digest, reading)
        if other is not reading and (other.digest != reading.digest or not reading.digest):
            yield of_case(
                "identical labels", reading.case, file,
                f"voxel by voxel the label of case {other.case.id}, of another image", "a label of its own",
                "find the right label file",
            )  # fmt: skip


def _check_foreground(shaped: Sequence[tuple[Reading, LabelShape]], background: int) -> Iterator[Problem]:
    """Yield labels that are foreground nearly everywhere, or have it where all others have none."""
    if len(shaped) < ENOUGH:
        return
    filled = [1 - _share(label.values, background) for _, label in shaped]
    border = [_share(label.border, background) for _, label in shaped]
    framed = sum(share > BORDER[0] for share in border) >= USUAL * len(shaped)
    for (reading, _), share, outside in zip(shaped, filled, border, strict=True):
        file = reading.case.label_path
        assert file is not None
        if framed and outside < BORDER[1] and 0.5 < share < 1:
            yield of_case(
                "inverted label", reading.case, file,
                f"background on {100 * outside:.0f} % of the border",
                "background there, as in nearly all labels",
                "swap background and foreground",
            )  # fmt: skip
        elif share > FULL[0] and median(filled) < FULL[1]:
            yield of_case(
                "full label", reading.case, file,
                f"foreground on {100 * share:.1f} % of the voxels",
                f"about {100 * median(filled):.2g} %", "find the right label file",
            )  # fmt: skip


def _check_islands(dataset: Dataset, shaped: Sequence[tuple[Reading, LabelShape]]) -> Iterator[Problem]:
    """Yield classes with specks far away, if nearly all other cases have them in one piece."""
    names = dict(zip(dataset.label_values, dataset.classes, strict=True))
    for value, name in list(names.items())[1:]:
        parts = [label.parts[value] for _, label in shaped if value in label.parts]
        if len(parts) < ENOUGH or sum(count == 1 for count in parts) < USUAL * len(parts):
            continue
        for reading, label in shaped:
            file = reading.case.label_path
            if file is not None and (islands := label.islands.get(value, 0)):
                yield of_case(
                    "tiny islands", reading.case, file,
                    f"{islands} speck{'s' if islands > 1 else ''} of {name} far from the rest",
                    "one piece, as in nearly all labels", "remove them, or confirm that they are meant",
                )  # fmt: skip


def _share(values: dict[int, int], value: int) -> float:
    return values.get(value, 0) / max(1, sum(values.values()))


def _listed(values: Sequence[int], most: int) -> str:
    return ", ".join(map(str, values[:most])) + (", ..." if len(values) > most else "")
