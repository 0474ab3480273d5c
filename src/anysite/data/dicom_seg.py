"""Writing DICOM segmentations with highdicom, which reference the images that were segmented."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import highdicom
import numpy as np
from highdicom.seg import (
    SegmentAlgorithmTypeValues,
    Segmentation,
    SegmentationTypeValues,
    SegmentDescription,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from anysite import __version__
from anysite.data.dicom import Series, read_series
from anysite.data.dicom_headers import DAMAGED, quiet
from anysite.data.volume import Volume
from anysite.errors import FileFormatError, GeometryError, LabelError

# What an image must say of its patient and study, though it may leave it empty.
TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"),
    *("AccessionNumber", "ReferringPhysicianName", "SeriesNumber", "InstanceNumber"),
)
# Repeated as they are, also where they keep no rule of DICOM.
PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "PatientAge", "PatientWeight")
TYPE_1 = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
SERIES_NUMBER = 1000
MAX_NAME = 64  # characters of a segment's name


def write(volume: Volume, path: Path, image_path: Path, classes: Sequence[str], labelmap: bool) -> None:
    """Write a label map `(1, *S)` of class indices, each class as the segment of its index.

    The patient and study are those of the image. A file without any segment found has one empty frame.

    Raises:
        FileFormatError: images that lack what a segmentation must repeat of them.
        GeometryError: a label map on another grid than the image's.
        LabelError: more classes than a segmentation may have.
    """
    series = read_series(image_path)
    if not volume.same_grid(series.grid):
        raise GeometryError(
            f"a mask of shape {volume.shape}", where=path, expected=f"the image's grid, {series.grid.shape}"
        )
    if not 2 <= len(classes) <= 2**16:
        raise LabelError(f"{len(classes)} classes", where=path, expected="2 to 65536")
    sources = [_source(header, image_path) for header in series.headers]
    kind = SegmentationTypeValues.LABELMAP if labelmap else SegmentationTypeValues.BINARY
    try:
        with quiet():
            segmentation = Segmentation(
                source_images=sources,
                pixel_array=_frames(volume, series),
                segmentation_type=kind,
                segment_descriptions=[_describe(index, name) for index, name in enumerate(classes) if index],
                series_instance_uid=highdicom.UID(),
                series_number=SERIES_NUMBER,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="anysite",
                manufacturer_model_name="anysite",
                software_versions=__version__,
                device_serial_number="none",
                content_description="Segmentation by a neural network",
                omit_empty_frames=bool(volume.array.any()),
            )
            for name in PATIENT:
                if name in series.headers[0]:
                    segmentation[name] = series.headers[0][name]
            segmentation.save_as(path, enforce_file_format=True)
    except OSError:
        raise
    except DAMAGED as error:  # without its text, which quotes values
        raise FileFormatError(
            f"no DICOM segmentation can be made of these images ({type(error).__name__})",
            where=image_path,
            fix="write masks as --format nifti",
        ) from None


def _frames(volume: Volume, series: Series) -> np.ndarray:
    """Return the label map `(frames, rows, columns)` in the order of the source images and their frames."""
    dtype = np.uint8 if volume.array.max() < 256 else np.uint16
    label = volume.array[0].astype(dtype)
    if volume.dimension == 2:
        return label[None]
    planes = label.transpose(2, 1, 0)
    order = [(one.instance.name, one.frame) for one in series.slices]
    files = list(dict.fromkeys(name for name, _ in order))
    if len(files) > 1 and len(files) < len(order):
        raise FileFormatError("a series of several multi-frame files", expected="one, or one file a slice")
    return planes[np.argsort([frame for _, frame in order], kind="stable")]


def _source(header: Dataset, image_path: Path) -> Dataset:
    source = copy.deepcopy(header)
    for name in TYPE_1:
        if not source.get(name):
            raise FileFormatError(
                f"a DICOM image without {name}, which a segmentation must repeat",
                where=image_path,
                fix="write masks as --format nifti",
            )
    if source.get("PatientSex") not in ("M", "F", "O"):
        source.PatientSex = None
    if not source.get("SpecificCharacterSet"):
        source.pop("SpecificCharacterSet", None)
    for name in TYPE_2:
        if name not in source:
            setattr(source, name, None)
    if not source.get("SOPClassUID"):
        source.SOPClassUID = header.file_meta.MediaStorageSOPClassUID
    return source


def _describe(number: int, name: str) -> SegmentDescription:
    return SegmentDescription(
        segment_number=number,
        segment_label=name[:MAX_NAME],
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=codes.SCT.AnatomicalStructure,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="anysite", version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
    )
