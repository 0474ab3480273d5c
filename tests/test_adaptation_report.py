"""The table on adaptation, from rows with known changes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from anysite.judgement import exact_interval
from anysite.report.adaptation import describe_adaptations
from anysite.report.page import write_report
from anysite.report.read import read_sources

PLAIN = {"a": 0.8, "b": 0.7, "c": 0.6, "d": 0.5}
CHANGES = {"a": 0.0, "b": 0.05, "c": -0.02, "d": 0.03}


def row(case: str, adapt: str, metric: str, value: float | None, **more: object) -> dict[str, object]:
    return {
        "dataset": "sites", "method": "baseline", "adapt": adapt, "seed": 0, "train_domains": "x", "domain": "y",
        "split": "unseen", "patient": case, "case": case, "class": "disc" if metric == "dice" else "all classes",
        "metric": metric, "value": value, "unit": "1", "corruption": "none", "severity": 0, **more,
    }  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [row(case, "none", "dice", value) for case, value in PLAIN.items()]
    lines += [row(case, "refseg", "dice", PLAIN[case] + change) for case, change in CHANGES.items()]
    lines += [row(case, "refseg", "adapted", float(case != "a")) for case in PLAIN]
    lines += [row("a", "none", "dice", 0.4, corruption="blur", severity=3, split="in_domain")]
    lines += [row("a", "refseg", "dice", 0.5, corruption="blur", severity=3, split="in_domain")]
    lines += [row("z", "refseg", "dice", 0.1)]  # nothing to compare it with
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_gain_and_harm_are_counted_image_by_image(rows: Path) -> None:
    (result,) = describe_adaptations([row for source in read_sources([rows]) for row in source.rows])
    assert (result.method, result.adapter) == ("baseline", "refseg")
    unseen, corrupted = result.gains
    assert (unseen.kind, unseen.images, unseen.adapted) == ("unseen", 4, 3)
    assert unseen.gain.mean == pytest.approx(0.015)
    assert unseen.gain_adapted is not None
    assert unseen.gain_adapted.mean == pytest.approx(0.02)
    assert (unseen.harmed, unseen.helped) == (1, 2)
    assert unseen.worst == (("c", pytest.approx(-0.02)),)
    share, low, high = unseen.harmed_share
    assert share == 0.25
    assert 0 <= low < share < high <= 1
    assert (corrupted.kind, corrupted.images) == ("corrupted", 1)
    assert corrupted.gain.mean == pytest.approx(0.1)


@pytest.mark.parametrize(("harmed", "share"), [(0, 0.0), (6, 1.0)])
def test_images_and_trainings_of_one_patient_count_once_for_the_share_of_harmed_masks(
    harmed: int, share: float, tmp_path: Path
) -> None:
    lines = []
    for patient, seed, copy in itertools.product(range(6), range(3), range(10)):
        for adapt, value in (("none", 0.8), ("refseg", 0.7 if patient < harmed else 0.8)):
            name = f"{patient}_{copy}"
            lines.append(row(name, adapt, "dice", value) | {"patient": str(patient), "seed": seed})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (result,) = describe_adaptations([row for source in read_sources([path]) for row in source.rows])
    (gain,) = result.gains
    assert (gain.images, gain.harmed) == (180, 30 * harmed)
    assert gain.harmed_share == (share, *exact_interval(harmed, 6))


def test_a_mask_made_where_nothing_is_counts_as_harm(tmp_path: Path) -> None:
    lines = []
    for case, before, after in (("right", None, 0.0), ("mended", 0.0, None), ("nothing", None, None)):
        for adapt, value in (("none", before), ("refseg", after)):
            lines += [row(case, adapt, "dice", 0.9), row(case, adapt, "dice", value, **{"class": "cup"})]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (result,) = describe_adaptations([row for source in read_sources([path]) for row in source.rows])
    (gain,) = result.gains
    assert (gain.images, gain.harmed, gain.helped) == (3, 1, 1)
    assert gain.worst == (("right", -0.5),)
    assert gain.gain.mean == pytest.approx(0)


def test_the_page_shows_gain_and_harm(rows: Path, tmp_path: Path) -> None:
    text = write_report([rows], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Test-time adaptation" in text
    assert "c -2.0" in text or "c −2.0" in text
