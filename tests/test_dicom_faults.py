"""DICOM that cannot be trusted: each fault planted in sound files, and refused by its name."""

from __future__ import annotations

import random
import re
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless

from anysite.data import files
from anysite.errors import DataError, FileFormatError
from dicom_files import (
    AXIAL,
    SECRETS,
    enhanced,
    header,
    series,
    set_pixels,
    uid,
    voxels,
    write,
    write_file,
)

Fault = Callable[[list[Dataset]], object]
FAULTS: dict[str, tuple[str, Fault]] = {}


def fault(text: str) -> Callable[[Fault], Fault]:
    """Plant a fault in the six slices of a series, which is then refused with this text."""

    def keep(plant: Fault) -> Fault:
        FAULTS[plant.__name__] = (text, plant)
        return plant

    return keep


def positions(slices: list[Dataset], *heights: float) -> None:
    for dataset, height in zip(slices, heights, strict=True):
        dataset.ImagePositionPatient = [-30, 20, height]


@fault(r"a gap of 5 mm after slice 3 of 5, .* 2\.5 mm apart: 1 slices are missing")
def missing_slice(slices):
    del slices[3]


@fault(r"1 slices are missing")
def missing_slice_of_four(slices):
    del slices[4], slices[1]
    positions(slices, 0, 2.5, 7.5, 10)


@fault(r"6 slices at 5 positions, some of them more than once")
def duplicate_position(slices):
    slices[3].ImagePositionPatient = slices[2].ImagePositionPatient


@fault(r"6 slices at 3 positions, some of them more than once.*phases, echoes or repetitions")
def two_phases(slices):
    positions(slices, 0, 0, 2, 2, 4, 4)


@fault(r"6 slices at one position")
def one_position(slices):
    positions(slices, *[1.0] * 6)


@fault(r"unevenly spaced slices, 2\.3 to 2\.7 mm apart")
def uneven_spacing(slices):
    positions(slices, 0, 2.5, 5.2, 7.5, 10, 12.5)


@fault(r"unevenly spaced slices")
def two_spacings(slices):
    positions(slices, 0, 1, 2, 3, 4.5, 6)


@fault(r"a sheared stack: slices are shifted by 10\.00 degrees \(gantry tilt\)")
def gantry_tilt(slices):
    for index, dataset in enumerate(slices):
        dataset.ImagePositionPatient = [-30, 20 + np.tan(np.radians(10)) * 2.5 * index, 2.5 * index]


@fault(r"slice 3 of 6 is shifted sideways by 3 mm")
def one_slice_aside(slices):
    slices[2].ImagePositionPatient = [-27, 20, slices[2].ImagePositionPatient[2]]


@fault(r"1 of 6 slices of another orientation than the first")
def mixed_orientation(slices):
    slices[4].ImageOrientationPatient = [1, 0, 0, 0, 0, -1]


@fault(r"5 of 6 slices of another orientation")
def fan_of_slices(slices):
    for index, dataset in enumerate(slices):
        angle = np.radians(2 * index)
        dataset.ImageOrientationPatient = [1, 0, 0, 0, np.cos(angle), np.sin(angle)]


@fault(r"2 of 6 slices of another pixel spacing than the first")
def mixed_pixel_spacing(slices):
    slices[1].PixelSpacing = slices[2].PixelSpacing = [0.7, 0.95]


@fault(r"images of 2 different sizes")
def mixed_rows(slices):
    set_pixels(slices[3], voxels((7, 10)))


@fault(r"images of 2 different sizes")
def mixed_columns(slices):
    set_pixels(slices[3], voxels((8, 9)))


@fault(r"images of 2 patients")
def mixed_patient_ids(slices):
    slices[5].PatientID = "CANARYID2"


@fault(r"images of 2 patients")
def mixed_patient_names(slices):
    slices[5].PatientName = "CANARY^NAME^OTHER"


@fault(r"images in 2 frames of reference")
def mixed_frames_of_reference(slices):
    slices[5].FrameOfReferenceUID = uid("other")


@fault(r"images of 2 photometric interpretations")
def mixed_photometric_interpretation(slices):
    slices[5].PhotometricInterpretation = "MONOCHROME1"


@fault(r"slices of several rescale units")
def mixed_rescale_units(slices):
    for index, dataset in enumerate(slices):
        dataset.RescaleType = "HU" if index else "US"


@fault(r"slices of several rescale units")
def mixed_pet_units(slices):
    for index, dataset in enumerate(slices):
        dataset.Units = "BQML" if index else "CNTS"


@fault(r"a modality lookup table")
def modality_lookup_table(slices):
    slices[0].ModalityLUTSequence = Sequence([Dataset()])


@fault(r"a rescale slope or intercept that is 0, infinite or no number")
def rescale_not_a_number(slices):
    set_text(slices[2], "RescaleSlope", b"nan ")


@fault(r"a rescale slope or intercept that is 0, infinite or no number")
def rescale_slope_zero(slices):
    slices[2].RescaleSlope = 0


@fault(r"RescaleIntercept is no number")
def rescale_text(slices):
    set_text(slices[2], "RescaleIntercept", b"CANARY^NAME ")


@fault(r"2 values of RescaleSlope; expected one")
def rescale_several(slices):
    slices[2].RescaleSlope = [1, 2]


@fault(r"2 image series \(3, 4\); expected one\. Choose one by its number, such as study#3")
def two_series(slices):
    for dataset in slices[3:]:
        dataset.SeriesInstanceUID, dataset.SeriesNumber = uid("second"), 4


@fault(r"2 image series \(1, 2\).*beside 1 localisers")
def two_series_of_one_number_beside_a_localiser(slices):
    for dataset in slices[3:]:
        dataset.SeriesInstanceUID = uid("second")
    slices[5].SeriesInstanceUID, slices[5].ImageType = uid("third"), ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    slices[5].SeriesNumber = 9


@fault(r"only a localiser.*study#3")
def only_a_localiser(slices):
    for dataset in slices:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


@fault(r"no image series, only SR")
def only_reports(slices):
    for dataset in slices:
        dataset.Modality = "SR"


@fault(r"no pixel data")
def no_pixel_data(slices):
    del slices[3].PixelData


@fault(r"1[56]0 bytes of pixels; expected 160 by the header|158 bytes of pixels; expected 160")
def too_few_pixels(slices):
    slices[3].PixelData = slices[3].PixelData[:-2]


@fault(r"320 bytes of pixels; expected 160 by the header")
def too_many_pixels(slices):
    slices[3].PixelData *= 2


@fault(r"IM0003 has no ImagePositionPatient")
def no_position(slices):
    del slices[3].ImagePositionPatient


@fault(r"IM0003 has no ImageOrientationPatient")
def no_orientation(slices):
    del slices[3].ImageOrientationPatient


@fault(r"IM0000 has no PixelSpacing")
def no_pixel_spacing(slices):
    for dataset in slices:
        del dataset.PixelSpacing


@fault(r"IM0000 has no ImagePositionPatient")
def no_place_at_all(slices):
    for dataset in slices:
        del dataset.ImagePositionPatient, dataset.ImageOrientationPatient


@fault(r"6 images without position and orientation")
def several_pictures(slices):
    for dataset in slices:
        dataset.Modality, dataset.SOPClassUID = "CR", "1.2.840.10008.5.1.4.1.1.1"
        del dataset.ImagePositionPatient, dataset.ImageOrientationPatient


@fault(r"a slice with the position -30, 20; expected 3 numbers")
def two_coordinates(slices):
    slices[2].ImagePositionPatient = [-30, 20]


@fault(r"a slice with the position -30, 20, inf")
def infinite_position(slices):
    set_text(slices[2], "ImagePositionPatient", b"-30\\20\\inf")


@fault(r"a pixel spacing of 0, 0\.9 mm; expected positive")
def zero_spacing(slices):
    for dataset in slices:
        dataset.PixelSpacing = [0, 0.9]


@fault(r"a pixel spacing of 0\.7, -0\.9 mm; expected positive")
def negative_spacing(slices):
    for dataset in slices:
        dataset.PixelSpacing = [0.7, -0.9]


@fault(r"direction cosines of length 1 and 1\.1; expected unit vectors")
def long_direction(slices):
    for dataset in slices:
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1.1, 0]


@fault(r"direction cosines of length 0 and 0")
def no_direction(slices):
    for dataset in slices:
        dataset.ImageOrientationPatient = [0] * 6


@fault(r"direction cosines that are not orthogonal")
def oblique_directions(slices):
    for dataset in slices:
        dataset.ImageOrientationPatient = [1, 0, 0, 0.1, 0.99499, 0]


@fault(r"one slice of unknown thickness")
def one_slice_without_thickness(slices):
    del slices[1:], slices[0].SliceThickness


@fault(r"the photometric interpretation PALETTE COLOR")
def palette(slices):
    for dataset in slices:
        dataset.PhotometricInterpretation = "PALETTE COLOR"


@fault(r"the photometric interpretation missing")
def no_photometric_interpretation(slices):
    for dataset in slices:
        del dataset.PhotometricInterpretation


@fault(r"3 samples a pixel of MONOCHROME2")
def three_grey_samples(slices):
    for dataset in slices:
        dataset.SamplesPerPixel = 3


@fault(r"12 bits stored up to bit 15 of 16")
def high_bit(slices):
    for dataset in slices:
        dataset.BitsStored = 12


@fault(r"not readable as DICOM")
def bits_that_fill_no_byte(slices):
    for dataset in slices:
        dataset.BitsAllocated, dataset.PixelData = 12, dataset.PixelData[:120]


@fault(r"an image without rows, columns or frames")
def no_rows(slices):
    for dataset in slices:
        del dataset.Rows


@fault(r"65535 x 65535 x 6 voxels; expected at most")
def too_large(slices):
    for dataset in slices:
        dataset.Rows = dataset.Columns = 65535


@fault(r"a tiled whole-slide image")
def whole_slide(slices):
    for dataset in slices:
        dataset.TotalPixelMatrixRows = 999


@fault(r"3 frames in one file without their positions")
def burst(slices):
    del slices[1:]
    slices[0].NumberOfFrames, slices[0].PixelData = 3, slices[0].PixelData * 3


def set_text(dataset: Dataset, name: str, content: bytes) -> None:
    """Store what pydicom would not write: as a number's text."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    tag = Tag(tag_for_keyword(name) or 0)
    dataset[tag] = RawDataElement(tag, "DS", len(content), content, 0, False, True)


def refusal(path: Path) -> str:
    """Return the one line that a path is refused with, which names no patient."""
    with pytest.raises(DataError) as caught:
        files.read(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    assert not [secret for secret in SECRETS if secret in text]
    return text


def test_there_are_faults_enough():
    assert len(FAULTS) >= 50


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(tmp_path, name):
    text, plant = FAULTS[name]
    slices = series(voxels())
    plant(slices)
    assert re.search(text, refusal(write(slices, tmp_path / "study")))


def test_what_looks_like_a_fault_and_is_none(tmp_path):
    expected = files.read(write(series(voxels()), tmp_path / "sound"))
    backwards = series(voxels())
    for dataset in backwards:
        dataset.InstanceNumber = 7 - dataset.InstanceNumber
    rounded = series(voxels())
    for dataset in rounded:
        dataset.ImagePositionPatient = [-30, 20, float(dataset.ImagePositionPatient[2]) + 0.001]
    for name, slices in {"files": series(voxels())[::-1], "numbers": backwards, "rounded": rounded}.items():
        volume = files.read(write(slices, tmp_path / name))
        np.testing.assert_array_equal(volume.array, expected.array)
        np.testing.assert_allclose(volume.affine, expected.affine, atol=2e-3)


@pytest.mark.parametrize(
    ("text", "change"),
    [
        (r"positions of 5 frames; expected 6", lambda whole: whole.PerFrameFunctionalGroupsSequence.pop()),
        (r"has no ImagePositionPatient", lambda whole: whole.PerFrameFunctionalGroupsSequence[2].clear()),
        (r"has no PixelSpacing", lambda whole: whole.SharedFunctionalGroupsSequence[0].pop("PixelMeasuresSequence")),
        (
            r"6 slices at 5 positions",
            lambda whole: whole.PerFrameFunctionalGroupsSequence.__setitem__(
                3, whole.PerFrameFunctionalGroupsSequence[2]
            ),
        ),
        (r"an image without rows, columns or frames", lambda whole: setattr(whole, "NumberOfFrames", -1)),
        (r"expected at most", lambda whole: setattr(whole, "NumberOfFrames", 2**31 - 1)),
        (r"960 bytes of pixels; expected 1120|positions of 6 frames", lambda w: setattr(w, "NumberOfFrames", 7)),
    ],
)  # fmt: skip
def test_a_fault_in_a_multi_frame_file_is_named(tmp_path, text, change):
    whole = enhanced(voxels())
    change(whole)
    assert re.search(text, refusal(write_file(whole, tmp_path / "whole.dcm")))


def test_a_truncated_file_is_never_read(tmp_path):
    whole = write_file(series(voxels((1, 8, 10)))[0], tmp_path / "whole.dcm")
    assert files.read(whole).shape == (10, 8, 1)
    content = whole.read_bytes()
    for length in range(0, len(content) - 1, 3):
        (tmp_path / "cut.dcm").write_bytes(content[:length])
        refusal(tmp_path / "cut.dcm")


def test_a_truncated_slice_is_named_among_the_others(tmp_path):
    folder = write(series(voxels()), tmp_path / "study")
    path = folder / "IM0002"
    path.write_bytes(path.read_bytes()[:-40])
    assert "IM0002: " in refusal(folder)
    (folder / "IM0002").rename(folder / uid("slice"))
    text = refusal(folder)
    assert "file 1 of 6 by name" in text
    assert uid("slice") not in text


def test_an_outer_slice_cut_to_nothing_is_not_overlooked(tmp_path):
    folder = write(series(voxels()), tmp_path / "study")
    path = sorted(folder.iterdir())[-1]
    assert not path.suffix
    for length in (0, 90, 131):
        path.write_bytes(path.read_bytes()[:length])
        assert f"{path.name}: a file of {path.stat().st_size} bytes" in refusal(folder)


def test_a_slice_of_zeros_or_without_its_preamble_is_not_overlooked(tmp_path):
    folder = write(series(voxels()), tmp_path / "study")
    path = sorted(folder.iterdir())[-1]
    content = path.read_bytes()
    path.write_bytes(b"\0" * len(content))
    assert f"{path.name}: a file that begins with nothing but zeros" in refusal(folder)
    path.write_bytes(content[132:])
    assert f"{path.name}: a DICOM file without its preamble" in refusal(folder)
    path.write_bytes(content)
    (folder / "README").write_text("words " * 50)
    assert files.read(folder).shape == (10, 8, 6)


def test_garbage_and_deep_nesting_are_refused(tmp_path):
    rng = random.Random(0)
    content = bytearray(write_file(series(voxels((1, 8, 10)))[0], tmp_path / "whole.dcm").read_bytes())
    (tmp_path / "noise.dcm").write_bytes(rng.randbytes(5000))
    refusal(tmp_path / "noise.dcm")
    (tmp_path / "empty.dcm").write_bytes(b"")
    refusal(tmp_path / "empty.dcm")
    nested = b"".join(
        struct.pack("<HH2sHI", 0x0040, 0xA730, b"SQ", 0, 0xFFFFFFFF)
        + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
        for _ in range(3000)
    )
    (tmp_path / "nested.dcm").write_bytes(bytes(content[: content.index(b"\x08\x00")]) + nested)
    refusal(tmp_path / "nested.dcm")
    for _ in range(400):  # read, or refused by name
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 3, 30))):
            mutated[rng.randrange(132, len(content))] = rng.randrange(256)
        (tmp_path / "mutated.dcm").write_bytes(mutated)
        try:
            volume = files.read(tmp_path / "mutated.dcm")
        except DataError as error:
            assert not [secret for secret in SECRETS if secret in str(error)]  # noqa: PT017
        else:
            assert min(volume.spacing) > 0


def test_a_zip_that_cannot_be_trusted_is_refused(tmp_path):
    folder = write(series(voxels()), tmp_path / "study")
    sound = tmp_path / "study.zip"
    with zipfile.ZipFile(sound, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.iterdir():
            archive.write(path, f"deep/{path.name}")
    expected = files.read(folder)
    np.testing.assert_array_equal(files.read(sound).array, expected.array)

    content = sound.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    assert "not readable as ZIP" in refusal(tmp_path / "cut.zip")
    damaged = bytearray(content)
    damaged[600:700] = bytes(100)
    (tmp_path / "damaged.zip").write_bytes(damaged)
    assert "damaged ZIP" in refusal(tmp_path / "damaged.zip")
    encrypted = bytearray(content)
    for entry in re.finditer(b"PK\x01\x02", content):
        encrypted[entry.start() + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(encrypted)
    assert "an encrypted ZIP" in refusal(tmp_path / "locked.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.dcm", bytes(2**27))
    assert re.search(r"a ZIP that unpacks to \d+ times its size", refusal(tmp_path / "bomb.zip"))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("notes.txt", "no image")
    assert "no DICOM files" in refusal(tmp_path / "other.zip")


def test_no_file_is_written_beside_a_zip(tmp_path):
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../escaped.dcm", write_file(header(), tmp_path / "x.dcm").read_bytes())
    (tmp_path / "slip").mkdir()
    (tmp_path / "slip" / "slip.zip").write_bytes(buffer.getvalue())
    refusal(tmp_path / "slip" / "slip.zip")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["slip", "slip.zip", "x.dcm"]


def test_a_deflated_file_is_refused_before_it_is_unpacked(tmp_path):
    dataset = series(voxels((1, 8, 10)), AXIAL)[0]
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    assert "a deflated DICOM file" in refusal(write_file(dataset, tmp_path / "packed.dcm"))


def test_compressed_pixels_of_another_size_are_refused(tmp_path):
    import highdicom.frame

    dataset = series(voxels((1, 8, 10)))[0]
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    codestream = highdicom.frame.encode_frame(voxels((80, 100)), JPEG2000Lossless, 16, 16, "MONOCHROME2", 0)
    from pydicom.encaps import encapsulate

    dataset.PixelData = encapsulate([codestream])
    dataset["PixelData"].VR = "OB"
    text = refusal(write_file(dataset, tmp_path / "one.dcm"))
    assert "(80, 100) compressed pixels; expected (8, 10) by the header" in text


def test_nothing_there(tmp_path):
    for name in ("nothing.dcm", "nothing#3", "nothing.zip#2"):
        with pytest.raises(FileFormatError, match="no such file"):
            files.read(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match="no such file|no DICOM"):
        files.read(tmp_path / "empty")
