"""How often known images cross the limits of a judge, by what the limits are taken of.

Run as `python benchmarks/limits.py RUN=ROWS... --output FILE.json`, RUN a run folder that `anysite benchmark
--keep-runs` left and ROWS its rows with the metric `verdict`. From the scores of all images of known sites that the
network was not trained on their distances are found again; a thousand times ten of them set limits, and of the others
those are counted that cross one. Scores that are fitted jointly (`combined`, `quality`) are left out, but counted where
the rate of false alarms is shared out.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from scipy import special

from anysite import atomic
from anysite.judge import COMBINED, QUALITY, _find_limit
from anysite.provenance import commit
from anysite.rows import read_rows
from anysite.runs import JUDGE, load_tensors

FITTED, DRAWS = 10, 1000
LEAST = 1e-6
RATES = (0.05, 0.1, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="RUN=ROWS")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    rows = []
    for named in arguments.runs:
        run, _, path = named.partition("=")
        task, seed, distances = read_distances(Path(run), Path(path))
        for rate in RATES:
            for name, find in LIMITS.items():
                crossed = count_crossed(distances, rate, find)
                row = {"task": task, "seed": seed, "images": len(distances), "stated": rate, "limit": name}
                rows.append(row | {"crossed": round(crossed, 4)})
    for rate in RATES:
        for name in LIMITS:
            found = [row["crossed"] for row in rows if (row["stated"], row["limit"]) == (rate, name)]
            print(f"stated {rate:.2f}, {name}: {np.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})")
    atomic.write_json(arguments.output, {"commit": commit(), "fitted": FITTED, "draws": DRAWS, "rows": rows})


def read_distances(run: Path, path: Path) -> tuple[str, int, np.ndarray]:
    """Return task, seed and distances (images by scores) of what the run was not trained on at its sites."""
    limits = load_tensors(run / JUDGE)[1]["limits"]
    seed = json.loads((run / "config.json").read_text(encoding="utf-8"))["seed"]
    scores: dict[str, dict[str, float | None]] = defaultdict(dict)
    task = ""
    for row in read_rows(path):
        name = row["metric"].removeprefix("score_")
        fits = (row["split"], row["severity"], row["seed"], row["adapt"]) == ("in_domain", 0, seed, "none")
        if fits and name in limits and name not in (COMBINED, QUALITY):
            scores[row["case"]][name] = row["value"]
            task = row["dataset"]
    names = [name for name in limits if all(found.get(name) is not None for found in scores.values())]
    usual, limit = np.array([limits[name] for name in names]).T
    distances = usual + np.array([[s[n] for n in names] for s in scores.values()]) * (limit - usual)
    return task, seed, np.maximum(distances, LEAST)  # as rows have scores, rounded, some are below nothing


def count_crossed(distances: np.ndarray, rate: float, find: Callable[[np.ndarray, float], float]) -> float:
    """Return the share of images beyond a limit that ten others have set, over random draws of those."""
    rng = np.random.default_rng(0)
    share = 1 - rate / (distances.shape[1] + 2)
    crossed = []
    for _ in range(DRAWS):
        order = rng.permutation(len(distances))
        known, further = distances[order[:FITTED]], distances[order[FITTED:]]
        limits = np.array([find(column, share) for column in known.T])
        crossed.append((further > limits).any(1).mean())
    return float(np.mean(crossed))


def find_by_power(power: float, values: np.ndarray, share: float) -> float:
    """Return Student's limit of powers of distances, of logarithms for 0, or the quantile where that is higher."""
    bent, count = np.log(values) if power == 0 else values**power, len(values)
    limit = bent.mean() + special.stdtrit(count - 1, share) * np.sqrt(1 + 1 / count) * bent.std(ddof=1)
    straight = np.exp(limit) if power == 0 else max(limit, 0) ** (1 / power)
    return max(float(np.quantile(values, share)), float(straight))


LIMITS: dict[str, Callable[[np.ndarray, float], float]] = {
    "the judge's": lambda values, share: _find_limit(values, share)[1],
    "of distances": partial(find_by_power, 1),
    "of square roots": partial(find_by_power, 1 / 2),
    "of cube roots": partial(find_by_power, 1 / 3),
    "of logarithms": partial(find_by_power, 0),
}


if __name__ == "__main__":
    main()
