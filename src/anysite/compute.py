"""What the machine at hand can do: threads, precision, memory."""

from __future__ import annotations

import ctypes
import os
import platform

import torch
from torch import Tensor, nn

from anysite.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**27  # larger blocks are whole volumes, which a step does not ask for again


def count_cores() -> int:
    """Return the number of CPU cores this process may use."""
    # sched_getaffinity knows of limits that cpu_count does not, but not every platform has it.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(count: int = 0) -> int:
    """Make PyTorch use `count` CPU threads, 0 for all cores this process may use; return the number."""
    count = count or count_cores()
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
    return count


def choose_precision(setting: str, accelerator: str = "cpu") -> str:
    """Return "bf16-mixed" for "auto" where bfloat16 is the faster one, "32-true" elsewhere.

    Of processors those that multiply tiles of bfloat16 (AMX): by vectors alone (AVX-512) a U-Net takes longer than in
    float32, as `benchmarks/precision.py` measures.
    """
    if setting != "auto":
        return setting
    if accelerator == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.cpu.get_capabilities().get("amx_bf16") else "32-true"


def protect_small_convolutions(module: nn.Module) -> None:
    """Let every convolution compute in float32 where its input is smaller than its kernel along an axis.

    There oneDNN, as of PyTorch 2.13, takes memory that nobody wrote for part of the weights' gradient in bfloat16:
    a 3-D convolution of kernel 3 over two slices learns noise, and now and then from NaN. The bottleneck of many
    networks is as small, and costs next to nothing.
    """
    for part in module.modules():
        if type(part) in _PROTECTED:
            part.__class__ = _PROTECTED[type(part)]


class _Protected(nn.Module):
    kernel_size: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        small = any(length < kernel for length, kernel in zip(input.shape[2:], self.kernel_size, strict=True))
        if not small or input.device.type != "cpu":
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


class _Convolution2d(_Protected, nn.Conv2d):
    pass


class _Convolution3d(_Protected, nn.Conv3d):
    pass


_PROTECTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: _Convolution2d,
    nn.Conv3d: _Convolution3d,
}


def choose_accelerator(setting: str = "auto") -> str:
    """Return "cuda" or "cpu"; "auto" takes a GPU where there is one.

    Raises:
        ConfigError: another name, or "cuda" without a GPU that PyTorch can use.
    """
    available = torch.cuda.is_available()
    if setting not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"accelerator {setting!r}", expected="auto, cpu or cuda")
    if setting == "cuda" and not available:
        raise ConfigError("no GPU that PyTorch can use", where="accelerator cuda", fix="use auto or cpu")
    return "cuda" if available and setting != "cpu" else "cpu"


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed blocks for the next step instead of returning them to the kernel.

    Every training step frees and asks for the same activations; with the default thresholds each of them is
    mapped and zeroed anew. Blocks above `KEPT_BYTES` are still returned at once. Returns whether the C library
    took the setting.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    taken = [
        library.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES), library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    ]  # fmt: skip
    return all(taken)


def release_freed_memory() -> None:
    """Give freed blocks that `keep_freed_memory` kept back to the kernel, before something large follows."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
