"""Writing files so that a crash, a full disk or a second writer never leaves half of one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anysite.errors import DataError, FileFormatError

TEMPORARY = re.compile(r"\.\d+\.partial-[0-9a-f]{8}-(.+)")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that takes its place when the block ends without an error.

    The temporary name keeps every suffix of `path`, so that writers choosing the format by suffix work.
    The file and its folder are fsynced before and after the rename; on any error the old file stays and
    the temporary one is removed.

    Raises:
        FileFormatError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f".{os.getpid()}.partial-{secrets.token_hex(4)}-{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile, whose files only the owner may read: the user's umask decides.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing `path`; the lock ends with the process that holds it, however that ends.

    Nobody else is writing the file then, so that what killed processes left of it is removed.

    Args:
        wait: Until another process is done, instead of raising an error.

    Raises:
        DataError: another process holds it.
        FileFormatError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    lock_path = path.with_name(f".{path.name}.lock")
    lock = FileLock(lock_path, blocking=wait)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        sweep(path.parent, [path.name])
    except Timeout:
        raise DataError("in use by another process", where=path, fix="wait for it, or stop it") from None
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps a file that is open
            lock_path.unlink()
        lock.release()


def sweep(folder: Path, names: Collection[str] | None = None) -> None:
    """Delete the temporary files that killed processes left in a folder: of the files `names`, or of all.

    Whoever calls this holds the lock on what is written there.
    """
    for path in folder.glob(".*.partial-*"):
        if (match := TEMPORARY.fullmatch(path.name)) and (names is None or match[1] in names):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8; parts of file names that are none are written as escapes.

    Raises:
        FileFormatError: the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` atomically, as indented JSON; NaN is refused because JSON has none."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def append(path: Path, text: str) -> None:
    """Add `text` to the end of `path`, as UTF-8; a kill may leave the last of it half-written, an error does not.

    Raises:
        FileFormatError: the file cannot be written.
    """
    try:
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                content = text.encode()
                while content:
                    content = content[file.write(content) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        with suppress(OSError):
            if not path.stat().st_size:
                path.unlink()
        raise _unwritable(path, error) from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileFormatError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # other programs write a mark first
    except FileNotFoundError:
        raise FileFormatError("no such file", where=path, expected="a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"not readable as JSON ({error})", where=path) from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unwritable(path: Path, error: OSError) -> FileFormatError:
    reason = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
    return FileFormatError(
        f"cannot be written ({reason})", where=path, fix="free space or choose another folder"
    )


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # a folder cannot be opened for syncing on Windows
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
