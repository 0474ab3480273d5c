"""Training steps a second of anysite beside a plain MONAI loop, in one process, taking turns.

Run as `python benchmarks/train_step.py [--rounds 4] [--steps 6] [--output benchmarks/train_step.json]`. Both sides
train the same network from the same patch size, batch size and optimizer on the phantom, from files already read:
anysite prepares cases on its grid, MONAI caches what comes before its first random transform (CacheDataset). MONAI's
loop is the one of its tutorials: dictionary transforms, DataLoader, float32. Its loader runs with 0 and with 2
workers, and the faster of the two counts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import monai.transforms as mt
import torch
from monai.data.dataloader import DataLoader
from monai.data.dataset import CacheDataset
from monai.losses.dice import DiceCELoss

from anysite import atomic, compute, config, runs
from anysite.data.case import Dataset
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.learner import build_network
from anysite.plan import Plan, learn_plan
from anysite.splits import split
from anysite.train import build_training, start_fabric

KEYS = ["image", "label"]
SETTINGS = {
    2: ["plan.patch_size=[192, 192]", "train.batch_size=8"],
    3: ["plan.patch_size=[64, 64, 64]", "train.batch_size=2"],
}


def monai_transforms(plan: Plan) -> mt.Compose:
    """Return the dictionary transforms of a plain MONAI training, as strong as anysite's augmentation."""
    size = plan.patch_size
    spatial = list(range(len(size)))
    return mt.Compose(
        [
            mt.LoadImaged(KEYS, image_only=True, ensure_channel_first=True),
            mt.NormalizeIntensityd("image", channel_wise=True),
            mt.SpatialPadd(KEYS, size),
            mt.RandCropByPosNegLabeld(KEYS, "label", size, pos=1, neg=2, num_samples=1),
            *(mt.RandFlipd(KEYS, prob=0.5, spatial_axis=axis) for axis in spatial),
            mt.RandAffined(
                KEYS, prob=0.5, rotate_range=[0.52] * (1 if len(size) == 2 else 3), scale_range=[0.35] * len(size),
                mode=("bilinear", "nearest"), padding_mode="reflection",
            ),
            mt.RandBiasFieldd("image", prob=0.2),
            mt.RandGaussianNoised("image", prob=0.15, std=0.1),
            mt.RandGaussianSmoothd("image", prob=0.2),
            mt.RandScaleIntensityd("image", factors=0.3, prob=0.3),
            mt.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
            mt.RandSimulateLowResolutiond("image", prob=0.25),
        ]
    )  # fmt: skip


def monai_loop(
    plan: Plan, settings: config.Config, files: list[dict[str, str]], workers: int
) -> Iterator[None]:
    """Train one step each time the iterator is advanced."""
    network = build_network(settings, plan)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)
    cached = CacheDataset(files, monai_transforms(plan), cache_rate=1.0, progress=False)
    batch_size = settings.train.batch_size
    loader = DataLoader(
        cached,
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        optimizer.zero_grad()
        loss = loss_of(network(batch["image"].as_tensor()), batch["label"].as_tensor())
        loss.backward()
        optimizer.step()
        yield


def anysite_loop(dataset: Dataset, settings: config.Config, plan: Plan, folder: Path) -> Iterator[float]:
    """Train one step each time the iterator is advanced, and yield the seconds the network waited for it."""
    compute.keep_freed_memory()
    runs.start(folder, settings, plan, split(dataset, settings).as_ids())
    training = build_training(start_fabric(settings), dataset, settings, folder)
    for batch in training.batches():
        training.take_step(batch)
        yield training.waited_s


def seconds_a_step(advance: Callable[[], object], steps: int) -> float:
    """Return the mean seconds of a few calls."""
    began = time.perf_counter()
    for _ in range(steps):
        advance()
    return (time.perf_counter() - began) / steps


def compare(dimension: int, rounds: int, steps: int) -> dict[str, float | int | str]:
    """Return seconds a step of both sides, their ratio, and how long the network waited for batches."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_phantom(Path(name) / "phantom", dimension=dimension, size=192 if dimension == 2 else 72,
                               patients_per_site=4)  # fmt: skip
        dataset = open_dataset(folder)
        settings = config.load("baseline", [*SETTINGS[dimension], "train.steps=100000"])
        plan = learn_plan(dataset, settings.plan)
        files = [{"image": str(c.image_paths[0]), "label": str(c.label_path)} for c in dataset.labelled]
        ours = anysite_loop(dataset, settings, plan, Path(name) / "run")
        sides: dict[str, Callable[[], object]] = {"anysite": lambda: next(ours)}
        for workers in (0, 2):
            loop = monai_loop(plan, settings, files, workers)
            sides[f"monai_{workers}_workers"] = lambda loop=loop: next(loop)
        for advance in sides.values():
            seconds_a_step(advance, 2)
        taken: dict[str, list[float]] = {side: [] for side in sides}
        before = next(ours)
        for _ in range(rounds):
            for side, advance in sides.items():
                taken[side].append(seconds_a_step(advance, steps))
        began = time.perf_counter()
        waited = next(ours) - before
        waiting = waited / (sum(taken["anysite"]) * steps + time.perf_counter() - began)
    median = {side: statistics.median(values) for side, values in taken.items()}
    monai = min(median["monai_0_workers"], median["monai_2_workers"])
    return {
        "dimension": dimension,
        **{f"{side}_seconds_a_step": round(value, 3) for side, value in median.items()},
        "ratio": round(monai / median["anysite"], 2),
        "share_of_time_waiting_for_batches": round(waiting, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    threads = compute.use_threads()
    rows = []
    for dimension in (2, 3):
        row = compare(dimension, arguments.rounds, arguments.steps)
        row |= {"threads": threads, "precision": compute.choose_precision("auto"), "commit": runs.commit()}
        print(row, flush=True)
        rows.append(row)
    if arguments.output:
        atomic.write_json(arguments.output, rows)


if __name__ == "__main__":
    main()
