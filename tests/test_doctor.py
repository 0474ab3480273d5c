"""The check beside a table of planted faults, and beside clean datasets of all kinds."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from anysite.data.check import RULES, check_dataset, inspect_dataset, require_sound
from anysite.data.check.copies import compare
from anysite.data.check.likeness import describe
from anysite.data.layouts import open_dataset
from anysite.errors import DataError, FaultyDataError
from planted import Planted, draw, make, scaled, write

Plant = Callable[[Planted], None]
FAULTS: dict[str, tuple[str, set[str], Plant]] = {}

BASES = {
    "2-D": {},
    "colour": {"channels": 3},
    "binary": {"classes": 1, "values": (0, 255)},
    "3-D": {"kind": "float", "shape": (20, 22, 18)},
    "CT": {"kind": "ct", "shape": (20, 22, 18)},
    "channels": {"kind": "float", "shape": (20, 22, 18), "channels": 2},
    "visits": {"patients": 4, "visits": 2, "sites": ("north", "east")},
}


def fault(base: str, *rules: str) -> Callable[[Plant], Plant]:
    """List a function as one that plants a fault, which exactly these rules must find."""

    def add(plant: Plant) -> Plant:
        FAULTS[plant.__name__] = base, set(rules), plant
        return plant

    return add


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Planted]:
    root = tmp_path_factory.mktemp("bases")
    return {name: make(root / name, **options) for name, options in BASES.items()}


def test_the_table_is_long_enough() -> None:
    assert len(FAULTS) >= 60


def test_every_rule_has_a_planted_fault() -> None:
    assert {rule for _, rules, _ in FAULTS.values() for rule in rules} == set(RULES)


@pytest.mark.parametrize("name", BASES)
def test_the_bases_are_clean(bases: dict[str, Planted], name: str) -> None:
    assert check_dataset(bases[name].folder) == []


# Files


@fault("2-D", "missing file")
def image_missing(data: Planted) -> None:
    data.path(3).unlink()


@fault("2-D", "missing file")
def label_missing(data: Planted) -> None:
    data.path(3, "label").unlink()


@fault("2-D", "missing file")
def name_too_long_for_a_file(data: Planted) -> None:
    data.rename(3, "a" * 5000)


@fault("2-D", "missing file")
def name_with_a_null_byte(data: Planted) -> None:
    data.rename(3, "a\0.png")


@fault("2-D", "unreadable file")
def picture_cut_short(data: Planted) -> None:
    data.path(3).write_bytes(data.path(3).read_bytes()[:-400])


@fault("2-D", "unreadable file")
def picture_without_a_byte(data: Planted) -> None:
    data.path(3).write_bytes(b"")


@fault("2-D", "unreadable file")
def text_named_picture(data: Planted) -> None:
    data.path(3).write_text("not a picture")


@fault("2-D", "unreadable file")
def unknown_format(data: Planted) -> None:
    data.path(3).rename(data.folder / "image.xyz")
    data.rename(3, "image.xyz")


@fault("3-D", "unreadable file")
def volume_cut_short(data: Planted) -> None:
    data.path(3).write_bytes(data.path(3).read_bytes()[:-300])


@fault("3-D", "unreadable file")
def label_volume_cut_short(data: Planted) -> None:
    data.path(3, "label").write_bytes(data.path(3, "label").read_bytes()[:40])


@fault("3-D", "unreadable file")
def volume_shorter_than_its_header_says(data: Planted) -> None:
    nibabel.Nifti1Image(data.read(3), data.affine(3)).to_filename(data.folder / "cut.nii")
    (data.folder / "cut.nii").write_bytes((data.folder / "cut.nii").read_bytes()[:-4])
    data.rename(3, "cut.nii")


@fault("3-D", "non-finite values")
def not_a_number(data: Planted) -> None:
    array = data.read(3).copy()
    array[2, 3, 4] = np.nan
    data.put(3, array)


@fault("3-D", "non-finite values")
def infinite(data: Planted) -> None:
    array = data.read(3).copy()
    array[2] = -np.inf
    data.put(3, array)


@fault("3-D", "non-finite values")
def lowest_number_for_no_data(data: Planted) -> None:
    array = data.read(3).astype(np.float32)
    array[2] = np.finfo(np.float32).min
    data.put(3, array)


@fault("3-D", "unusable geometry")
def spacing_of_zero(data: Planted) -> None:
    image = nibabel.Nifti1Image(data.read(3), None)
    image.header.set_sform(np.diag([1.0, 0.0, 2.0, 1.0]), code=1)
    image.to_filename(data.path(3))


@fault("3-D", "unusable geometry")
def affine_not_a_number(data: Planted) -> None:
    affine = data.affine(3)
    affine[0, 3] = np.nan
    image = nibabel.Nifti1Image(data.read(3), None)
    image.header.set_sform(affine, code=1)
    image.to_filename(data.path(3))


# Layouts


@fault("2-D", "contradictory layout")
def two_cases_of_one_name(data: Planted) -> None:
    data.row(3)["case"] = data.row(4)["case"]
    data.save()


@fault("2-D", "contradictory layout")
def column_misspelt(data: Planted) -> None:
    text = (data.folder / "index.csv").read_text()
    (data.folder / "index.csv").write_text(text.replace("image", "picture", 1))


@fault("2-D", "contradictory layout")
def declaration_garbled(data: Planted) -> None:
    (data.folder / "dataset.json").write_text('{"labels": ')


@fault("2-D", "contradictory layout")
def masks_without_images(data: Planted) -> None:
    (data.folder / "index.csv").unlink()
    for row in data.rows:  # names of images and masks must agree in folders
        (data.folder / row["image"]).rename(data.folder / row["image"].replace("_0.png", ".png"))
    shutil.copy(data.path(3, "label"), data.path(3, "label").with_name("other.png"))


@fault("2-D", "contradictory layout")
def site_missing_in_a_line(data: Planted) -> None:
    data.row(3)["domain"] = ""
    data.save()


# Geometry


@fault("2-D", "channel count")
def colour_among_grey(data: Planted) -> None:
    data.put(3, np.repeat(data.read(3)[..., None], 3, -1))


@fault("2-D", "channel count")
def site_of_colour(data: Planted) -> None:
    for case in range(5):
        data.put(case, np.repeat(data.read(case)[..., None], 3, -1))


@fault("channels", "channel count")
def channel_not_listed(data: Planted) -> None:
    data.rename(3, "", "image_1")


@fault("3-D", "2-D and 3-D mixed")
def picture_among_volumes(data: Planted) -> None:
    signal, label = draw(np.random.default_rng(5), (40, 44), 2)
    write(data.folder / "flat.png", scaled(signal, "8-bit"))
    write(data.folder / "flat_label.png", label)
    data.rename(3, "flat.png")
    data.rename(3, "flat_label.png", "label")


@fault("channels", "channels on different grids")
def channel_of_another_shape(data: Planted) -> None:
    data.put(3, data.read(3, "image_1")[:, :-2], "image_1")


@fault("channels", "channels on different grids")
def channel_elsewhere(data: Planted) -> None:
    affine = data.affine(3, "image_1")
    affine[1, 3] += 10
    data.put(3, data.read(3, "image_1"), "image_1", affine)


@fault("2-D", "image and label on different grids")
def label_of_another_shape(data: Planted) -> None:
    data.put(3, data.read(3, "label")[:, 2:], "label")


@fault("3-D", "image and label on different grids")
def label_elsewhere(data: Planted) -> None:
    affine = data.affine(3)
    affine[:3, 3] += 1
    data.put(3, data.read(3, "label"), "label", affine)


@fault("3-D", "image and label on different grids")
def label_mirrored_in_its_header(data: Planted) -> None:
    data.put(3, data.read(3, "label"), "label", np.diag([-1.0, 1.0, 2.0, 1.0]))


@fault("3-D", "image and label on different grids")
def label_of_another_spacing(data: Planted) -> None:
    data.put(3, data.read(3, "label"), "label", np.diag([1.0, 1.0, 2.5, 1.0]))


@fault("2-D", "tiny image")
def image_of_few_pixels(data: Planted) -> None:
    data.put(3, data.read(3)[28:34, 14:50])
    data.put(3, data.read(3, "label")[28:34, 14:50], "label")


def _respaced(data: Planted, *spacing: float, cases: tuple[int, ...] = (3,)) -> None:
    for case in cases:
        for column in ("image", "label"):
            data.put(case, data.read(case, column), column, np.diag([*spacing, 1.0]))


@fault("3-D", "spacing outlier")
def slices_four_times_as_thick(data: Planted) -> None:
    _respaced(data, 1, 1, 8)


@fault("3-D", "spacing outlier", "implausible spacing")
def spacing_in_metres(data: Planted) -> None:
    _respaced(data, 0.001, 0.001, 0.002)


@fault("3-D", "implausible spacing")
def site_in_metres(data: Planted) -> None:
    _respaced(data, 0.001, 0.001, 0.002, cases=tuple(range(5)))


@fault("3-D", "implausible spacing", "spacing outlier")
def spacing_of_a_hundred(data: Planted) -> None:
    _respaced(data, 1, 1, 100)


@fault("3-D", "slice axis")
def axes_swapped_in_the_header(data: Planted) -> None:
    _respaced(data, 2, 1, 1)


@fault("3-D", "orientation")
def turned_upside_down_in_the_header(data: Planted) -> None:
    _respaced(data, -1, -1, 2)


@fault("3-D", "extent outlier")
def slices_missing(data: Planted) -> None:
    for column in ("image", "label"):
        data.put(3, data.read(3, column)[..., 8:11], column)


# Intensities


@fault("2-D", "constant image")
def black_image(data: Planted) -> None:
    data.put(3, np.zeros_like(data.read(3)))


@fault("3-D", "constant image")
def volume_of_one_value(data: Planted) -> None:
    data.put(3, np.full_like(data.read(3), 7))


@fault("colour", "constant channel")
def channel_of_one_value(data: Planted) -> None:
    array = data.read(3).copy()
    array[..., 1] = 0
    data.put(3, array)


@fault("2-D", "nearly constant image")
def image_of_three_bright_pixels(data: Planted) -> None:
    array = np.zeros_like(data.read(3))
    array[20, 20:23] = 200
    data.put(3, array)


@fault("3-D", "extreme voxels")
def voxel_far_beyond_the_others(data: Planted) -> None:
    array = data.read(3).copy()
    array[0, 0, 0] = 1e8
    data.put(3, array)


@fault("2-D", "saturated image")
def overexposed(data: Planted) -> None:
    array = data.read(3).astype(float)
    data.put(3, np.clip(array * 255 / np.quantile(array, 0.7), 0, 255).astype(np.uint8))


@fault("CT", "saturated image")
def window_too_narrow(data: Planted) -> None:
    array = data.read(3)
    data.put(3, np.minimum(array, np.quantile(array, 0.75)).astype(np.int16))


@fault("3-D", "intensity scale")
def divided_by_255(data: Planted) -> None:
    data.put(3, data.read(3) / 255)


@fault("3-D", "intensity scale")
def multiplied_by_a_thousand(data: Planted) -> None:
    data.put(3, data.read(3) * 1000)


@fault("3-D", "intensity scale")
def exported_as_8_bit(data: Planted) -> None:
    for case in range(15):
        data.put(case, data.read(case) * 4)
    array = data.read(3)
    data.put(3, np.rint(255 * (array - array.min()) / np.ptp(array)).astype(np.uint8))


@fault("CT", "missing Hounsfield offset")
def stored_values_without_intercept(data: Planted) -> None:
    data.put(3, (data.read(3) + 1100).astype(np.int16))


@fault("CT", "missing Hounsfield offset")
def site_without_intercept(data: Planted) -> None:
    for case in range(5):
        data.put(case, np.maximum(data.read(case) + 1024, 0).astype(np.int16))


@fault("CT", "missing Hounsfield offset")
def ct_as_8_bit(data: Planted) -> None:
    array = data.read(3).astype(float)
    data.put(3, np.rint(255 * (array - array.min()) / np.ptp(array)).astype(np.uint8))


@fault("2-D", "inverted intensities")
def dark_is_bright(data: Planted) -> None:
    data.put(3, 255 - data.read(3))


@fault("3-D", "inverted intensities")
def dark_is_bright_in_a_volume(data: Planted) -> None:
    data.put(3, 900 - data.read(3))


@fault("colour", "channel order")
def blue_first(data: Planted) -> None:
    data.put(3, data.read(3)[..., ::-1].copy())


@fault("colour", "channel order")
def red_and_green_swapped(data: Planted) -> None:
    data.put(3, data.read(3)[..., [1, 0, 2]].copy())


@fault("channels", "channel order")
def channel_files_swapped(data: Planted) -> None:
    row = data.row(3)
    row["image"], row["image_1"] = row["image_1"], row["image"]
    data.save()


# Labels


def _relabel(data: Planted, old: int, new: int) -> None:
    label = data.read(3, "label")
    data.put(3, np.where(label == old, new, label).astype(np.uint8), "label")


@fault("2-D", "label values")
def value_of_no_class(data: Planted) -> None:
    _relabel(data, 2, 9)


@fault("2-D", "label values")
def odd_value_without_declaration(data: Planted) -> None:
    (data.folder / "dataset.json").unlink()
    _relabel(data, 2, 200)


@fault("2-D", "undeclared classes")
def values_far_apart_without_declaration(data: Planted) -> None:
    (data.folder / "dataset.json").unlink()
    for case in range(15):
        data.put(case, data.read(case, "label") * np.uint8(90), "label")


@fault("3-D", "label values")
def label_of_fractions(data: Planted) -> None:
    data.put(3, ndimage.gaussian_filter(data.read(3, "label").astype(np.float32), 1), "label")


@fault("3-D", "label values")
def negative_label(data: Planted) -> None:
    data.put(3, -data.read(3, "label").astype(np.int16), "label")


@fault("2-D", "label values")
def label_in_colours(data: Planted) -> None:
    label = data.read(3, "label").astype(np.uint8)
    data.put(3, np.stack([label, 0 * label, 2 * label], -1), "label")


@fault("binary", "grey label")
def label_with_smoothed_edges(data: Planted) -> None:
    data.put(3, ndimage.gaussian_filter(data.read(3, "label").astype(float), 1).astype(np.uint8), "label")


@fault("2-D", "grey label")
def other_image_as_label(data: Planted) -> None:
    data.put(3, data.read(4), "label")


@fault("2-D", "label is the image")
def image_named_as_label(data: Planted) -> None:
    data.rename(3, data.row(3)["image"], "label")


@fault("2-D", "label is the image")
def image_copied_as_label(data: Planted) -> None:
    data.put(3, data.read(3), "label")


@fault("2-D", "no label")
def no_label_listed(data: Planted) -> None:
    data.rename(3, "", "label")


@fault("2-D", "empty label")
def label_of_background(data: Planted) -> None:
    data.put(3, np.zeros((56, 64), np.uint8), "label")


@fault("2-D", "lossy label")
def label_as_jpeg(data: Planted) -> None:
    label = np.zeros((56, 64), np.uint8)
    label[16:40, 16:40] = 1
    Image.fromarray(label).save(data.folder / "label.jpg", quality=100)
    data.rename(3, "label.jpg", "label")


@fault("2-D", "class never present")
def class_missing_at_a_site(data: Planted) -> None:
    for case in range(5):
        data.put(case, np.minimum(data.read(case, "label"), 1).astype(np.uint8), "label")


@fault("2-D", "class never present")
def class_declared_that_nobody_drew(data: Planted) -> None:
    (data.folder / "dataset.json").write_text('{"labels": {"background": 0, "a": 1, "b": 2, "c": 3}}')


@fault("2-D", "identical labels")
def label_of_another_case(data: Planted) -> None:
    shutil.copy(data.path(7, "label"), data.path(3, "label"))


@fault("2-D", "identical labels")
def label_file_listed_twice(data: Planted) -> None:
    data.rename(3, data.row(7)["label"], "label")


@fault("2-D", "full label")
def label_everywhere(data: Planted) -> None:
    data.put(3, np.ones((56, 64), np.uint8), "label")


@fault("binary", "inverted label")
def foreground_and_background_swapped(data: Planted) -> None:
    data.put(3, (255 - data.read(3, "label")).astype(np.uint8), "label")


@fault("3-D", "inverted label")
def foreground_and_background_swapped_in_a_volume(data: Planted) -> None:
    data.put(3, (data.read(3, "label") == 0).astype(np.uint8), "label")


@fault("2-D", "tiny islands")
def specks_in_a_corner(data: Planted) -> None:
    label = data.read(3, "label").copy().astype(np.uint8)
    label[2, 2:4] = label[-3, -3] = 1
    data.put(3, label, "label")


@fault("3-D", "tiny islands")
def voxel_in_a_corner(data: Planted) -> None:
    label = data.read(3, "label").copy().astype(np.uint8)
    label[0, 0, 0] = 1
    data.put(3, label, "label")


# Copies: case 3 of the site north becomes case 12 of the site south in another form


@fault("2-D", "identical images")
def same_file_of_two_patients(data: Planted) -> None:
    shutil.copy(data.path(12), data.path(3))


@fault("2-D", "identical images")
def same_file_listed_twice(data: Planted) -> None:
    data.rename(3, data.row(12)["image"])


@fault("visits", "identical images")
def same_file_of_one_patient(data: Planted) -> None:
    shutil.copy(data.path(2), data.path(3))


@fault("3-D", "identical images")
def same_volume_compressed_or_not(data: Planted) -> None:
    nibabel.Nifti1Image(data.read(12), data.affine(12)).to_filename(data.folder / "copy.nii")
    data.rename(3, "copy.nii")


def _copy(data: Planted, change: Callable[[np.ndarray], np.ndarray]) -> None:
    image, label = change(data.read(12)), data.read(12, "label").astype(np.uint8)
    data.put(3, np.ascontiguousarray(image))
    if label.shape != image.shape[: label.ndim]:
        label = np.zeros(image.shape[: label.ndim], np.uint8)
        label[tuple(slice(n // 3, 2 * n // 3) for n in label.shape)] = 1
        label[tuple(slice(n // 3, n // 2) for n in label.shape)] = 2
    else:
        label = np.roll(label, 1, 0)
    data.put(3, label, "label")


@fault("2-D", "nearly identical images")
def copy_through_jpeg(data: Planted) -> None:
    buffer = io.BytesIO()
    Image.fromarray(data.read(12)).save(buffer, "JPEG", quality=80)
    _copy(data, lambda _: np.array(Image.open(buffer)))


@fault("2-D", "nearly identical images")
def copy_mirrored(data: Planted) -> None:
    _copy(data, lambda image: image[:, ::-1])


@fault("2-D", "nearly identical images")
def copy_turned(data: Planted) -> None:
    _copy(data, lambda image: np.rot90(image))


@fault("2-D", "nearly identical images")
def copy_enlarged(data: Planted) -> None:
    _copy(data, lambda image: np.array(Image.fromarray(image).resize((150, 130))))


@fault("2-D", "nearly identical images")
def copy_with_a_frame(data: Planted) -> None:
    _copy(data, lambda image: np.pad(image, ((9, 20), (3, 14))))


@fault("2-D", "nearly identical images")
def copy_cropped(data: Planted) -> None:
    _copy(data, lambda image: image[3:51, 2:58])


@fault("2-D", "nearly identical images")
def copy_in_another_window(data: Planted) -> None:
    _copy(data, lambda image: np.clip(0.9 * (image.astype(float) - 10), 0, 160).astype(np.uint8))


@fault("2-D", "nearly identical images")
def copy_with_noise(data: Planted) -> None:
    noise = np.random.default_rng(0).normal(0, 3, (56, 64))
    _copy(data, lambda image: np.clip(image + noise, 0, 255).astype(np.uint8))


@fault("colour", "nearly identical images")
def copy_in_colour(data: Planted) -> None:
    _copy(data, lambda image: (0.9 * image).astype(np.uint8))


@fault("3-D", "nearly identical images")
def volume_mirrored(data: Planted) -> None:
    _copy(data, lambda image: image[::-1])


@fault("3-D", "nearly identical images")
def volume_in_other_values(data: Planted) -> None:
    _copy(data, lambda image: np.rint(1.3 * image + 40).astype(np.int16))


@fault("3-D", "nearly identical images")
def volume_with_a_frame(data: Planted) -> None:
    _copy(data, lambda image: np.pad(image, ((3, 1), (2, 6), (1, 2))))


# Patients, sites, splits


@fault("2-D", "patient at several sites")
def patient_at_two_sites(data: Planted) -> None:
    data.row(3)["patient"] = data.row(12)["patient"]
    data.save()


@fault("2-D", "too few patients")
def site_of_one_patient(data: Planted) -> None:
    for row in data.rows[:5]:
        row["patient"] = "one"
    data.save()


@fault("visits", "patients unknown")
def visits_without_patients(data: Planted) -> None:
    for row in data.rows:
        del row["patient"]
    data.save()


@fault("2-D", "patients unknown")
def eyes_without_patients(data: Planted) -> None:
    for number, row in enumerate(data.rows):
        row["case"] = f"{row['domain']}{number // 2:02d}_{'LR'[number % 2]}"
        del row["patient"]
    data.save()


@fault("2-D", "patients unknown")
def slices_without_patients(data: Planted) -> None:
    for number, row in enumerate(data.rows):
        row["case"] = f"vol{number // 3:02d}_{number % 3:04d}"
        del row["patient"]
    data.save()


@fault("2-D", "site unknown")
def no_column_of_sites(data: Planted) -> None:
    for row in data.rows:
        del row["domain"]
    data.save()


@fault("visits", "patient in two splits")
def fold_that_parts_a_patient(data: Planted) -> None:
    cases = [row["case"] for row in data.rows]
    (data.folder / "splits_final.json").write_text(json.dumps([{"train": cases[1:], "val": cases[:1]}]))


@fault("visits", "patient in two splits")
def column_that_parts_a_patient(data: Planted) -> None:
    for number, row in enumerate(data.rows):
        row["split"] = "test" if number == 3 else "train"
    data.save()


@fault("2-D", "unknown case in splits")
def fold_of_other_cases(data: Planted) -> None:
    (data.folder / "splits_final.json").write_text('[{"train": ["north-p00"], "val": ["elsewhere"]}]')


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(
    bases: dict[str, Planted], tmp_path: Path, name: str
) -> None:
    base, rules, plant = FAULTS[name]
    source = bases[base]
    shutil.copytree(source.folder, tmp_path / base)
    plant(Planted(tmp_path / base, [dict(row) for row in source.rows]))
    problems = inspect_dataset(tmp_path / base, threads=1).problems
    assert {problem.rule for problem in problems} == rules, problems
    assert all(problem.observed and problem.expected and problem.fix for problem in problems)


# Clean datasets: not a word about them


CLEAN = 100
NAMES = ("north", "east", "south", "west")


def write_clean(folder: Path, number: int) -> Path:
    """Write the dataset of a number: layouts, sizes, kinds of values, sites and classes vary."""
    rng = np.random.default_rng(number)
    flat = number % 2 == 0
    size = (int(rng.integers(40, 90)), int(rng.integers(40, 90)))
    data = make(
        folder,
        kind=("8-bit", "16-bit")[number // 2 % 2] if flat else ("float", "ct", "16-bit")[number // 2 % 3],
        shape=size if flat else (*(int(n) for n in rng.integers(18, 30, 2)), int(rng.integers(8, 24))),
        classes=int(rng.integers(1, 5)),
        channels=(1, 3)[number // 4 % 2]
        if flat and number // 2 % 2 == 0
        else 1 + (not flat and number % 3 == 0),
        sites=NAMES[: int(rng.integers(1, 5))],
        patients=int(rng.integers(2, 7)),
        visits=1 + number % 3 // 2,
        spacing=tuple(float(s) for s in rng.uniform(0.5, 5.0, 3)),
        seed=number,
    )
    layout = ("csv", "folders", "nnU-Net")[number // 5 % 3]
    if layout == "nnU-Net":
        as_nnunet(data)
    elif layout == "folders" and "image_1" not in data.row(0) and number % 3 != 2:
        (folder / "index.csv").unlink()
        for row in data.rows:
            (folder / row["image"]).rename(folder / re.sub(r"_0\.", ".", row["image"]))
        if len({row["domain"] for row in data.rows}) == 1:
            (folder / "dataset.json").unlink()
    return folder


def as_nnunet(data: Planted) -> None:
    """Move the files to where nnU-Net wants them, with a patient column nowhere and sites in a mapping."""
    sites: dict[str, list[str]] = {}
    for number, row in enumerate(data.rows):
        name = f"case{number:03d}"
        sites.setdefault(row["domain"], []).append(name)
        for column, folder in (("image", "imagesTr"), ("image_1", "imagesTr"), ("label", "labelsTr")):
            if column in row:
                source = data.folder / row[column]
                channel = "" if column == "label" else f"_000{column.removeprefix('image').strip('_') or 0}"
                target = data.folder / folder / (name + channel + "".join(source.suffixes))
                target.parent.mkdir(exist_ok=True)
                source.rename(target)
    (data.folder / "index.csv").unlink()
    (data.folder / "domain_mapping.json").write_text(json.dumps(sites))


@pytest.mark.parametrize("number", range(20))
def test_clean_datasets_raise_no_alarm(tmp_path: Path, number: int) -> None:
    assert check_dataset(write_clean(tmp_path / "data", number)) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20, CLEAN))
def test_more_clean_datasets_raise_no_alarm(tmp_path: Path, number: int) -> None:
    assert check_dataset(write_clean(tmp_path / "data", number)) == []


def test_among_ten_thousand_unrelated_pairs_none_is_called_a_copy() -> None:
    rng = np.random.default_rng(0)
    for shape, count in (((48, 52), 150), ((18, 20, 16), 40)):
        likenesses = [describe(draw(rng, shape, 2)[0]) for _ in range(count)]
        known = [likeness for likeness in likenesses if likeness is not None]
        assert len(known) == count
        assert compare(known, np.eye(count, dtype=bool)) == {}


# The whole of a check


def test_sites_are_ranked_by_how_much_they_differ(bases: dict[str, Planted], tmp_path: Path) -> None:
    shutil.copytree(bases["2-D"].folder, tmp_path / "data")
    data = Planted(tmp_path / "data", [dict(row) for row in bases["2-D"].rows])
    for case in range(5, 10):
        data.put(case, (255 * (data.read(case) / 255.0) ** 3).astype(np.uint8))
    (shift,) = inspect_dataset(data.folder).shift
    assert shift.sites[0].domain == "east"
    matrix = np.array(shift.intensity)
    assert matrix[0, 1:].min() > 2 * matrix[1, 2]
    np.testing.assert_array_equal(matrix, matrix.T)
    assert [site.distance for site in shift.sites] == sorted((s.distance for s in shift.sites), reverse=True)
    assert all(sum(site.histogram) == pytest.approx(1, abs=0.01) for site in shift.sites)
    json.dumps(dataclasses.asdict(inspect_dataset(data.folder)))


def test_one_site_differs_from_none(bases: dict[str, Planted]) -> None:
    dataset = open_dataset(bases["2-D"].folder)
    alone = dataset.with_cases(case for case in dataset.cases if case.domain == "east")
    assert inspect_dataset(alone).shift == ()


def test_what_is_no_dataset_at_all_is_misuse(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(DataError):
            inspect_dataset(path)


def test_training_refuses_all_errors_at_once_and_reads_no_test_site(
    bases: dict[str, Planted], tmp_path: Path
) -> None:
    shutil.copytree(bases["2-D"].folder, tmp_path / "data")
    data = Planted(tmp_path / "data", [dict(row) for row in bases["2-D"].rows])
    dataset = open_dataset(data.folder)
    require_sound(dataset)
    data.path(0).unlink()
    data.put(1, np.zeros_like(data.read(1)))
    _relabel(data, 2, 9)
    with pytest.raises(FaultyDataError) as raised:
        require_sound(dataset)
    assert len(raised.value.faults) == 3
    for fault, words in zip(
        raised.value.faults,
        ("p00_0.png: no such file", "every voxel is 0", "value 9; expected only 0, 1, 2"),
        strict=True,
    ):
        assert words in fault
    require_sound(dataset.leave_out(["north"])[0])


def test_the_rules_are_all_in_the_docs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([^|]+) \| (error|warning)[^|]* \|", page, re.MULTILINE)
    assert dict(listed) == RULES
