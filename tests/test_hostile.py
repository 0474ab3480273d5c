"""Files made to do harm: none runs code, writes where it should not, or takes memory that its content does not need."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from anysite import atomic, config, runs
from anysite.data import files
from anysite.data.layouts import open_dataset, open_images
from anysite.data.probabilities import read_probabilities
from anysite.describe import describe
from anysite.errors import AnysiteError
from anysite.manifest import read_manifests
from anysite.report.read import read_sources
from anysite.rows import read_rows

SUFFIXES = (
    *files.FORMATS,
    ".npz",
    ".npy",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".safetensors",
    ".json",
    ".jsonl",
    ".csv",
    ".toml",
)


class Payload:
    """Pickles into a command that leaves a canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


def pickles(canary: Path) -> Iterator[bytes]:
    for protocol in range(6):
        yield pickle.dumps(Payload(canary), protocol)
    array = np.empty(1, object)
    array[0] = Payload(canary)
    with io.BytesIO() as file:
        np.save(file, array, allow_pickle=True)
        yield file.getvalue()
    for name in ("probabilities", "../../canary"):
        with io.BytesIO() as file:
            np.savez(file, **{name: array})  # pyright: ignore[reportArgumentType]
            yield file.getvalue()
    with io.BytesIO() as file:  # as torch.save writes it
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Payload(canary)))
            archive.writestr("../../canary", "x")
        yield file.getvalue()


def texts(canary: Path) -> Iterator[str]:
    command = f"touch {canary}"
    for name in ("_target_", "__reduce__", "__class__", "$ref", "class_path", "target"):
        yield json.dumps({name: "os.system", "_args_": [command], "args": [command]})
        yield json.dumps({"labels": {name: 1, "background": 0}, "name": {name: "os.system"}})
    yield f"!!python/object/apply:os.system ['{command}']"
    yield f"__import__('os').system('{command}')"
    yield f'name = "$(touch {canary})"\n[network]\nname = "os:system"'
    yield f"=cmd|' /C touch {canary}'!A0"


READERS: list[Callable[[Path], object]] = [
    files.read, files.read_label, read_probabilities, runs.load_tensors, atomic.read_json, read_rows, open_images,
    open_dataset, describe, lambda path: read_sources([path]), lambda path: config.load(str(path)),
]  # fmt: skip


def survive(read: Callable[[Path], object], path: Path) -> bool:
    """Read a file; tell whether it was refused. Any other error than a named one fails the test."""
    try:
        read(path)
    except AnysiteError:
        return True
    return False


@pytest.mark.filterwarnings("ignore")
def test_no_file_runs_code_whatever_its_name(tmp_path: Path) -> None:
    canary, place = tmp_path / "canary", tmp_path / "place"
    place.mkdir()
    count = refused = 0
    contents = [*pickles(canary), *(text.encode() for text in texts(canary))]
    for suffix in SUFFIXES:
        for content in contents:
            path = place / f"case{suffix}"
            path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
            refused += sum(survive(read, path) for read in READERS)
            count += 1
            path.unlink()
    assert count >= 200
    assert refused > 8 * count
    assert not canary.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["place"]
    assert not list(place.iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fuzz import make_whole

    folder = tmp_path_factory.mktemp("whole")
    make_whole(folder)
    return folder / "run"


@pytest.mark.filterwarnings("ignore")
def test_no_part_of_a_run_folder_runs_code(run: Path, tmp_path: Path) -> None:
    from fuzz import PARTS, read_run, reseal

    canary = tmp_path / "canary"
    for part in (*PARTS, runs.JUDGE, runs.CHECKPOINT):
        for content in [*pickles(canary), *(text.encode() for text in texts(canary))]:
            shutil.copytree(run, tmp_path / "run")
            (tmp_path / "run" / part).write_bytes(content)
            if part != runs.MANIFEST:
                reseal(tmp_path / "run")
            survive(read_run, tmp_path / "run")
            survive(describe, tmp_path / "run")
            shutil.rmtree(tmp_path / "run")
    for key, value in (
        ("network", {"name": "os:system"}), ("network", {"name": "unet", "_target_": "os.system"}),
        ("objectives", {"os:system": {}}), ("judge", {"detectors": {"os:system": {}}}), ("pretrained", "/etc"),
    ):  # fmt: skip
        shutil.copytree(run, tmp_path / "run")
        content = json.loads((run / runs.CONFIG).read_text()) | {key: value}
        (tmp_path / "run" / runs.CONFIG).write_text(json.dumps(content))
        reseal(tmp_path / "run")
        survive(read_run, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../../outside.png", "/etc/passwd", "a/../../x.png"])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    content = {"cases": {"a": {"status": "done", "mask": name}}}
    (tmp_path / "predictions.json").write_text(json.dumps(content))
    with pytest.raises(AnysiteError, match="not a manifest of predictions"):
        read_manifests(tmp_path)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "a\\b", "."])
def test_a_case_cannot_name_a_folder_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "index.csv").write_text(f"case,image\n{name},x.png\n")
    with pytest.raises(AnysiteError, match="an identifier that can name a file"):
        open_images(tmp_path)


# Bombs


def nifti(
    shape: tuple[int, ...], code: int = 2, bits: int = 8, offset: float = 352, slope: float = 1.0
) -> bytes:
    header = bytearray(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).header.binaryblock)
    struct.pack_into("<8h", header, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<hh", header, 70, code, bits)
    struct.pack_into("<ff", header, 108, offset, slope)
    return bytes(header)


def nifti2(shape: tuple[int, ...]) -> bytes:
    header = bytearray(nibabel.Nifti2Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).header.binaryblock)
    struct.pack_into("<8q", header, 16, len(shape), *shape, *[1] * (7 - len(shape)))
    return bytes(header)


def png(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def tiff(width: int, height: int, bits: int = 8) -> bytes:
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, 8), (262, 3, 1, 1),
            (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 100)]  # fmt: skip
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + table + bytes(100)


def safetensors(header: bytes, length: int | None = None, content: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + content


def npz(shape: str, content: bytes = b"", dtype: str = "<f2") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(
                "probabilities.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + content
            )
        return file.getvalue()


MANY = json.dumps(
    {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
).encode()
OVERLAP = json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}).encode()
WIDE = json.dumps({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}).encode()
DEEP = b'{"__metadata__": {"facts": "' + b"[" * 100_000 + b'"}}'
BOMBS: dict[str, bytes] = {
    "voxels.nii": nifti((10_000, 10_000, 10_000)),
    "axes.nii": nifti((32767,) * 7),
    "bytes.nii": nifti((2000, 1000, 1000), 64, 64),
    "scaled.nii": nifti((2000, 1000, 1000), 2, 8, slope=0.5),
    "complex.nii": nifti((1000, 1000, 1000), 1792, 128),
    "negative.nii": nifti((-5, 100, 100)),
    "offset.nii": nifti((10, 10, 10), offset=1e12),
    "no_offset.nii": nifti((10, 10, 10), offset=float("nan")),
    "voxels2.nii": nifti2((10**6, 10**6, 1)),
    "overflow.nii": nifti2((2**40, 2**40, 2**40)),
    "voxels.nii.gz": gzip.compress(nifti((10_000, 10_000, 10_000))),
    "extensions.nii.gz": gzip.compress(nifti((10, 10, 10), offset=1e9) + b"\1\0\0\0" + struct.pack("<II", 10**9, 0)),
    "zeros.nii.gz": gzip.compress(nifti((2000, 1000, 1000)) + bytes(2_000_000)),
    "wide_zeros.nii.gz": gzip.compress(nifti((500, 500, 500), 64, 64, slope=2) + bytes(1_000_000)),
    "two.nii.gz": gzip.compress(gzip.compress(bytes(5_000_000))),
    "many.nii.gz": gzip.compress(b"") * 10_000,
    "wide.png": png(100_000, 100_000),
    "colour.png": png(60_000, 60_000, 8, 2),
    "deep.png": png(60_000, 60_000, 16, 6),
    "long.png": png(2**31 - 1, 1),
    "all.png": png(2**31 - 1, 2**31 - 1),
    "wide.tif": tiff(100_000, 100_000),
    "deep.tif": tiff(60_000, 60_000, 64),
    "long.tif": tiff(2**32 - 1, 1),
    "all.tif": tiff(2**32 - 1, 2**32 - 1),
    "length.safetensors": safetensors(b"{}", 2**62),
    "header.safetensors": safetensors(b"{}", 2**27),
    "many.safetensors": safetensors(MANY),
    "overlap.safetensors": safetensors(OVERLAP, content=bytes(8)),
    "shape.safetensors": safetensors(WIDE, content=bytes(8)),
    "deep.safetensors": safetensors(DEEP),
    "shape.npz": npz("(100000, 100000, 100)"),
    "overflow.npz": npz("(4611686018427387904, 4)"),
    "zeros.npz": npz("(2, 1000, 1000, 500)", bytes(2_000_000)),
    "object.npz": npz("(1,)", b"x" * 8, "|O"),
    "text.npz": npz("(1,)", b"x" * 400, "<U100"),
    "deep.json": b"[" * 1_000_000,
    "deep_object.json": b'{"datasets":' * 100_000,
    "digits.json": b"1" * 1_000_000,
    "field.csv": b"case,image\n" + b"x" * 1_000_000 + b",y.png\n",
    "columns.csv": b",".join(b"c%d" % i for i in range(10_000)) + b"\n",
}  # fmt: skip

# Runs in a process of its own, where memory can be measured: prints the CPU time and memory that each file took.
MEASURE = """
import json, resource, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import logging; logging.disable()
from anysite import atomic, runs
from anysite.data import files
from anysite.data.layouts import open_dataset
from anysite.data.probabilities import read_probabilities
from anysite.errors import AnysiteError
import PIL.PngImagePlugin
READERS = {".npz": read_probabilities, ".safetensors": runs.load_tensors, ".json": open_dataset, ".csv": open_dataset}
PEAK = Path("/proc/self/status")
def peak():
    return int(next(l.split()[1] for l in PEAK.read_text().splitlines() if l.startswith("VmHWM"))) / 1024
def resident():
    return int(next(l.split()[1] for l in PEAK.read_text().splitlines() if l.startswith("VmRSS"))) / 1024
results = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = resident(), time.process_time()
    try:
        READERS.get(path.suffix, files.read)(path)
        outcome = "accepted"
    except AnysiteError as error:
        outcome = "refused"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    results[path.name] = [outcome, round(1000 * (time.process_time() - began), 1), round(peak() - before, 1)]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float, float]]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("asks Linux for the memory of a process")
    folder = tmp_path_factory.mktemp("bombs")
    for name, content in BOMBS.items():
        (folder / name).write_bytes(content)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def test_files_that_claim_too_much_are_refused_before_they_take_memory(
    measured: dict[str, tuple[str, float, float]],
) -> None:
    assert len(measured) == len(BOMBS) >= 30
    assert {name: told for name, (told, _, _) in measured.items() if told != "refused"} == {}
    assert {name: megabytes for name, (_, _, megabytes) in measured.items() if megabytes > 64} == {}


@pytest.mark.slow
def test_files_that_claim_too_much_are_refused_at_once(measured: dict[str, tuple[str, float, float]]) -> None:
    assert {name: ms for name, (_, ms, _) in measured.items() if ms > 100} == {}


# The guard of conftest.py


def test_no_test_reaches_a_network(network_report: Path) -> None:
    with pytest.raises(PermissionError, match="a test asked for"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    script = "import socket; socket.getaddrinfo('example.org', 80)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "a test asked for the address of example.org" in result.stderr
    assert len(network_report.read_text().splitlines()) == 2
    network_report.unlink()  # as expected here
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname()).close()
