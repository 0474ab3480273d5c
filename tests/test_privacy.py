"""What files and machines know of people reaches no mask, report, log, run folder, row or error text."""

from __future__ import annotations

import getpass
import gzip
import os
import shutil
import socket
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Extension
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from anysite.data.phantom import write_phantom
from conftest import SMALL
from test_cli import call

SETTINGS = [f"--set={setting}" for setting in (*SMALL, "train.steps=2")]
VOLUMES = ["--set=plan.dimension=3d", "--set=plan.patch_size=[16, 16, 16]", "--set=network.depth=2"]
CANARIES = [f"Canary{number:02d}Doe" for number in range(40)]


def canary(number: int) -> str:
    return CANARIES[number]


def plant_in_png(path: Path) -> None:
    """Text chunks of every kind, EXIF, XMP and ICC names."""
    picture, text = Image.open(path), PngInfo()
    picture.load()
    for number, key in enumerate(("Author", "Title", "Description", "Comment", "Source", "Creation Time")):
        text.add_text(key, canary(number))
    text.add_text("Patient", canary(6), zip=True)
    text.add_itxt("XML:com.adobe.xmp", canary(7))
    exif = Image.Exif()
    exif[0x010E], exif[0x013B], exif[0x9003] = canary(8), canary(9), canary(10)
    picture.save(path, pnginfo=text, exif=exif)


def plant_in_jpeg(source: Path, path: Path) -> None:
    exif = Image.Exif()
    for number, tag in enumerate((0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298), start=11):
        exif[tag] = canary(number)
    Image.open(source).save(path, exif=exif, comment=canary(18).encode(), quality=95)


def plant_in_tiff(source: Path, path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for number, tag in enumerate((269, 270, 271, 272, 305, 306, 315, 33432), start=19):
        tags[tag] = canary(number)
    Image.open(source).save(path, tiffinfo=tags)


def plant_in_nifti(path: Path) -> None:
    image = nibabel.Nifti1Image.from_filename(path)
    data, header = np.asanyarray(image.dataobj), image.header
    header["descrip"], header["aux_file"] = canary(27), canary(28)
    header["db_name"], header["intent_name"] = canary(29), canary(30)
    for number, code in ((31, 4), (32, 6), (33, 0)):  # AFNI, comment, ignored
        header.extensions.append(Nifti1Extension(code, canary(number).encode()))
    nibabel.save(nibabel.Nifti1Image(data, image.affine, header), path)


def contents(folder: Path) -> bytes:
    """Return the bytes of all files and their names, unpacked where a format packs them."""
    found = [b""]
    for path in sorted(folder.rglob("*")):
        found.append(str(path.relative_to(folder)).encode())
        if not path.is_file():
            continue
        content = path.read_bytes()
        found.append(content)
        if path.suffix == ".gz":
            found.append(gzip.decompress(content))
        if path.suffix == ".png":  # compressed text
            for place in range(len(content) - 1):
                if content[place : place + 1] == b"\x78":
                    try:
                        found.append(zlib.decompressobj().decompress(content[place:], 2**20))
                    except zlib.error:
                        continue
    return b"\n".join(found)


def run_chain(data: Path, out: Path, settings: list[str]) -> str:
    """Check, train, predict, evaluate, report, continue and fail; return all that was printed."""
    results = [
        call("check", data),
        call("train", data, "--output", out / "run", "--test-domain=east", *settings),
        call("train", data, "--output", out / "again", "--set", f"pretrained={out / 'run'}", "--test-domain=east",
             *settings),
        call("predict", out / "run", data, "--output", out / "masks", "--save-probabilities", "--include-training"),
        call("evaluate", out / "masks", data),
        call("report", out / "masks", "--output", out / "report.html"),
        call("info", out / "run"),
        call("info", out / "masks"),
    ]  # fmt: skip
    assert [result.code for result in results] == [0] * len(results), results
    return "".join(result.out + result.err for result in results)


def leaks(text: str, planted: list[str]) -> list[str]:
    return [word for word in planted if word.lower() in text.lower()]


@pytest.mark.parametrize("dimension", [2, 3])
def test_no_artefact_tells_what_only_files_and_the_machine_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dimension: int
) -> None:
    monkeypatch.setenv("USER", canary(34))
    monkeypatch.setenv("LOGNAME", canary(34))
    monkeypatch.setattr(socket, "gethostname", lambda: canary(35))
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", canary(35), "1", "1", "x")))
    assert getpass.getuser() == canary(34)
    place = tmp_path / canary(36) / "study"
    size = 64 if dimension == 2 else 24
    data = write_phantom(
        place / "data", dimension=dimension, patients_per_site=2, size=size, sites=("north", "east")
    )
    images = sorted([*data.rglob("images/*.png"), *data.rglob("images/*.nii.gz")])
    index = (data / "index.csv").read_text()
    for number, path in enumerate(images):
        if dimension == 3:
            plant_in_nifti(path)
        elif number % 3 == 0:
            plant_in_png(path)
        else:
            other = path.with_suffix(".jpg" if number % 3 == 1 else ".tif")
            (plant_in_jpeg if number % 3 == 1 else plant_in_tiff)(path, other)
            index = index.replace(path.name, other.name, 1)
            path.unlink()
    head, *lines = index.splitlines()
    if dimension == 2:  # masks keep their names: only what is in the folder of images was renamed
        lines = [
            line.replace(
                "masks/" + line.rsplit("/", 1)[1], "masks/" + Path(line.rsplit("/", 1)[1]).stem + ".png"
            )
            for line in lines
        ]
    more = ["name,birth date,note", ",".join(canary(n) for n in (37, 38, 39))]
    (data / "index.csv").write_text(
        "\n".join([f"{head},{more[0]}", *(f"{line},{more[1]}" for line in lines)]) + "\n"
    )
    out = place / "out"
    printed = run_chain(data, out, SETTINGS if dimension == 2 else [*SETTINGS, *VOLUMES])
    made = contents(out).decode("latin-1")
    assert leaks(made, CANARIES) == []
    assert leaks(printed.replace(str(tmp_path / canary(36)), ""), CANARIES) == []  # but paths the user typed
    assert str(tmp_path) not in made.replace("predictions.json", "")
    # Errors tell the file, not what is in it.
    for path in images:
        if path.exists():
            path.write_bytes(path.read_bytes()[:-40])
    results = [
        call("check", data),
        call("predict", out / "run", data, "--output", out / "damaged", "--include-training"),
    ]
    assert results[1].code == 1
    told = "".join(result.out + result.err for result in results)
    assert leaks(told.replace(str(tmp_path / canary(36)), ""), CANARIES) == []
    assert leaks(contents(out / "damaged").decode("latin-1"), CANARIES) == []


def test_a_run_folder_names_no_folder_of_the_user(tmp_path: Path) -> None:
    """Not even where the run to start from lies elsewhere: only the way from one to the other is stored."""
    data = write_phantom(tmp_path / "data", patients_per_site=2, size=32, sites=("north", "east"))
    home = tmp_path / "Jane_Doe"
    assert call("train", data, "--output", home / "first", *SETTINGS).code == 0
    pretrained = f"--set=pretrained={home / 'first'}"
    assert call("train", data, "--output", home / "second", pretrained, *SETTINGS).code == 0
    made = contents(home / "second").decode("latin-1")
    assert "Jane_Doe" not in made
    assert '"../first"' in made
    shutil.move(home, tmp_path / "moved")  # and both may move together
    assert call("train", data, "--output", tmp_path / "moved" / "second", "--resume", *SETTINGS).code == 0
