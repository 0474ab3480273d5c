"""Damaged files for every reader; run as a program with limited memory, which prints what became of them.

Arguments: FOLDER SEED COUNT FORMAT... damages files at random; FOLDER SEED 0 FORMAT... cuts them short.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
import torch
from PIL import Image

import dicom_files
from anysite import atomic, runs
from anysite.config import load
from anysite.data import files
from anysite.data.layouts import open_dataset
from anysite.data.probabilities import read_probabilities, write_probabilities
from anysite.data.volume import Volume
from anysite.errors import AnysiteError
from anysite.learner import build_network
from anysite.manifest import read_manifests
from anysite.normalisation import Normalisation
from anysite.plan import Plan
from anysite.report.read import read_sources

SLOWEST_S, MEMORY = 2.0, 3 * 2**30
PARTS = (
    runs.CONFIG,
    runs.PLAN,
    runs.SPLITS,
    runs.MANIFEST,
    runs.CALIBRATION,
    runs.POSTPROCESSING,
    runs.WEIGHTS,
)
ODD: list[Any] = [
    *(None, True, -1, 0, 1.5, 1e308, -1e308, 2**63, 10**30, "", "x", "../../../etc/passwd", "\x00", [], {}),
    *(
        [[]],
        [None],
        {"": None},
        float("nan"),
        float("inf"),
        "__class__",
        {"_target_": "os.system"},
        [1] * 1000,
    ),
]


def make_whole(folder: Path) -> None:
    """Write one whole file of every kind."""
    chooser = np.random.default_rng(0)
    array = chooser.integers(0, 255, (5, 6, 7)).astype(np.int16)
    for suffix in ("nii", "nii.gz"):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 2, 3, 1.0])), folder / f"whole.{suffix}")
    picture = chooser.integers(0, 255, (20, 30)).astype(np.uint8)
    for suffix in ("png", "jpg", "tif"):
        Image.fromarray(picture).save(folder / f"whole.{suffix}")
    for suffix in ("nrrd", "mha"):
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing((1, 2, 3))
        SimpleITK.WriteImage(image, str(folder / f"whole.{suffix}"), useCompression=True)
    dicom_files.write_file(dicom_files.series(dicom_files.voxels((1, 8, 10)))[0], folder / "whole.dcm")
    write_probabilities(Volume(chooser.random((2, 9, 9)), np.eye(3), "px"), folder / "whole.npz")
    plan = Plan(
        dimension=2, image_dimension=2, spacing=(1.0, 1.0), unit="px", channels=1,
        normalisation=(Normalisation(kind="case"),), patch_size=(16, 16), classes=("background", "organ"),
        label_values=(0, 1),
    )  # fmt: skip
    settings = load("baseline", ["network.width=4", "network.depth=2", "judge.detectors={}"])
    run = folder / "run"
    runs.start(run, settings, plan, {"training": ["a"], "held_out": ["b"], "test": []}, dataset="x")
    learned = {"temperature": [1.5], "failed": {}}, None, None, {"classes": [1], "smaller_than": 0.1}
    runs.finish(run, build_network(settings, plan), *learned, steps=1)
    (masks := folder / "masks").mkdir()
    case = {"status": "done", "mask": "a.png", "images": ["../a.png"], "label": None, "patient": "p", "domain": "d",
            "verdict": {"decision": "accept", "reasons": [], "scores": {"entropy": 0.5}, "predicted_dice": None},
            "seconds": 0.1, "error": None}  # fmt: skip
    atomic.write_json(
        masks / "predictions.json", {"origin": "o", "runs": [], "cases": {"a": case}, "files": {}}
    )
    (data := folder / "dataset" / "imagesTr").mkdir(parents=True)
    (folder / "dataset" / "labelsTr").mkdir()
    for place in (data / "a_0000.png", folder / "dataset" / "labelsTr" / "a.png"):
        Image.fromarray((picture > 99).astype(np.uint8)).save(place)
    declared = {"labels": {"background": 0, "organ": 1}, "channel_names": {"0": "CT"}, "file_ending": ".png",
                "name": "n", "numTraining": 1}  # fmt: skip
    atomic.write_json(folder / "dataset" / "dataset.json", declared)


def damage(content: bytes, chooser: random.Random) -> bytes:
    """Flip, overwrite, insert, delete or cut a few bytes, most often near the beginning, where headers are."""
    damaged = bytearray(content)
    for _ in range(chooser.choice((1, 1, 2, 4, 16))):
        near = min(len(damaged), chooser.choice((16, 128, 352, len(damaged) or 1)))
        place = chooser.randrange(max(1, near))
        kind = chooser.randrange(5)
        if kind == 0 and damaged:
            damaged[place] ^= 1 << chooser.randrange(8)
        elif kind == 1:
            value = chooser.choice(
                (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\x80\x7f")
            )
            damaged[place : place + 4] = value
        elif kind == 2:
            damaged[place:place] = chooser.randbytes(chooser.choice((1, 4, 64)))
        elif kind == 3:
            del damaged[place : place + chooser.choice((1, 4, 64))]
        else:
            del damaged[chooser.randrange(len(damaged) + 1) :]
    return bytes(damaged)


def damage_json(content: bytes, chooser: random.Random) -> bytes:
    """Put an odd value in place of one, drop or add a key; now and then damage the text itself."""
    if chooser.random() < 0.2:
        return damage(content, chooser)
    whole = json.loads(content)
    node, parents = whole, []
    while isinstance(node, dict | list) and node and chooser.random() < 0.8:
        key = chooser.choice(list(node)) if isinstance(node, dict) else chooser.randrange(len(node))
        parents.append((node, key))
        node = node[key]
    if not parents:
        return json.dumps(chooser.choice(ODD)).encode()
    holder, key = parents[-1]
    kind = chooser.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chooser.choice(("__class__", "extra", "name"))] = chooser.choice(ODD)
    else:
        holder[key] = chooser.choice(ODD)
    return json.dumps(whole).encode()


def damage_image(suffix: str, content: bytes, chooser: random.Random) -> bytes:
    """Damage the file, or what is compressed in it."""
    if suffix == "nii.gz" and chooser.random() < 0.6:
        return gzip.compress(damage(gzip.decompress(content), chooser), 1)
    return damage(content, chooser)


def geometry_fault(volume: Volume) -> str:
    """Return what no reader may accept."""
    spacing = np.array(volume.spacing)
    if not np.isfinite(volume.affine).all() or abs(np.linalg.det(volume.affine[:-1, :-1])) < 1e-12:
        return "a singular affine"
    if (spacing <= 0).any() or (spacing > 1e4).any():
        return f"spacing {spacing}"
    return "" if np.isfinite(volume.array).all() else "values that are not finite"


def read_run(folder: Path) -> None:
    """Do all that opening a run for prediction does."""
    run = runs.open_run(folder)
    with torch.no_grad():
        run.network()


def reseal(run: Path) -> None:
    """Let the manifest fit the files, as somebody with a purpose might."""
    with contextlib.suppress(Exception):
        manifest = json.loads((run / runs.MANIFEST).read_text())
        manifest["files"] = {name: atomic.sha256(run / name) for name in manifest["files"]}
        (run / runs.MANIFEST).write_text(json.dumps(manifest))


class Trial:
    """Counts what became of the files, and keeps what should not have."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.slowest_s = 0.0

    def run(self, name: str, read: Callable[[], Any]) -> Any:
        """Read once: accepted, refused by a named error, or a fault."""
        began = time.process_time()
        try:
            result = read()
            self.counts["accepted"] += 1
            return result
        except AnysiteError as error:
            self.counts["refused"] += 1
            if "\n" in str(error).strip() or not str(error):
                self.faults.append(f"{name}: an error of several lines: {error}")
        except BaseException as error:  # noqa: BLE001
            self.faults.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        finally:
            took = time.process_time() - began
            self.slowest_s = max(self.slowest_s, took)
            if took > SLOWEST_S:
                self.faults.append(f"{name}: {took:.1f} s")
        return None


def fuzz(kind: str, folder: Path, seed: int, count: int, trial: Trial) -> None:
    """Read `count` damaged files of one kind."""
    chooser = random.Random(f"{kind}/{seed}")
    if kind == "run":
        whole = {name: (folder / "run" / name).read_bytes() for name in PARTS}
        for index in range(count):
            part = chooser.choice(PARTS)
            change = damage if part == runs.WEIGHTS else damage_json
            (folder / "run" / part).write_bytes(change(whole[part], chooser))
            if part != runs.MANIFEST and chooser.random() < 0.9:
                reseal(folder / "run")
            trial.run(f"{part} {index}", lambda: read_run(folder / "run"))
            for name, content in whole.items():
                (folder / "run" / name).write_bytes(content)
        return
    if kind == "json":
        targets: list[tuple[Path, Callable[[], Any]]] = [
            (folder / "masks" / "predictions.json", lambda: read_manifests(folder / "masks")),
            (folder / "masks" / "predictions.json", lambda: read_sources([folder / "masks"])),
            (folder / "dataset" / "dataset.json", lambda: open_dataset(folder / "dataset")),
        ]
        for index in range(count):
            path, read = chooser.choice(targets)
            content = path.read_bytes()
            path.write_bytes(damage_json(content, chooser))
            trial.run(f"{path.name} {index}", read)
            path.write_bytes(content)
        return
    content, path = (folder / f"whole.{kind}").read_bytes(), folder / f"damaged.{kind}"
    for index in range(count):
        path.write_bytes(damage(content, chooser) if kind == "npz" else damage_image(kind, content, chooser))
        if kind == "npz":
            trial.run(f"{kind} {index}", lambda: read_probabilities(path))
        elif (volume := trial.run(f"{kind} {index}", lambda: files.read(path))) is not None and (
            fault := geometry_fault(volume)
        ):
            trial.faults.append(f"{kind} {index}: accepted {fault}")


def cut(kind: str, folder: Path, trial: Trial) -> None:
    """Cut files short; what is still accepted has to be the very same content."""
    if kind == "run":
        for part in PARTS:
            path = folder / "run" / part
            content = path.read_bytes()
            for place in np.linspace(0, len(content) - 1, 30).astype(int):
                path.write_bytes(content[:place])
                trial.run(f"{part} cut at {place}", lambda: read_run(folder / "run"))
                path.write_bytes(content)
        return
    content, path = (folder / f"whole.{kind}").read_bytes(), folder / f"cut.{kind}"
    read = read_probabilities if kind == "npz" else lambda path: files.read(path).array
    whole = read(folder / f"whole.{kind}")
    for place in sorted(
        {*range(max(0, len(content) - 20), len(content)), *np.linspace(0, len(content) - 1, 40).astype(int)}
    ):
        path.write_bytes(content[:place])
        array = trial.run(f"{kind} cut at {place}", lambda: read(path))
        if array is not None and not np.array_equal(array, whole):
            trial.faults.append(f"{kind} cut at {place}: accepted as something else")


def main() -> None:
    """Damage or cut files of the given kinds."""
    folder, seed, count, kinds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import logging

    logging.disable()
    make_whole(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    results = {}
    for kind in kinds:
        trial = Trial()
        signal.alarm(3600)
        with contextlib.redirect_stderr(io.StringIO()):
            fuzz(kind, folder, seed, count, trial) if count else cut(kind, folder, trial)
        results[kind] = {**trial.counts, "slowest_s": round(trial.slowest_s, 2), "faults": trial.faults}
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
