"""Seconds and memory to segment a 192 x 192 x 96 volume, beside MONAI's sliding window in float32.

Run as `python benchmarks/predict_volume.py [--rounds 3] [--steps 400] [--output benchmarks/predict_volume.json]`.
A 3-D network is trained on the phantom first, so that the masks compared are real ones. Both sides take the same
grid tensor, weights, windows (64^3, half overlapping, Gaussian) and batch of windows, and end with probabilities;
neither mirrors. Each side is a process of its own; its peak memory includes the libraries.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from monai.inferers.utils import sliding_window_inference

from anysite import atomic, compute, config, runs
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.segment import Segmenter
from anysite.train import train
from side_by_side import Advance, taking_turns

SHAPE = (96, 192, 192)
EXTENT_MM = (160.0, 192.0, 192.0)  # of the phantom, slice axis first
WINDOWS = 4


def dice_of(a: torch.Tensor, b: torch.Tensor, classes: int) -> float:
    """Return the smallest Dice over foreground classes of two label maps."""
    scores = []
    for index in range(1, classes):
        one, other = a == index, b == index
        if one.any() or other.any():
            scores.append(2 * int((one & other).sum()) / (int(one.sum()) + int(other.sum())))
    return min(scores)


def prepare_anysite(folder: Path) -> Advance:
    """Return a function that predicts the volume and returns its label map."""
    compute.use_threads()
    run, grid = _open(folder)
    predict = run.config.predict.model_copy(update={"flips": False, "batch_size": WINDOWS})
    segmenter = Segmenter([run], predict)
    return lambda: segmenter.predict_grid(grid)[0].argmax(0).to(torch.uint8)


def prepare_monai(folder: Path) -> Advance:
    """Return a function that predicts the volume by MONAI's inferer in float32 and returns its label map."""
    warnings.simplefilter("ignore")
    compute.use_threads()
    run, grid = _open(folder)
    network = run.network()

    @torch.inference_mode()
    def predict() -> torch.Tensor:
        logits = sliding_window_inference(
            grid[None], run.plan.patch_size, WINDOWS, network, overlap=0.5, mode="gaussian", sigma_scale=0.125
        )
        assert isinstance(logits, torch.Tensor)
        return torch.softmax(logits, dim=1)[0].argmax(0).to(torch.uint8)

    return predict


def _open(folder: Path) -> tuple[runs.Run, torch.Tensor]:
    run = runs.open_run(folder / "run")
    dataset = open_dataset(folder / "phantom")
    # The network was trained on this fine grid, on which a phantom has the size of a clinical volume.
    image = dataset.cases[0].image().oriented(run.plan.axes).resampled_to(SHAPE, "cubic")
    plan = run.plan.model_copy(update={"spacing": image.spacing})
    return dataclasses.replace(run, plan=plan), plan.to_grid(image)


def compare(rounds: int, steps: int) -> dict[str, float | int | str]:
    """Return seconds and peak memory of both sides, their ratio and the agreement of their masks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = open_dataset(write_phantom(folder / "phantom", dimension=3, size=72, patients_per_site=4))
        spacing = tuple(round(e / n, 4) for e, n in zip(EXTENT_MM, SHAPE, strict=True))
        overrides = [f"train.steps={steps}", "plan.patch_size=[64, 64, 64]", "plan.dimension=3d"]
        overrides.append(f"plan.spacing={list(spacing)}")
        train(dataset, config.load("baseline", overrides), folder / "run")
        sides = {"anysite": (prepare_anysite, (folder,)), "monai": (prepare_monai, (folder,))}
        taken: dict[str, list[float]] = {side: [] for side in sides}
        masks: dict[str, torch.Tensor] = {}
        with taking_turns(sides) as started:
            for _ in range(rounds):
                for side, process in started.items():
                    seconds, masks[side] = process.run(1)
                    taken[side].append(seconds)
            peaks = {f"{side}_peak_memory_mb": process.stop() for side, process in started.items()}
    median = {side: statistics.median(values) for side, values in taken.items()}
    agreement = dice_of(masks["anysite"], masks["monai"], len(dataset.classes))
    return {
        "shape": "x".join(map(str, SHAPE)),
        **{f"{side}_seconds": round(value, 2) for side, value in median.items()},
        "ratio": round(median["monai"] / median["anysite"], 2),
        "smallest_class_dice_between_masks": round(agreement, 5),
        **peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    threads = compute.use_threads()
    row = compare(arguments.rounds, arguments.steps)
    row |= {"threads": threads, "precision": compute.choose_precision("auto"), "commit": runs.commit()}
    print(row)
    if arguments.output:
        atomic.write_json(arguments.output, [row])


if __name__ == "__main__":
    main()
