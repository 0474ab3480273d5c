"""NRRD and MetaImage: what SimpleITK writes is read with its place, and nothing that is cut short."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from anysite.data import files, itk
from anysite.data.volume import Volume
from anysite.errors import FileFormatError, GeometryError

REAL = Path(__file__).parents[2] / "shared" / "data" / "dicom"
KINDS = ("u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")


def sitk_image(array: np.ndarray, vector: bool = False) -> SimpleITK.Image:
    """Return an image turned by 20 degrees, with the last array axis first in space."""
    image = SimpleITK.GetImageFromArray(array, isVector=vector)
    image.SetSpacing((0.5, 2.0, 1.25)[: image.GetDimension()])
    if image.GetDimension() == 3:
        image.SetOrigin((10.5, -20, 30))
        a = np.radians(20)
        image.SetDirection((np.cos(a), -np.sin(a), 0, np.sin(a), np.cos(a), 0, 0, 0, -1))
    return image


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_place_are_those_of_a_nifti_of_the_same_image(tmp_path, kind, suffix, compressed):
    array = np.random.default_rng(0).integers(0, 100, (4, 5, 6)).astype(kind)
    image = sitk_image(array)
    for name in (f"a{suffix}", "a.nii"):
        SimpleITK.WriteImage(image, str(tmp_path / name), useCompression=compressed)
    found, twin = files.read(tmp_path / f"a{suffix}"), files.read(tmp_path / "a.nii")
    np.testing.assert_array_equal(found.array, twin.array)
    assert found.array.dtype == np.dtype(kind)
    np.testing.assert_allclose(found.affine, twin.affine, atol=1e-5)


def test_other_voxels_beside_the_same_header_are_another_image(tmp_path):
    SimpleITK.WriteImage(sitk_image(np.zeros((4, 5, 6), np.int16)), str(tmp_path / "a.mhd"))
    former = files.digest_of(tmp_path / "a.mhd")
    assert [path.name for path in files.files_of(tmp_path / "a.mhd")] == ["a.mhd", "a.raw"]
    voxels = bytearray((tmp_path / "a.raw").read_bytes())
    voxels[0] = 1
    (tmp_path / "a.raw").write_bytes(voxels)
    assert files.digest_of(tmp_path / "a.mhd") != former
    (tmp_path / "a.raw").unlink()
    assert files.digest_of(tmp_path / "a.mhd") not in ("", former)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_components_and_a_fourth_axis_are_channels(tmp_path, suffix):
    array = np.random.default_rng(0).normal(size=(4, 5, 6, 3)).astype(np.float32)
    SimpleITK.WriteImage(sitk_image(array, vector=True), str(tmp_path / f"vector{suffix}"))
    np.testing.assert_array_equal(files.read(tmp_path / f"vector{suffix}").array, array.transpose(3, 2, 1, 0))
    series = SimpleITK.GetImageFromArray(array.transpose(3, 0, 1, 2).copy(), isVector=False)
    SimpleITK.WriteImage(series, str(tmp_path / f"series{suffix}"))
    np.testing.assert_array_equal(files.read(tmp_path / f"series{suffix}").array, array.transpose(3, 2, 1, 0))
    flat = sitk_image(array[0, :, :, 0])
    SimpleITK.WriteImage(flat, str(tmp_path / f"flat{suffix}"))
    assert files.read(tmp_path / f"flat{suffix}").shape == (6, 5, 1)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("classes", [3, 300])
def test_a_mask_keeps_every_voxel_and_the_place(tmp_path, suffix, classes):
    image = sitk_image(np.random.default_rng(0).integers(0, classes, (4, 5, 6)).astype(np.int16))
    image.SetSpacing((1 / 3, 0.7, 2.1))
    image.SetMetaData("PatientName", "Doe^Jane")
    source, mask = tmp_path / f"image{suffix}", tmp_path / f"mask{suffix}"
    SimpleITK.WriteImage(image, str(source))
    volume = files.read(source)
    files.write_label(volume, mask, image_path=source)
    np.testing.assert_array_equal(files.read_label(mask).array, volume.array)
    np.testing.assert_allclose(files.read_label(mask).affine, volume.affine, rtol=1e-15)
    assert SimpleITK.ReadImage(str(mask)).GetSpacing() == pytest.approx((1 / 3, 0.7, 2.1), rel=1e-15)
    assert b"Doe" not in mask.read_bytes()
    other = tmp_path / f"of_nifti{suffix}"
    nibabel.Nifti1Image(volume.array[0], volume.affine).to_filename(tmp_path / "image.nii")
    files.write_label(volume, other, image_path=tmp_path / "image.nii")
    assert files.read_label(other).same_grid(volume)


@pytest.mark.parametrize("stated", [b"", b"CompressedDataSize = 0\n", b"CompressedDataSize = 20\n"])
def test_compressed_voxels_of_no_stated_length_are_refused(tmp_path, stated):
    """ITK only warns, and returns memory as it found it."""
    path = tmp_path / "a.mha"
    array = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.uint8)
    SimpleITK.WriteImage(sitk_image(array), str(path), useCompression=True)
    whole = path.read_bytes()
    path.write_bytes(re.sub(rb"CompressedDataSize = \d+\n", stated, whole))
    assert path.read_bytes() != whole
    with pytest.raises(FileFormatError, match=r"CompressedDataSize (none|0|20); expected \d+"):
        files.read(path)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
def test_no_truncated_file_is_read(tmp_path, suffix, compressed):
    array = np.random.default_rng(0).integers(0, 9, (4, 5, 6)).astype(np.int16)
    SimpleITK.WriteImage(sitk_image(array), str(tmp_path / f"a{suffix}"), useCompression=compressed)
    data = next((p for p in tmp_path.iterdir() if p.suffix in (".raw", ".zraw")), tmp_path / f"a{suffix}")
    whole = data.read_bytes()
    for cut in np.linspace(0, len(whole) - 1, 40).astype(int):
        data.write_bytes(whole[:cut])
        if compressed and cut > len(whole) - 9:  # a checksum at the end of a stream may be missing
            continue
        with pytest.raises(FileFormatError, match=rf"a\{suffix}"):
            files.read(tmp_path / f"a{suffix}")
    if not compressed:
        data.write_bytes(whole + b"\0\0")
        with pytest.raises(FileFormatError, match="more than"):
            files.read(tmp_path / f"a{suffix}")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.nrrd", b"NRRD0004\ntype: block\nsizes: 3\nencoding: raw\n\n123", "values of type 'block'"),
        ("a.nrrd", b"NRRD0004\ntype: short\nsizes: 9 9 9\nencoding: bzip2\n\n", "encoded as 'bzip2'"),
        ("a.nrrd", b"NRRD0004\ntype: short\nsizes: 9 9\nencoding: raw\ndata file: /etc/passwd\n\n", "another file"),
        ("a.nrrd", b"NRRD0004\ntype: short\nsizes: 99999 99999 99999\nencoding: raw\n\n", "999970000299999 voxels"),
        ("a.nrrd", b"NRRD0004\ntype: short\n", "without an end"),
        ("a.nrrd", b"NRRD0004\ntype: short\nencoding: raw\n\n", "'sizes'"),
        ("a.mha", b"NDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = LIST\n", "voxels in 'LIST'"),
        (
            "a.mhd",
            b"NDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = ../../etc/passwd\n",
            "voxels in 'passwd'",
        ),
        ("a.mhd", b"NDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = b.raw\n", "no data file"),
        ("a.mha", b"NDims = 3\nDimSize = 2 -2 2\nElementType = MET_SHORT\nElementDataFile = LOCAL\n", "-2"),
        ("a.mha", b"NDims = 3\nDimSize = 2 2 2\nElementType = MET_STRING\nElementDataFile = LOCAL\n", "MET_STRING"),
        ("a.mha", b"\x00" * 3_000_000, "without an end"),
        ("a.mha", b"", "without an end"),
    ],
)  # fmt: skip
def test_headers_that_lie_are_refused_by_name(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=problem) as error:
        files.read(tmp_path / name)
    assert name in str(error.value)


def test_a_bomb_is_unpacked_no_further_than_its_header_says(tmp_path):
    header = b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: gzip\n\n"
    (tmp_path / "a.nrrd").write_bytes(header + gzip.compress(bytes(200_000_000), 1))
    with pytest.raises(FileFormatError, match="more than 65 bytes"):
        files.read(tmp_path / "a.nrrd")


def test_a_sheared_grid_is_refused(tmp_path):
    header = (
        b"NRRD0004\ntype: uchar\ndimension: 3\nspace: left-posterior-superior\nsizes: 2 2 2\n"
        b"space directions: (1,0,0) (0.2,1,0) (0,0,1)\nkinds: domain domain domain\nencoding: raw\n\n12345678"
    )
    (tmp_path / "a.nrrd").write_bytes(header)
    with pytest.raises((GeometryError, FileFormatError), match=r"a\.nrrd"):
        files.read(tmp_path / "a.nrrd")


def test_right_anterior_superior_is_understood(tmp_path):
    header = (
        b"NRRD0004\ntype: uchar\ndimension: 3\nspace: right-anterior-superior\nsizes: 2 2 2\n"
        b"space directions: (1.5,0,0) (0,2,0) (0,0,3)\nspace origin: (5,6,7)\nencoding: raw\n\n12345678"
    )
    (tmp_path / "a.nrrd").write_bytes(header)
    expected = np.array([[1.5, 0, 0, 5], [0, 2, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1.0]])
    np.testing.assert_allclose(files.read(tmp_path / "a.nrrd").affine, expected)


def test_a_mask_is_no_mhd(tmp_path):
    with pytest.raises(FileFormatError, match="MHA, which is one"):
        files.write_label(Volume(np.zeros((1, 2, 2, 2), np.int32), np.eye(4)), tmp_path / "mask.mhd")


def test_a_full_disk_is_an_error(tmp_path):
    label = Volume(np.zeros((1, 2, 2, 2), np.int32), np.eye(4))
    with pytest.raises(FileFormatError, match="cannot be written"):
        itk.write_label(label, tmp_path / "no such folder" / "mask.nrrd")


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared real data are not here")
def test_real_nrrd_segmentations_are_read():
    paths = sorted(REAL.rglob("*.nrrd"))
    assert len(paths) > 5
    for path in paths:
        volume = files.read_label(path)
        oracle = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
        np.testing.assert_array_equal(volume.array[0].transpose(), oracle)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_capitals_of_a_suffix_do_not_matter(tmp_path: Path, suffix: str) -> None:
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), str(tmp_path / f"a{suffix}"))
    (tmp_path / f"a{suffix}").rename(tmp_path / f"A{suffix.upper()}")
    found = files.read(tmp_path / f"A{suffix.upper()}").array
    assert sorted(found.ravel().tolist()) == list(range(24))
