"""What temperature and postprocessing change, on the same networks: rows of kept runs with and without each.

Run as `python benchmarks/after_network.py KEPT... --dataset DATASET --output ROWS.jsonl`, KEPT the folders that
`anysite benchmark --keep-runs` left. Every image of a test site and every held-out one is segmented once; its Dice
without fragments and with them, and its calibration error with the run's temperature and without, are rows of the
methods NAME, NAME_with_fragments and NAME_uncalibrated. Images of training sites are those that the temperature was
fitted on and the fragments were decided by, as far as a run held out no more of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from anysite.config import choose_adapter
from anysite.data.case import Case, Dataset
from anysite.data.layouts import open_dataset
from anysite.evaluate import score_probabilities, score_volume
from anysite.rows import Row, rows_of, write_rows
from anysite.runs import Run, commit, open_run
from anysite.segment import Segmenter

ROLES = {"held_out": "in_domain", "test": "unseen"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kept", nargs="+", type=Path)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = open_dataset(arguments.dataset)
    rows: list[Row] = []
    for folder in arguments.kept:
        rows += score_run(open_run(folder / "run"), dataset)
        write_rows(arguments.output, rows)
        print(f"{folder.name}: {len(rows)} rows so far", flush=True)


def score_run(run: Run, dataset: Dataset) -> list[Row]:
    """Return the rows of one run."""
    settings = choose_adapter(run.config.predict, "none").model_copy(update={"postprocess": False})
    segmenter = Segmenter([run], settings)
    cases = {case.id: case for case in dataset.labelled}
    rows: list[Row] = []
    for role, split in ROLES.items():
        for name in run.splits[role]:
            if name in cases:
                rows += score_image(segmenter, run, dataset, cases[name], split)
    return rows


def score_image(segmenter: Segmenter, run: Run, dataset: Dataset, case: Case, split: str) -> list[Row]:
    """Return the rows of one image."""
    truth = dataset.label_of(case)
    prediction = segmenter.segment(case.image())
    without = prediction.label.array.copy()
    run.postprocessing.apply(without[0])
    name = run.manifest.get("preset", "run")
    shared = {
        "dataset": dataset.name, "adapt": "none", "seed": run.config.seed, "corruption": "none", "severity": 0,
        "train_domains": "+".join(run.manifest["train_domains"]), "labels": "all", "commit": commit(),
    }  # fmt: skip
    dice = {"": prediction.label.with_array(without), "_with_fragments": prediction.label}
    found: list[Row] = []
    for suffix, label in dice.items():
        scores = score_volume(label, truth, dataset, case, metrics=["dice"])
        found += rows_of(scores, case, split, shared | {"method": name + suffix})
    if run.temperature.values != (1.0,):
        for suffix, chances in {"": prediction.probabilities, "_uncalibrated": prediction.raw}.items():
            scores = score_probabilities(
                chances.array, prediction.label, truth, dataset, case, ["ece", "nll"]
            )
            found += rows_of(scores, case, split, shared | {"method": name + suffix})
    return found


if __name__ == "__main__":
    main()
