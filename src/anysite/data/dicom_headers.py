"""Headers of DICOM files through pydicom: read, sorted into series, and one series chosen."""

from __future__ import annotations

import logging
import re
import struct
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_dataset as read_elements

from anysite.data.dicom_members import Members, name_member
from anysite.errors import AnysiteError, DataError, FileFormatError

# What pydicom and its decoders raise for files that lie about themselves.
DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError),
    *(MemoryError, AssertionError, Warning, struct.error, zlib.error, zipfile.BadZipFile, InvalidDicomError),
    BytesLengthException,
)
# Objects that describe images, by modality and by the SOP class of what carries another one.
NO_IMAGES = {
    *(
        "SEG",
        "RTSTRUCT",
        "RTPLAN",
        "RTDOSE",
        "RTRECORD",
        "SR",
        "PR",
        "KO",
        "REG",
        "ANN",
        "FID",
        "DOC",
        "PLAN",
    ),
    *("SMR", "AU", "ECG", "HD", "EPS", "RWV", "STAIN", "RTINTENT", "RTRAD", "RTSEGANN", "TEXTUREMAP", "M3D"),
}
NO_IMAGE_CLASSES = (
    *("1.2.840.10008.5.1.4.1.1.66.", "1.2.840.10008.5.1.4.1.1.481.", "1.2.840.10008.5.1.4.1.1.88."),
    *("1.2.840.10008.5.1.4.1.1.11.", "1.2.840.10008.5.1.4.1.1.104."),
)
DIRECTORY_CLASS = "1.2.840.10008.1.3.10"
DEFLATED = "1.2.840.10008.1.2.1.99"
LOCALISER = re.compile(r"\b(locali[sz]er|scout|topogram|scanogram|survey)\b", re.IGNORECASE)
MAX_FRAMES = 2**17

# Their messages quote values, which may be of a patient.
for library in ("pydicom", "highdicom"):
    logging.getLogger(library).propagate = False
    logging.getLogger(library).addHandler(logging.NullHandler())
_QUIET = threading.RLock()


@dataclass(frozen=True)
class Instance:
    """One DICOM file without its pixels; `name` is its key among the members, `title` what messages call it."""

    name: str
    title: str
    header: Dataset

    @property
    def frames(self) -> int:
        """The number of images in the file."""
        return int(self.header.get("NumberOfFrames") or 1)

    @cached_property
    def is_image(self) -> bool:
        """Whether the file is an image, not something that describes one."""
        header = self.header
        return header.get("Modality", "") not in NO_IMAGES and not str(
            header.get("SOPClassUID") or ""
        ).startswith(NO_IMAGE_CLASSES)


@dataclass(frozen=True)
class ImageSeries:
    """The images of one series, with the number that chooses it."""

    number: int
    instances: tuple[Instance, ...]

    @property
    def is_localiser(self) -> bool:
        """Whether the images were made to plan others."""
        header = self.instances[0].header
        kind = [str(value).upper() for value in _several(header.get("ImageType"))]
        return "LOCALIZER" in kind or bool(LOCALISER.search(str(header.get("SeriesDescription") or "")))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, which quote values; their filters belong to the whole process, so one thread at a time."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def guarded(where: object) -> Iterator[None]:
    """Turn what damaged files raise into a FileFormatError without their values, and silence warnings."""
    try:
        with quiet():
            yield
    except AnysiteError as error:
        if error.where:
            raise
        raise type(error)(error.found, where=where, expected=error.expected, fix=error.fix) from None
    except DAMAGED as error:
        raise FileFormatError(
            f"not readable as DICOM ({type(error).__name__})",
            where=where,
            fix="the file is truncated or damaged: copy it again",
        ) from None


def read_headers(members: Members, where: Path) -> list[Instance]:
    """Read every file without its pixels, in the order of their names.

    Raises:
        FileFormatError: there is none, or one is no DICOM.
    """
    if not members:
        raise FileFormatError("no DICOM files", where=where, expected="files of a series directly in it")
    found = []
    for name in sorted(members):
        header = read_dataset(members, name, where, stop_before_pixels=True)
        if str(header.file_meta.get("MediaStorageSOPClassUID") or "") != DIRECTORY_CLASS:
            found.append(Instance(name, name_member(name, members), header))
    return found


def read_dataset(members: Members, name: str, where: Path, stop_before_pixels: bool = False) -> Dataset:
    """Read one file.

    Raises:
        FileFormatError: it is no DICOM, is damaged, or unpacks to an unknown size.
    """
    title = name_member(name, members)
    with guarded(where if len(members) == 1 else f"{where}: {title}"):
        with members[name]() as file:
            file.seek(132)
            meta = read_elements(
                cast("BinaryIO", file), False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2
            )
            if meta.get("TransferSyntaxUID") == DEFLATED:
                raise FileFormatError(
                    "a deflated DICOM file", expected="another transfer syntax", fix="convert it"
                )
            file.seek(0)
            dataset = pydicom.dcmread(file, stop_before_pixels=stop_before_pixels)
        if not dataset.get("Modality") and not dataset.get("Rows") and not len(dataset):
            raise FileFormatError("a DICOM file without content")
        return dataset


def sort_series(instances: Sequence[Instance]) -> list[ImageSeries]:
    """Sort images into series, in the order of their numbers.

    A series has the number that its scanner gave it where all have one and those differ; elsewhere they are counted
    1, 2, ... in the order of that number and of their first file's name.
    """
    groups: dict[str, list[Instance]] = {}
    for instance in instances:
        if instance.is_image:
            groups.setdefault(str(instance.header.get("SeriesInstanceUID") or ""), []).append(instance)
    numbered = sorted(
        ((_series_number(group), group[0].name, group) for group in groups.values()),
        key=lambda item: item[:2],
    )
    numbers = [number for number, _, _ in numbered]
    unique = len(set(numbers)) == len(numbers) and min(numbers, default=0) >= 0 and np.isfinite(numbers).all()
    return [
        ImageSeries(int(number) if unique else position, tuple(group))
        for position, (number, _, group) in enumerate(numbered, start=1)
    ]


def list_numbers(instances: Sequence[Instance]) -> list[int]:
    """Return the numbers of the image series, without those of localisers beside others."""
    found = sort_series(instances)
    return [series.number for series in found if not series.is_localiser] or [s.number for s in found]


def choose_series(instances: Sequence[Instance], choice: tuple[int, ...], where: Path) -> ImageSeries:
    """Return the series of a number, or the only one.

    Raises:
        DataError: there is no image, only a localiser, no such number, or several series and no choice.
    """
    found = sort_series(instances)
    shown = list_numbers(instances)
    if not found:
        kinds = sorted({re.sub(r"[^A-Z0-9]", "", str(i.header.get("Modality", ""))) for i in instances})
        raise DataError(
            f"no image series, only {', '.join(filter(None, kinds)) or 'other objects'}",
            where=where,
            expected="images",
        )
    if choice:
        series = next((s for s in found if (s.number,) == choice), None)
        if series is None:
            raise DataError(
                f"no image series {'+'.join(map(str, choice))}",
                where=where,
                expected=f"one of {', '.join(str(s.number) for s in found)}",
            )
        return series
    if len(shown) > 1:
        skipped = len(found) - len(shown)
        raise DataError(
            f"{len(shown)} image series ({', '.join(map(str, shown[:20]))}{', ...' if len(shown) > 20 else ''})"
            + (f" beside {skipped} localisers" if skipped else ""),
            where=where,
            expected="one",
            fix=f"choose one by its number, such as {where.name}#{shown[0]}",
        )
    series = next(s for s in found if s.number == shown[0])
    if series.is_localiser:
        raise DataError(
            "only a localiser", where=where, expected="an image series",
            fix=f"to read it nevertheless, name it as {where.name}#{series.number}",
        )  # fmt: skip
    return series


def functional_group(header: Dataset, frame: int, name: str) -> Dataset:
    """Return the item that holds a frame's attributes: its own, that of all frames, or the header itself."""
    own = header.get("PerFrameFunctionalGroupsSequence")
    shared = header.get("SharedFunctionalGroupsSequence")
    for holder in (own[frame] if own else None, shared[0] if shared else None):
        if holder is not None and holder.get(name):
            return holder[name][0]
    return header


def numbers_of(item: Dataset, name: str) -> list[float]:
    """Return an attribute's numbers, none where it is missing or empty.

    Raises:
        FileFormatError: values that are no numbers.
    """
    try:
        return [float(value) for value in _several(item.get(name))]
    except (ValueError, TypeError, OverflowError):
        raise FileFormatError(f"{name} is no number") from None


def number_of(item: Dataset, name: str, default: float) -> float:
    """Return an attribute's only number, or `default` where it is missing.

    Raises:
        FileFormatError: several values, or one that is no number.
    """
    values = numbers_of(item, name)
    if len(values) > 1:
        raise FileFormatError(f"{len(values)} values of {name}", expected="one")
    return values[0] if values else default


def _several(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _series_number(group: Sequence[Instance]) -> float:
    try:
        return number_of(group[0].header, "SeriesNumber", float("inf"))
    except FileFormatError:
        return float("inf")
