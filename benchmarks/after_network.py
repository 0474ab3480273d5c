"""What temperature and postprocessing change, on the same networks: rows of kept runs with and without each.

Run as `python benchmarks/after_network.py KEPT... --dataset DATASET --output ROWS.jsonl`, KEPT the folders that
`anysite benchmark --keep-runs` left. Every image of a test site and every held-out one is segmented once; its Dice
without fragments and with them, and its calibration error with the run's temperature and without, are rows of the
methods NAME, NAME_with_fragments and NAME_uncalibrated. Images of training sites are those that the temperature was
fitted on and the fragments were decided by, as far as a run held out no more of them. Without KEPT the rows are read,
and how many masks lost by it is printed once more.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import torch

from anysite.config import choose_adapter
from anysite.data.case import Case, Dataset
from anysite.data.layouts import open_dataset
from anysite.evaluate import score_probabilities, score_volume
from anysite.provenance import commit
from anysite.rows import Row, read_rows, rows_of, write_rows
from anysite.runs import Run, open_run
from anysite.segment import Segmenter

ROLES = {"held_out": "in_domain", "test": "unseen"}
FRAGMENTS = "_with_fragments"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kept", nargs="*", type=Path)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for folder in arguments.kept:
        rows += score_run(open_run(folder / "run"), open_dataset(arguments.dataset))
        write_rows(arguments.output, rows)
        print(f"{folder.name}: {len(rows)} rows so far", flush=True)
    count_harm(read_rows(arguments.output))


def count_harm(rows: list[Row]) -> None:
    """Print how many masks lost more than a point of Dice with their fragments, and the most that one lost."""
    dice: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        if row["metric"] == "dice" and row["value"] is not None:
            method = row["method"].removesuffix(FRAGMENTS)
            image = (row["split"], row["train_domains"], method, str(row["seed"]), row["case"])
            kind = "with" if row["method"].endswith(FRAGMENTS) else "without"
            dice.setdefault(image, {}).setdefault(kind, []).append(row["value"])
    for split in ROLES.values():
        pairs = [both for image, both in dice.items() if image[0] == split and len(both) == 2]
        changes = [100 * (mean(both["without"]) - mean(both["with"])) for both in pairs]
        if changes:
            harmed = sum(change < -1 for change in changes)
            print(
                f"{split}: {len(changes)} masks, {mean(changes):+.2f}, {harmed} harmed, worst {min(changes):+.1f}"
            )


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
    dice = {"": prediction.label.with_array(without), FRAGMENTS: prediction.label}
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
