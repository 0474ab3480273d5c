from __future__ import annotations

import errno
import gzip
import os
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from anysite.data import files
from anysite.data.volume import Volume
from anysite.errors import DataError, FileFormatError, GeometryError, LabelError

relaxed = settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def label_map(shape: tuple[int, ...], seed: int, classes: int = 4) -> Volume:
    rng = np.random.default_rng(seed)
    array = rng.integers(0, classes, (1, *shape)).astype(np.int32)
    array.flat[0] = classes - 1
    if len(shape) == 2:
        return Volume.of_pixels(array)
    affine = np.eye(4)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    affine[:3] = np.c_[turn * rng.uniform(0.3, 4, 3), rng.normal(size=3)]
    return Volume(array, affine.astype(np.float32).astype(float))  # NIfTI keeps 32 bits of it


@relaxed
@given(st.sampled_from([".nii", ".nii.gz"]), st.integers(0, 999), st.sampled_from([2, 256, 257, 65536]))
def test_nifti_labels_keep_every_voxel_and_the_affine(tmp_path, suffix, seed, classes):
    label = label_map((3, 5, 4), seed, classes)
    files.write_label(label, tmp_path / f"mask{suffix}")
    back = files.read_label(tmp_path / f"mask{suffix}")
    np.testing.assert_array_equal(back.array, label.array)
    np.testing.assert_array_equal(back.affine, label.affine)
    qform = nibabel.Nifti1Image.from_filename(tmp_path / f"mask{suffix}").get_sform()
    np.testing.assert_array_equal(qform, label.affine)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_capitals_of_a_nifti_suffix_do_not_matter(tmp_path, suffix):
    label = label_map((3, 5, 4), 0, 3)
    files.write_label(label, tmp_path / f"mask{suffix}")
    (tmp_path / f"mask{suffix}").rename(tmp_path / f"Mask{suffix.title()}")
    np.testing.assert_array_equal(files.read_label(tmp_path / f"Mask{suffix.title()}").array, label.array)


@pytest.mark.parametrize("change", [-100, 2], ids=["truncated", "longer"])
def test_a_packed_nifti_of_another_length_than_its_header_says_is_refused(tmp_path, change):
    path = tmp_path / "mask.nii.gz"
    files.write_label(label_map((9, 5, 4), 0, 3), path)
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw[:change] if change < 0 else raw + b"\0" * change))
    with pytest.raises(
        FileFormatError, match="Expected 180 bytes, got 80" if change < 0 else "more than 532 bytes"
    ):
        files.read(path)


@relaxed
@given(st.sampled_from([".png", ".tif", ".TIFF"]), st.integers(0, 999), st.sampled_from([2, 256, 257, 65536]))
def test_picture_labels_keep_every_pixel(tmp_path, suffix, seed, classes):
    label = label_map((5, 7), seed, classes)
    files.write_label(label, tmp_path / f"mask{suffix}")
    back = files.read_label(tmp_path / f"mask{suffix}")
    np.testing.assert_array_equal(back.array, label.array)
    assert back.unit == "px"


def test_a_tiff_of_several_pages_is_a_volume(tmp_path):
    volume = Volume.of_pixels(np.arange(2 * 5 * 7).reshape(1, 2, 5, 7))
    files.write_label(volume, tmp_path / "stack.tif")
    np.testing.assert_array_equal(files.read_label(tmp_path / "stack.tif").array, volume.array)
    pages = [Image.fromarray(page.astype(np.uint8)) for page in volume.array[0]]
    pages[0].save(tmp_path / "lzw.tif", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    np.testing.assert_array_equal(files.read(tmp_path / "lzw.tif").array, volume.array)
    with tifffile.TiffWriter(tmp_path / "sizes.tif") as writer:
        writer.write(np.zeros((5, 7), np.uint8), metadata=None)
        writer.write(np.zeros((6, 7), np.uint8), metadata=None)
    with pytest.raises(FileFormatError, match="different shapes"):
        files.read(tmp_path / "sizes.tif")


def test_colours_of_16_bits_are_read_whole_or_not_at_all(tmp_path):
    array = np.random.default_rng(0).integers(0, 2**16, (5, 7, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb")
    np.testing.assert_array_equal(files.read(tmp_path / "a.tif").array, array.transpose(2, 0, 1))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array, isVector=True), str(tmp_path / "a.png"))
    with pytest.raises(FileFormatError, match="a.png: a PNG of 16-bit colours"):
        files.read(tmp_path / "a.png")
    grey = SimpleITK.GetImageFromArray(array[..., 0].copy())
    SimpleITK.WriteImage(grey, str(tmp_path / "grey.png"))
    np.testing.assert_array_equal(files.read(tmp_path / "grey.png").array[0], array[..., 0])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".png", ".jpg", ".tif", "_pages.tif"])
def test_a_truncated_file_is_never_read_as_another_image(tmp_path, suffix):
    path = tmp_path / f"whole{suffix}"
    rng = np.random.default_rng(0)
    if ".nii" in suffix:
        nibabel.Nifti1Image(rng.integers(0, 999, (5, 6, 4)).astype(np.int16), np.eye(4)).to_filename(path)
    elif suffix == "_pages.tif":
        pages = rng.integers(0, 255, (3, 9, 8)).astype(np.uint8)
        tifffile.imwrite(path, pages, photometric="minisblack", compression="deflate")
    elif suffix == ".tif":
        tifffile.imwrite(path, rng.integers(0, 255, (9, 8)).astype(np.uint8))
    else:
        Image.fromarray(rng.integers(0, 255, (9, 8)).astype(np.uint8)).save(path)
    content, whole = path.read_bytes(), files.read(path).array
    cut = tmp_path / f"cut{suffix}"
    for length in [*range(0, len(content) - 40, 7), *range(max(0, len(content) - 40), len(content))]:
        cut.write_bytes(content[:length])
        if suffix == ".png" and length > len(content) - 24:  # only checksums and the end mark are missing
            continue
        with pytest.raises(FileFormatError, match=r"cut"):
            files.read(cut)
    if suffix == ".nii":
        cut.write_bytes(content + b"\0")
        with pytest.raises(FileFormatError, match="more|exactly"):
            files.read(cut)
    assert whole.size


@relaxed
@given(st.sampled_from([".nii", ".png", ".tif"]), st.data())
def test_damaged_bytes_raise_only_data_errors(tmp_path, suffix, data):
    path = tmp_path / f"damaged{suffix}"
    files.write_label(label_map((4, 4, 3) if suffix == ".nii" else (6, 5), 0), path)
    content = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    complaint = None
    try:
        files.read(path)
    except DataError as error:
        complaint = error
    assert complaint is None or complaint.where == str(path)


@pytest.mark.parametrize("suffix", [".nii.gz", ".png", ".tif"])
@pytest.mark.parametrize("fails", ["writer", "fsync"])
def test_a_full_disk_leaves_the_old_mask_and_nothing_else(tmp_path, monkeypatch, suffix, fails):
    path, old = tmp_path / f"mask{suffix}", label_map((4, 4, 3) if "nii" in suffix else (4, 4), 0)
    files.write_label(old, path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(files.FORMATS[suffix], "write_label", full)
    with pytest.raises(FileFormatError, match="No space left"):
        files.write_label(old.with_array(1 - np.minimum(old.array, 1)), path)
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(files.read_label(path).array, old.array)


def test_a_writer_that_alters_the_mask_is_found_out(tmp_path):
    too_many = Volume.of_pixels(np.full((1, 3, 3), 70_000))
    for path in (tmp_path / "mask.png", tmp_path / "mask.tif"):
        with pytest.raises(FileFormatError, match="differs"):
            files.write_label(too_many, path)
    assert not list(tmp_path.iterdir())
    for name, complaint in (("a.jpg", "JPEG"), ("a.xyz", "unknown"), ("a", "unknown")):
        with pytest.raises(FileFormatError, match=complaint):
            files.write_label(label_map((3, 3), 0), tmp_path / name)
    with pytest.raises(FileFormatError, match="three spatial axes"):
        files.write_label(label_map((3, 3, 3), 0), tmp_path / "a.png")


def test_picture_modes(tmp_path):
    rng = np.random.default_rng(0)
    rgba, grey = rng.integers(0, 255, (5, 6, 4)).astype(np.uint8), rng.integers(0, 4, (5, 6)).astype(np.uint8)
    palette = Image.fromarray(grey, "L").convert("P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    greys = Image.fromarray(grey, "L").convert("P")
    greys.putpalette([level for level in range(0, 256, 5) for _ in range(3)])
    saved = {
        "rgba.png": (Image.fromarray(rgba), np.moveaxis(rgba[..., :3], -1, 0)),
        "rgb.tif": (Image.fromarray(rgba[..., :3]), np.moveaxis(rgba[..., :3], -1, 0)),
        "rgba.tif": (Image.fromarray(rgba), np.moveaxis(rgba[..., :3], -1, 0)),
        "palette.png": (palette, np.moveaxis(np.asarray(palette.convert("RGB")), -1, 0)),
        "palette.tif": (palette, np.moveaxis(np.asarray(palette.convert("RGB")), -1, 0)),
        "palette_of_greys.png": (greys, np.asarray(greys.convert("L"))[None]),
        "sixteen.png": (Image.fromarray(grey.astype(np.uint16) * 9000), grey[None] * np.uint16(9000)),
        "bit.png": (Image.fromarray(grey > 1), (grey > 1)[None] * 255),
        "bit.tif": (Image.fromarray(grey > 1), (grey > 1)[None] * 255),
        "alpha.png": (Image.fromarray(rgba[..., :2], "LA"), rgba[None, ..., 0]),
    }
    for name, (image, expected) in saved.items():
        image.save(tmp_path / name)
        np.testing.assert_array_equal(files.read(tmp_path / name).array, expected, err_msg=name)
    for name in ("palette.png", "palette.tif", "palette_of_greys.png"):
        np.testing.assert_array_equal(files.read_label(tmp_path / name).array, grey[None], err_msg=name)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_label_whose_palette_begins_with_white_is_refused(tmp_path, suffix):
    """As Pillow makes it of a black and white mask: the background would become the object."""
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4, 2:5] = 255
    path = tmp_path / f"a.{suffix}"
    for pixels in (mask, 255 - 255 * (mask == 1)):
        image = Image.fromarray((pixels == 0).astype(np.uint8), "P")
        image.putpalette([255] * 3 + [0] * 3)
        image.save(path)
        with pytest.raises(FileFormatError, match="palette shows as the greys"):
            files.read_label(path)
    image = Image.fromarray((mask > 0).astype(np.uint8), "P")
    image.putpalette([0] * 3 + [255] * 3)
    image.save(path)
    np.testing.assert_array_equal(files.read_label(path).array[0], mask > 0)


def write_as_lzw(path: Path, array: np.ndarray, **more) -> None:
    """Write a TIFF that says it is LZW, which tifffile cannot decode by itself; its voxels are not."""
    tifffile.imwrite(path, array, compression="deflate", **more)
    said = struct.pack("<HHIHH", 259, 3, 1, 32946, 0)
    assert said in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(said, struct.pack("<HHIHH", 259, 3, 1, 5, 0)))


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_tiff_in_which_0_is_white_is_turned_as_an_image_and_refused_as_a_label(tmp_path, compression):
    grey = np.random.default_rng(0).integers(0, 255, (5, 6)).astype(np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, 255 - grey, photometric="miniswhite", compression=compression)
    np.testing.assert_array_equal(files.read(path).array[0], grey)
    with pytest.raises(FileFormatError, match="0 stands for white"):
        files.read_label(path)
    tifffile.imwrite(path, grey.astype(np.uint16) * 9, photometric="miniswhite", compression=compression)
    np.testing.assert_array_equal(files.read(path).array[0], 65535 - grey.astype(np.uint16) * 9)
    write_as_lzw(path, grey.astype(np.uint16), photometric="miniswhite")
    with pytest.raises(FileFormatError, match="16-bit values in a compression"):
        files.read(path)
    mask = grey > 100
    for kind in ("raw", "group4"):
        Image.fromarray(mask).save(path, compression=kind, tiffinfo={262: 0})
        np.testing.assert_array_equal(files.read_label(path).array[0] > 0, mask, err_msg=kind)


def test_no_band_of_a_tiff_is_lost(tmp_path):
    bands = np.random.default_rng(0).integers(0, 4088, (5, 6, 5)).astype(np.uint16)
    path = tmp_path / "a.tif"
    for count, extra in ((5, ["unspecified"] * 2), (4, ["unspecified"]), (4, ["unassalpha"])):
        tifffile.imwrite(path, bands[..., :count], photometric="rgb", extrasamples=extra)
        kept = 3 if extra == ["unassalpha"] else count
        np.testing.assert_array_equal(files.read(path).array, np.moveaxis(bands[..., :kept], -1, 0))
    tifffile.imwrite(
        path, bands[..., :2], photometric="minisblack", extrasamples=["unspecified"], planarconfig="contig"
    )
    np.testing.assert_array_equal(files.read(path).array, np.moveaxis(bands[..., :2], -1, 0))
    write_as_lzw(path, bands[..., :3], photometric="rgb")
    with pytest.raises(FileFormatError, match="16-bit values in a compression that would be cut"):
        files.read(path)


def test_a_qform_whose_handedness_is_left_out_is_read(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.diag([1, 2, 3, 1]))
    image.set_qform(np.diag([1, 2, 3, 1]), code=1)
    image.set_sform(None, code=0)
    nibabel.save(image, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[76:80] = b"\0" * 4  # pixdim[0]
    (tmp_path / "a.nii").write_bytes(content)
    assert files.read(tmp_path / "a.nii").spacing == pytest.approx((1, 2, 3))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_pictures_are_upright_as_viewers_show_them(tmp_path, name, orientation):
    stored = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / name, exif=exif)
    if name == "a.jpg":  # which alters values
        with Image.open(tmp_path / name) as image:
            stored = np.asarray(image)
    turned = {2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.T}
    turned |= {6: stored.T[:, ::-1], 7: stored.T[::-1, ::-1], 8: stored.T[::-1]}
    np.testing.assert_array_equal(files.read(tmp_path / name).array[0], turned.get(orientation, stored))


def test_tiff_that_has_to_be_turned_and_coloured_pages_are_refused(tmp_path):
    pages = [Image.fromarray(np.full((3, 4), level, np.uint8)) for level in (1, 2)]
    pages[0].save(tmp_path / "a.tif", tiffinfo={274: 6})
    with pytest.raises(FileFormatError, match="turned"):
        files.read(tmp_path / "a.tif")
    coloured = [page.convert("P") for page in pages]
    coloured[0].save(tmp_path / "b.tif", save_all=True, append_images=coloured[1:])
    with pytest.raises(FileFormatError, match="palette"):
        files.read(tmp_path / "b.tif")


def test_axes_of_nifti_become_channels_or_space(tmp_path):
    for shape, expected in {
        (4, 5): (1, 4, 5, 1),
        (4, 5, 6): (1, 4, 5, 6),
        (4, 5, 6, 2): (2, 4, 5, 6),
        (4, 5, 6, 1, 3): (3, 4, 5, 6),
        (4, 5, 6, 2, 1): (2, 4, 5, 6),
    }.items():
        array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
        nibabel.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / "a.nii")
        volume = files.read(tmp_path / "a.nii")
        assert volume.array.shape == expected
        assert volume.array[-1, 3, 4, 0] == array[3, 4, *([0] * (len(shape) > 2)), ...].flat[-1]
    nibabel.Nifti1Image(np.zeros((2, 2, 2, 2, 2), np.int16), np.eye(4)).to_filename(tmp_path / "a.nii")
    with pytest.raises(GeometryError, match="a.nii"):
        files.read(tmp_path / "a.nii")
    nibabel.Nifti1Image(np.zeros((2, 2, 2), np.complex64), np.eye(4)).to_filename(tmp_path / "a.nii")
    with pytest.raises(FileFormatError, match="numbers"):
        files.read(tmp_path / "a.nii")


def test_values_that_are_no_label_or_no_number(tmp_path):
    def label_of(array):
        nibabel.Nifti1Image(array.astype(np.float32), np.eye(4)).to_filename(tmp_path / "a.nii")
        return files.read_label(tmp_path / "a.nii")

    assert label_of(np.full((2, 2, 2), 3.0)).array.dtype == np.int32
    for array, error in (
        (np.full((2, 2, 2), 0.5), LabelError),
        (np.full((2, 2, 2), -1), LabelError),
        (np.full((2, 2, 2), 3e9), LabelError),
        (np.full((2, 2, 2), np.nan), FileFormatError),
        (np.full((2, 2, 2), np.finfo(np.float32).min), FileFormatError),
        (np.full((2, 2, 2), np.inf), FileFormatError),
        (np.arange(16).reshape(2, 2, 2, 2), LabelError),
    ):
        with pytest.raises(error, match="a.nii"):
            label_of(array)
    assert label_of(np.ones((2, 2, 2, 3))).array.shape == (1, 2, 2, 2)  # grey saved as RGB


def test_names():
    nifti, other = Path("x/a.b.NII.GZ"), Path("a.xyz")
    assert (files.suffix_of(nifti), files.stem_of(nifti)) == (".nii.gz", "a.b")
    assert (files.suffix_of(other), files.stem_of(other)) == ("", "a")
    with pytest.raises(FileFormatError, match="no such file"):
        files.read(Path("nowhere.png"))


OME = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0"
DimensionOrder="XYZCT" Type="uint8" SizeX="8" SizeY="8" SizeZ="{pages}" SizeC="1" SizeT="1">
<Channel ID="Channel:0:0" SamplesPerPixel="1"/><TiffData/></Pixels></Image></OME>"""


@pytest.mark.parametrize("described", [2, 5])
def test_a_description_of_other_pages_than_the_file_holds_is_refused(tmp_path: Path, described: int) -> None:
    pages = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8)
    path = tmp_path / "stack.tif"
    tifffile.imwrite(
        path, pages, metadata=None, photometric="minisblack", description=OME.format(pages=described)
    )
    with pytest.raises(FileFormatError, match=f"a description of {described} pages; expected the 3 that"):
        files.read(path)
    tifffile.imwrite(path, pages, metadata=None, photometric="minisblack", description=OME.format(pages=3))
    np.testing.assert_array_equal(files.read(path).array[0], pages)


def test_pages_of_another_file_are_not_read(tmp_path: Path) -> None:
    page = np.full((8, 8), 7, np.uint8)
    (tmp_path / "secret").mkdir()
    tifffile.imwrite(tmp_path / "secret" / "b.tif", page + 1, metadata=None)
    data = "".join(
        f'<TiffData IFD="0" FirstZ="{z}" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{z}</UUID></TiffData>'
        for z, name in enumerate(("a.tif", "secret/b.tif"))
    )
    description = OME.format(pages=2).replace("<TiffData/>", data)
    tifffile.imwrite(tmp_path / "a.tif", page, metadata=None, description=description)
    try:
        found = files.read(tmp_path / "a.tif").array
    except FileFormatError:
        return
    assert 8 not in found


def test_signed_bytes_keep_their_sign_whatever_the_compression(tmp_path: Path) -> None:
    values = np.arange(-128, 128).astype(np.int8).reshape(16, 16)
    for compression in ("none", "deflate"):
        tifffile.imwrite(tmp_path / f"{compression}.tif", values, compression=compression, metadata=None)
        np.testing.assert_array_equal(files.read(tmp_path / f"{compression}.tif").array[0], values)
    Image.fromarray(values.view(np.uint8)).save(
        tmp_path / "lzw.tif", compression="tiff_lzw", tiffinfo={339: 2}
    )
    with tifffile.TiffFile(tmp_path / "lzw.tif") as tiff:
        assert (tiff.series[0].dtype, int(tiff.series[0].keyframe.compression)) == (np.int8, 5)
    np.testing.assert_array_equal(files.read(tmp_path / "lzw.tif").array[0], values)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.nii", "A.Nii.gz"])
def test_what_a_library_says_of_a_file_names_no_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "Mueller_Hans"
    folder.mkdir()
    (folder / name).write_bytes(b"neither picture nor volume")
    with pytest.raises(FileFormatError) as caught:
        files.read(folder / name)
    assert (
        str(caught.value).count("Mueller_Hans") == 1
    )  # where the file lies, which readers of tables leave out
