"""Probabilities beside a mask: one compressed array a case, as nnU-Net writes them."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float

from anysite import atomic
from anysite.data.volume import Volume
from anysite.errors import FileFormatError

DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def write_probabilities(probabilities: Volume, path: Path) -> None:
    """Write `(K, *S)` probabilities as `.npz` with the array "probabilities", atomically.

    Raises:
        FileFormatError: the file cannot be written.
    """
    try:
        with atomic.replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, probabilities=probabilities.array.astype(np.float16))
    except OSError as error:
        raise FileFormatError(f"cannot be written ({error.strerror})", where=path) from error


def read_probabilities(path: Path) -> Float[np.ndarray, "k *s"]:
    """Read what `write_probabilities` wrote, in float32.

    Raises:
        FileFormatError: the file is missing, damaged or holds something else.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            probabilities = content["probabilities"].astype(np.float32)
    except (*DAMAGED, KeyError, TypeError, AttributeError) as error:
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
