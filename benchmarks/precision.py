"""Seconds of a training step and of a prediction in bfloat16 beside float32, on this processor, taking turns.

Run as `python benchmarks/precision.py [--rounds 4] [--threads 1] [--output FILE]`: the baseline's U-Net without data.
The rows say whether the processor multiplies tiles of bfloat16 (AMX) or vectors alone (AVX-512).
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch

from anysite import compute
from anysite.networks.unet import UNet
from side_by_side import Advance, report_dimensions, taking_turns

SHAPES = {2: (8, 1, 192, 192), 3: (2, 1, 64, 64, 64)}
PRECISIONS = ("32-true", "bf16-mixed")


def prepare(dimension: int, precision: str, training: bool, threads: int) -> Advance:
    """Return a function that takes one training step, or predicts one batch."""
    warnings.simplefilter("ignore")
    compute.use_threads(threads)
    compute.keep_freed_memory()
    shape = SHAPES[dimension]
    network = UNet(1, 4, shape[2:])
    network.to(memory_format=network.memory_format)  # pyright: ignore[reportCallIssue]
    network.train(training)
    compute.protect_small_convolutions(network)
    batch = torch.randn(shape).contiguous(memory_format=network.memory_format)
    optimizer = torch.optim.AdamW(network.parameters())

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return network(batch).float()

    def step() -> None:
        optimizer.zero_grad()
        forward().square().mean().backward()
        optimizer.step()

    def predict() -> None:
        with torch.inference_mode():
            forward()

    return step if training else predict


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    def compare(dimension: int) -> dict[str, Any]:
        row: dict[str, Any] = {"dimension": dimension}
        for kind, training in (("step", True), ("prediction", False)):
            sides = {p: (prepare, (dimension, p, training, arguments.threads)) for p in PRECISIONS}
            with taking_turns(sides) as started:
                for side in started.values():
                    side.run(1)
                rounds = [
                    {name: side.run(2)[0] for name, side in started.items()} for _ in range(arguments.rounds)
                ]
            seconds = {name: statistics.median(one[name] for one in rounds) for name in PRECISIONS}
            row |= {f"{kind}_{name}_s": round(value, 4) for name, value in seconds.items()}
            row[f"{kind}_float32_over_bfloat16"] = round(seconds["32-true"] / seconds["bf16-mixed"], 2)
        return row

    able = torch.cpu.get_capabilities()
    report_dimensions(
        compare, arguments.output, threads=arguments.threads,
        **{name: bool(able.get(name)) for name in ("amx_bf16", "avx512_bf16")},
    )  # fmt: skip


if __name__ == "__main__":
    main()
