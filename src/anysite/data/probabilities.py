"""Probabilities beside a mask: one compressed array a case, as nnU-Net writes them."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float

from anysite import atomic
from anysite.data.limits import require_modest
from anysite.data.volume import Volume
from anysite.errors import FileFormatError

NAME = "probabilities"
DAMAGED = (
    *(OSError, ValueError, EOFError, MemoryError, NotImplementedError, RuntimeError, ArithmeticError),
    *(LookupError, TypeError, AttributeError, SyntaxError, zipfile.BadZipFile, zlib.error, struct.error),
)


def write_probabilities(probabilities: Volume, path: Path) -> None:
    """Write `(K, *S)` probabilities as `.npz` with the array "probabilities", atomically.

    Raises:
        FileFormatError: the file cannot be written.
    """
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, probabilities=probabilities.array.astype(np.float16))


def read_probabilities(path: Path) -> Float[np.ndarray, "k *s"]:
    """Read what `write_probabilities` wrote, in float32.

    Raises:
        FileFormatError: the file is missing, damaged or holds something else.
    """
    try:
        _require_modest(path)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            probabilities = content[NAME].astype(np.float32)
    except FileFormatError:
        raise
    except DAMAGED as error:
        raise FileFormatError(f"not readable as probabilities ({error})", where=path) from error
    if probabilities.ndim < 2:
        raise FileFormatError(
            f"an array of shape {probabilities.shape}",
            where=path,
            expected="one map of probabilities a class",
        )
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise FileFormatError("values that are no probabilities", where=path, expected="numbers from 0 to 1")
    return probabilities


def _require_modest(path: Path) -> None:
    """Compare what the array's header claims with what the archive says of it, and both with the limits."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{NAME}.npy")
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(file)
            start = file.tell()
    if dtype.kind != "f":
        raise FileFormatError(f"values of type {dtype}", where=path, expected="probabilities")
    voxels = math.prod(shape)
    require_modest(path, voxels, 4 * voxels)  # read as float32
    if start + voxels * dtype.itemsize != member.file_size:
        raise FileFormatError(
            f"{member.file_size} bytes",
            where=path,
            expected=f"exactly {start + voxels * dtype.itemsize} by the array's header",
        )
