"""Joint training beside networks for one dataset, organ by organ: Dice and calibration error, paired over patients.

Run as `python benchmarks/joint/compare.py results/joint_slices.jsonl joint_slices_wide dedicated_slices`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean

from anysite.rows import read_rows
from anysite.statistics import compare_paired, estimate_mean

METRICS = ("dice", "ece")


def main() -> None:
    path, *methods = sys.argv[1:]
    rows = [r for r in read_rows(Path(path)) if r["metric"] in METRICS and r["value"] is not None]
    organs = sorted({row["domain"].split("/")[0] for row in rows})
    patient_of = {(row["seed"], row["case"]): row["patient"] for row in rows}
    for metric in METRICS:
        for organ in organs:
            sides = []
            for method in methods:
                values: dict[tuple[int, str], list[float]] = {}
                for row in rows:
                    found = row["method"], row["metric"], row["domain"].split("/")[0]
                    if found == (method, metric, organ):
                        values.setdefault((row["seed"], row["case"]), []).append(100 * row["value"])
                sides.append({key: mean(each) for key, each in values.items()})
            shared = sides[0].keys() & sides[1].keys()
            one, other = ({key: side[key] for key in shared} for side in sides)
            change = compare_paired(one, other, patient_of).difference
            means = [
                estimate_mean([*side.values()], [patient_of[key] for key in side]).mean
                for side in (one, other)
            ]
            print(
                f"{metric} {organ}: {means[0]:.1f} against {means[1]:.1f}, {change.mean:+.1f} "
                f"[{change.low:+.1f}, {change.high:+.1f}], n = {change.n_patients}"
            )


if __name__ == "__main__":
    main()
