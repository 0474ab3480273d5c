"""A made-up dataset of four sites, written as ordinary files: for the demo and the tests."""

from __future__ import annotations

import csv
import io
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from anysite import atomic
from anysite.data import files
from anysite.data.phantom_sites import (
    DEFAULT_SIZE,
    FIELD_OF_VIEW_MM,
    SITES,
    TISSUES,
    Site,
    acquire,
    block_means,
    grid,
    jittered,
)
from anysite.data.volume import Volume
from anysite.errors import ConfigError

LABELS = {"background": 0, "shell": 1, "cavity": 2, "crescent": 3, "nodule": 4}
MISSING_NODULES = 0.15
SIZES = {2: (32, 1024), 3: (24, 96)}  # smaller: a structure vanishes; larger: gigabytes of memory

_TISSUE = {name: index for index, name in enumerate(TISSUES)}
_LABEL_OF_TISSUE = np.array([LABELS.get(name, 0) for name in TISSUES], np.uint8)


@dataclass(frozen=True)
class Blob:
    """A round body whose radius wavers smoothly with direction."""

    centre_mm: np.ndarray
    radii_mm: np.ndarray
    rotation: np.ndarray
    waves: np.ndarray
    phases: np.ndarray
    amplitude: float

    @classmethod
    def draw(
        cls, rng: np.random.Generator, centre_mm: np.ndarray, radii_mm: np.ndarray, amplitude: float = 0.1
    ) -> Blob:
        """Draw a random attitude and outline; the last axis of three tilts by little."""
        dimension = len(centre_mm)
        waves = rng.normal(0, 1.5, (4, dimension))
        phases = rng.uniform(0, 2 * np.pi, 4)
        return cls(centre_mm, radii_mm, _rotation(rng, dimension, np.pi, 0.15), waves, phases, amplitude)

    def depth(self, points_mm: np.ndarray) -> np.ndarray:
        """Return 0 at the centre, 1 on the surface and more outside, for points `(n, d)`."""
        local = ((points_mm - self.centre_mm) @ self.rotation / self.radii_mm).astype(np.float32)
        depth = np.sqrt(np.einsum("nd,nd->n", local, local))
        near = depth < 1.5
        direction = local[near] / np.maximum(depth[near], 1e-6)[:, None]
        waver = np.cos(direction @ self.waves.T.astype(np.float32) + self.phases.astype(np.float32))
        depth[near] /= 1 + self.amplitude * waver.mean(axis=1)
        return depth


@dataclass(frozen=True)
class Anatomy:
    """The inside of one patient: the organ of shell and cavity, what touches it, and look-alikes around it."""

    body: Blob
    interior: Blob
    neighbours: tuple[tuple[str, Blob], ...]
    bowel: Blob
    crescent: Blob
    organ: Blob
    cavity_share: float
    nodule: Blob | None
    warp: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def draw(cls, dimension: int, with_nodule: bool, rng: np.random.Generator) -> Anatomy:
        """Draw a patient."""
        upright = np.array([1.0, 1.0, 1.3])[:dimension]
        half = np.array(FIELD_OF_VIEW_MM)[:dimension] / 2
        stretch = np.array([1.0, 0.92, 2.0])[:dimension]

        def towards(angle: float, length: float) -> np.ndarray:
            return length * np.array([np.cos(angle), np.sin(angle), 0.0])[:dimension]

        def blob(centre: np.ndarray, radius: float) -> Blob:
            return Blob.draw(rng, centre, radius * upright * rng.uniform(0.88, 1.12, dimension), 0.1)

        body = Blob.draw(rng, np.zeros(dimension), half * rng.uniform(0.85, 0.98, dimension) * stretch, 0.05)
        body = replace(body, rotation=np.eye(dimension))
        interior = replace(body, radii_mm=body.radii_mm * rng.uniform(0.84, 0.92))

        centre, radius = rng.normal(0, 7, dimension), rng.uniform(30, 38)
        organ = blob(centre, radius)
        side = np.pi + rng.uniform(-0.5, 0.5)
        crescent = blob(centre + towards(side, 0.8 * radius), radius * rng.uniform(0.9, 1.0))
        far = side + np.pi + rng.uniform(-0.9, 0.9)
        nodule_radius = rng.uniform(10, 13) * (1.0 if dimension == 2 else 1.45)  # a ball has few voxels
        nodule = blob(centre + towards(far, radius + 0.35 * nodule_radius), nodule_radius)
        bowel = blob(centre + towards(side - rng.uniform(1.4, 2.0), radius + 34), rng.uniform(12, 17))
        neighbours = [
            ("lung", blob(centre + towards(far + 0.3, radius + 38), 30)),
            ("liver", blob(centre + towards(side + rng.uniform(1.2, 1.7), radius + 38), 36)),
        ]
        for _ in range(5):
            start = centre + towards(rng.uniform(0, 2 * np.pi), radius + rng.uniform(24, 60))
            long = np.array([1.0, 1.0, 8.0])[:dimension]
            neighbours.append(("vessel", Blob.draw(rng, start, rng.uniform(3, 6) * long)))
        share, waves = rng.uniform(0.52, 0.62), rng.normal(0, 0.03, (3, dimension))
        warp = (waves, rng.uniform(0, 2 * np.pi, 3), rng.normal(0, 2.5, (3, dimension)))
        present = nodule if with_nodule else None
        return cls(body, interior, tuple(neighbours), bowel, crescent, organ, share, present, warp)

    def tissue(self, points_mm: np.ndarray, contraction: float) -> np.ndarray:
        """Return the tissue index at each point `(n, d)`; `contraction` scales the cavity."""
        waves, phases, shifts = self.warp
        points = points_mm + np.sin(points_mm @ waves.T + phases) @ shifts
        tissue = np.full(len(points), _TISSUE["air"], np.uint8)
        tissue[self.body.depth(points) < 1] = _TISSUE["fat"]
        inside = self.interior.depth(points) < 1
        tissue[inside] = _TISSUE["muscle"]
        for name, blob in self.neighbours:
            tissue[inside & (blob.depth(points) < 1)] = _TISSUE[name]
        depth = self.bowel.depth(points)
        tissue[inside & (depth < 1)] = _TISSUE["bowel_wall"]
        tissue[inside & (depth < 0.65)] = _TISSUE["bowel"]
        tissue[inside & (self.crescent.depth(points) < 1)] = _TISSUE["crescent"]
        depth = self.organ.depth(points)
        tissue[depth < 1] = _TISSUE["shell"]
        tissue[depth < self.cavity_share * contraction] = _TISSUE["cavity"]
        if self.nodule is not None:
            tissue[self.nodule.depth(points) < 1] = _TISSUE["nodule"]
        return tissue


def write_phantom(
    folder: Path,
    *,
    dimension: int = 2,
    patients_per_site: int = 12,
    size: int | None = None,
    seed: int = 0,
    sites: Sequence[str] = tuple(SITES),
) -> Path:
    """Write a segmentation dataset of several made-up sites, and return its folder.

    The files are `<site>/images/<case>.png` or `.nii.gz`, `<site>/masks/` alike, `index.csv` and
    `dataset.json`. A case depends on its site, number and `seed` alone, so the same arguments give
    the same bytes and fewer sites or patients give a subset.

    Args:
        folder: New or empty.
        dimension: 2 for 8-bit PNG, 3 for NIfTI in mm.
        patients_per_site: Every third patient has two cases.
        size: Pixels along each side in 2-D (128 where not given); in 3-D voxels along the first axis
            for a spacing of 4 mm (48 where not given), other values scale the sites' spacing.
        seed: Any whole number from 0.
        sites: Names from `SITES`.

    Raises:
        ConfigError: an argument out of range, an unknown site, or a folder with something in it.
    """
    folder = Path(folder)
    size = DEFAULT_SIZE.get(dimension, 0) if size is None else size
    _check(folder, dimension, patients_per_site, size, seed, sites)
    suffix = ".png" if dimension == 2 else ".nii.gz"
    whole, folder = folder, folder.resolve().with_name(f".{folder.resolve().name}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # of one that was interrupted
    rows = []
    for name in sites:
        for number in range(patients_per_site):
            anatomy = Anatomy.draw(dimension, not _lacks_nodule(number, seed, name), _rng(seed, name, number))
            patient = f"{name}-{number:03d}"
            for visit in range(2 if number % 3 == 2 else 1):
                image, label = examine(anatomy, SITES[name], dimension, size, _rng(seed, name, number, visit))
                case = f"{patient}-{'ab'[visit]}"
                image_path = f"{name}/images/{case}{suffix}"
                label_path = f"{name}/masks/{case}{suffix}"
                _write_image(image, folder / image_path)
                files.write_label(label, folder / label_path)
                rows.append((case, patient, name, image_path, label_path))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("case", "patient", "domain", "image", "label"), *rows])
    atomic.write_json(
        folder / "dataset.json",
        {
            "name": "phantom",
            "labels": LABELS,
            "channel_names": {"0": "phantom"},
            "licence": "CC0 1.0 (made-up images, no patient)",
        },
    )
    atomic.write_text(folder / "index.csv", table.getvalue())
    if not whole.exists():
        folder.replace(whole)
    else:
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == "index.csv"):
            entry.replace(whole / entry.name)
        folder.rmdir()
    return whole


def _check(folder: Path, dimension: int, patients: int, size: int, seed: int, sites: Sequence[str]) -> None:
    if dimension not in (2, 3):
        raise ConfigError(f"dimension {dimension}", where="phantom", expected="2 or 3")
    if patients < 1:
        raise ConfigError(f"{patients} patients per site", where="phantom", expected="1 or more")
    smallest, largest = SIZES[dimension]
    if not smallest <= size <= largest:
        raise ConfigError(f"size {size}", where="phantom", expected=f"{smallest} to {largest}")
    if seed < 0:
        raise ConfigError(f"seed {seed}", where="phantom", expected="0 or more")
    for name in sites:
        if name not in SITES:
            raise ConfigError(
                f"no site named {name!r}", where="phantom", expected=f"one of {', '.join(SITES)}"
            )
    if not sites or len(set(sites)) < len(sites):
        raise ConfigError(f"sites {list(sites)}", where="phantom", expected="at least one, each once")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            "something is already there", where=folder, expected="a new or empty folder",
            fix="delete it, or choose another",
        )  # fmt: skip


def examine(
    anatomy: Anatomy, site: Site, dimension: int, size: int, rng: np.random.Generator
) -> tuple[Volume, Volume]:
    """Return image and label map `(1, *S)` of one visit, in which the patient lies and contracts anew."""
    affine, shape = grid(site, dimension, size)
    fine = 3 if dimension == 2 else 2
    indices = np.stack(
        np.meshgrid(*[(np.arange(n * fine) + 0.5) / fine - 0.5 for n in shape], indexing="ij"), -1
    )
    world = indices.reshape(-1, dimension) @ affine[:-1, :-1].T + affine[:-1, -1]
    centre_mm = affine[:-1] @ [*(np.array(shape) - 1) / 2, 1]
    shifted = world - centre_mm + rng.normal(0, 4, dimension)
    posed = shifted @ _rotation(rng, dimension, 0.15, 0.1)
    tissue = anatomy.tissue(posed, rng.uniform(0.9, 1.1)).reshape(indices.shape[:-1])

    label = _majority(_LABEL_OF_TISSUE[tissue], fine)
    spacing = tuple(float(s) for s in np.linalg.norm(affine[:-1, :-1], axis=0))
    signal = acquire(tissue, fine, spacing, jittered(site, rng), rng)
    if dimension == 2:
        grey = np.clip(np.rint(255 * signal), 0, 255).astype(np.uint8)
        return Volume.of_pixels(grey[None]), Volume.of_pixels(label[None])
    raw = np.clip(np.rint(site.offset + site.scale * signal), -1024, 4095).astype(np.int16)
    return Volume(raw[None], affine), Volume(label[None], affine)


def _majority(fine_label: np.ndarray, fine: int) -> np.ndarray:
    shares = [block_means(fine_label == value, fine) for value in LABELS.values()]
    return np.argmax(shares, axis=0).astype(np.int32)


def _rotation(rng: np.random.Generator, dimension: int, turn: float, tilt: float) -> np.ndarray:
    """Draw a rotation of at most `turn` in the plane and, for three axes, `tilt` out of it (radians)."""
    angle = rng.uniform(-turn, turn)
    plane = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if dimension == 2:
        return plane
    rotation = np.eye(3)
    rotation[:2, :2] = plane
    angle = rng.uniform(-tilt, tilt)
    tilted = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    return tilted @ rotation


def _lacks_nodule(number: int, seed: int, site: str) -> bool:
    # Steps of the golden ratio spread the missing ones evenly, so that a small site also has its share.
    return (_rng(seed, site).random() + number * 0.6180339887) % 1 < MISSING_NODULES


def _rng(seed: int, site: str, *numbers: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(site.encode()), *numbers])


def _write_image(volume: Volume, path: Path) -> None:
    with atomic.replacing(path) as temporary:
        if volume.dimension == 2:
            Image.fromarray(volume.array[0]).save(temporary)
        else:
            image = nibabel.Nifti1Image(volume.array[0], volume.affine)
            image.header.set_xyzt_units("mm")
            nibabel.save(image, temporary)
