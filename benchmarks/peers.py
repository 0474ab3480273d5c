"""Train other programs on the splits of `anysite benchmark`, for the same time, and score their masks alike.

Run as `python benchmarks/peers.py PEER DATASET --test-domain SITE --seed 0 --seconds 300 --spacing 1,2,2 --patch 96,96
--output rows.jsonl`, with PEER one of

- `monai_loop`: MONAI's UNet, transforms, loss and sliding window in a plain loop, as in its tutorials, on slices;
- `nnunet`: nnU-Net v2's planner, preprocessing, default trainer and predictor, configuration 2d. It has to be
  installed beside anysite (`pip install nnunetv2`).

Both learn from the cases that anysite trains on at this seed and score those that it holds out and the site left
out. Their training ends after so many seconds, reading and preprocessing not counted; the learning-rate schedule is
stretched over them by a measured step time. Neither mirrors at test time. Volumes alone, whose slice axis is the
third, as in cardiac MR.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers.inferer import SliceInferer
from monai.losses.dice import DiceCELoss
from monai.networks.nets.unet import UNet
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import RandCropByPosNegLabeld, SpatialPadd
from monai.transforms.intensity.dictionary import (
    NormalizeIntensityd,
    RandAdjustContrastd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from monai.transforms.spatial.dictionary import RandFlipd, RandRotated, RandZoomd, Resized
from monai.transforms.utility.dictionary import SqueezeDimd
from monai.utils.misc import set_determinism

from anysite import compute, config, provenance
from anysite.data.case import Case, Dataset
from anysite.data.layouts import open_dataset
from anysite.evaluate import score_volume
from anysite.rows import Row, rows_of, write_rows
from anysite.splits import Splits, split

BATCH = 4
CLOCKED_STEPS = 20  # after as many that warm up
Segment = Callable[[Case], np.ndarray]  # a label map on the image's own grid, axes x, y, z


def train_monai(
    splits: Splits, seconds: float, spacing: tuple[float, ...], patch: tuple[int, ...], seed: int
) -> tuple[Segment, int, float]:
    """Return MONAI's way from a case to a label map, the number of steps and the seconds they took."""
    set_determinism(seed)
    classes = len(splits.training.classes)
    prepare: Any = NormalizeIntensityd("image", nonzero=False, channel_wise=True)
    cases = []
    for case in splits.training.cases:
        item = {
            "image": torch.from_numpy(np.float32(case.image().array)),
            "label": torch.from_numpy(np.float32(splits.training.label_of(case).array)),
        }
        cases.append(prepare(_resize(item, spacing)))
    augment: Any = Compose(
        [
            SpatialPadd(("image", "label"), (*patch, 1)),
            RandCropByPosNegLabeld(("image", "label"), "label", (*patch, 1), pos=1, neg=2, num_samples=1),
            SqueezeDimd(("image", "label"), dim=-1),
            RandFlipd(("image", "label"), prob=0.5, spatial_axis=0),
            RandFlipd(("image", "label"), prob=0.5, spatial_axis=1),
            RandRotated(("image", "label"), range_x=0.5, prob=0.2, mode=("bilinear", "nearest")),
            RandZoomd(("image", "label"), prob=0.2, min_zoom=0.7, max_zoom=1.4, mode=("bilinear", "nearest")),
            RandGaussianNoised("image", prob=0.15, std=0.1),
            RandGaussianSmoothd("image", prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0)),
            RandScaleIntensityd("image", factors=0.25, prob=0.15),
            RandShiftIntensityd("image", offsets=0.1, prob=0.15),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
        ]
    )
    network = UNet(2, 1, classes, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch")
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-5)
    draw = np.random.default_rng(seed)

    def step() -> None:
        chosen = [augment(dict(cases[index]))[0] for index in draw.integers(len(cases), size=BATCH)]
        image = torch.stack([item["image"].as_tensor() for item in chosen])
        label = torch.stack([item["label"].as_tensor() for item in chosen])
        optimizer.zero_grad()
        loss_of(network(image), label).backward()
        optimizer.step()

    began = time.monotonic()
    steps = _fitting(step, seconds, began)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        step()
        schedule.step()
    took = time.monotonic() - began
    network.eval()
    slide = SliceInferer(roi_size=patch, spatial_dim=2, sw_batch_size=8, overlap=0.5, mode="gaussian")

    @torch.inference_mode()
    def segment(case: Case) -> np.ndarray:
        image = torch.from_numpy(np.float32(case.image().array))
        logits = slide(prepare(_resize({"image": image}, spacing))["image"].as_tensor()[None], network)
        assert isinstance(logits, torch.Tensor)
        native = torch.nn.functional.interpolate(logits.softmax(1), image.shape[1:], mode="trilinear")
        return native[0].argmax(0).numpy()

    return segment, steps + 2 * CLOCKED_STEPS, took


def _resize(item: Any, spacing: tuple[float, ...]) -> Any:
    """Resample to `spacing`, slice axis first, from voxels of 1."""
    z, y, x = spacing
    shape = item["image"].shape[1:]
    size = [round(n / s) for n, s in zip(shape, (x, y, z), strict=True)]
    modes: Any = [{"image": "trilinear", "label": "nearest"}[key] for key in item]
    return Resized(list(item), size, mode=modes)(item)


def _fitting(step: Callable[[], None], seconds: float, began: float) -> int:
    """Return how many more steps fit into `seconds` since `began`, by the time of a few."""
    for _ in range(CLOCKED_STEPS):
        step()
    middle = time.monotonic()
    for _ in range(CLOCKED_STEPS):
        step()
    each = (time.monotonic() - middle) / CLOCKED_STEPS
    return max(1, int((seconds - (time.monotonic() - began)) / each))


def train_nnunet(
    splits: Splits,
    seconds: float,
    spacing: tuple[float, ...],
    patch: tuple[int, ...],
    seed: int,
    folder: Path,
) -> tuple[Segment, int, float]:
    """Return nnU-Net's way from a case to a label map, the number of steps and the seconds they took."""
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(folder / name)
        (folder / name).mkdir()
    # Its planner takes the number of augmenting processes for its threads, so that it is set to 0 only afterwards.
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "false"}
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api  # pyright: ignore
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (  # pyright: ignore
        ExperimentPlanner,
    )
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # pyright: ignore
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # pyright: ignore

    np.random.seed(seed)
    torch.manual_seed(seed)
    name = "Dataset001_peer"
    _write_raw(splits, folder / "raw" / name)

    class Planner(ExperimentPlanner):
        """nnU-Net's own, on the grid that anysite has."""

        def determine_fullres_target_spacing(self) -> np.ndarray:
            return np.array(spacing)

    api.extract_fingerprints([1], num_processes=1)
    Planner(1, suppress_transpose=True).plan_experiment()  # slices of 1 are not the coarse axis to it
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112
    plans_path = folder / "preprocessed" / name / "nnUNetPlans.json"
    plans = json.loads(plans_path.read_text())
    plans["configurations"]["2d"] |= {"batch_size": BATCH, "patch_size": list(patch)}
    plans_path.write_text(json.dumps(plans))
    api.preprocess_dataset(1, configurations=["2d"], num_processes=[1])
    ids = splits.as_ids()
    folds = [{"train": ids["training"], "val": ids["held_out"]}]
    (folder / "preprocessed" / name / "splits_final.json").write_text(json.dumps(folds))
    dataset_json = json.loads((folder / "raw" / name / "dataset.json").read_text())

    def start(epochs: int, iterations: int) -> Any:
        own = json.loads(plans_path.read_text()) | {"continue_training": False}
        trainer = nnUNetTrainer(own, "2d", 0, dataset_json, torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch = epochs, iterations
        trainer.num_val_iterations_per_epoch = 1  # nothing is chosen by it
        trainer.save_every = epochs + 1
        trainer.logger.plot_progress_png = lambda folder: None
        trainer.plot_network_architecture = lambda: None
        trainer.initialize()
        return trainer

    clock = start(1, 1)
    clock.on_train_start()
    clock.on_train_epoch_start()
    began = time.monotonic()
    fitting = _fitting(lambda: clock.train_step(next(clock.dataloader_train)), seconds, began)
    epochs = 10
    trainer = start(epochs, max(1, fitting // epochs))
    began = time.monotonic()
    trainer.run_training()
    took = time.monotonic() - began
    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu")
    )
    trainer.network.eval()
    trainer.set_deep_supervision_enabled(False)
    weights = [trainer.network.state_dict()]
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, weights, dataset_json,
        "nnUNetTrainer", None,
    )  # fmt: skip
    reader = trainer.plans_manager.image_reader_writer_class()

    def segment(case: Case) -> np.ndarray:
        image, facts = reader.read_images([str(path) for path in case.image_paths])
        return predictor.predict_single_npy_array(image, facts).transpose(2, 1, 0)

    return segment, epochs * trainer.num_iterations_per_epoch, took


def _write_raw(splits: Splits, folder: Path) -> None:
    """Lay the cases out as nnU-Net reads them, by links."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    cases = [*splits.training.cases, *splits.held_out.cases]
    for case in cases:
        assert case.label_path is not None
        (folder / "imagesTr" / f"{case.id}_0000.nii.gz").symlink_to(case.image_paths[0].resolve())
        (folder / "labelsTr" / f"{case.id}.nii.gz").symlink_to(case.label_path.resolve())
    facts = {
        "channel_names": {"0": "MRI"},
        "labels": {name: index for index, name in enumerate(splits.training.classes)},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(facts))


def score(segment: Segment, splits: Splits, dataset: Dataset, common: Row) -> tuple[list[Row], float]:
    """Return a row for every case and class held out or left out, and the mean seconds of a case."""
    rows: list[Row] = []
    began = time.monotonic()
    parts = (("in_domain", splits.held_out), ("unseen", splits.test))
    for role, part in parts:
        for case in part.labelled:
            label = dataset.label_of(case)
            mask = label.with_array(segment(case)[None].astype(np.uint8))
            rows += rows_of(score_volume(mask, label, dataset, case, metrics=["dice"]), case, role, common)
    return rows, (time.monotonic() - began) / sum(len(part.labelled) for _, part in parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=("monai_loop", "nnunet"))
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--test-domain", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--spacing", required=True, help="slice axis first")
    parser.add_argument("--patch", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    compute.use_threads(arguments.threads)
    dataset = open_dataset(arguments.dataset)
    overrides = [f"seed={arguments.seed}", config.override_sites([arguments.test_domain])]
    splits = split(dataset, config.load("baseline", overrides))
    spacing = tuple(float(part) for part in arguments.spacing.split(","))
    patch = tuple(int(part) for part in arguments.patch.split(","))
    with tempfile.TemporaryDirectory() as name:
        if arguments.peer == "nnunet":
            trained = train_nnunet(splits, arguments.seconds, spacing, patch, arguments.seed, Path(name))
        else:
            trained = train_monai(splits, arguments.seconds, spacing, patch, arguments.seed)
        segment, steps, took = trained
        settings = f"seconds={arguments.seconds:g} spacing={arguments.spacing} patch={arguments.patch}"
        common: Row = {
            "dataset": dataset.name, "method": arguments.peer, "adapt": "none", "seed": arguments.seed,
            "train_domains": "+".join(d for d in dataset.domains if d != arguments.test_domain),
            "corruption": "none", "severity": 0, "labels": "all", "commit": provenance.commit(),
            "config": provenance.fingerprint(settings), "overrides": settings, "job": provenance.fingerprint(settings),
        }  # fmt: skip
        rows, each = score(segment, splits, dataset, common)
    common |= {"domain": "", "patient": "", "case": "", "class": "", "split": "run"}
    costs = (("train_seconds", round(took, 1)), ("predict_seconds_per_case", round(each, 3)))
    rows += [{**common, "metric": m, "value": v, "unit": "s"} for m, v in costs]
    rows.append({**common, "metric": "train_steps", "value": steps, "unit": "1"})
    write_rows(arguments.output, rows, shared=True)
    for role in ("in_domain", "unseen"):
        dice = [row["value"] for row in rows if row["split"] == role and row["value"] is not None]
        print(f"{role}: Dice {100 * np.mean(dice):.1f} of {len(dice)} masks, {steps} steps in {took:.0f} s")


if __name__ == "__main__":
    main()
