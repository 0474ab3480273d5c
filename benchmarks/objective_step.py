"""Seconds and peak memory of a training step with the pieces of a method, beside the baseline's, taking turns.

Run as `python benchmarks/objective_step.py METHOD [--threads 2] [--rounds 6] [--output benchmarks/METHOD_step.json]`.
For RAM-DSIR amplitude mixing is also timed by itself, on the batch of a step.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from anysite import compute, config, runs
from anysite.amplitude import mix_with_partners
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.loop import Training
from anysite.planning import learn_plan
from anysite.splits import split
from anysite.train import build_training, start_fabric
from side_by_side import Advance, report_dimensions, taking_turns

PATCHES = {2: "[192, 192]", 3: "[64, 64, 64]"}
STEPS = 2
VARIANTS = {
    "ram_dsir": {
        "ram": "ram_dsir={consistency_weight=0, restoration_weight=0}",
        "dsir": "ram_dsir={mixing=false, supervised_weight=0, consistency_weight=0}",
        "ram_dsir": "ram_dsir={}",
        "ram_dsir_at_full_resolution": "ram_dsir={restoration_factor=1}",
    },
    "medcontext": {"masked": "medcontext={consistency_weight=0}", "medcontext": "medcontext={}"},
}


def build(folder: Path, variant: str, objective: str, dimension: int, threads: int) -> Training:
    """Return a training on the phantom in `folder`, of the baseline plus one objective."""
    compute.use_threads(threads)
    compute.keep_freed_memory()
    dataset = open_dataset(folder / "phantom")
    settings = config.load(
        "baseline",
        [f"plan.patch_size={PATCHES[dimension]}", f"train.threads={threads}", "train.sampling=domain"]
        + [
            "train.steps=100000",
            "train.diagnose_every=0",
            *([f"objectives.{objective}"] if objective else []),
        ],
    )
    plan = learn_plan(dataset, settings.plan)
    runs.start(folder / variant, settings, plan, split(dataset, settings).as_ids())
    return build_training(start_fabric(settings), dataset, settings, folder / variant)


def prepare_step(*arguments: Any) -> Advance:
    """Return a function that takes one training step."""
    warnings.simplefilter("ignore")
    training = build(*arguments)
    batches = training.batches()

    def advance() -> None:
        training.take_step(next(batches))

    return advance


def prepare_mixing(*arguments: Any) -> Advance:
    """Return a function that mixes the amplitudes of one batch."""
    warnings.simplefilter("ignore")
    sampler = build(*arguments).sampler
    batches = itertools.cycle([sampler.batch(step) for step in range(8)])

    def advance() -> None:
        batch = next(batches)
        mix_with_partners(batch.image, batch.domain, (0.0, 1.0), 0.1)

    return advance


def compare(method: str, dimension: int, rounds: int, threads: int) -> dict[str, Any]:
    """Return the seconds of a step of every variant, and their ratios in time and peak memory."""
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), 192 if dimension == 2 else 72
        write_phantom(folder / "phantom", dimension=dimension, size=size, patients_per_site=4)
        variants = {"baseline": "", **VARIANTS[method]}
        sides: dict[str, Any] = {
            variant: (prepare_step, (folder, variant, objective, dimension, threads))
            for variant, objective in variants.items()
        }
        if method == "ram_dsir":
            sides["mixing"] = (prepare_mixing, (folder, "mixing", "", dimension, threads))
        taken: dict[str, list[float]] = {side: [] for side in sides}
        with taking_turns(sides) as started:
            for side in started.values():
                side.run(STEPS)
            for _ in range(rounds):
                for variant, side in started.items():
                    taken[variant].append(side.run(STEPS)[0])
            peak_mb = {variant: side.stop() for variant, side in started.items()}
    median = {variant: statistics.median(values) for variant, values in taken.items()}
    row: dict[str, Any] = {
        "method": method,
        "dimension": dimension,
        "baseline_seconds_a_step": round(median["baseline"], 3),
        "baseline_peak_memory_mb": peak_mb["baseline"],
    }
    for variant in VARIANTS[method]:
        row[f"{variant}_ratio"] = round(median[variant] / median["baseline"], 2)
        row[f"{variant}_peak_memory_ratio"] = round(peak_mb[variant] / peak_mb["baseline"], 2)
    if "mixing" in median:
        row["mixing_share_of_baseline_step"] = round(median["mixing"] / median["baseline"], 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=VARIANTS)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    threads = compute.use_threads(arguments.threads)
    report_dimensions(
        lambda dimension: compare(arguments.method, dimension, arguments.rounds, threads), arguments.output,
        threads=threads, torch=torch.__version__,
    )  # fmt: skip


if __name__ == "__main__":
    main()
