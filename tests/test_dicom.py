"""DICOM series as volumes: where they lie in the patient, what their values are, and how cases are found."""

from __future__ import annotations

import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import set_pixel_data
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from anysite.data import files
from anysite.data.layouts import find_cases, open_dataset, open_images
from anysite.errors import DataError
from dicom_files import AXIAL, enhanced, header, series, set_pixels, uid, voxels, write, write_file

SHARED = Path(__file__).parents[2] / "shared" / "data" / "dicom"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="shared data not present")


def turned(*degrees: float) -> tuple[float, ...]:
    """Return direction cosines turned about x, y and z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(3)
        a, b = [i for i in range(3) if i != axis]
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = matrix @ turn
    return (*matrix[:, 0], *matrix[:, 1])


ORIENTATIONS = {
    "axial": AXIAL,
    "sagittal": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
    "coronal": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
    "oblique": turned(20, -35, 50),
    "prone": (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    "negated columns": (1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    "negated rows": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "sagittal, negated columns": (0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    "oblique, negated columns": tuple(np.multiply(turned(-70, 10, 5), [1, 1, 1, -1, -1, -1])),
}


def read_by_itk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return array `(X, Y, Z)` and affine to RAS as the Insight Toolkit reads a series."""
    sitk = pytest.importorskip("SimpleITK")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_series_lies_where_another_reader_puts_it(tmp_path, name):
    folder = write(series(voxels(), ORIENTATIONS[name]), tmp_path / "case")
    array, affine = read_by_itk(folder)
    volume = files.read(folder)
    np.testing.assert_array_equal(volume.array[0], array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    np.testing.assert_allclose(volume.spacing, (0.9, 0.7, 2.5), atol=1e-6)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_voxel_lies_where_the_standard_says(tmp_path, name):
    """Equation C.7.6.2.1-1, for one bright voxel of known slice, row and column, whatever the order of files."""
    array = np.zeros((6, 8, 10), np.uint16)
    array[4, 2, 7] = 500
    slices = series(array, ORIENTATIONS[name])
    bright = slices[4]
    row, column = np.reshape([float(v) for v in bright.ImageOrientationPatient], (2, 3))
    expected = np.array([float(v) for v in bright.ImagePositionPatient]) + 0.9 * 7 * row + 0.7 * 2 * column
    slices = [slices[i] for i in (3, 0, 5, 1, 4, 2)]
    volume = files.read(write(slices, tmp_path / "case"))
    for oriented in (volume, volume.oriented("RAS"), volume.oriented("PIL")):
        found = np.argwhere(oriented.array[0] == 500)
        assert len(found) == 1
        np.testing.assert_allclose(oriented.affine[:3] @ [*found[0], 1], expected * [-1, -1, 1], atol=1e-4)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 5, 0, 3, 1, 4]])
def test_a_multi_frame_file_is_the_same_volume(tmp_path, order):
    array = voxels()
    expected = files.read(write(series(array, ORIENTATIONS["oblique"]), tmp_path / "single"))
    whole = enhanced(array, order, orientation=ORIENTATIONS["oblique"])
    for path in (tmp_path / "whole.dcm", tmp_path / "without_suffix"):
        volume = files.read(write_file(whole, path))
        np.testing.assert_array_equal(volume.array, expected.array)
        np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-9)


def test_frames_have_their_own_rescale(tmp_path):
    array, order = voxels(), [3, 1, 0, 2, 5, 4]
    whole = enhanced(array, order)
    for index, frame in zip(order, whole.PerFrameFunctionalGroupsSequence, strict=True):
        values = Dataset()
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 0.5 + index, -index, "US"
        frame.PixelValueTransformationSequence = Sequence([values])
    found = files.read(write_file(whole, tmp_path / "whole.dcm"))
    expected = array * (0.5 + np.arange(6))[:, None, None] - np.arange(6)[:, None, None]
    assert found.array.dtype == np.float32
    np.testing.assert_allclose(found.array[0], expected.transpose(2, 1, 0), rtol=1e-6)


@pytest.mark.parametrize("stored", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
@pytest.mark.parametrize(
    ("slope", "intercept"), [(1, 0), (1, -1024), (2, 3), (-1, 0), (0.25, 1.5), (1, 0.5), (60000, -70000)]
)
def test_values_are_those_of_a_float64_oracle(tmp_path, stored, slope, intercept):
    limits = np.iinfo(stored)
    rng = np.random.default_rng(0)
    array = rng.integers(limits.min, limits.max, (3, 4, 5), dtype=stored, endpoint=True)
    array[0, 0, :2] = limits.min, limits.max
    slices = series(array, RescaleSlope=slope, RescaleIntercept=intercept)
    found = files.read(write(slices, tmp_path / "case")).array[0].transpose(2, 1, 0)
    expected = array.astype(np.float64) * slope + intercept
    if found.dtype.kind == "f":
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    else:
        np.testing.assert_array_equal(found.astype(np.float64), expected)
    exact = float(slope).is_integer() and float(intercept).is_integer()
    if exact and np.abs(expected).max() < 2**31:
        assert found.dtype.kind in "iu"


def test_slices_of_a_pet_have_their_own_slopes(tmp_path):
    array = voxels()
    slices = series(array, Modality="PT", Units="BQML")
    for index, dataset in enumerate(slices):
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{1.37 * (index + 1):.6f}", 0
    volume = files.read(write(slices[::-1], tmp_path / "case"))
    expected = array * (1.37 * np.arange(1, 7))[:, None, None]
    np.testing.assert_allclose(volume.array[0], expected.transpose(2, 1, 0), rtol=1e-6)


def test_bits_beyond_those_stored_are_dropped(tmp_path):
    array = voxels((3, 4, 5))
    overlaid = array | np.uint16(0xF000)
    slices = series(overlaid)
    for dataset in slices:
        dataset.BitsStored, dataset.HighBit = 12, 11
    found = files.read(write(slices, tmp_path / "unsigned")).array[0]
    np.testing.assert_array_equal(found, array.transpose(2, 1, 0))
    signed = (array.astype(np.int16) - 500).view(np.uint16) & np.uint16(
        0x0FFF
    )  # without its sign's upper bits
    for dataset, plane in zip(slices, signed, strict=True):
        set_pixels(dataset, plane, bits=12).PixelRepresentation = 1
    found = files.read(write(slices, tmp_path / "signed")).array[0]
    np.testing.assert_array_equal(found, array.transpose(2, 1, 0).astype(np.int16) - 500)


def test_higher_is_brighter_in_monochrome1(tmp_path):
    array = voxels((3, 4, 5))
    slices = series(array, PhotometricInterpretation="MONOCHROME1", RescaleSlope=2, RescaleIntercept=0)
    for dataset in slices:
        dataset.BitsStored, dataset.HighBit = 10, 9
    found = files.read(write(slices, tmp_path / "case")).array[0]
    np.testing.assert_array_equal(found, 2 * (1023 - array.transpose(2, 1, 0).astype(int)))


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
def test_compressed_files_keep_every_value(tmp_path, syntax, dtype):
    array = (voxels((3, 32, 40)) % 256).astype(dtype) - dtype(100 if dtype == np.int16 else 0)
    expected = files.read(write(series(array, RescaleIntercept=-7, RescaleSlope=1), tmp_path / "plain"))
    slices = series(array, RescaleIntercept=-7, RescaleSlope=1)
    for dataset in slices:
        dataset.compress(syntax, generate_instance_uid=False)
    found = files.read(write(slices, tmp_path / "packed"))
    np.testing.assert_array_equal(found.array, expected.array)
    folder = write(slices, tmp_path / "cut")
    path = folder / "IM0001"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match="IM0001"):
        files.read(folder)


def test_lossless_jpeg_keeps_every_value(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gdcm = pytest.importorskip("gdcm")
    array = voxels((3, 32, 40))
    folder = write(series(array), tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    for path in folder.iterdir():
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(tmp_path / "packed" / path.name))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
    found, expected = files.read(tmp_path / "packed"), files.read(folder)
    np.testing.assert_array_equal(found.array, expected.array)


def picture(array: np.ndarray, photometric: str = "RGB", **more: object) -> Dataset:
    dataset = header(SOPClassUID=SecondaryCaptureImageStorage, Modality="OT", **more)
    for name in ("FrameOfReferenceUID",):
        delattr(dataset, name)
    set_pixel_data(dataset, array, photometric, 8)
    return dataset


def test_a_colour_picture_has_channels_and_pixels(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (8, 10, 3)).astype(np.uint8)
    volume = files.read(write_file(picture(array), tmp_path / "rgb.dcm"))
    assert volume.unit == "px"
    np.testing.assert_array_equal(volume.array, array.transpose(2, 0, 1))
    planar = picture(array)
    planar.PlanarConfiguration, planar.PixelData = 1, array.transpose(2, 0, 1).tobytes()
    np.testing.assert_array_equal(files.read(write_file(planar, tmp_path / "planar.dcm")).array, volume.array)
    flat = np.full((8, 10, 3), [76, 85, 255], np.uint8)  # pure red in YBR
    red = files.read(write_file(picture(flat, "YBR_FULL"), tmp_path / "ybr.dcm"))
    np.testing.assert_allclose(red.array[:, 0, 0], [255, 0, 0], atol=1)


def test_a_radiograph_is_a_picture_also_where_pixels_have_a_size(tmp_path):
    array = voxels((1, 8, 10))[0]
    dataset = header(SOPClassUID=ComputedRadiographyImageStorage, Modality="CR", PixelSpacing=[0.1, 0.1])
    volume = files.read(write_file(set_pixels(dataset, array), tmp_path / "cr.dcm"))
    assert (volume.unit, volume.spacing) == ("px", (1, 1))
    np.testing.assert_array_equal(volume.array[0], array)
    assert files.is_picture(tmp_path / "cr.dcm")


def test_a_single_slice_is_a_volume_as_thick_as_it_says(tmp_path):
    volume = files.read(write_file(series(voxels((1, 8, 10)))[0], tmp_path / "one.dcm"))
    assert volume.shape == (10, 8, 1)
    np.testing.assert_allclose(volume.spacing, (0.9, 0.7, 2.5))


def several(folder: Path, numbers: tuple[int | None, ...] = (3, 5), **more: Any) -> Path:
    """Write series of these numbers into one folder, the values of each starting at its place."""
    for place, number in enumerate(numbers):
        slices = series(
            voxels(seed=place), SeriesNumber=number, SeriesInstanceUID=uid(f"s{place}"), **more
        )  # fmt: skip
        write(slices, folder, lambda index, place=place: f"{'ba'[place % 2]}{place}_{index}")
    return folder


def zipped(folder: Path) -> Path:
    path = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, f"DICOM/{file.name}")
        archive.writestr("__MACOSX/._x", b"no image")
        archive.writestr("README.txt", b"no image")
    return path


def first_value(path: Path | str) -> float:
    return float(files.read(Path(path)).array[0, 0, 0, 0])


def test_one_of_several_series_is_chosen_by_its_number(tmp_path):
    expected = [float(voxels(seed=place)[0, 0, 0]) for place in (0, 1)]
    folder = several(tmp_path / "study")
    for path in (folder, zipped(folder)):
        assert [first_value(f"{path}#{number}") for number in (3, 5)] == expected
        with pytest.raises(DataError, match=r"no image series 4; expected one of 3, 5"):
            files.read(Path(f"{path}#4"))
        assert [files.stem_of(Path(f"{path}#{n}")) for n in (3, 5)] == ["study_3", "study_5"]
    counted = several(tmp_path / "counted", (7, 7))  # by the names of their files: a1 before b0
    assert [first_value(f"{counted}#{number}") for number in (1, 2)] == expected[::-1]
    unnamed = several(tmp_path / "unnamed", (None, 7))
    assert [first_value(f"{unnamed}#{number}") for number in (1, 2)] == expected[::-1]
    odd = several(tmp_path / "odd#3", (4,))
    assert first_value(odd) == expected[0]  # a folder may be called so


def test_localisers_and_other_objects_are_no_cases(tmp_path):
    folder = several(tmp_path / "study", (2,))
    write(series(voxels(seed=7), SeriesInstanceUID=uid("l"), SeriesNumber=1,
                 ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), folder, "loc{}".format)  # fmt: skip
    write([header(Modality="SR", SOPClassUID=UID("1.2.840.10008.5.1.4.1.1.88.33"))], folder, "sr{}".format)
    (folder / "notes.txt").write_text("x")
    assert [case.id for case in open_images(folder)] == ["study"]
    assert first_value(folder) == float(voxels(seed=0)[0, 0, 0])
    assert first_value(f"{folder}#1") == float(voxels(seed=7)[0, 0, 0])


def test_cases_are_named_after_folders(tmp_path):
    root = tmp_path / "cases"
    several(root / "anna", (2,))
    several(root / "bert", (4, 9))
    zipped(several(tmp_path / "carl", (4, 9))).rename(root / "carl.zip")
    several(root / "dora" / "head" / "t1", (1,))
    write_file(enhanced(voxels()), root / "loose.dcm")
    cases = open_images(root)
    assert sorted(case.id for case in cases) == [
        *("anna", "bert_4", "bert_9", "carl_4", "carl_9", "cases", "dora_head_t1"),
    ]
    for case in cases:
        assert case.image().shape == (10, 8, 6)
    assert [case.id for case in open_images(root / "bert")] == ["bert_4", "bert_9"]
    assert [case.id for case in open_images(root / "carl.zip")] == ["carl_4", "carl_9"]
    assert [case.id for case in open_images(Path(f"{root / 'bert'}#9"))] == ["bert_9"]
    assert [case.id for case in open_images(root / "loose.dcm")] == ["loose"]
    (root / "bert" / "b0_0").write_bytes(b"DICM".rjust(132, b"\0"))  # a bad case stops no other
    assert sorted(case.id for case in open_images(root))[1] == "bert"
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        open_images(root / "empty")


def test_a_dataset_may_name_folders_and_zips(tmp_path):
    from anysite.data.volume import Volume

    several(tmp_path / "a", (2,))
    zipped(several(tmp_path / "b", (4, 9)))
    image = files.read(tmp_path / "a")
    label = image.with_array((image.array > 500).astype(np.int32))
    turned_label = label.oriented("RAS")  # as other tools write it
    files.write_label(Volume(turned_label.array, turned_label.affine), tmp_path / "a.nii.gz")
    (tmp_path / "index.csv").write_text("case,image,label\n1,a,a.nii.gz\n2,b.zip#9,\n")
    one, two = open_dataset(tmp_path).cases
    np.testing.assert_array_equal(one.label().array, label.array)
    assert one.label().same_grid(one.image())
    assert two.image().array[0, 0, 0, 0] == voxels(seed=1)[0, 0, 0]

    site = tmp_path / "site"
    several(site / "images" / "x_0000", (1,))
    several(site / "images" / "x_0001", (1,))
    (site / "masks").mkdir()
    files.write_label(label, site / "masks" / "x.nii.gz")
    (case,) = find_cases(site).cases
    assert case.id == "x"
    assert case.image().array.shape == (2, 10, 8, 6)
    nnunet = tmp_path / "nnunet"
    (nnunet / "labelsTr").mkdir(parents=True)
    several(nnunet / "imagesTr" / "y_0000", (1,))
    files.write_label(label, nnunet / "labelsTr" / "y.nii.gz")
    (nnunet / "dataset.json").write_text('{"labels": {"background": 0, "x": 1}}')
    (case,) = open_dataset(nnunet).cases
    assert case.label().same_grid(case.image())


def test_stored_messages_name_no_folders_above_a_series(tmp_path):
    several(tmp_path / "study")
    case = open_images(tmp_path / "study")[0]
    (tmp_path / "study" / "b0_0").write_bytes(b"DICM".rjust(132, b"\0"))
    with pytest.raises(DataError) as caught:
        case.image()
    assert case.without_folders(str(caught.value)) == "study: b0_0: a DICOM file without content."


def test_a_digest_changes_with_any_file_of_a_folder(tmp_path):
    folder = several(tmp_path / "study", (2,))
    before = files.digest_of(folder)
    assert files.digest_of(folder) == before == files.digest_of(Path(f"{folder}#2"))
    (folder / "b0_0").rename(folder / "c")
    assert files.digest_of(folder) != before


def test_without_the_extra_it_is_named(tmp_path):
    write_file(enhanced(voxels()), tmp_path / "one.dcm")
    command = (
        "import sys; sys.modules['pydicom'] = None; from pathlib import Path; from anysite.data import files\n"
        f"files.read(Path({str(tmp_path / 'one.dcm')!r}))"
    )
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    last = result.stderr.strip().splitlines()[-1]
    assert "FileFormatError" in last
    assert 'pip install "anysite[dicom]"' in last


def test_reading_other_formats_needs_no_pydicom(tmp_path):
    several(tmp_path / "study", (2,))
    volume = files.read(tmp_path / "study")
    files.write_label(volume.with_array(volume.array.astype(np.int32)), tmp_path / "label.nii.gz")
    command = (
        "import sys; sys.modules['pydicom'] = None; from pathlib import Path; from anysite.data import files\n"
        f"print(files.read_label(Path({str(tmp_path / 'label.nii.gz')!r})).shape)"
    )
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "(10, 8, 6)"


@real
@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    ["brainix_flair_plus_roi/FLAIR", "dcmqi_ct3_liver_seg/ct-3slice", "totalseg_ct/dicom",
     "udacity_hcrop/Study1/13_HCropVolume", "rt_utils_rtstruct"],
)  # fmt: skip
def test_real_series_lie_where_another_reader_puts_them(name):
    volume = files.read(SHARED / name)
    array, affine = read_by_itk(SHARED / name)
    np.testing.assert_array_equal(volume.array[0], array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-3)


@real
@pytest.mark.data
def test_a_real_series_lies_where_its_nifti_label_does():
    volume = files.read(SHARED / "totalseg_ct" / "dicom").oriented()
    label = files.read(SHARED / "totalseg_ct" / "nifti" / "example_seg_dicom.nii.gz").oriented()
    assert volume.shape == label.shape
    np.testing.assert_allclose(volume.affine, label.affine, atol=1e-3)
    assert volume.array[0][label.array[0] > 0].mean() > -50  # organs lie in the body, not in the air


@real
@pytest.mark.data
@pytest.mark.parametrize("size", ["23x38x3", "24x38x3"])
def test_real_multi_frame_files_are_the_volumes_of_their_series(size):
    folder = SHARED / "dcmqi_ct3_liver_seg" / size
    single, multiple = files.read(folder / "image"), files.read(folder / "multiframe")
    np.testing.assert_array_equal(single.array, multiple.array)
    np.testing.assert_allclose(single.affine, multiple.affine, atol=1e-6)
