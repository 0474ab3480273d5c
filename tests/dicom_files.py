"""DICOM files made for tests, with names and identifiers in them that must appear nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

SECRETS = ("CANARY^NAME", "CANARYID", "19470813", "CANARY HOSPITAL", "9.87.654.321")
ROOT = "1.2.826.0.1.3680043.8.498.9.87.654.321"  # every UID begins with it
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def uid(text: object) -> UID:
    """Return a UID that is always the same for one text."""
    return UID(f"{ROOT}.{int.from_bytes(str(text).encode()[-6:], 'big')}")


def voxels(shape: tuple[int, ...] = (6, 8, 10), seed: int = 0) -> np.ndarray:
    """Return `(slices, rows, columns)` in which no axis and no direction is like another."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1000, shape).astype(np.uint16)


def header(**more: Any) -> Dataset:
    """Return what all images have in common."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.preamble = b"\0" * 128
    content: dict[str, Any] = {
        "PatientName": SECRETS[0], "PatientID": SECRETS[1], "PatientBirthDate": SECRETS[2], "PatientSex": "F",
        "InstitutionName": SECRETS[3], "StudyDate": SECRETS[2], "StudyTime": "101010", "StudyID": "1",
        "AccessionNumber": "7", "ReferringPhysicianName": SECRETS[0], "StudyInstanceUID": uid("study"),
        "SeriesInstanceUID": uid("series"), "SeriesNumber": 3, "FrameOfReferenceUID": uid("frame"),
        "Modality": "CT", "SOPClassUID": CTImageStorage, "SOPInstanceUID": generate_uid(prefix=f"{ROOT}."),
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "PositionReferenceIndicator": "",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "Manufacturer": "made up", "Laterality": "",
    }  # fmt: skip
    for name, value in (content | more).items():
        setattr(dataset, name, value)
    return dataset


def set_pixels(dataset: Dataset, array: np.ndarray, bits: int | None = None) -> Dataset:
    """Store `(rows, columns)` or `(frames, rows, columns)` uncompressed."""
    array = np.asarray(array)
    dataset.Rows, dataset.Columns = array.shape[-2:]
    dataset.BitsAllocated = array.dtype.itemsize * 8
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(array.dtype.kind == "i")
    content = array.astype(array.dtype.newbyteorder("<")).tobytes()
    dataset.PixelData = content + b"\0" * (len(content) % 2)
    return dataset


def series(
    array: np.ndarray,
    orientation: tuple[float, ...] = AXIAL,
    origin: tuple[float, float, float] = (-30.0, 20.0, 5.0),
    spacing: tuple[float, float, float] = (0.7, 0.9, 2.5),
    **more: Any,
) -> list[Dataset]:
    """Return one dataset a slice of `(slices, rows, columns)`; spacing of rows, columns, slices."""
    row, column = np.reshape(orientation, (2, 3))
    normal = np.cross(row, column)
    found = []
    for index, plane in enumerate(array):
        dataset = header(**more)
        dataset.InstanceNumber = index + 1
        dataset.ImageOrientationPatient = [float(f"{v:.12g}") for v in orientation]
        position = np.array(origin) + index * spacing[2] * normal
        dataset.ImagePositionPatient = [float(f"{v:.10g}") for v in position]
        dataset.PixelSpacing = list(spacing[:2])
        dataset.SliceThickness = spacing[2]
        found.append(set_pixels(dataset, plane))
    return found


def write(datasets: list[Dataset], folder: Path, names: Callable[[int], str] = "IM{:04d}".format) -> Path:
    """Write one file a dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, dataset in enumerate(datasets):
        write_file(dataset, folder / names(index))
    return folder


def write_file(dataset: Dataset, path: Path) -> Path:
    """Write a dataset, also one that keeps no rule."""
    dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID") or CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID") or uid("file")
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def enhanced(array: np.ndarray, order: list[int] | None = None, **more: Any) -> Dataset:
    """Return an enhanced multi-frame image of `(slices, rows, columns)` whose frames lie in the file in `order`."""
    single = series(array, **more)
    order = order or list(range(len(array)))
    whole = header(SOPClassUID=EnhancedCTImageStorage, ContentDate="20200101", ContentTime="101010", **more)
    whole.InstanceNumber = 1
    set_pixels(whole, array[order])
    whole.NumberOfFrames = len(array)
    shared = Dataset()
    shared.PlaneOrientationSequence = Sequence([_only(single[0], "ImageOrientationPatient")])
    shared.PixelMeasuresSequence = Sequence([_only(single[0], "PixelSpacing", "SliceThickness")])
    whole.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for index in order:
        frame = Dataset()
        frame.PlanePositionSequence = Sequence([_only(single[index], "ImagePositionPatient")])
        frames.append(frame)
    whole.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return whole


def _only(dataset: Dataset, *names: str) -> Dataset:
    item = Dataset()
    for name in names:
        setattr(item, name, dataset[name].value)
    return item
