"""Seconds and peak memory from an image file to a mask file, beside nnU-Net's predictor.

Run as `python benchmarks/predict_file.py [--slices 300] [--rounds 2] [--folder DIR] [--output
benchmarks/predict_file.json]` where nnU-Net v2 is installed beside anysite (`pip install nnunetv2`). A network is
trained on made-up CT first (in DIR, where it is kept and used again), and segments a volume of 512 x 512 x SLICES
voxels that is resampled on the way. Both take the same weights, spacing, intensity window and windows (64^3, half
overlapping, Gaussian), and neither mirrors. `anysite` is the command line and judges the mask as well; nnU-Net is its
predictor without worker processes, whose memory would come on top. They take turns, each in a process of its own,
whose memory the kernel counted. Masks are not compared: a network trained for minutes on so large an image finds
little in it, and `predict_volume.py` compares masks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from anysite import atomic, compute, provenance, runs
from large_volume import write_ct

SIDES = ("anysite", "nnunet")
PATCH, SPACING_MM, OVERLAP = 64, 1.5, 0.5
SETTINGS = (
    f"plan.spacing={[SPACING_MM] * 3}", f"plan.patch_size={[PATCH] * 3}", "plan.dimension=3d", "network.width=8",
    "train.batch_size=2", f"predict.overlap={OVERLAP}", "predict.flips=false", "judge.shifted_copies=0",
)  # fmt: skip


def predict_nnunet(run: runs.Run, image: Path, output: Path) -> None:
    """Write the mask that nnU-Net's predictor makes with a run's network."""
    os.environ |= {"nnUNet_compile": "false"}
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # pyright: ignore
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # pyright: ignore

    window = run.plan.normalisation[0]
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    plans = {
        "dataset_name": "Dataset001_peer", "plans_name": "peer", "image_reader_writer": "SimpleITKIO",
        # From its order of axes (up, forward, right) to the run's (up, right, forward).
        "transpose_forward": [0, 2, 1], "transpose_backward": [0, 2, 1],
        "foreground_intensity_properties_per_channel": {
            "0": {
                "mean": window.mean, "std": window.std,
                "percentile_00_5": window.low, "percentile_99_5": window.high,
            }
        },
        "configurations": {
            "3d_fullres": {
                "preprocessor_name": "DefaultPreprocessor", "spacing": [SPACING_MM] * 3,
                "patch_size": [PATCH] * 3, "batch_size": 2, "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False], "architecture": {}, "batch_dice": False,
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": resampling,
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": resampling | {"order": 1},
            }
        },
    }  # fmt: skip
    names = run.plan.classes
    facts = {
        "channel_names": {"0": "CT"}, "file_ending": ".nii.gz",
        "labels": {name: index for index, name in enumerate(names)},
    }  # fmt: skip
    manager = PlansManager(plans)
    network = run.network()
    predictor = nnUNetPredictor(
        tile_step_size=1 - OVERLAP, use_mirroring=False, perform_everything_on_device=False,
        device=torch.device("cpu"), allow_tqdm=False,
    )  # fmt: skip
    weights = [network.state_dict()]
    predictor.manual_initialization(
        network, manager, manager.get_configuration("3d_fullres"), weights, facts, "nnUNetTrainer", None
    )
    network.eval()
    predictor.predict_from_files_sequential([[str(image)]], [str(output / "p0")])


def measure(command: list[str]) -> tuple[float, int]:
    """Run a command; return its seconds and its peak memory in MiB."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - began, round(usage.ru_maxrss / 1024)


def compare(folder: Path, slices: int, rounds: int, steps: int) -> dict[str, Any]:
    """Return seconds and peak memory of both sides, and their ratio."""
    volume = folder / f"volume_{slices}"
    if not volume.exists():
        write_ct(volume, "p0", slices, 0)
    if not (folder / "training").exists():
        for patient in range(1, 7):
            write_ct(folder / "training", f"p{patient}", 64, patient)
    # In a process of its own, since a child's count of memory begins with its parent's.
    sets = [part for setting in (*SETTINGS, f"train.steps={steps}") for part in ("--set", setting)]
    trained = [sys.executable, "-m", "anysite", "train", str(folder / "training"), "--preset", "baseline"]
    subprocess.run(
        [*trained, "--output", str(folder / "run"), "--resume", *sets], check=True, stdout=sys.stderr
    )
    image = volume / "images" / "p0.nii.gz"
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks = dict.fromkeys(SIDES, 0)
    for _ in range(rounds):
        for side in SIDES:
            output = folder / side
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir()
            own = [sys.executable, "-m", "anysite", "predict", str(folder / "run"), str(image.parent)]
            peer = [
                sys.executable,
                __file__,
                "--side",
                side,
                "--folder",
                str(folder),
                "--slices",
                str(slices),
            ]
            seconds, peak = measure([*own, "--output", str(output)] if side == "anysite" else peer)
            print(f"{side}: {seconds:.1f} s, {peak} MiB", file=sys.stderr)
            taken[side].append(seconds)
            peaks[side] = max(peaks[side], peak)
    median = {side: statistics.median(values) for side, values in taken.items()}
    return {
        "shape": f"512x512x{slices}",
        **{f"{side}_seconds": round(value, 1) for side, value in median.items()},
        **{f"times_{side}": round(median[side] / median["anysite"], 2) for side in SIDES[1:]},
        **{f"{side}_peak_memory_mib": peak for side, peak in peaks.items()},
        "training_steps": steps,
        "rounds": rounds,
    }


def main() -> None:
    """Print the row, and write it as JSON; with --side predict in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--side", choices=SIDES[1:], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="keep volumes and run here, and use them again")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    threads = compute.use_threads()
    if arguments.side:
        image = arguments.folder / f"volume_{arguments.slices}" / "images" / "p0.nii.gz"
        predict_nnunet(runs.open_run(arguments.folder / "run"), image, arguments.folder / arguments.side)
        return
    with tempfile.TemporaryDirectory() as name:
        row = compare(arguments.folder or Path(name), arguments.slices, arguments.rounds, arguments.steps)
    row |= {
        "threads": threads, "precision": compute.choose_precision("auto"), "python": platform.python_version(),
        "commit": provenance.commit(),
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    if arguments.output:
        atomic.write_json(arguments.output, row)


if __name__ == "__main__":
    main()
