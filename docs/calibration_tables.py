"""The table of calibration in docs/prediction.md, written from the rows in results/ and nothing else."""

from __future__ import annotations

from evidence_page import RESULTS, between_markers, read_index

from anysite.rows import Row, read_rows
from anysite.statistics import Estimate, compare_paired, estimate_mean

SPLITS = {
    "in_domain": "held-out patients of the training site, whom it was fitted on",
    "unseen": "the unseen site",
}
WITHOUT = "_uncalibrated"


def write_calibration_tables(text: str) -> str:
    """Return the text of the page on prediction with its table of calibration written anew."""
    lines: list[str] = []
    for name, entry in read_index().items():
        if "calibration" not in entry or not (RESULTS / name).is_file():
            continue
        rows = [row for row in read_rows(RESULTS / name) if row["metric"] in ("ece", "nll")]
        commits = ", ".join(sorted({f"`{row['commit']}`" for row in rows}))
        lines += [f"**{entry['calibration']}**", "", *_describe(rows), ""]
        lines += [f"```\n{entry['command']}\n```", "", f"Commit {commits}.", ""]
    return between_markers(text, lines)


def _describe(rows: list[Row]) -> list[str]:
    """Return one row for the networks of each training site, metric and kind of patients."""
    lines = [
        "| trained on | patients | error | without temperature | with it | paired | smaller in | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups = dict.fromkeys((row["train_domains"], row["split"], row["metric"]) for row in rows)
    for sites, split, metric in sorted(groups, key=str):
        chosen = [
            row
            for row in rows
            if (row["train_domains"], row["split"], row["metric"]) == (sites, split, metric)
            and row["value"] is not None
        ]
        without, tempered = (
            {
                (row["seed"], row["case"]): row["value"]
                for row in chosen
                if row["method"].endswith(WITHOUT) is ending
            }
            for ending in (True, False)
        )
        patient_of = {(row["seed"], row["case"]): row["patient"] for row in chosen}
        change = compare_paired(tempered, without, patient_of).difference
        means = [
            estimate_mean([*values.values()], [patient_of[key] for key in values])
            for values in (without, tempered)
        ]
        smaller = sum(tempered[key] < value for key, value in without.items())
        cells = [sites, SPLITS[split], metric, *map(_text, means), _text(change, signed=True)]
        cells += [f"{smaller} of {len(without)} images", str(len({seed for seed, _ in without}))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _text(estimate: Estimate, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    text = f"{estimate.mean:{sign}.3f}"
    if estimate.low is not None and estimate.high is not None:
        text += f" [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
    return f"{text}, n = {estimate.n_patients}"
