"""Files damaged at random or cut short: refused by a named error, or read as what they are; never a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource")  # limits memory: not on Windows

FUZZ = Path(__file__).with_name("fuzz.py")
KINDS = ("nii", "nii.gz", "nrrd", "mha", "dcm", "png", "jpg", "tif", "npz", "run", "json")


def run(folder: Path, seed: int, count: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    command = [sys.executable, str(FUZZ), str(folder), str(seed), str(count), *kinds]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]  # a crash of the process would be an end by a signal
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("fuzz"), 0, 250, KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_by_name_or_read_with_sound_geometry(
    outcomes: dict[str, Any], kind: str
) -> None:
    assert outcomes[kind]["faults"] == []
    assert outcomes[kind]["refused"] > 50


def test_files_cut_short_are_never_taken_for_whole_ones(tmp_path: Path) -> None:
    outcomes = run(tmp_path, 0, 0, KINDS[:-1])
    assert [fault for outcome in outcomes.values() for fault in outcome["faults"]] == []
    assert sum(outcome["refused"] + outcome.get("accepted", 0) for outcome in outcomes.values()) >= 500


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_damaged_files(tmp_path: Path, kind: str) -> None:
    outcome = run(tmp_path, 1, 10_000, (kind,))[kind]
    assert outcome["faults"] == []
