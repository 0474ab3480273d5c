"""Seconds of a training step with the pieces of RAM-DSIR, beside the baseline's, taking turns.

Run as `python benchmarks/ram_dsir_step.py [--threads 2] [--rounds 6] [--output benchmarks/ram_dsir_step.json]`.
Amplitude mixing is also timed by itself, on the batch of a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from anysite import atomic, compute, config, runs
from anysite.augment import mix_with_partners
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.loop import Training
from anysite.plan import learn_plan
from anysite.splits import split
from anysite.train import build_training, start_fabric

PATCHES = {2: "[192, 192]", 3: "[64, 64, 64]"}
STEPS = 2
VARIANTS = {
    "baseline": [],
    "ram": ["objectives.ram_dsir={consistency_weight=0, restoration_weight=0}"],
    "dsir": ["objectives.ram_dsir={mixing=false, supervised_weight=0, consistency_weight=0}"],
    "ram_dsir": ["objectives.ram_dsir={}"],
    "ram_dsir_at_full_resolution": ["objectives.ram_dsir={restoration_factor=1}"],
}


def prepare(dimension: int, folder: Path, threads: int) -> dict[str, Training]:
    """Return a training for each variant, on the same phantom."""
    size = 192 if dimension == 2 else 72
    dataset = open_dataset(
        write_phantom(folder / "phantom", dimension=dimension, size=size, patients_per_site=4)
    )
    trainings = {}
    for name, overrides in VARIANTS.items():
        settings = config.load(
            "baseline",
            [f"plan.patch_size={PATCHES[dimension]}", f"train.threads={threads}", *overrides]
            + ["train.sampling=domain", "train.steps=100000", "train.diagnose_every=0"],
        )
        plan = learn_plan(dataset, settings.plan)
        runs.start(folder / name, settings, plan, split(dataset, settings).as_ids())
        trainings[name] = build_training(start_fabric(settings), dataset, settings, folder / name)
    return trainings


def compare(dimension: int, rounds: int, threads: int) -> dict[str, Any]:
    """Return the seconds of a step of every variant, their ratios, and the share of the mixing."""
    with tempfile.TemporaryDirectory() as name:
        trainings = prepare(dimension, Path(name), threads)
        batches = {variant: training.batches() for variant, training in trainings.items()}
        taken: dict[str, list[float]] = {variant: [] for variant in (*trainings, "mixing")}
        for turn in range(rounds + 1):  # the first one warms up
            for variant, training in trainings.items():
                began = time.perf_counter()
                for _ in range(STEPS):
                    training.take_step(next(batches[variant]))
                taken[variant].append((time.perf_counter() - began) / STEPS)
            batch = trainings["baseline"].sampler.batch(turn)
            began = time.perf_counter()
            mix_with_partners(batch.image, batch.domain, (0.0, 1.0), 0.1)
            taken["mixing"].append(time.perf_counter() - began)
            if not turn:
                taken = {variant: [] for variant in taken}
    median = {variant: statistics.median(values) for variant, values in taken.items()}
    base = median["baseline"]
    return {
        "dimension": dimension,
        "baseline_seconds_a_step": round(base, 3),
        **{f"{variant}_ratio": round(median[variant] / base, 2) for variant in list(VARIANTS)[1:]},
        "mixing_share_of_baseline_step": round(median["mixing"] / base, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    threads = compute.use_threads(arguments.threads)
    compute.keep_freed_memory()
    rows = []
    for dimension in (2, 3):
        row = compare(dimension, arguments.rounds, threads)
        row |= {"threads": threads, "torch": torch.__version__, "commit": runs.commit()}
        print(row, flush=True)
        rows.append(row)
    if arguments.output:
        atomic.write_json(arguments.output, rows)


if __name__ == "__main__":
    main()
