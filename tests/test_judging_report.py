"""The report's section on judgement: from rows to what it says, and from a benchmark to rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from anysite.benchmark import benchmark, list_jobs, unfinished
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.errors import ConfigError
from anysite.experiment import Job
from anysite.judgement import is_judgement
from anysite.report.judging import REFERRAL, describe_judgement
from anysite.report.page import write_report
from anysite.report.read import Row
from anysite.rows import read_rows
from conftest import SMALL


def row(metric: str, value: float | None, case: str, **fields: object) -> Row:
    given = {"dataset": "phantom", "method": "baseline", "seed": "0", "train_domains": "north", "domain": "north",
             "split": "in_domain", "patient": case, "case": case, "class": "all classes", "metric": metric,
             "corruption": "none", "severity": "0", "value": value}  # fmt: skip
    return Row.model_validate(given | fields)


def image(
    case: str, dice: float | None, verdict: float | None, *scores: float | None, **fields: object
) -> list[Row]:
    rows = [row("verdict", verdict, case, **fields)]
    rows += [row(f"score_{name}", value, case, **fields) for name, value in zip("ab", scores, strict=False)]
    if dice is not None:
        rows += [row("dice", dice + d, case, **fields | {"class": c}) for c, d in (("x", 0.05), ("y", -0.05))]
    return rows


HELD_OUT = [
    *image("1", 0.9, 0, 0.0, 0.3),
    *image("2", 0.8, 0, 0.1, 0.2),
    *image("3", 0.6, 0, 0.2, 0.1),
    *image("4", 0.85, 1, 0.3, 1.2),
]
UNSEEN = [
    *image("5", 0.5, 1, 0.25, 2.0, split="unseen", domain="west"),
    *image("6", 0.2, 2, 0.5, None, split="unseen", domain="west"),
]
OTHER = [
    *image("1", None, 2, 5.0, 5.0, split="other", other="brains", domain="north"),
    *image("9", None, 0, 0.0, 0.0, split="other", other="brains"),
    *image("8", None, None, split="other", other="brains"),
]


def test_what_the_section_says_is_what_the_rows_say() -> None:
    predicted = zip(
        ("predicted_dice_low", "predicted_dice", "predicted_dice_high"), (0.7, 0.8, 0.85), strict=True
    )
    told = [row(name, value, case) for name, value in predicted for case in ("1", "2")]
    judgement = describe_judgement("baseline", [*HELD_OUT, *UNSEEN, *OTHER, *told])
    assert judgement is not None
    assert judgement.scores == ("a", "b", REFERRAL)
    others, west = judgement.shifts
    assert (others.kind, others.name, others.images) == ("other", "brains", 2)
    assert (west.kind, west.name, west.images) == ("unseen", "west", 2)
    assert west.scores["a"] == (pytest.approx(7 / 8), pytest.approx(0.25))
    assert west.scores["b"] == (1.0, 0.0)
    assert others.scores["a"] == (pytest.approx(4.5 / 8), 1.0)
    assert [mean.kind for mean in judgement.means] == ["other", "unseen", "all"]
    assert judgement.means[-1].scores["a"][0] == pytest.approx((7 / 8 + 4.5 / 8) / 2)

    ((name, images, failed, rankings),) = judgement.rankings
    assert (name, images, failed) == ("clean images", 6, 3)
    by_b = next(ranking for ranking in rankings if ranking.score == "b")
    assert by_b.caught == 1  # one of six is looked at, and it failed
    assert by_b.aurc == pytest.approx((0.4 + 0.6 / 2 + 0.7 / 3 + 0.85 / 4 + 1.35 / 5 + 2.15 / 6) / 6)

    passed = {group.kind: group for group in judgement.passed}
    assert (passed["in_domain"].failed, passed["in_domain"].silent) == (1, 1)
    assert passed["in_domain"].silent_interval == pytest.approx((0.0084, 0.9057), abs=1e-4)
    assert (passed["in_domain"].predicted, passed["in_domain"].within) == (2, 1)  # 0.9 is above 0.85
    assert passed["unseen"].silent_interval is None  # none was accepted
    assert {kind: group.beyond for kind, group in passed.items()} == {"in_domain": 1, "unseen": 2, "other": 1}
    assert (passed["other"].silent, passed["other"].refused) == (1, 1)


def test_a_mask_failed_below_the_dice_that_was_asked_for() -> None:
    asked = [row("least_dice", 0.82, name) for name in "1234"]
    judgement = describe_judgement("baseline", [*HELD_OUT, *UNSEEN, *asked])
    assert judgement is not None
    passed = {group.kind: group for group in judgement.passed}
    assert (passed["in_domain"].failed, passed["in_domain"].silent) == (2, 2)  # 0.8 and 0.6; 0.85 is enough
    assert passed["unseen"].failed == 2
    assert is_judgement("least_dice")


def test_an_image_without_a_score_counts_as_the_strangest() -> None:
    judged = describe_judgement("m", [*HELD_OUT, *UNSEEN])
    lacking = [r for r in (*HELD_OUT, *UNSEEN) if (r.metric, r.case) != ("score_b", "1")]
    without = describe_judgement("m", lacking)
    assert judged is not None
    assert without is not None
    (_, number, _, before), (_, other, _, after) = judged.rankings[0], without.rankings[0]
    assert number == other
    measured = [{one.score: one for one in ranked} for ranked in (before, after)]
    assert measured[1]["a"] == measured[0]["a"]
    assert measured[1]["b"].aurc > measured[0]["b"].aurc  # its best mask looks worst


def test_runs_are_measured_apart_because_their_scores_are() -> None:
    moved = [
        r.model_copy(
            update={"value": None if r.value is None else r.value + 100 * r.metric.startswith("score")}
        )
        for r in [*HELD_OUT, *UNSEEN]
    ]
    shifted = [r.model_copy(update={"seed": "1"}) for r in moved]
    once, twice = (
        describe_judgement("m", rows) for rows in ([*HELD_OUT, *UNSEEN], [*HELD_OUT, *UNSEEN, *shifted])
    )
    assert once is not None
    assert twice is not None
    assert twice.runs == 2
    assert twice.shifts[0].scores == once.shifts[0].scores
    assert describe_judgement("m", [row("dice", 0.5, "1")]) is None


@pytest.mark.usefixtures("one_core")
def test_a_benchmark_keeps_what_the_section_needs(tmp_path: Path) -> None:
    sites = write_phantom(tmp_path / "sites", patients_per_site=8, size=48, sites=("north", "east"))
    other = write_phantom(tmp_path / "elsewhere", patients_per_site=2, size=48, sites=("west",), seed=5)
    volumes = write_phantom(tmp_path / "volumes", dimension=3, size=24, patients_per_site=1, sites=("west",))
    overrides = [*SMALL, "train.steps=5", "train.validation_cases=0", "judge.detectors={histogram = {}, nearest = {}}",
                 "train.validation_fraction=0.7", "judge.shifted_copies=6"]  # fmt: skip
    for folder in (sites, other, volumes):
        described = json.loads((folder / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps(described | {"name": folder.name}))
    dataset = open_dataset(sites)

    def jobs(others: Sequence[Path] = ()) -> list[Job]:
        return list_jobs(
            dataset, sites, ["baseline"], [0], "leave-one-out", overrides, test_domains=["east"],
            metrics=["dice", "verdict"], corruptions=["gaussian_noise"], severities=[5], others=others,
        )  # fmt: skip

    output = tmp_path / "rows.jsonl"
    (outcome,) = benchmark(jobs(others=[other, volumes]), output, parallel=0)
    assert outcome.error == ""
    rows = read_rows(output)
    assert {r["split"] for r in rows} == {"in_domain", "unseen", "other", "run"}
    assert {r["metric"] for r in rows if r["split"] == "unseen"} >= {
        "dice", "verdict", "score_histogram", "score_nearest", "score_combined", "score_quality",
    }  # fmt: skip
    assert any(r["corruption"] == "gaussian_noise" and r["metric"] == "verdict" for r in rows)
    told = {
        r["case"]: r["value"] for r in rows if r["metric"] == "predicted_dice" and r["split"] == "in_domain"
    }
    assert told
    assert all(0 <= value <= 1 for value in told.values())
    assert {r["other"] for r in rows if r["split"] == "other"} == {"elsewhere", "volumes"}
    refused = [r for r in rows if r.get("other") == "volumes"]
    assert {(r["metric"], r["value"]) for r in refused} == {("verdict", None)}
    assert unfinished(jobs(others=[other, volumes]), output) == []
    assert unfinished(jobs(), output) == []
    with pytest.raises(ConfigError, match="another dataset named 'sites'"):
        jobs(others=[sites])

    page = write_report([output], tmp_path / "report.html").read_text()
    assert '<h2 id="risk">Risk and coverage</h2>' in page
    assert "another dataset" in page
    for line in output.read_text().splitlines():
        if not is_judgement(json.loads(line)["metric"]):
            assert "score_" not in line
