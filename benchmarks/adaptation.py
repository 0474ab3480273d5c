"""What every adapter does to corrupted images of the training sites: gain, harm and cost.

Run as `python benchmarks/adaptation.py [--steps 800] [--output FILE]`, or with `--run RUN --dataset DATASET` for a run
that has learned what reflection needs. Without one a network is trained on three sites of the phantom; then held-out
images of those sites are adapted to as they are and corrupted (severity 4), every one and without the guard. No image
of a test site is looked at, so that settings may be chosen by this.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anysite import atomic, config
from anysite.config import choose_adapter
from anysite.corrupt import corrupt
from anysite.data.case import Case
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.data.volume import Volume
from anysite.references import mean_dice
from anysite.runs import open_run
from anysite.segment import Segmenter
from anysite.settings import PredictSettings
from anysite.train import train

CORRUPTIONS = ("gamma_dark", "low_contrast", "bias_field", "gaussian_noise", "motion_blur", "low_resolution")
SETTINGS = [
    "network.width=8", "train.batch_size=4", "plan.patch_size=[128,128]", "predict.flips=false",
    'test_domains=["west"]', "objectives.reflection={}", "judge.detectors={histogram={}}", "calibration.kind=none",
]  # fmt: skip
TRIALS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("refseg", {}),
    ("refseg", {"margin_voxels": 15}),
    ("refseg", {"similarity": "correlation"}),
    ("refseg", {"similarity": "contrast"}),
    ("refseg", {"similarity": "contrast", "margin_voxels": 15}),
    ("refseg", {"learning_rate": 1e-2}),
    ("refseg", {"shape_weight": 0.0}),
    ("refseg", {"subset": "all", "learning_rate": 3e-4}),
    ("denoising_prior", {}),
    ("tent", {}),
    ("reliable_entropy", {}),
    ("fourier_prompt", {}),
    ("intensity_views", {}),
    ("standard_views", {}),
    ("standard_views", {"intensities": False}),
    ("standard_views", {"sizes": []}),
    ("standard_views", {"sizes": [0.92, 1.08]}),
    ("standard_views", {"sizes": [0.8, 1.25]}),
)
CLEAN = "clean"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument(
        "--run", type=Path, help="a run that has learned reflection, in place of one on the phantom"
    )
    parser.add_argument("--dataset", type=Path, help="that it was trained on")
    parser.add_argument("--cases", type=int, default=1000, help="held-out cases at most")
    parser.add_argument(
        "--flips", action="store_true", help="average over mirrored views, as prediction does"
    )
    parser.add_argument("--only", help="these adapters alone, separated by commas")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        if arguments.run:
            dataset, run = open_dataset(arguments.dataset), open_run(arguments.run)
        else:
            dataset = open_dataset(write_phantom(Path(name) / "phantom", patients_per_site=10))
            settings = config.load(
                "baseline", [*SETTINGS, f"train.steps={arguments.steps}", "train.threads=1"]
            )
            run = train(dataset, settings, Path(name) / "run")
        held_out = [case for case in dataset.cases if case.id in run.splits["held_out"]][: arguments.cases]
        images = [
            (_picture(case, kind, seed), dataset.label_of(case), dataset.known_to(case))
            for seed, case in enumerate(held_out)
            for kind in (CLEAN, *CORRUPTIONS)
        ]
        clean = np.arange(len(images)) % (1 + len(CORRUPTIONS)) == 0

        usual = run.config.predict.model_copy(update={"flips": arguments.flips})

        def predict(settings: PredictSettings) -> tuple[list[np.ndarray], float]:
            segmenter, began = Segmenter([run], settings, "cpu"), time.perf_counter()
            return [segmenter.segment(image).raw.array for image, _, _ in images], time.perf_counter() - began

        def score(maps: list[np.ndarray]) -> np.ndarray:
            dice = []
            for probabilities, (image, truth, known) in zip(maps, images, strict=True):
                label = image.with_array(np.asarray(run.plan.decide(probabilities))[None].astype(np.uint8))
                dice.append(mean_dice(label, truth, run.plan, known) or 0.0)
            return np.array(dice)

        first, plain_s = predict(usual)
        plain = score(first)
        rows: list[dict[str, Any]] = [
            {
                "adapter": "none", "images": int((~clean).sum()), "dice": round(plain[~clean].mean(), 4),
                "clean_images": int(clean.sum()), "clean_dice": round(plain[clean].mean(), 4),
            }
        ]  # fmt: skip
        wanted = arguments.only.split(",") if arguments.only else [name for name, _ in TRIALS]
        if unknown := {*wanted} - {name for name, _ in TRIALS}:
            parser.error(f"--only {', '.join(sorted(unknown))}: not among the trials")
        for adapter, own in (trial for trial in TRIALS if trial[0] in wanted):
            chosen = choose_adapter(usual, f"{adapter}:always")
            adapt = chosen.adapt.model_copy(update={"settings": own})
            maps, seconds = predict(chosen.model_copy(update={"adapt": adapt}))
            row: dict[str, Any] = {"adapter": adapter, "settings": own}
            # As `predict.adapt.first_share` does by default, and alone.
            averaged = [(one + other) / 2 for one, other in zip(maps, first, strict=True)]
            for kind, found in (("alone", maps), ("averaged", averaged)):
                change = score(found) - plain
                row[kind] = _summarise(change[~clean])
                row[f"{CLEAN} {kind}"] = _summarise(change[clean])
            if arguments.flips:
                row["times_plain"] = round(seconds / plain_s, 1)
            rows.append(row)
            print(row, flush=True)
        report = json.dumps(rows, indent=1)
    if arguments.output:
        atomic.write_text(arguments.output, report + "\n")


def _picture(case: Case, kind: str, seed: int) -> Volume:
    image = case.image()
    return image if kind == CLEAN else corrupt(image, kind, 4, seed)


def _summarise(change: np.ndarray) -> dict[str, Any]:
    return {
        "gain": round(float(change.mean()), 4), "harmed": int((change < -0.01).sum()),
        "helped": int((change > 0.01).sum()), "worst": round(float(change.min()), 4),
    }  # fmt: skip


if __name__ == "__main__":
    main()
