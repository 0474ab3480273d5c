"""DICOM segmentations and contours as labels, and masks written as segmentations."""

from __future__ import annotations

import json
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import pack_bits
from pydicom.sequence import Sequence
from pydicom.uid import ComputedRadiographyImageStorage, RTStructureSetStorage
from typer.testing import CliRunner

from anysite.cli import app
from anysite.data import files
from anysite.data.check import check_dataset
from anysite.data.dicom_contours import fill_polygon
from anysite.data.layouts import open_dataset
from anysite.data.volume import Volume
from anysite.errors import ConfigError, DataError, FileFormatError, GeometryError, LabelError
from dicom_files import ROOT, SECRETS, enhanced, header, series, set_pixels, uid, voxels, write, write_file
from test_dicom import ORIENTATIONS, picture, several

SHARED = Path(__file__).parents[2] / "shared" / "data" / "dicom"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="shared data not present")
CLASSES = ("background", "left ventricle", "right ventricle", "scar")


def some_label(image: Volume, seed: int = 0) -> Volume:
    """Return a label map with all classes, empty in its last slice."""
    array = np.random.default_rng(seed).integers(0, 4, (1, *image.shape)).astype(np.int32)
    if image.dimension == 3 and image.shape[2] > 1:
        array[..., -1] = 0
    return image.with_array(array)


def put_on(grid: Volume, label: Volume) -> np.ndarray:
    """Return `(1, *S)` with every voxel of a label at the voxel of the grid that lies at its place."""
    index = np.argwhere(label.array[0])
    points = np.c_[index, np.ones(len(index))] @ (np.linalg.inv(grid.affine) @ label.affine).T
    assert np.abs(points - np.rint(points)).max() < 1e-3
    array = np.zeros((1, *grid.shape), np.int32)
    array[0][tuple(np.rint(points[:, :3]).astype(int).T)] = label.array[0][tuple(index.T)]
    return array


@pytest.mark.parametrize("labelmap", [False, True])
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_written_segmentation_is_read_voxel_for_voxel(tmp_path, name, labelmap):
    folder = write(series(voxels(), ORIENTATIONS[name])[::-1], tmp_path / "case")
    label = some_label(files.read(folder))
    path = tmp_path / "mask.dcm"
    files.write_segmentation(label, path, folder, CLASSES, labelmap)
    found = files.read_label(path, folder)
    np.testing.assert_array_equal(found.array, label.array)
    assert found.same_grid(label)
    other = highdicom.seg.segread(path).get_volume(combine_segments=True)  # another reader
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ other.affine
    found = Volume(np.asarray(other.array)[None].astype(np.int32), affine)
    np.testing.assert_array_equal(put_on(label, found), label.array)


def test_a_segmentation_says_whose_and_of_what_it_is(tmp_path):
    folder = write(series(voxels()), tmp_path / "case")
    files.write_segmentation(
        some_label(files.read(folder)), tmp_path / "mask.dcm", folder, CLASSES
    )  # fmt: skip
    written, source = pydicom.dcmread(tmp_path / "mask.dcm"), pydicom.dcmread(folder / "IM0000")
    for name in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert written[name].value == source[name].value
    assert [item.SegmentLabel for item in written.SegmentSequence] == list(CLASSES[1:])
    assert [item.SegmentNumber for item in written.SegmentSequence] == [1, 2, 3]
    images = written.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {item.ReferencedSOPInstanceUID for item in images} == {
        pydicom.dcmread(path).SOPInstanceUID for path in folder.iterdir()
    }


@pytest.mark.parametrize("labelmap", [False, True])
def test_segmentations_of_multi_frame_files_pictures_and_nothing(tmp_path, labelmap):
    whole = write_file(enhanced(voxels(), [3, 1, 0, 2, 5, 4]), tmp_path / "whole.dcm")
    dataset = header(SOPClassUID=ComputedRadiographyImageStorage, Modality="CR")
    radiograph = write_file(set_pixels(dataset, voxels((1, 8, 10))[0]), tmp_path / "cr.dcm")
    one = write_file(series(voxels((1, 8, 10)))[0], tmp_path / "one.dcm")
    zipped_series = Path(f"{several(tmp_path / 'study')}#5")
    for path in (whole, radiograph, one, zipped_series):
        image = files.read(path)
        empty = image.with_array(np.zeros((1, *image.shape), np.int32))
        for label in (some_label(image), empty):
            files.write_segmentation(label, tmp_path / "mask.dcm", path, CLASSES, labelmap)
            np.testing.assert_array_equal(files.read_label(tmp_path / "mask.dcm", path).array, label.array)


def test_what_cannot_be_written_is_refused_and_leaves_the_old_file(tmp_path):
    folder = write(series(voxels()), tmp_path / "case")
    label = some_label(files.read(folder))
    path = tmp_path / "out" / "mask.dcm"
    files.write_segmentation(label, path, folder, CLASSES)
    before = path.read_bytes()
    for text, volume, image in (
        ("expected the image's grid", Volume(label.array[:, :-1], label.affine), folder),
        ("expected the image's grid", Volume(label.array, np.diag([1.0, 1, 1, 1])), folder),
        ("an image that is not DICOM", label, tmp_path / "x.nii.gz"),
    ):
        with pytest.raises(DataError, match=text):
            files.write_segmentation(volume, path, image, CLASSES)
    slices = series(voxels())
    for dataset in slices:
        dataset.StudyInstanceUID = ""
    with pytest.raises(FileFormatError, match="without StudyInstanceUID.*--format nifti"):
        files.write_segmentation(label, path, write(slices, tmp_path / "anonymous"), CLASSES)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["mask.dcm"]


def segmentation(folder: Path, pixels: np.ndarray, kind: str = "BINARY", numbers: int = 2) -> Dataset:
    """Return a segmentation made by another program, of `(slices, rows, columns[, segments])`."""
    sources = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    code = highdicom.sr.CodedConcept("123037004", "SCT", "Anatomical Structure")
    return highdicom.seg.Segmentation(
        sources, pixels, kind,
        [
            highdicom.seg.SegmentDescription(number, f"{number}", code, code, "MANUAL")
            for number in range(1, numbers + 1)
        ],
        highdicom.UID(), 9, highdicom.UID(), 1, "other", "other", "1", "1",
    )  # fmt: skip


@pytest.fixture
def case(tmp_path: Path) -> Path:
    return write(series(voxels(), ORIENTATIONS["oblique"]), tmp_path / "case")


def read_changed(dataset: Dataset, case: Path, name: str = "label.dcm") -> Volume:
    dataset.save_as(case.parent / name.partition("#")[0], enforce_file_format=True)
    return files.read_label(case.parent / name, case)


def test_fractional_segments_begin_at_one_half(case):
    fractions = np.random.default_rng(0).random((6, 8, 10, 2))
    fractions[..., 1] *= 1 - fractions[..., 0]  # they never add up to more than one
    fractions[..., 0] = np.where(fractions[..., 0] < 0.5, fractions[..., 0], 0.5 + fractions[..., 0] / 4)
    label = read_changed(segmentation(case, fractions, "FRACTIONAL"), case)
    expected = (fractions[..., 0] >= 0.5) + 2 * (np.rint(fractions[..., 1] * 255) / 255 >= 0.5)
    clear = np.abs(fractions - 0.5).min(axis=-1) > 1 / 255
    assert {1, 2} <= set(expected[clear].tolist())
    np.testing.assert_array_equal(label.array[0].transpose(2, 1, 0)[clear], expected[clear])


def test_overlapping_segments_are_refused_and_can_be_read_one_by_one(case):
    pixels = np.zeros((6, 8, 10, 2), np.uint8)
    pixels[1:4, 2:6, 2:6, 0] = pixels[3:5, 4:7, 4:9, 1] = 1
    dataset = segmentation(case, pixels)
    with pytest.raises(LabelError, match=r"segments 1 and 2 overlap.*#1"):
        read_changed(dataset, case)
    for number in (1, 2):
        found = read_changed(dataset, case, f"label.dcm#{number}").array[0].transpose(2, 1, 0)
        np.testing.assert_array_equal(found, pixels[..., number - 1].astype(int) * number)
    with pytest.raises(LabelError, match=r"no segment 3; expected one of 1, 2"):
        read_changed(dataset, case, "label.dcm#1+3")


def test_sparse_frames_in_any_order_are_placed_on_the_image(case):
    pixels = np.zeros((6, 8, 10), np.uint8)
    pixels[[1, 4], 2:5, 3:7] = [[[1]], [[2]]]
    dataset = segmentation(case, pixels)
    assert dataset.NumberOfFrames == 2
    frames = dataset.PerFrameFunctionalGroupsSequence
    stored = dataset.pixel_array
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames[::-1])
    dataset.PixelData = pack_bits(stored[::-1])
    found = read_changed(dataset, case)
    np.testing.assert_array_equal(found.array[0].transpose(2, 1, 0), pixels)


def test_a_segmentation_lies_on_the_nifti_of_its_image_too(case):
    label = some_label(files.read(case))
    files.write_segmentation(label, case.parent / "mask.dcm", case, CLASSES)
    turned = files.read(case).oriented("RAS")
    image = Volume(turned.array.astype(np.int32), turned.affine)
    files.write_label(image, case.parent / "image.nii.gz")
    found = files.read_label(case.parent / "mask.dcm", case.parent / "image.nii.gz")
    np.testing.assert_array_equal(put_on(label, found), label.array)
    assert found.axes == image.axes


def move(dataset: Dataset, by: float) -> None:
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        item = frame.PlanePositionSequence[0]
        row = np.array(dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
                       .ImageOrientationPatient[:3], float)  # fmt: skip
        item.ImagePositionPatient = [
            f"{v:.8g}" for v in np.array(item.ImagePositionPatient, float) + by * row
        ]


@pytest.mark.parametrize(
    ("text", "change"),
    [
        (r"off the image's grid", lambda d: move(d, 0.3)),
        (r"reaches beyond the image", lambda d: move(d, 9.0)),
        (r"another frame of reference", lambda d: setattr(d, "FrameOfReferenceUID", uid("elsewhere"))),
        (r"of unknown type", lambda d: setattr(d, "SegmentationType", "WHATEVER")),
        (r"whole-slide", lambda d: setattr(d, "TotalPixelMatrixRows", 9)),
        (r"a frame of segment 1; expected one of 2", lambda d: d.SegmentSequence.pop(0)),
        (r"frames and the places of", lambda d: d.PerFrameFunctionalGroupsSequence.pop()),
        (r"bytes of pixels", lambda d: setattr(d, "PixelData", d.PixelData[:-4])),
        (r"no pixel data", lambda d: delattr(d, "PixelData")),
        (
            r"off the image's grid",
            lambda d: setattr(
                d.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0], "PixelSpacing", [1.4, 1.8]
            ),
        ),
        (r"not readable as DICOM", lambda d: d.PerFrameFunctionalGroupsSequence[0].clear()),
        (r"expected at most", lambda d: setattr(d, "NumberOfFrames", 2**31 - 1)),
    ],
)  # fmt: skip
def test_a_segmentation_with_a_fault_is_refused(case, text, change):
    pixels = np.zeros((6, 8, 10), np.uint8)
    pixels[1:4, 2:8, 2:9], pixels[4, 2:8, 2:9] = 1, 2
    dataset = segmentation(case, pixels)
    change(dataset)
    with pytest.raises(DataError, match=text) as caught:
        read_changed(dataset, case)
    assert ROOT not in str(caught.value)


def test_a_dicom_label_needs_its_image(case):
    files.write_segmentation(some_label(files.read(case)), case.parent / "mask.dcm", case, CLASSES)
    with pytest.raises(FileFormatError, match="a DICOM label without its image"):
        files.read_label(case.parent / "mask.dcm")
    with pytest.raises(DataError, match="no image series, only SEG"):
        files.read(case.parent / "mask.dcm")


def structure_set(folder: Path, *contours: tuple[int, int, np.ndarray], **more: object) -> Dataset:
    """Return contours (region, slice, points `(N, 2)` as column and row) drawn on a series."""
    sources = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    dataset = header(Modality="RTSTRUCT", SOPClassUID=RTStructureSetStorage, SeriesInstanceUID=uid("rt"))
    regions: dict[int, Dataset] = {}
    for number, index, points in contours:
        source = sources[index]
        row, column = np.reshape(np.array(source.ImageOrientationPatient, float), (2, 3))
        world = np.array(source.ImagePositionPatient, float) + points * [0.9, 0.7] @ np.stack([row, column])
        contour, reference = Dataset(), Dataset()
        contour.ContourGeometricType = "CLOSED_PLANAR"
        contour.ContourData = [f"{v:.6f}" for v in world.ravel()]
        contour.NumberOfContourPoints = len(points)
        reference.ReferencedSOPClassUID = source.SOPClassUID
        reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
        contour.ContourImageSequence = Sequence([reference])
        for name, value in more.items():
            setattr(contour, name, value)
        region = regions.setdefault(number, Dataset())
        region.ReferencedROINumber = number
        region.ContourSequence = Sequence([*region.get("ContourSequence", []), contour])
    dataset.ROIContourSequence = Sequence(regions.values())
    return dataset


def circle(centre: tuple[float, float], radius: float, count: int = 40) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.array(centre) + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def is_inside(point: tuple[float, float], polygon: np.ndarray) -> bool:
    """Sum the angles that the edges are seen at: 0 outside; another rule than the one tested."""
    from_point = polygon - point
    angles = np.arctan2(from_point[:, 1], from_point[:, 0])
    turns = np.diff(np.append(angles, angles[0]))
    return bool(abs(np.sum((turns + np.pi) % (2 * np.pi) - np.pi)) > 1)


def test_contours_are_filled_where_voxel_centres_lie_inside_and_holes_are_left(case):
    outer, hole, other = circle((4.6, 4.2), 3.3), circle((4.6, 4.2), 1.4), circle((2.1, 3.3), 2.01)
    dataset = structure_set(case, (7, 2, outer), (7, 2, hole), (4, 4, other))
    found = read_changed(dataset, case).array[0]
    for x in range(10):
        for y in range(8):
            ring = is_inside((x, y), outer) and not is_inside((x, y), hole)
            assert found[x, y, 2] == (7 if ring else 0)
            assert found[x, y, 4] == (4 if is_inside((x, y), other) else 0)
    assert not found[..., [0, 1, 3, 5]].any()
    assert set(np.unique(found)) == {0, 4, 7}


def test_a_contour_drawn_twice_counts_once_and_crossing_ones_are_refused(case):
    outer, hole, island = circle((4.6, 4.2), 3.3), circle((4.6, 4.2), 2.2), circle((4.6, 4.2), 1.1)
    once = read_changed(structure_set(case, (1, 3, outer)), case).array
    assert once.any()
    twice = structure_set(case, (1, 3, outer), (1, 3, outer))
    np.testing.assert_array_equal(read_changed(twice, case).array, once)
    nested = read_changed(structure_set(case, (1, 3, island), (1, 3, hole), (1, 3, outer)), case).array
    expected = fill_polygon(outer, (10, 8)) & ~fill_polygon(hole, (10, 8)) | fill_polygon(island, (10, 8))
    np.testing.assert_array_equal(nested[0, ..., 3] > 0, expected)
    crossing = (1, 3, circle((3.4, 4), 2.45)), (1, 3, circle((5.6, 4), 2.45))
    with pytest.raises(LabelError, match="contours of region 1 that cross"):
        read_changed(structure_set(case, *crossing), case)
    exclusive = structure_set(case, *crossing, ContourGeometricType="CLOSEDPLANAR_XOR")
    both = [fill_polygon(points, (10, 8)) for _, _, points in crossing]
    np.testing.assert_array_equal(read_changed(exclusive, case).array[0, ..., 3] > 0, both[0] ^ both[1])


def test_polygons_that_share_an_edge_share_no_voxel():
    left = np.array([[0, 0], [4, 0], [4, 6], [0, 6]], float)
    one, two = fill_polygon(left, (12, 8)), fill_polygon(left + [4, 0], (12, 8))
    assert one.sum() == two.sum() == 24
    assert not (one & two).any()
    star = circle((5, 4), 3.5, 5)[[0, 2, 4, 1, 3]]  # crosses itself: its middle counts twice
    assert not fill_polygon(star, (12, 8))[5, 4]


@pytest.mark.parametrize(
    ("text", "contours", "more"),
    [
        ("regions 1 and 2 overlap.*#2", [(1, 2, circle((4, 4), 3)), (2, 2, circle((5, 4), 3))], {}),
        ("lies on no slice", [(1, 2, circle((4, 4), 3))], {"ContourData": list("000914389")}),
        ("reaches beyond the image", [(1, 2, circle((9, 4), 3))], {}),
        ("drawn on other images", [(1, 2, circle((4, 4), 3))], {"ContourImageSequence": "other"}),
        ("has open contours", [(1, 2, circle((4, 4), 3))], {"ContourGeometricType": "OPEN_PLANAR"}),
        ("a contour of 7 numbers", [(1, 2, circle((4, 4), 3))], {"ContourData": ["1"] * 7}),
    ],
)  # fmt: skip
def test_contours_with_a_fault_are_refused(case, text, contours, more):
    if "ContourImageSequence" in more:
        reference = Dataset()
        reference.ReferencedSOPInstanceUID = uid("elsewhere")
        more = {"ContourImageSequence": Sequence([reference])}
    with pytest.raises(DataError, match=text) as caught:
        read_changed(structure_set(case, *contours, **more), case)
    assert ROOT not in str(caught.value)


def test_regions_are_chosen_by_number_and_points_mark_nothing(case):
    dataset = structure_set(case, (1, 2, circle((4, 4), 3)), (2, 2, circle((5, 4), 2)))
    point = structure_set(case, (3, 1, np.array([[3.0, 3.0]])), ContourGeometricType="POINT")
    dataset.ROIContourSequence.append(point.ROIContourSequence[0])
    assert set(np.unique(read_changed(dataset, case, "label.dcm#2").array)) == {0, 2}
    assert set(np.unique(read_changed(dataset, case, "label.dcm#2+3").array)) == {0, 2}
    picture_path = write_file(picture(np.zeros((8, 10, 3), np.uint8)), case.parent / "rgb.dcm")
    with pytest.raises(GeometryError, match="contours for a picture"):
        files.read_label(case.parent / "label.dcm", picture_path)


def dicom_dataset(folder: Path, count: int = 4) -> Path:
    """Write cases of a bright block on noise, each a folder of slices with its segmentation, and a manifest."""
    rows = []
    for number in range(count):
        array = voxels((12, 16, 16), seed=number) // 4
        place = slice(3 + number % 3, 9 + number % 3)
        array[3:9, place, 4:10] += 500
        slices = series(array, ORIENTATIONS["oblique" if number % 2 else "axial"], spacing=(2.0, 2.0, 2.0))
        image = write(slices, folder / f"case{number}")
        volume = files.read(image)
        label = volume.with_array((volume.array > 450).astype(np.int32))
        files.write_segmentation(label, folder / f"label{number}.dcm", image, ("background", "block"))
        rows.append(f"c{number},p{number},north,case{number},label{number}.dcm")
    (folder / "index.csv").write_text("\n".join(["case,patient,domain,image,label", *rows]))
    return folder


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def secrets_in(folder: Path) -> list[str]:
    """Return the files other than DICOM in which something of a patient stands."""
    texts = (*SECRETS, ROOT)
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".dcm"]
    return [path.name for path in found if any(text.encode() in path.read_bytes() for text in texts)]


@pytest.mark.slow
def test_a_dicom_dataset_from_check_to_report(tmp_path):
    data = dicom_dataset(tmp_path / "data")
    assert not [problem for problem in check_dataset(data) if problem.severity == "error"]
    case = open_dataset(data).cases[1]
    assert case.label().same_grid(case.image())
    said = call(
        "train", data, "--output", tmp_path / "run", "--preset", "baseline",
        *[f"--set={s}" for s in ("network.width=4", "network.depth=2", "plan.patch_size=[16, 16, 8]",
          "train.batch_size=1", "train.threads=1", "train.precision=32-true", "train.steps=15",
          "train.learning_rate=0.01", "predict.flips=false", "judge.shifted_copies=0", "plan.dimension=3d")],
    )  # fmt: skip
    scores = []
    for kind, suffix in (("auto", ".nii.gz"), ("dicom_seg", ".dcm"), ("dicom_seg_labelmap", ".dcm")):
        out = tmp_path / "out"  # one after the other in one folder: the mask of another kind goes
        options = ("--include-training", "--format", kind)
        said += call("predict", tmp_path / "run", data, "--output", out, *options)
        assert sorted(p.name for p in out.glob("c*")) == [f"c{n}{suffix}" for n in range(4)]
        assert "4 were there already" in call("predict", tmp_path / "run", data, "--output", out, *options)
        if suffix == ".dcm":
            assert pydicom.dcmread(out / "c0.dcm").SegmentSequence[-1].SegmentLabel == "class_1"
        said += call("evaluate", out, data) + call("report", out, "--output", tmp_path / "report.html")
        scores.append(json.loads((out / "summary.json").read_text())["foreground_mean"])
    assert scores[0] == scores[1] == scores[2]
    assert "cannot be read" not in (tmp_path / "report.html").read_text()
    assert not [*secrets_in(tmp_path / "out"), *secrets_in(tmp_path / "run")]
    assert not [text for text in (*SECRETS, ROOT) if text in (tmp_path / "report.html").read_text()]
    refused = CliRunner().invoke(
        app, ["predict", *map(str, (tmp_path / "run", data)), "--output", "x", "--format", "y"]
    )
    assert isinstance(refused.exception, ConfigError)
    assert not [text for text in (*SECRETS, ROOT) if text in said]
    assert '"mm"' in call("info", data / "case0", "--json")


@real
@pytest.mark.data
@pytest.mark.parametrize(
    ("label", "image", "expected"),
    [
        ("liver.dcm", "ct-3slice", "liver_seg.nrrd"),
        ("partial_overlaps.dcm#1+4+5", "ct-3slice", "partial_overlaps-1.nrrd"),
        ("partial_overlaps.dcm#2", "ct-3slice", "partial_overlaps-2.nrrd"),
        ("partial_overlaps.dcm#3", "ct-3slice", "partial_overlaps-3.nrrd"),
        ("sparse-labelmap-noppv.dcm", "24x38x3/image", "sparse_labelmap_noppv_seg.nrrd"),
        ("24x38x3/seg", "24x38x3/image", "24x38x3/nrrd/label.nrrd"),
        ("24x38x3/seg", "24x38x3/multiframe", "24x38x3/nrrd/label.nrrd"),
        ("23x38x3/seg", "23x38x3/image", "23x38x3/nrrd/label.nrrd"),
        ("23x38x3/seg", "23x38x3/multiframe", "23x38x3/nrrd/label.nrrd"),
    ],
)
def test_real_segmentations_equal_what_another_program_made_of_them(label, image, expected):
    sitk = pytest.importorskip("SimpleITK")
    folder = SHARED / "dcmqi_ct3_liver_seg"
    found = files.read_label(folder / label, folder / image)
    other = sitk.ReadImage(str(folder / expected))
    np.testing.assert_array_equal(found.array[0], sitk.GetArrayFromImage(other).T)
    origin = np.array(other.GetOrigin()) * [-1, -1, 1]
    np.testing.assert_allclose(found.affine[:3, 3], origin, atol=1e-3)


@real
@pytest.mark.data
def test_the_padding_of_a_real_labelmap_is_background():
    folder = SHARED / "dcmqi_ct3_liver_seg"
    names = ("sparse-labelmap-ppv5.dcm", "sparse-labelmap-noppv.dcm")
    one, other = (files.read_label(folder / name, folder / "24x38x3" / "image") for name in names)
    np.testing.assert_array_equal(one.array, other.array)


@real
@pytest.mark.data
def test_real_labels_of_other_images_and_overlaps_are_refused():
    folder = SHARED / "dcmqi_ct3_liver_seg"
    with pytest.raises(LabelError, match="segments 1 and 2 overlap"):
        files.read_label(folder / "partial_overlaps.dcm", folder / "ct-3slice")
    with pytest.raises(GeometryError, match="another frame of reference"):
        files.read_label(folder / "liver.dcm", folder / "24x38x3" / "image")
    scans = SHARED / "rt_utils_rtstruct"
    for name in ("invalid_reference_rt.dcm", "non_existent_reference_rt.dcm"):
        with pytest.raises(GeometryError, match="drawn on other images"):
            files.read_label(scans / name, scans)


@real
@pytest.mark.data
def test_real_contours_enclose_the_voxels_that_lie_inside():
    scans = SHARED / "rt_utils_rtstruct"
    found = files.read_label(scans / "rt.dcm", scans)
    contours = pydicom.dcmread(scans / "rt.dcm").ROIContourSequence[0].ContourSequence
    polygons = [np.reshape(np.array(contour.ContourData, float), (-1, 3))[:, :2] for contour in contours]
    index = np.argwhere(np.ones(found.shape[:2], bool))
    centres = -(np.c_[index, np.zeros(len(index)), np.ones(len(index))] @ found.affine[:2].T)
    corners = np.concatenate(polygons)
    near = ((centres >= corners.min(0)) & (centres <= corners.max(0))).all(1)  # only these can lie inside
    inside = [np.array([is_inside(tuple(c), polygon) for c in centres[near]]) for polygon in polygons]
    expected = np.zeros(len(centres), bool)
    expected[near] = np.logical_xor.reduce(inside)
    expected = expected.reshape(found.shape[:2])
    differing = (found.array[0, :, :, 0] > 0) != expected
    assert expected.sum() > 1000
    assert differing.sum() < 0.1 * expected.sum()  # centres on the very line may go either way
    assert not found.array[..., 1].any()
