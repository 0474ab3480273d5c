"""Seconds to enter many cases in a manifest: by its journal, and by storing the whole after each.

Run as `python benchmarks/manifest.py [--cases 2000] [--output benchmarks/manifest.json]`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from anysite import atomic, provenance
from anysite.data.case import Case
from anysite.manifest import Manifest, describe_case

SCORES = ("histogram", "spectral", "entropy", "soft_dice", "shape", "combined", "quality")


def describe_entry(case: Case, output: Path) -> dict[str, Any]:
    """Return an entry as long as that of a case with a verdict."""
    verdict = {
        "decision": "accept", "reasons": [], "scores": dict.fromkeys(SCORES, -0.044540530990117684),
        "predicted_dice": [0.9245919454571186, 0.9575872648762769, 0.986337680549005], "least_dice": 0.7,
    }  # fmt: skip
    digest = "0" * 64
    done = {
        "status": "done",
        "mask": f"{case.id}.png",
        "sha256": digest,
        "image_sha256": [digest],
        "error": None,
    }
    return describe_case(case, output) | done | {"verdict": verdict, "seconds": 0.1}


def enter_cases(folder: Path, count: int, whole: bool) -> float:
    """Return the seconds that `count` cases take, the last ones with all others in the manifest."""
    manifest = Manifest(folder, "1/1", "origin", {})
    manifest.write()
    began = time.monotonic()
    for number in range(count):
        case = Case(f"case-{number}", f"patient-{number}", "site", (folder / f"case-{number}.png",))
        manifest.claim([f"{case.id}.png"])
        if whole:
            manifest.write()
        manifest.enter(case, describe_entry(case, folder))
        if whole:
            manifest.write()
    manifest.write()
    return time.monotonic() - began


def main() -> None:
    """Print both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        journal, whole = (
            enter_cases(Path(name) / kind, arguments.cases, kind == "whole") for kind in ("journal", "whole")
        )
    row = {
        "cases": arguments.cases, "journal_seconds": round(journal, 2), "whole_seconds": round(whole, 2),
        "ratio": round(whole / journal, 1), "commit": provenance.commit(),
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    if arguments.output:
        atomic.write_json(arguments.output, row)


if __name__ == "__main__":
    main()
