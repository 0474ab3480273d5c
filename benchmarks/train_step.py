"""Training steps a second of anysite beside a plain MONAI loop, taking turns.

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
import warnings
from pathlib import Path

import monai.transforms as mt
import torch
from monai.data.dataloader import DataLoader
from monai.data.dataset import CacheDataset
from monai.losses.dice import DiceCELoss

from anysite import compute, config, runs
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.learner import build_network
from anysite.plan import Plan
from anysite.planning import learn_plan
from anysite.splits import split
from anysite.train import build_training, start_fabric
from side_by_side import Advance, report_dimensions, taking_turns

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
            mt.RandSimulateLowResolutiond(
                "image", prob=0.25, upsample_mode="bilinear" if len(size) == 2 else "trilinear"
            ),
        ]
    )  # fmt: skip


def prepare_monai(folder: Path, workers: int) -> Advance:
    """Return a function that takes one step of the MONAI loop."""
    warnings.simplefilter("ignore")
    compute.use_threads()
    settings, plan = runs.read_config(folder / "run"), runs.read_plan(folder / "run")
    dataset = open_dataset(folder / "phantom")
    files = [{"image": str(c.image_paths[0]), "label": str(c.label_path)} for c in dataset.labelled]
    network = build_network(settings, plan)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)
    cached = CacheDataset(files, monai_transforms(plan), cache_rate=1.0, progress=False)
    loader = DataLoader(
        cached, batch_size=settings.train.batch_size, shuffle=True, num_workers=workers, drop_last=True,
        persistent_workers=workers > 0,
    )  # fmt: skip
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def advance() -> None:
        batch = next(batches)
        optimizer.zero_grad()
        loss = loss_of(network(batch["image"].as_tensor()), batch["label"].as_tensor())
        loss.backward()
        optimizer.step()

    return advance


def prepare_anysite(folder: Path) -> Advance:
    """Return a function that takes one step of anysite's loop, and returns the seconds waited so far."""
    compute.use_threads()
    compute.keep_freed_memory()
    settings = runs.read_config(folder / "run")
    training = build_training(
        start_fabric(settings), open_dataset(folder / "phantom"), settings, folder / "run"
    )
    batches = training.batches()

    def advance() -> float:
        training.take_step(next(batches))
        return training.waited_s

    return advance


def compare(dimension: int, rounds: int, steps: int) -> dict[str, float | int | str]:
    """Return seconds a step of both sides, their ratio, and how long the network waited for batches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = 192 if dimension == 2 else 72
        dataset = open_dataset(
            write_phantom(folder / "phantom", dimension=dimension, size=size, patients_per_site=4)
        )
        settings = config.load("baseline", [*SETTINGS[dimension], "train.steps=100000"])
        plan = learn_plan(dataset, settings.plan)
        runs.start(folder / "run", settings, plan, split(dataset, settings).as_ids())
        sides = {
            "anysite": (prepare_anysite, (folder,)),
            "monai_0_workers": (prepare_monai, (folder, 0)),
            "monai_2_workers": (prepare_monai, (folder, 2)),
        }
        taken: dict[str, list[float]] = {side: [] for side in sides}
        waited_s = 0.0
        with taking_turns(sides) as started:
            warm = {name: side.run(3) for name, side in started.items()}
            for _ in range(rounds):
                for name, side in started.items():
                    seconds, result = side.run(steps)
                    taken[name].append(seconds)
                    if name == "anysite":
                        waited_s = result - warm["anysite"][1]
            peaks = {f"{name}_peak_memory_mb": side.stop() for name, side in started.items()}
    median = {side: statistics.median(values) for side, values in taken.items()}
    monai = min(median["monai_0_workers"], median["monai_2_workers"])
    return {
        "dimension": dimension,
        **{f"{side}_seconds_a_step": round(value, 3) for side, value in median.items()},
        "ratio": round(monai / median["anysite"], 2),
        "share_of_time_waiting_for_batches": round(waited_s / (sum(taken["anysite"]) * steps), 3),
        **peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    threads = compute.use_threads()
    report_dimensions(
        lambda dimension: compare(dimension, arguments.rounds, arguments.steps), arguments.output,
        threads=threads, precision=compute.choose_precision("auto"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
