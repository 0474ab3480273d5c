"""A mask lies where its image lies, however the file stores it: orientations x spacings x header states."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Extension

import dicom_files
from anysite.data import files, nifti_place
from anysite.data.volume import Volume
from anysite.errors import FileFormatError, GeometryError
from anysite.normalisation import Normalisation
from anysite.plan import Plan

SPACINGS_MM = ((1, 1, 1), (0.5, 0.5, 3), (2, 1, 1.5), (0.7, 0.7, 0.7), (3, 0.8, 0.9), (1.3, 4, 1.1))
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
MARKERS = {1: (0, 4, 5), 2: (8, 6, 6), 3: (3, 0, 7), 4: (5, 10, 4), 5: (4, 7, 0), 6: (2, 3, 12)}


def phantom() -> np.ndarray:
    """Return `(9, 11, 13)` with a body and a marker of its own at each end of each axis."""
    array = np.zeros((9, 11, 13), np.int16)
    array[2:6, 3:9, 4:8] = 7
    for value, (x, y, z) in MARKERS.items():
        array[x, y, z] = value
    return array


def place(spacing: tuple[float, ...]) -> np.ndarray:
    """Return an affine with this spacing, turned by some degrees, away from the origin."""
    a, b = np.radians((9.0, -6.0))
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = (-31.5, 12.25, 77)
    return affine.astype(np.float32).astype(float)  # what a header can hold


def stored(
    array: np.ndarray, affine: np.ndarray, order: tuple[int, ...], signs: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return array and affine with axes permuted and flipped, every voxel at its old place in the world."""
    to_old = np.zeros((4, 4))
    to_old[3, 3] = 1
    for axis, (old, sign) in enumerate(zip(order, signs, strict=True)):
        to_old[old, axis] = sign
        to_old[old, 3] = 0 if sign > 0 else array.shape[old] - 1
    turned = array.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
    return np.ascontiguousarray(turned), affine @ to_old


@dataclass(frozen=True)
class State:
    """A header state: how it is made, and the words of its refusal, or none where it is read."""

    make: Callable[[nibabel.Nifti1Image, np.ndarray], None]
    refusal: str = ""


def set_forms(
    image: nibabel.Nifti1Image, sform: np.ndarray | None, scode: int, qform: np.ndarray | None, qcode: int
) -> None:
    # Without an affine of its own an image is written with the header as it is, also a damaged one.
    image.set_sform(sform, scode, update_affine=False)
    image.set_qform(qform, qcode, update_affine=False)


def both(image: nibabel.Nifti1Image, affine: np.ndarray, qcode: int = 1, scode: int = 1) -> None:
    set_forms(image, affine, scode, affine, qcode)


def sform_alone(image: nibabel.Nifti1Image, affine: np.ndarray) -> None:
    image.header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
    set_forms(image, affine, 2, None, 0)


def other_sizes(image: nibabel.Nifti1Image, affine: np.ndarray) -> None:
    sform_alone(image, affine)
    image.header.set_zooms((1, 1, 1))


def qform_alone(image: nibabel.Nifti1Image, affine: np.ndarray) -> None:
    set_forms(image, None, 0, affine, 1)


def elsewhere(image: nibabel.Nifti1Image, affine: np.ndarray) -> None:
    moved = affine.copy()
    moved[:3, 3] += (5, -40, 12)
    set_forms(image, affine, 4, moved, 1)


def mirrored(image: nibabel.Nifti1Image, affine: np.ndarray) -> None:
    other = affine.copy()
    other[:3, 0] *= -1
    set_forms(image, affine, 2, other, 1)


def scaled(image: nibabel.Nifti1Image, affine: np.ndarray) -> None:
    set_forms(image, affine, 1, affine @ np.diag([1.02, 1, 1, 1]), 1)


def sheared(image: nibabel.Nifti1Image, affine: np.ndarray) -> None:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    shear = np.eye(4)
    shear[0, 1] = 0.2 * sizes[1] / sizes[0]
    set_forms(image, affine @ shear, 1, None, 0)


def no_rotation(image: nibabel.Nifti1Image, affine: np.ndarray) -> None:
    both(image, affine)
    image.header["quatern_b"] = image.header["quatern_c"] = 0.9


def singular(image: nibabel.Nifti1Image, affine: np.ndarray) -> None:
    both(image, affine)
    image.header["srow_x"] = image.header["srow_y"]


def uncoded(image: nibabel.Nifti1Image, affine: np.ndarray) -> None:
    set_forms(image, None, 0, None, 0)
    image.header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))


STATES = {
    "both forms": State(both),
    "sform alone": State(sform_alone),
    "qform alone": State(qform_alone),
    "sform beside other voxel sizes": State(other_sizes),
    "forms at two places": State(elsewhere),
    "unusable qform beside an sform": State(no_rotation),
    "no code": State(uncoded),
    "mirrored forms": State(mirrored, "in the sform and .* in the qform"),
    "forms of two scales": State(scaled, "mm in the sform and"),
    "sheared": State(sheared, "axes that meet at 78.7 degrees"),
    "singular sform": State(singular, "singular"),
}


def grid_plan(spacing: tuple[float, ...], axes: str = "RAS") -> Plan:
    return Plan(
        dimension=3, image_dimension=3, axes=axes, spacing=spacing, unit="mm", channels=1,
        normalisation=(Normalisation(kind="none"),), patch_size=(16, 16, 16),
        classes=tuple(f"class_{i}" for i in range(8)), label_values=tuple(range(8)),
    )  # fmt: skip


def segment_by_value(image: Volume, plan: Plan) -> Volume:
    """Return the label map of an image whose intensities are its classes, over the plan's grid and back."""
    grid = plan.to_grid(image)[0]
    maps = torch.stack([1 - (grid - value).abs().clamp(max=1) for value in range(8)])
    return image.with_array(plan.decide(plan.from_grid(maps, image).array)[None])


def marker_positions(path: Path) -> dict[int, np.ndarray]:
    """Return where each marker of a mask lies in RAS mm, by SimpleITK."""
    image = SimpleITK.ReadImage(str(path))
    shape = SimpleITK.LabelShapeStatisticsImageFilter()
    shape.Execute(image)
    return {value: np.array(shape.GetCentroid(value)) * (-1, -1, 1) for value in MARKERS}


def sweep(folder: Path, state: str, spacing: tuple[float, ...], suffix: str) -> int:
    """Check every orientation of one header state; return how many."""
    array, affine = phantom(), place(spacing)
    for order, signs in ORIENTATIONS:
        turned, turned_affine = stored(array, affine, order, signs)
        image = nibabel.Nifti1Image(turned, None)
        STATES[state].make(image, turned_affine)
        source, mask = folder / f"image{suffix}", folder / f"mask{suffix}"
        image.to_filename(source)
        if STATES[state].refusal:
            with pytest.raises(GeometryError, match=STATES[state].refusal) as refused:
                files.read(source)
            assert source.name in str(refused.value)
            continue
        volume = files.read(source)
        header = nibabel.Nifti1Image.from_filename(source).header
        expected = np.array(header.get_best_affine()) if state == "no code" else turned_affine
        np.testing.assert_allclose(volume.affine, expected, atol=1e-3, rtol=0)
        # The plan's grid has its slices along the last axis of the phantom, wherever the file has them.
        along = list(volume.oriented("RAS").spacing)
        files.write_label(segment_by_value(volume, grid_plan(tuple(along))), mask, image_path=source)
        written = nibabel.Nifti1Image.from_filename(mask)
        np.testing.assert_array_equal(np.asarray(written.dataobj), turned)
        for name in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x"):
            np.testing.assert_array_equal(written.header[name], header[name])
        np.testing.assert_array_equal(written.header["pixdim"][:4], header["pixdim"][:4])
        np.testing.assert_array_equal(written.affine, nibabel.Nifti1Image.from_filename(source).affine)
        if state in ("both forms", "sform alone", "qform alone"):  # where ITK and nibabel agree
            for value, position in marker_positions(mask).items():
                truth = affine @ [*MARKERS[value], 1]
                np.testing.assert_allclose(position, truth[:3], atol=1e-3, rtol=0)
    return len(ORIENTATIONS)


@pytest.mark.parametrize("state", STATES)
def test_a_mask_lies_where_its_image_lies(tmp_path, state):
    assert sweep(tmp_path, state, SPACINGS_MM[2], ".nii") == 48


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("spacing", SPACINGS_MM, ids=str)
def test_a_mask_lies_where_its_image_lies_everywhere(tmp_path, spacing, suffix):
    assert sum(sweep(tmp_path, state, spacing, suffix) for state in STATES) == 48 * len(STATES)


@pytest.mark.parametrize("spacing", SPACINGS_MM[:3], ids=str)
def test_the_mask_does_not_depend_on_how_the_file_stores_the_image(spacing):
    plan = grid_plan((1.1, 1.1, 1.1))
    upright = Volume(phantom()[None].astype(np.float32), np.diag([*spacing, 1.0]))
    expected = segment_by_value(upright, plan).array[0]
    assert len(np.unique(expected)) > 2
    for order, signs in ORIENTATIONS:
        array, affine = stored(upright.array[0], upright.affine, order, signs)
        label = segment_by_value(Volume(array[None], affine), plan).oriented("RAS")
        np.testing.assert_array_equal(label.array[0], expected)


@pytest.mark.parametrize(("unit", "factor"), [(1, 1000.0), (2, 1.0), (3, 0.001), (0, 1.0)])
def test_lengths_are_in_mm_whatever_the_header_counts_in(tmp_path, unit, factor):
    affine = np.diag([0.5, 0.5, 2.0, 1.0])
    image = nibabel.Nifti1Image(phantom(), affine)
    image.header["xyzt_units"] = unit + 8
    image.to_filename(tmp_path / "a.nii")
    assert files.read(tmp_path / "a.nii").spacing == pytest.approx(tuple(factor * s for s in (0.5, 0.5, 2)))
    image.header["xyzt_units"] = 5
    image.to_filename(tmp_path / "b.nii")
    with pytest.raises(GeometryError, match="unit of length 5"):
        files.read(tmp_path / "b.nii")


def test_a_mask_takes_nothing_else_from_its_image(tmp_path):
    image = nibabel.Nifti1Image(phantom(), place((1, 1, 2)))
    image.header["descrip"], image.header["aux_file"] = b"Jane Doe", b"1970-01-01"
    image.header.extensions.append(Nifti1Extension("comment", b"Jane Doe"))
    image.to_filename(tmp_path / "image.nii")
    volume = files.read(tmp_path / "image.nii")
    files.write_label(volume, tmp_path / "mask.nii", image_path=tmp_path / "image.nii")
    content = (tmp_path / "mask.nii").read_bytes()
    assert b"Jane" not in content
    assert b"1970" not in content


def test_nifti_2_is_answered_in_kind(tmp_path):
    affine = np.diag([1 / 3, 0.7, 2.0, 1.0])  # what 32 bits cannot hold
    nibabel.Nifti2Image(phantom(), affine).to_filename(tmp_path / "image.nii.gz")
    volume = files.read(tmp_path / "image.nii.gz")
    files.write_label(volume, tmp_path / "mask.nii.gz", image_path=tmp_path / "image.nii.gz")
    np.testing.assert_array_equal(files.read(tmp_path / "mask.nii.gz").affine, affine)


@pytest.mark.parametrize("slope", [1.0, 0.0, float("nan"), 0.1, -2.5, 1e-4, 37.0])
@pytest.mark.parametrize("intercept", [0.0, -1024.0, 0.5, 1e5])
@pytest.mark.parametrize(
    "kind", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", ">i2", ">u2", ">i4", ">f4", ">f8"]
)
def test_intensities_are_what_the_header_makes_of_them(tmp_path, kind, slope, intercept):
    dtype = np.dtype(kind)
    limits = np.iinfo(dtype) if dtype.kind in "iu" else None
    low, high = (max(limits.min, -(2**40)), min(limits.max, 2**40)) if limits else (-3e4, 3e4)
    raw = np.random.default_rng(0).uniform(low, high, (5, 6, 7)).astype(dtype)
    raw.flat[0], raw.flat[1] = low, high
    image = nibabel.Nifti1Image(
        raw, np.eye(4), header=nibabel.Nifti1Header(endianness=dtype.str[0].replace("|", "<")), dtype=dtype
    )
    image.header.set_data_dtype(dtype)
    path = tmp_path / "image.nii"
    image.to_filename(path)
    content = bytearray(path.read_bytes())
    order = "<" if content[0] == 92 else ">"
    content[112:120] = np.array([slope, intercept], f"{order}f4").tobytes()
    path.write_bytes(content)
    oracle = (
        np.frombuffer(content[352:], raw.dtype.newbyteorder(order))
        .reshape(raw.shape, order="F")
        .astype(float)
    )
    if slope not in (0.0,) and np.isfinite(slope):
        oracle = oracle * float(np.float32(slope)) + float(np.float32(intercept))
    found = files.read(path).array[0]
    np.testing.assert_allclose(found.astype(float), oracle, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.tuples(*[st.integers(2, 17)] * 3), st.tuples(*[st.integers(2, 17)] * 3))
def test_resampling_a_label_invents_no_class(seed, shape, new_shape):
    values = np.random.default_rng(seed).choice([0, 3, 7, 200], (1, *shape)).astype(np.int32)
    label = Volume(values, np.eye(4)).resampled_to(new_shape, "label")
    assert set(np.unique(label.array)) <= set(np.unique(values))


@pytest.mark.parametrize(
    "spacing", [(0.5, 0.5, 0.5), (1.7, 1.7, 1.7), (0.8, 0.8, 2.0), (2.0, 2.0, 2.0), (3.0, 3.0, 3.0)], ids=str
)
def test_resampling_keeps_the_volume_of_balls(spacing):
    rng, before, after = np.random.default_rng(0), 0.0, 0.0
    for _ in range(6):
        centre, radius = rng.uniform(-0.5, 0.5, 3), rng.uniform(16, 20)
        offset = np.indices((48, 48, 48)) - 24 - centre[:, None, None, None]
        ball = Volume(np.array((offset**2).sum(0) < radius**2, np.int32)[None], np.eye(4))
        there = ball.resampled(spacing, "label")
        before += ball.array.sum()
        after += there.array.sum() * np.prod(there.spacing)
    assert after == pytest.approx(before, rel=0.01)


def test_the_forms_are_compared_with_room_for_rounding():
    header = nibabel.Nifti1Header()
    affine = place((0.123456, 0.7, 1.9))
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    np.testing.assert_allclose(nifti_place.find_affine(header), affine, atol=1e-5)
    header["pixdim"][1] *= 1.005
    np.testing.assert_allclose(nifti_place.find_affine(header), affine, atol=1e-5)


def test_a_damaged_place_names_the_file(tmp_path):
    image = nibabel.Nifti1Image(phantom(), None)
    set_forms(image, None, 0, np.eye(4), 1)
    image.header["pixdim"][2] = 0
    image.to_filename(tmp_path / "flat.nii")
    with pytest.raises((GeometryError, FileFormatError), match="flat.nii"):
        files.read(tmp_path / "flat.nii")


def check_series(
    folder: Path, spacing: tuple[float, ...], order: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    """Store the phantom as a DICOM series with these axes, segment it by value, and look where the markers are."""
    upright, affine = phantom(), place(spacing)
    turned, to_ras = stored(upright, affine, order, signs)
    to_lps = np.diag([-1, -1, 1, 1]) @ to_ras
    sizes = np.linalg.norm(to_lps[:3, :3], axis=0)
    cosines = to_lps[:3, :3] / sizes
    slices = dicom_files.series(
        turned.transpose(2, 1, 0).astype(np.uint16), tuple(cosines.T[:2].ravel()),
        spacing=(float(sizes[1]), float(sizes[0]), float(sizes[2])),
    )  # fmt: skip
    for index, dataset in enumerate(slices):
        dataset.ImagePositionPatient = [float(f"{v:.10g}") for v in (to_lps @ [0, 0, index, 1])[:3]]
    series = dicom_files.write(slices, folder / "series")
    volume = files.read(series)
    np.testing.assert_array_equal(volume.oriented("RAS").array[0], upright)
    label = segment_by_value(volume, grid_plan(tuple(volume.oriented("RAS").spacing)))
    files.write_label(label, folder / "mask.nii", image_path=series)
    for value, position in marker_positions(folder / "mask.nii").items():
        np.testing.assert_allclose(position, (affine @ [*MARKERS[value], 1])[:3], atol=1e-3, rtol=0)
    shutil.rmtree(series)


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS[::5], ids=str)
def test_a_mask_lies_where_its_dicom_series_lies(tmp_path, order, signs):
    check_series(tmp_path, SPACINGS_MM[2], order, signs)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", SPACINGS_MM, ids=str)
def test_a_mask_lies_where_its_dicom_series_lies_everywhere(tmp_path, spacing):
    for order, signs in ORIENTATIONS:
        check_series(tmp_path, spacing, order, signs)
