"""Write the dataset lists that the joint training is measured on: heart, hippocampus, brain, and all three.

Run as `python benchmarks/joint/lists.py DATA --output FOLDER`; DATA holds cardiac_mr_3d, hippocampus_3d and
brain_t1_2mm_dlmuse. Alone or with the others, a dataset has the same names, so that rows can be compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from anysite import atomic

DATASETS: dict[str, dict[str, Any]] = {
    "heart": {"path": "cardiac_mr_3d"},
    "hippocampus": {"path": "hippocampus_3d"},
    "brain": {
        "path": "brain_t1_2mm_dlmuse",
        # Labels of DLMUSE, right and left.
        "labels": {
            "brain_stem": [35], "brain_hippocampus": [47, 48], "lateral_ventricle": [51, 52], "thalamus": [59, 60],
        },
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    placed = {
        name: one | {"path": str((arguments.data / one["path"]).resolve())} for name, one in DATASETS.items()
    }
    for name, chosen in {**{name: [name] for name in placed}, "organs": list(placed)}.items():
        content = {"name": "organs", "datasets": {one: placed[one] for one in chosen}}
        atomic.write_json(arguments.output / f"{name}.json", content)


if __name__ == "__main__":
    main()
