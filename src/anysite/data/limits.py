"""What images can be: how large a file may claim to be, decided from its header, and where Hounsfield units begin."""

from __future__ import annotations

from pathlib import Path

from anysite.errors import FileFormatError

MAX_VOXELS = 2**31
MAX_BYTES = 2**33  # in memory, eight times a CT of the whole body
# One layer of gzip makes nothing smaller than a 1032nd, which a mask with little in it nearly reaches.
UNSUSPICIOUS_BYTES, MAX_RATIO = 2**30, 1100
MAX_INTENSITY = 1e18  # its square is a number in single precision
HOUNSFIELD_BELOW = -500.0  # air lies near -1000, and no other common scale goes so low


def require_modest(path: Path, voxels: int, bytes_in_memory: int) -> None:
    """Refuse what no image is: too many voxels or bytes, or a small file that would unpack to gigabytes.

    Raises:
        FileFormatError: the file claims so.
    """
    if voxels > MAX_VOXELS:
        raise FileFormatError(f"{voxels} voxels", where=path, expected=f"at most {MAX_VOXELS}")
    if bytes_in_memory > MAX_BYTES:
        raise FileFormatError(
            f"{bytes_in_memory} bytes of voxels", where=path, expected=f"at most {MAX_BYTES}"
        )
    stored = max(1, path.stat().st_size)
    if bytes_in_memory > UNSUSPICIOUS_BYTES and bytes_in_memory > MAX_RATIO * stored:
        raise FileFormatError(
            f"a file of {stored} bytes that would unpack to {bytes_in_memory}",
            where=path,
            expected=f"at most {MAX_RATIO} times its size",
            fix="store it with a smaller data type, or uncompressed",
        )
