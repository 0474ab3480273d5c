"""Files are replaced whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anysite import atomic
from anysite.errors import FileFormatError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "old.nii.gz"
    path.write_text("old")
    return path


def assert_untouched(target: Path) -> None:
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_the_new_file_takes_the_place_of_the_old(target: Path) -> None:
    with atomic.replacing(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.name.endswith(".nii.gz")
        assert temporary.name.startswith(".")  # no glob for images finds it
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert target.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, FileFormatError("x"), SystemExit])
def test_an_error_inside_leaves_the_old_file(
    target: Path, error: type[BaseException] | BaseException
) -> None:
    def write() -> None:
        with atomic.replacing(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        write()
    assert_untouched(target)


@pytest.mark.parametrize("broken", ["fsync", "open", "rename"])
def test_a_failing_disk_leaves_the_old_file(
    target: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    message = r"old\.nii\.gz: cannot be written \(No space left on device\)\. Free space"
    with pytest.raises(FileFormatError, match=message), atomic.replacing(target) as temporary:  # noqa: PT012
        temporary.write_text("new")
        if broken == "rename":
            monkeypatch.setattr(Path, "replace", fail)
        else:
            monkeypatch.setattr(os, broken, fail)
    monkeypatch.undo()
    assert_untouched(target)


def test_content_is_on_the_disk_before_the_rename_and_the_rename_after(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def recorded_sync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112
        sync(descriptor)

    def recorded_replace(self: Path, other: Path) -> Path:
        events.append("rename")
        return replace(self, other)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    atomic.write_text(target, "new")
    assert events == ["file", "rename", "folder"]


def test_two_writers_at_once_do_not_meet(target: Path) -> None:
    with atomic.replacing(target) as first, atomic.replacing(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"  # the outer block ends last
    assert len(list(target.parent.iterdir())) == 1


@given(PLAIN)
def test_json_comes_back(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "deeper" / "content.json"
    atomic.write_json(path, content)
    assert atomic.read_json(path) == content


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_values_that_json_lacks_are_refused(target: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(target, value)
    assert_untouched(target)


@pytest.mark.parametrize("content", [b"", b"{", b"{'a': 1}", b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_json_names_the_file(target: Path, content: bytes) -> None:
    target.write_bytes(content)
    with pytest.raises(FileFormatError, match="not readable as JSON") as caught:
        atomic.read_json(target)
    assert caught.value.where == str(target)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file"):
        atomic.read_json(tmp_path / "none.json")


def test_sha256_of_a_known_text(target: Path) -> None:
    # FIPS 180-2, appendix B.1
    target.write_bytes(b"abc")
    assert atomic.sha256(target) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    target.write_bytes(bytes(range(256)) * 5000)
    assert atomic.sha256(target) == hashlib.sha256(bytes(range(256)) * 5000).hexdigest()


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    former = os.umask(0o077)
    try:
        atomic.write_text(tmp_path / "private.txt", "x")
        os.umask(0o002)
        atomic.write_text(tmp_path / "shared.txt", "x")
    finally:
        os.umask(former)
    assert (tmp_path / "private.txt").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "shared.txt").stat().st_mode & 0o777 == 0o664
