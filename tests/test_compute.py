"""What the machine can do, as told by simulated machines."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from anysite import compute


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_as_set_or_as_many_as_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute.use_threads(2) == 2 == torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert compute.use_threads() == 3 == torch.get_num_threads()
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert compute.use_threads(0) == 1 == torch.get_num_threads()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": True}, "bf16-mixed"),
        ({"avx512_bf16": True, "amx_bf16": False}, "32-true"),
        ({"avx512_bf16": False, "avx512_f": True}, "32-true"),
        ({}, "32-true"),
    ],
)
def test_bfloat16_only_where_the_processor_multiplies_tiles_of_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert compute.choose_precision("auto") == expected
    for setting in ("32-true", "bf16-mixed"):
        assert compute.choose_precision(setting) == setting


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_bfloat16_on_a_graphics_processor_is_never_emulated(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
    )
    assert compute.choose_precision("auto", "cuda") == expected


def test_the_accelerator_as_set_or_as_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert compute.choose_accelerator() == expected
        assert compute.choose_accelerator("cpu") == "cpu"


def test_memory_is_kept_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        accepts = 1

        def mallopt(self, parameter: int, value: int) -> int:
            calls.append((parameter, value))
            return self.accepts

    library = Library()
    monkeypatch.setattr(compute.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(compute.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert compute.keep_freed_memory()
    # malloc.h: M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD is -3; values are C ints.
    assert {parameter for parameter, _ in calls} == {-1, -3}
    assert all(2**27 <= value < 2**31 for _, value in calls)
    library.accepts = 0
    assert not compute.keep_freed_memory()
    monkeypatch.setattr(compute.platform, "libc_ver", lambda: ("", ""))
    calls.clear()
    assert not compute.keep_freed_memory()
    assert not calls


@pytest.mark.skipif(compute.platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_freed_memory_that_was_kept_is_given_back_when_asked() -> None:
    program = (
        "from anysite import compute\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "compute.keep_freed_memory()\n"
        "import torch\n"
        "blocks = [torch.ones(2**18) for _ in range(100)]\n"
        "del blocks\n"
        "kept = resident()\n"
        "compute.release_freed_memory()\n"
        "print(kept - resident())\n"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(said.stdout) > 50 * 2**20


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "groups"),
    [
        *(((2, 2, 2), 3, 1, 1), ((2, 4, 6), 3, 1, 1), ((2, 2, 2), 3, 1, 32), ((3, 4, 4), 5, 1, 1)),
        *(
            ((4, 1, 1), 3, 2, 1),
            ((1, 1), 3, 2, 1),
            ((2, 1), 3, 2, 1),
            ((4, 4, 4), 3, 1, 1),
            ((8, 8), 3, 2, 1),
        ),
    ],
)
def test_gradients_of_small_convolutions_in_bfloat16_are_those_of_float32(
    size: tuple[int, ...], kernel: int, stride: int, groups: int
) -> None:
    """Memory is filled with NaN before each step, where a kernel that reads what nobody wrote will find it."""
    build = nn.Conv2d if len(size) == 2 else nn.Conv3d
    torch.manual_seed(0)
    protected = nn.Sequential(build(32, 32, kernel, stride, padding=kernel // 2, groups=groups))
    plain = copy.deepcopy(protected)
    compute.protect_small_convolutions(protected)
    image = torch.randn(4, 32, *size)
    upstream = torch.randn_like(plain(image))
    plain(image).backward(upstream)
    expected = plain[0].weight.grad
    assert isinstance(expected, torch.Tensor)
    for _ in range(4):
        filled = [torch.full((count,), torch.nan) for count in (10**3, 10**4, 10**5, 10**6)]
        del filled
        protected.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            result = protected(image)
        result.backward(upstream.to(result.dtype))
        found = protected[0].weight.grad
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))
    assert list(protected.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(protected(image), plain(image))
