"""Seconds and memory to segment a 192 x 192 x 96 volume, beside MONAI's sliding window in float32.

Run as `python benchmarks/predict_volume.py [--rounds 3] [--steps 3000] [--folder DIR] [--output
benchmarks/predict_volume.json]`. A 3-D network is trained on the phantom first (in DIR, where it is kept and used
again). Both sides take the same grid tensor, weights, windows (48^3, half overlapping, Gaussian) and batch of
windows, and end with a label map; neither mirrors. The volume is a mosaic of cases, and each side times it in a
process of its own, whose peak memory includes the libraries. Masks are compared on the held-out cases themselves,
because a mosaic is no image that the network was trained for.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from monai.inferers.utils import sliding_window_inference

from anysite import atomic, compute, config, provenance, runs
from anysite.data.case import Dataset
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.segment import Segmenter
from anysite.train import train
from side_by_side import Advance, taking_turns

SHAPE = (96, 192, 192)
SIDE = 48  # of a phantom, whose cases lie side by side in the volume
WINDOWS = 4


Predict = Callable[[torch.Tensor], torch.Tensor]


def anysite_of(run: runs.Run) -> Predict:
    """Return anysite's way from an image on the grid to a label map."""
    predict = run.config.predict.model_copy(update={"flips": False, "batch_size": WINDOWS})
    segmenter = Segmenter([run], predict)
    return lambda image: segmenter.predict_grid(image)[0].argmax(0).to(torch.uint8)


def monai_of(run: runs.Run) -> Predict:
    """Return MONAI's way, in float32."""
    network = run.network()

    @torch.inference_mode()
    def predict(image: torch.Tensor) -> torch.Tensor:
        logits = sliding_window_inference(
            image[None],
            run.plan.patch_size,
            WINDOWS,
            network,
            overlap=0.5,
            mode="gaussian",
            sigma_scale=0.125,
        )
        assert isinstance(logits, torch.Tensor)
        return torch.softmax(logits, dim=1)[0].argmax(0).to(torch.uint8)

    return predict


def prepare(folder: Path, way_of: Callable[[runs.Run], Predict]) -> Advance:
    """Return a function that predicts the volume."""
    warnings.simplefilter("ignore")
    compute.use_threads()
    run = runs.open_run(folder / "run")
    predict, volume = way_of(run), mosaic(run, open_dataset(folder / "phantom"))
    return lambda: predict(volume).sum()


def mosaic(run: runs.Run, dataset: Dataset) -> torch.Tensor:
    """Return the volume: cases on the network's grid, side by side."""
    volume = torch.zeros(1, *SHAPE)
    corners = itertools.product(*(range(0, length, SIDE) for length in SHAPE))
    for corner, case in zip(corners, itertools.cycle(dataset.cases), strict=False):
        image = run.plan.to_grid(case.image())[:, :SIDE, :SIDE, :SIDE]
        place = tuple(slice(c, c + n) for c, n in zip(corner, image.shape[1:], strict=True))
        volume[(slice(None), *place)] = image
    return volume


def compare_masks(run: runs.Run, dataset: Dataset) -> dict[str, float]:
    """Return, by class, the Dice between the two sides' masks over all voxels of the held-out cases."""
    ways = anysite_of(run), monai_of(run)
    both: Counter[str] = Counter()
    either: Counter[str] = Counter()
    for case in dataset.cases:
        if case.id in run.splits["held_out"]:
            one, other = (way(run.plan.to_grid(case.image())) for way in ways)
            for index, name in enumerate(run.plan.classes):
                both[name] += 2 * int(((one == index) & (other == index)).sum())
                either[name] += int((one == index).sum()) + int((other == index).sum())
    return {name: both[name] / either[name] for name in run.plan.classes[1:]}


def compare(folder: Path, rounds: int, steps: int) -> dict[str, object]:
    """Return seconds and peak memory of both sides, their ratio and the agreement of their masks."""
    if not (folder / "run" / runs.MANIFEST).is_file():
        write_phantom(folder / "phantom", dimension=3, patients_per_site=16)
    dataset = open_dataset(folder / "phantom")
    overrides = [f"train.steps={steps}", f"plan.patch_size={[SIDE] * 3}", 'test_domains=["west"]']
    run = train(dataset, config.load("baseline", overrides), folder / "run", resume=True)
    sides = {"anysite": (prepare, (folder, anysite_of)), "monai": (prepare, (folder, monai_of))}
    taken: dict[str, list[float]] = {side: [] for side in sides}
    with taking_turns(sides) as started:
        for process in started.values():
            process.run(1)  # the first run allocates
        for _ in range(rounds):
            for side, process in started.items():
                taken[side].append(process.run(1)[0])
        peaks = {f"{side}_peak_memory_mb": process.stop() for side, process in started.items()}
    median = {side: statistics.median(values) for side, values in taken.items()}
    return {
        "shape": "x".join(map(str, SHAPE)),
        **{f"{side}_seconds": round(value, 2) for side, value in median.items()},
        "ratio": round(median["monai"] / median["anysite"], 2),
        "dice_between_masks": {name: round(d, 5) for name, d in compare_masks(run, dataset).items()},
        "training_steps": run.manifest["steps"],
        **peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--folder", type=Path, help="keep phantom and run here, and use them again")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    threads = compute.use_threads()
    with tempfile.TemporaryDirectory() as name:
        row = compare(arguments.folder or Path(name), arguments.rounds, arguments.steps)
    row |= {"threads": threads, "precision": compute.choose_precision("auto"), "commit": provenance.commit()}
    print(row)
    if arguments.output:
        atomic.write_json(arguments.output, [row])


if __name__ == "__main__":
    main()
