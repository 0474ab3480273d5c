"""The phantom: its files, its anatomy, its geometry, and how its sites differ."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from nibabel.orientations import aff2axcodes
from scipy import ndimage

from anysite.atomic import sha256
from anysite.data import files
from anysite.data.phantom import LABELS, Anatomy, examine, write_phantom
from anysite.data.phantom_sites import DEFAULT_SIZE, SITES, TISSUES, acquire, block_means, grid
from anysite.data.volume import Volume
from anysite.errors import ConfigError

SHELL, CAVITY, CRESCENT, NODULE = (LABELS[name] for name in ("shell", "cavity", "crescent", "nodule"))


def hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "index.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def cases_of(folder: Path) -> list[tuple[str, Volume, np.ndarray]]:
    return [
        (row["domain"], files.read(folder / row["image"]), files.read_label(folder / row["label"]).array[0])
        for row in rows_of(folder)
    ]


def grown(label: np.ndarray, index: int) -> set[int]:
    """The classes in a structure and one voxel around it."""
    return set(np.unique(label[np.asarray(ndimage.binary_dilation(label == index), bool)]).tolist())


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("flat"), size=64, patients_per_site=7)


@pytest.fixture(scope="module")
def solid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("solid"), dimension=3, patients_per_site=1)


@pytest.mark.parametrize(("dimension", "size"), [(2, 32), (3, 24)])
def test_same_seed_same_bytes_and_a_selection_is_a_subset(tmp_path: Path, dimension: int, size: int) -> None:
    def written(name: str, **arguments: object) -> dict[str, str]:
        settings = {"dimension": dimension, "size": size, "patients_per_site": 3, "sites": ("east", "west")}
        return hashes(write_phantom(tmp_path / name, **(settings | arguments)))  # pyright: ignore[reportArgumentType]

    first = written("first")
    assert written("again") == first
    fewer = written("fewer", sites=("west",), patients_per_site=2)
    assert fewer.pop("index.csv") != first["index.csv"]
    assert fewer.items() <= first.items()
    other = written("other", seed=1)
    images = [name for name in first if "images" in name]
    assert len(images) == 8
    assert all(other[name] != first[name] for name in images)


def test_an_interrupted_phantom_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hashes(write_phantom(tmp_path / "whole", patients_per_site=1, sites=("east",), size=32))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("anysite.atomic.write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_phantom(tmp_path / "again", patients_per_site=1, sites=("east",), size=32)
    assert not (tmp_path / "again").exists()
    (tmp_path / "again").mkdir()  # empty folders will do
    again = write_phantom(tmp_path / "again", patients_per_site=1, sites=("east",), size=32)
    assert hashes(again) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "again"}


def test_layout_is_the_ordinary_one(flat: Path, solid: Path) -> None:
    for folder, suffix in ((flat, ".png"), (solid, ".nii.gz")):
        rows = rows_of(folder)
        assert list(rows[0]) == ["case", "patient", "domain", "image", "label"]
        assert {row["domain"] for row in rows} == set(SITES)
        assert len({row["case"] for row in rows}) == len(rows)
        for row in rows:
            assert row["image"] == f"{row['domain']}/images/{row['case']}{suffix}"
            assert row["label"] == f"{row['domain']}/masks/{row['case']}{suffix}"
        listed = {row[kind] for row in rows for kind in ("image", "label")}
        assert set(hashes(folder)) == listed | {"index.csv", "dataset.json"}
        about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        assert about["labels"] == LABELS
        assert about["channel_names"] == {"0": "phantom"}
        assert about["licence"].startswith("CC0")


def test_patients_with_two_cases_stay_at_one_site(flat: Path) -> None:
    sites: dict[str, list[str]] = {}
    for row in rows_of(flat):
        sites.setdefault(row["patient"], []).append(row["domain"])
    assert all(len(set(domains)) == 1 for domains in sites.values())
    assert sorted(len(domains) for domains in sites.values()) == [1] * 20 + [2] * 8


def test_classes_touch_as_they_should(flat: Path, solid: Path) -> None:
    for _, image, label in cases_of(flat) + cases_of(solid):
        assert image.array.shape == (1, *label.shape)
        assert image.array.dtype == (np.uint8 if label.ndim == 2 else np.int16)
        assert set(np.unique(label)) >= {0, SHELL, CAVITY, CRESCENT}
        assert label.max() <= NODULE
        assert {CAVITY, SHELL} <= grown(label, CAVITY) <= {CAVITY, SHELL, NODULE}
        assert SHELL in grown(label, CRESCENT)
        assert CAVITY not in grown(label, CRESCENT)
        if (label == NODULE).any():
            assert SHELL in grown(label, NODULE)
            assert (label == NODULE).sum() < 0.4 * (label == SHELL).sum()


def test_about_15_percent_lack_the_nodule_in_every_case_of_the_patient(tmp_path: Path) -> None:
    folder = write_phantom(tmp_path / "many", size=32, patients_per_site=40, sites=("north", "west"))
    lacking: dict[str, set[bool]] = {}
    for row in rows_of(folder):
        label = files.read_label(folder / row["label"]).array
        lacking.setdefault(row["patient"], set()).add(NODULE not in label)
    assert all(len(values) == 1 for values in lacking.values())
    for site in ("north", "west"):
        share = np.mean([True in v for patient, v in lacking.items() if patient.startswith(site)])
        assert 0.1 <= share <= 0.2


def test_files_lie_in_the_world_as_their_site_does(solid: Path) -> None:
    for site_name, image, _ in cases_of(solid):
        site = SITES[site_name]
        np.testing.assert_allclose(image.spacing, site.spacing_mm, rtol=1e-6)
        assert "".join(aff2axcodes(image.affine)) == site.orientation
        middle = image.affine @ [*(np.array(image.shape) - 1) / 2, 1]
        np.testing.assert_allclose(middle[:3], site.centre_mm, atol=1e-4)


def test_one_patient_has_one_body_at_every_site_and_size() -> None:
    anatomy = Anatomy.draw(3, True, np.random.default_rng(3))
    volumes_mm3, centres_mm = [], []
    for name, size in [*((name, 36) for name in SITES), ("west", DEFAULT_SIZE[3])]:
        _, label = examine(anatomy, SITES[name], 3, size, np.random.default_rng(4))
        voxel_mm3 = abs(np.linalg.det(label.affine[:3, :3]))
        volumes_mm3.append([voxel_mm3 * (label.array == c).sum() for c in (SHELL, CAVITY, CRESCENT, NODULE)])
        index = ndimage.center_of_mass(label.array[0] == CAVITY)
        centres_mm.append((label.affine @ [*index, 1])[:3] - SITES[name].centre_mm)
    assert (np.ptp(volumes_mm3, axis=0) < np.mean(volumes_mm3, axis=0) * [0.05, 0.1, 0.05, 0.1]).all()
    assert (np.ptp(centres_mm, axis=0) < 1.0).all()


def test_grid_of_a_picture_has_rows_along_y() -> None:
    affine, shape = grid(SITES["north"], 2, 96)
    assert shape == (96, 96)
    np.testing.assert_allclose(affine @ [0, 47.5, 1], [0, -95, 1], atol=1e-9)
    np.testing.assert_allclose(affine @ [47.5, 0, 1], [-95, 0, 1], atol=1e-9)


def test_every_two_sites_differ_more_than_their_cases_do(flat: Path) -> None:
    features: dict[str, list[np.ndarray]] = {name: [] for name in SITES}
    for name, image, label in cases_of(flat):
        array = image.array[0].astype(float)
        array = (array - array.mean()) / array.std()
        features[name].append(np.array([np.median(array[label == c]) for c in (SHELL, CAVITY, CRESCENT)]))
    for first, second in itertools.combinations(SITES, 2):
        one, other = np.array(features[first]), np.array(features[second])
        spread = np.sqrt((one.var(axis=0) + other.var(axis=0)) / 2)
        assert (np.abs(one.mean(axis=0) - other.mean(axis=0)) > 1.5 * spread).any(), (first, second)


PLAIN = replace(SITES["north"], gamma=1.0, bias=0.0, blur_mm=0.0, acquired_mm=1.0, texture="none")


@pytest.mark.parametrize(
    ("noise", "mean_square", "deviation"),
    [  # for signal s and level l: Rician has E[x^2] = s^2 + 2 l^2, Poisson a variance of l^2 s
        ("gaussian", 0.5**2 + 0.05**2, 0.05),
        ("rician", 0.5**2 + 2 * 0.05**2, 0.05),
        ("speckle", 0.5**2 + 0.025**2, 0.025),
        ("poisson", 0.5**2 + 0.05**2 * 0.5, 0.05 * np.sqrt(0.5)),
    ],
)
def test_noise_has_the_moments_of_its_kind(noise: str, mean_square: float, deviation: float) -> None:
    level = 0.05
    site = replace(PLAIN, noise=noise, noise_level=level, signal=replace(PLAIN.signal, liver=0.5))
    uniform = np.full((400, 400), TISSUES.index("liver"), np.uint8)
    image = acquire(uniform, 2, (1.0, 1.0), site, np.random.default_rng(0))
    assert image.shape == (200, 200)
    assert np.mean(image**2) == pytest.approx(mean_square, rel=0.01)
    assert image.std() == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize("texture", ["stripes", "herringbone", "grain"])
def test_pattern_has_its_level_and_period(texture: str) -> None:
    site = replace(
        PLAIN, noise="gaussian", noise_level=0.0, texture=texture, texture_level=0.02, texture_mm=8.0
    )
    uniform = np.full((256, 256), TISSUES.index("liver"), np.uint8)
    image = acquire(uniform, 1, (1.0, 1.0), site, np.random.default_rng(0))
    assert image.mean() == pytest.approx(site.signal.liver, abs=0.003)
    assert image.std() == pytest.approx(0.02, rel=0.06)
    if texture != "grain":
        spectrum = np.abs(np.fft.rfft(image - image.mean(), axis=0)).mean(axis=1)
        assert 256 / spectrum.argmax() == pytest.approx(8.0, rel=0.05)


def test_without_flaws_a_voxel_is_the_mean_of_its_fine_samples() -> None:
    tissue = np.random.default_rng(0).integers(0, len(TISSUES), (6, 9, 12)).astype(np.uint8)
    image = acquire(tissue, 3, (1.0, 1.0, 1.0), replace(PLAIN, noise_level=0.0), np.random.default_rng(0))
    signal = np.array(astuple(PLAIN.signal))[tissue]
    means = block_means(signal, 3)
    for i, j, k in np.ndindex(2, 3, 4):
        expected = signal[3 * i : 3 * i + 3, 3 * j : 3 * j + 3, 3 * k : 3 * k + 3].mean()
        assert means[i, j, k] == pytest.approx(expected, rel=1e-5)
        assert image[i, j, k] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"dimension": 4}, "dimension 4"),
        ({"patients_per_site": 0}, "0 patients"),
        ({"size": 8}, "size 8"),
        ({"size": 128, "dimension": 3}, "expected 24 to 96"),
        ({"seed": -1}, "seed -1"),
        ({"sites": ("north", "nroth")}, "'nroth'"),
        ({"sites": ()}, "sites"),
        ({"sites": ("east", "east")}, "sites"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(
    tmp_path: Path, arguments: dict, found: str
) -> None:
    with pytest.raises(ConfigError, match=found):
        write_phantom(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="already there"):
        write_phantom(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.txt"]
