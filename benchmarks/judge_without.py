"""What detectors of the judge are worth: verdicts of kept runs by several sets of them.

Run as `python benchmarks/judge_without.py RUN... --dataset DATASET --sets histogram,entropy histogram,entropy,shape
--output FILE.json`, RUN the run folders that `anysite benchmark --keep-runs` left. Each run's judge is learned anew
with every set, from the same images as at the end of its training, and judges the images of test sites and the
held-out ones of patients that it did not learn from. Masks of a Dice below 0.7 count as failed, and of masks for which
less is to be expected a review is asked.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from anysite.config import choose_adapter
from anysite.data.case import Case, Dataset
from anysite.data.layouts import open_dataset
from anysite.judge import Judge
from anysite.provenance import commit
from anysite.references import learn_references, mean_dice
from anysite.runs import Run, open_run
from anysite.segment import Segmenter

LEAST_DICE = 0.7


@dataclass(frozen=True)
class Counts:
    """What became of the masks of one kind of image."""

    images: int
    failed: int
    accepted: int
    silent: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--dataset", required=True, type=Path)
    parser.add_argument("--sets", required=True, nargs="+")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = open_dataset(arguments.dataset)
    rows = []
    for path in arguments.runs:
        run = open_run(path)
        sites = run.manifest["train_domains"]
        for names in arguments.sets:
            for kind, counts in judge_masks(run, dataset, names.split(",")).items():
                row = {"preset": run.manifest.get("preset"), "seed": run.config.seed, "train_domains": sites}
                rows.append({**row, "detectors": names, "kind": kind, **vars(counts)})
                print(json.dumps(rows[-1]), flush=True)
    for names in arguments.sets:
        for kind in ("known", "unseen"):
            chosen = [row for row in rows if (row["detectors"], row["kind"]) == (names, kind)]
            sums = {
                key: sum(row[key] for row in chosen) for key in ("images", "failed", "accepted", "silent")
            }
            print(f"{names}, {kind}: {json.dumps(sums)}")
    content = {"commit": commit(), "dataset": dataset.name, "least_dice": LEAST_DICE, "rows": rows}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def judge_masks(run: Run, dataset: Dataset, names: list[str]) -> dict[str, Counts]:
    """Return what a judge of these detectors says of held-out patients it did not learn from, and of unseen ones."""
    cases = {case.id: case for case in dataset.cases}

    def part(role: str) -> Dataset:
        return replace(dataset, cases=tuple(cases[name] for name in run.splits[role]))

    settings = run.config.judge.model_copy(update={"detectors": {name: {} for name in names}})
    segmenter = Segmenter([run], choose_adapter(run.config.predict, "none"))
    held_out = part("held_out")
    learned_from = held_out.first_by_turns(settings.held_out_cases)
    references = part("training").first_by_turns(settings.cases)
    judge, _ = learn_references(segmenter, references, learned_from, held_out, settings)
    assert judge is not None, "too few cases to learn from"
    known_to_judge = {(case.domain, case.patient) for case in learned_from}
    known = [case for case in held_out.cases if (case.domain, case.patient) not in known_to_judge]
    counts = {}
    for kind, chosen in {"known": known, "unseen": [*part("test").cases]}.items():
        found: list[tuple[bool, bool]] = []
        for case in chosen:
            dice, accepted = _judge_case(segmenter, judge, dataset, case)
            found += [(dice < LEAST_DICE, accepted)] if dice is not None else []
        failed, accepted = (sum(pair[index] for pair in found) for index in (0, 1))
        counts[kind] = Counts(len(found), failed, accepted, sum(bad and good for bad, good in found))
    return counts


def _judge_case(
    segmenter: Segmenter, judge: Judge, dataset: Dataset, case: Case
) -> tuple[float | None, bool]:
    image = case.image()
    output = segmenter.observe(image, None)
    label = segmenter.label_of(output, image)
    dice = mean_dice(label, dataset.label_of(case), segmenter.plan, dataset.known_to(case))
    return dice, judge.judge(output, LEAST_DICE).decision == "accept"


if __name__ == "__main__":
    main()
