"""Where DICOM files lie: alone, in a folder or in a ZIP, and which of several series a path chooses."""

from __future__ import annotations

import errno
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from anysite.data.limits import MAX_VOXELS
from anysite.errors import FileFormatError

SUFFIXES = (".dcm", ".zip")
MAGIC_END = 132  # bytes that every DICOM file begins with
MAX_MEMBERS = 100_000
MAX_BYTES = 2 * MAX_VOXELS
# Of a ZIP that unpacks to more than a few series' worth of bytes.
MAX_RATIO, HARMLESS_BYTES = 100, 2**26
DAMAGED_ZIP = (
    *(OSError, EOFError, ValueError, RuntimeError, NotImplementedError, MemoryError, LookupError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)

Members = Mapping[str, Callable[[], io.BufferedIOBase]]


def split_choice(path: Path) -> tuple[Path, tuple[int, ...]]:
    """Split `study#3` into what lies on disk and the numbers chosen of it, none where nothing is chosen.

    Several numbers, of segments of a label, are joined by `+`.
    """
    path = Path(path)
    match = re.fullmatch(r"(.+)#(\d{1,9}(?:\+\d{1,9})*)", path.name)
    if match is None or is_there(path):
        return path, ()
    return path.with_name(match[1]), tuple(int(number) for number in match[2].split("+"))


def is_dicom(path: Path) -> bool:
    """Tell whether a path names DICOM: by suffix, by the file's magic number, or a folder that holds such files."""
    base, _ = split_choice(path)
    if is_there(base, Path.is_dir):
        return any(_belongs(entry) for entry in _files_in(base))
    return base.suffix.lower() in SUFFIXES or has_magic(base)


def is_there(path: Path, test: Callable[[Path], bool] = Path.exists) -> bool:
    """Tell what a test says of a path; False of names that no file can have, which tables may hold."""
    try:
        return test(path)
    except ValueError:
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def has_magic(path: Path) -> bool:
    """Tell whether a file begins as DICOM files do."""
    try:
        with path.open("rb") as file:
            return _is_magic(file.read(MAGIC_END))
    except (OSError, ValueError):  # of a name that no file can have
        return False


@contextmanager
def opened(base: Path) -> Iterator[Members]:
    """Yield the DICOM files of a file, folder or ZIP by name; each value opens one for reading.

    Nothing is unpacked to disk. Of a folder only the files directly in it count, of a ZIP all.

    Raises:
        FileFormatError: nothing is there, or a ZIP that is damaged, encrypted or too large.
    """
    if base.is_dir():
        yield _members_of(base)
    elif not base.is_file():
        raise FileFormatError("no such file or folder", where=base)
    elif base.suffix.lower() == ".zip":
        with _opened_zip(base) as members:
            yield members
    else:
        yield {base.name: partial(base.open, "rb")}


def name_member(name: str, members: Members) -> str:
    """Return how a message names one of the files: by its name, unless that holds a UID."""
    if re.search(r"\d+(\.\d+){3}", name):
        return f"file {sorted(members).index(name) + 1} of {len(members)} by name"
    return Path(name).name


@contextmanager
def _opened_zip(base: Path) -> Iterator[Members]:
    try:
        archive = zipfile.ZipFile(base)
    except DAMAGED_ZIP as error:
        raise FileFormatError(f"not readable as ZIP ({type(error).__name__})", where=base) from None
    with archive:
        entries = [
            entry
            for entry in archive.infolist()
            if not entry.is_dir() and not re.search(r"(^|/)(\.|__MACOSX/)", entry.filename)
        ]
        _require_small(entries, base)
        members = {entry.filename: partial(_open_entry, archive, entry, base) for entry in entries}
        yield {name: members[name] for name in sorted(members) if _counts(archive, name, base)}


def _require_small(entries: list[zipfile.ZipInfo], base: Path) -> None:
    if any(entry.flag_bits & 0x1 for entry in entries):
        raise FileFormatError("an encrypted ZIP", where=base, fix="unpack it first")
    size = sum(entry.file_size for entry in entries)
    packed = sum(entry.compress_size for entry in entries)
    if len(entries) > MAX_MEMBERS or size > MAX_BYTES:
        raise FileFormatError(
            f"a ZIP of {len(entries)} files and {size} bytes unpacked",
            where=base,
            expected=f"at most {MAX_MEMBERS} files and {MAX_BYTES} bytes",
        )
    if size > HARMLESS_BYTES and size > MAX_RATIO * packed:
        raise FileFormatError(
            f"a ZIP that unpacks to {size / max(packed, 1):.0f} times its size",
            where=base,
            expected=f"at most {MAX_RATIO} times, as images do",
        )


def _counts(archive: zipfile.ZipFile, name: str, base: Path) -> bool:
    if name.lower().endswith(".dcm"):
        return True
    try:
        with archive.open(name) as file:
            return _is_magic(file.read(MAGIC_END))
    except DAMAGED_ZIP as error:
        raise FileFormatError(f"a damaged ZIP ({type(error).__name__})", where=base) from None


def _open_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, base: Path) -> io.BufferedIOBase:
    try:
        return io.BytesIO(archive.read(entry))
    except DAMAGED_ZIP as error:
        raise FileFormatError(f"a damaged ZIP ({type(error).__name__})", where=base) from None


def _members_of(folder: Path) -> Members:
    listed = {path.name: path for path in _files_in(folder)}
    members = {name: partial(path.open, "rb") for name, path in listed.items() if _belongs(path)}
    for name, path in listed.items():
        # Without its first or last slice a series would look whole.
        if members and not path.suffix and name not in members and (fault := _find_damage(path)):
            everything = {other: partial(file.open, "rb") for other, file in listed.items()}
            raise FileFormatError(
                f"{name_member(name, everything)}: {fault}",
                where=folder,
                expected="whole DICOM files",
                fix="copy it again if it is a slice, else move it away",
            )
    return members


def _find_damage(path: Path) -> str:
    """Return what makes a file without suffix seem a damaged slice; nothing where it is of another kind."""
    size = path.stat().st_size
    if size < MAGIC_END:
        return f"a file of {size} bytes"
    with path.open("rb") as file:
        beginning = file.read(MAGIC_END)
    if not any(beginning):
        return "a file that begins with nothing but zeros"
    # The first group of elements, which follows where the preamble is missing.
    return "a DICOM file without its preamble" if beginning[:2] in (b"\x02\0", b"\x08\0") else ""


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())


def _belongs(path: Path) -> bool:
    return path.suffix.lower() == ".dcm" or has_magic(path)


def _is_magic(beginning: bytes) -> bool:
    return beginning[128:MAGIC_END] == b"DICM"
