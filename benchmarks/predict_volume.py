"""Seconds and memory to segment a 192 x 192 x 96 volume, beside MONAI's sliding window in float32.

Run as `python benchmarks/predict_volume.py [--rounds 3] [--steps 1500] [--folder DIR] [--output
benchmarks/predict_volume.json]`. A 3-D network is trained on the phantom first (in DIR, where it is kept and used
again), so that the masks compared are real ones; the volume is a mosaic of the unseen and held-out cases. Both
sides take the same grid tensor, weights, windows (48^3, half overlapping, Gaussian) and batch of windows, and end
with a label map; neither mirrors. Each side is a process of its own; its peak memory includes the libraries.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from monai.inferers.utils import sliding_window_inference

from anysite import atomic, compute, config, runs
from anysite.data.case import Dataset
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.patches import prepare
from anysite.segment import Segmenter
from anysite.train import train
from side_by_side import Advance, taking_turns

SHAPE = (96, 192, 192)
SIDE = 48  # of a phantom, whose cases lie side by side in the volume
WINDOWS = 4


def dice_of(a: torch.Tensor, b: torch.Tensor, classes: int) -> list[float]:
    """Return the Dice of each foreground class of two label maps."""
    pairs = [(a == index, b == index) for index in range(1, classes)]
    return [2 * int((one & other).sum()) / (int(one.sum()) + int(other.sum())) for one, other in pairs]


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
    image, _ = mosaic(run, open_dataset(folder / "phantom"))
    return run, image


def mosaic(run: runs.Run, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Return image and label of the volume: cases the network was not trained on, on its grid, side by side."""
    cases = [case for case in dataset.cases if case.id not in run.splits["training"]]
    image = torch.zeros(1, *SHAPE)
    label = torch.zeros(SHAPE, dtype=torch.uint8)
    corners = itertools.product(*(range(0, length, SIDE) for length in SHAPE))
    for corner, case in zip(corners, itertools.cycle(cases), strict=False):
        prepared = prepare(case, dataset, run.plan, 0)
        # A case that does not fill its place leaves zeros, its mean; one that is larger is cut.
        size = [min(n, SIDE) for n in prepared.label.shape]
        to = tuple(slice(c, c + n) for c, n in zip(corner, size, strict=True))
        of = tuple(slice(0, n) for n in size)
        image[(0, *to)] = prepared.image[(0, *of)].float()
        label[to] = prepared.label[of].to(torch.uint8)
    return image, label


def compare(folder: Path, rounds: int, steps: int) -> dict[str, object]:
    """Return seconds and peak memory of both sides, their ratio and the agreement of their masks."""
    if not (folder / "run" / runs.MANIFEST).is_file():
        write_phantom(folder / "phantom", dimension=3, patients_per_site=16)
    dataset = open_dataset(folder / "phantom")
    overrides = [f"train.steps={steps}", f"plan.patch_size={[SIDE] * 3}", 'test_domains=["west"]']
    run = train(dataset, config.load("baseline", overrides), folder / "run", resume=True)
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
    classes = len(dataset.classes)
    truth = dice_of(masks["monai"], mosaic(run, dataset)[1], classes)
    agreement = dice_of(masks["anysite"], masks["monai"], classes)
    voxels = float((masks["anysite"] == masks["monai"]).float().mean())
    return {
        "shape": "x".join(map(str, SHAPE)),
        **{f"{side}_seconds": round(value, 2) for side, value in median.items()},
        "ratio": round(median["monai"] / median["anysite"], 2),
        "dice_with_truth": [round(value, 3) for value in truth],
        "dice_between_masks": [round(value, 5) for value in agreement],
        "voxels_agreeing": round(voxels, 6),
        **peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--folder", type=Path, help="keep phantom and run here, and use them again")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    threads = compute.use_threads()
    with tempfile.TemporaryDirectory() as name:
        row = compare(arguments.folder or Path(name), arguments.rounds, arguments.steps)
    row |= {"threads": threads, "precision": compute.choose_precision("auto"), "commit": runs.commit()}
    print(row)
    if arguments.output:
        atomic.write_json(arguments.output, [row])


if __name__ == "__main__":
    main()
