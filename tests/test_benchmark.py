"""The benchmark: which jobs a protocol means, what a job writes, and going on after failures."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anysite import benchmark as benchmarking
from anysite import console, experiment, registry
from anysite.benchmark import Job, JobOutcome, benchmark, count_others, list_jobs, run_job, unfinished
from anysite.data.case import Dataset
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.errors import ConfigError, DataError, Interrupted, InterruptedTraining, RunError
from anysite.experiment import score_job
from anysite.report import write_report
from anysite.report.methods import split_by_method, summarise_methods
from anysite.report.read import Row as ReportRow
from anysite.rows import read_rows, write_rows
from anysite.runs import open_run
from anysite.train import train
from conftest import SMALL, small_config

pytestmark = pytest.mark.usefixtures("one_core")

TINY = [*SMALL, "train.steps=2", "train.validation_cases=0"]
FIELDS = {
    *("dataset", "method", "adapt", "seed", "train_domains", "domain", "split", "patient", "case", "class"),
    *("metric", "value", "unit", "corruption", "severity", "labels", "commit", "config", "overrides", "job"),
    "data",
}
COSTS = ["train_seconds", "train_steps", "predict_seconds_per_case", "peak_memory"]


@pytest.fixture(scope="module")
def jobs(phantom: Dataset, phantom_folder: Path) -> list[Job]:
    return list_jobs(phantom, phantom_folder, ["baseline"], [0], "leave-one-out", TINY)


@pytest.fixture(scope="module")
def finished(jobs: list[Job], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[JobOutcome]]:
    """The rows and outcomes of four jobs, two of which fail."""
    output = tmp_path_factory.mktemp("benchmark") / "rows.jsonl"
    unknown_site = replace(jobs[1], test_domains=("mars",), seed=7)
    unforeseen = replace(jobs[1], budget_s=float("inf"), seed=8)
    outcomes = list(benchmark([unknown_site, jobs[0], unforeseen, jobs[2]], output, parallel=0))
    return output, outcomes


def test_the_jobs_of_each_protocol(phantom: Dataset, tmp_path: Path) -> None:
    def jobs(protocol, **options) -> list[tuple]:
        listed = list_jobs(phantom, tmp_path, ["baseline"], [0, 5], protocol, **options)
        assert len({job.key for job in listed}) == len(listed)
        assert [job.seed for job in listed] == sorted(job.seed for job in listed)
        return [(job.test_domains, job.train_domains) for job in listed if job.seed == 5]

    assert jobs("leave-one-out") == [
        (("north",), ("east", "west")),
        (("east",), ("north", "west")),
        (("west",), ("north", "east")),
    ]
    assert jobs("leave-one-out", test_domains=["east"]) == [(("east",), ("north", "west"))]
    assert jobs("train-on-one") == [
        (("east", "west"), ("north",)),
        (("north", "west"), ("east",)),
        (("north", "east"), ("west",)),
    ]
    assert jobs("pooled") == [((), ("north", "east", "west"))]


def test_impossible_jobs_are_refused_before_anything_runs(phantom: Dataset, tmp_path: Path) -> None:
    def refused(
        message, methods=("baseline",), protocol="leave-one-out", dataset=phantom, seeds=(0,), **options
    ):
        with pytest.raises(ConfigError, match=message):
            list_jobs(dataset, tmp_path, methods, seeds, protocol, **options)

    refused("unknown preset 'nonesuch'", methods=["baseline", "nonesuch"])
    refused("no site 'mars'; expected one of north, east, west", test_domains=["mars"])
    refused("test sites with protocol 'pooled'", protocol="pooled", test_domains=["west"])
    refused("unknown setting", overrides=["train.stps=3"])
    refused("no metric 'accuracy'", metrics=["accuracy"])
    refused("seed -3; expected 0 or above", seeds=[2, -3])
    refused("0 members; expected 1 or more", members=0)
    refused("the metric verdict alone; expected dice,verdict", metrics=["verdict"])
    (tmp_path / "baseline.toml").write_text("")
    refused("2 methods named 'baseline'", methods=["baseline", str(tmp_path / "baseline.toml")])
    with pytest.raises(ConfigError, match="-1 jobs at once; expected 0 or more"):
        benchmark([], tmp_path / "rows.jsonl", parallel=-1)
    alone = phantom.with_cases(c for c in phantom.cases if c.domain == "east")
    refused("only the site 'east'.*--protocol pooled", dataset=alone)


def test_every_row_has_every_field(finished: tuple[Path, list[JobOutcome]]) -> None:
    rows = read_rows(finished[0])
    assert rows
    assert all(row.keys() == FIELDS for row in rows)
    assert {row["metric"] for row in rows} == {"dice", *COSTS}
    assert {(r["dataset"], r["method"], r["seed"]) for r in rows} == {("phantom", "baseline", 0)}
    assert {r["overrides"] for r in rows} == {" ".join(TINY)}


def test_splits_are_unseen_at_the_test_site_and_in_domain_elsewhere(
    phantom: Dataset, finished: tuple[Path, list[JobOutcome]]
) -> None:
    rows = read_rows(finished[0])
    for left_out, trained in (("north", "east+west"), ("west", "north+east")):
        scored = [r for r in rows if r["train_domains"] == trained and r["split"] != "run"]
        assert {r["domain"] for r in scored if r["split"] == "unseen"} == {left_out}
        assert {r["domain"] for r in scored if r["split"] == "in_domain"} == set(trained.split("+"))
        assert {r["split"] for r in scored} == {"unseen", "in_domain"}
        tested = {c.id: c.patient for c in phantom.cases if c.domain == left_out}
        assert {r["case"]: r["patient"] for r in scored if r["split"] == "unseen"} == tested
        counts = Counter((r["case"], r["class"]) for r in scored)
        assert set(counts.values()) == {1}
        assert {name for _, name in counts} == set(phantom.classes[1:])


def test_fewer_labels_are_scored_on_the_same_cases(
    phantom: Dataset, phantom_folder: Path, tmp_path: Path
) -> None:
    jobs = list_jobs(
        phantom,
        phantom_folder,
        ["baseline"],
        [0],
        "leave-one-out",
        TINY,
        test_domains=["west"],
        labels=[1, 3, None],
    )
    assert [job.labels for job in jobs] == [1, 3, None]
    assert len({job.digest for job in jobs}) == 3
    outcomes = [run_job(job, 1, None) for job in (jobs[0], jobs[2])]
    assert [outcome.error for outcome in outcomes] == ["", ""]
    few, every = ([r for r in o.rows if r["split"] != "run"] for o in outcomes)
    assert {r["labels"] for r in few} == {"1"}
    assert {r["labels"] for r in every} == {"all"}
    places = [{(r["case"], r["class"], r["split"]) for r in rows} for rows in (few, every)]
    assert places[0] == places[1]
    with pytest.raises(ConfigError, match="0 labelled patients"):
        list_jobs(phantom, tmp_path, ["baseline"], [0], "pooled", labels=[0])


def test_corrupted_copies_of_held_out_images_are_scored_beside_the_clean_ones(
    phantom: Dataset, phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, kept = tmp_path / "rows.jsonl", tmp_path / "runs"

    def listed(*names: str) -> list[Job]:
        return list_jobs(
            phantom, phantom_folder, ["baseline"], [0], "leave-one-out", TINY, test_domains=["west"],
            corruptions=names, severities=[1, 5],
        )  # fmt: skip

    (outcome,) = benchmark(listed("gaussian_noise"), output, parallel=0, keep_runs=kept)
    assert outcome.error == ""
    rows = [row for row in read_rows(output) if row["split"] == "in_domain"]
    clean = {(r["case"], r["class"]) for r in rows if r["corruption"] == "none"}
    for severity in (1, 5):
        found = [r for r in rows if (r["corruption"], r["severity"]) == ("gaussian_noise", severity)]
        assert {(r["case"], r["class"]) for r in found} == clean
        assert len({r["corruption_version"] for r in found}) == 1
    assert not [r for r in read_rows(output) if r["split"] == "unseen" and r["corruption"] != "none"]
    assert unfinished(listed("gaussian_noise"), output) == []
    assert unfinished(listed(), output) == []
    # Another corruption is added to what is there; another version of one replaces it.
    (more,) = benchmark(listed("jpeg"), output, parallel=0, keep_runs=kept)
    assert more.error == ""
    assert {r["corruption"] for r in read_rows(output)} == {"none", "gaussian_noise", "jpeg"}
    assert unfinished(listed("gaussian_noise", "jpeg"), output) == []
    # Other severities are added, and those on file stay.
    weaker = replace(listed("jpeg")[0], severities=(3,))
    (third,) = benchmark([weaker], output, parallel=0, keep_runs=kept)
    assert third.error == ""
    severities = {r["severity"] for r in read_rows(output) if r["corruption"] == "jpeg"}
    assert severities == {1, 3, 5}
    monkeypatch.setattr("anysite.experiment.version_of", lambda name: f"{name}/changed")
    (job,) = unfinished(listed("jpeg"), output)
    assert job.corruptions == ("jpeg",)


def test_rows_of_old_files_are_those_of_all_labels(
    phantom: Dataset, phantom_folder: Path, finished: tuple[Path, list[JobOutcome]], tmp_path: Path
) -> None:
    old = [{k: v for k, v in row.items() if k != "job"} for row in read_rows(finished[0])]
    write_rows(tmp_path / "old.jsonl", old)
    jobs = list_jobs(phantom, phantom_folder, ["baseline"], [0], "leave-one-out", TINY, labels=[1, None])
    waiting = unfinished(jobs, tmp_path / "old.jsonl")
    assert sum(job.labels is None for job in waiting) == 1
    assert sum(job.labels == 1 for job in waiting) == 3


@pytest.mark.parametrize(
    ("options", "text"), [({"corruptions": ["rain"]}, "rain"), ({"severities": [6]}, "severity 6")]
)
def test_unknown_corruptions_and_severities_are_refused(
    options: dict, text: str, phantom: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        list_jobs(phantom, tmp_path, ["baseline"], [0], "pooled", **options)


def test_calibration_is_scored_of_clean_and_corrupted_images(
    phantom: Dataset, phantom_folder: Path, tmp_path: Path
) -> None:
    (job,) = list_jobs(
        phantom, phantom_folder, ["baseline"], [0], "leave-one-out", TINY, test_domains=["west"],
        metrics=["dice", "ece"], corruptions=["gaussian_noise"], severities=[3],
    )  # fmt: skip
    outcome = run_job(job, 1, None)
    rows = [row for row in outcome.rows if row["metric"] == "ece"]
    assert {row["class"] for row in rows} == {"all classes"}
    assert {row["corruption"] for row in rows} == {"none", "gaussian_noise"}
    write_rows(tmp_path / "rows.jsonl", outcome.rows)
    assert not unfinished([job], tmp_path / "rows.jsonl")


def test_what_a_training_cost_is_kept(finished: tuple[Path, list[JobOutcome]]) -> None:
    costs = [r for r in read_rows(finished[0]) if r["split"] == "run"]
    assert [r["metric"] for r in costs] == COSTS * 2
    assert all(r["case"] == r["class"] == r["domain"] == "" for r in costs)
    assert {r["value"] for r in costs if r["metric"] == "train_steps"} == {2}
    assert all(r["value"] > 0 for r in costs)
    assert {r["metric"]: r["unit"] for r in costs} == dict(zip(COSTS, ("s", "1", "s", "MB"), strict=True))


def test_a_job_that_fails_is_reported_and_the_rest_goes_on(
    finished: tuple[Path, list[JobOutcome]],
) -> None:
    by_seed = {outcome.job.seed: outcome for outcome in finished[1] if outcome.error}
    assert by_seed.keys() == {7, 8}
    assert "no site named 'mars'" in by_seed[7].error
    assert by_seed[8].error.partition(": ")[0] in ("OverflowError", "ValueError")  # of no kind we foresee
    assert not by_seed[7].rows
    assert sum(not outcome.error for outcome in finished[1]) == 2


def test_finished_jobs_are_skipped_also_after_a_cut_last_line(
    jobs: list[Job], finished: tuple[Path, list[JobOutcome]], tmp_path: Path
) -> None:
    output, outcomes = finished
    assert unfinished(jobs, output) == [jobs[1]]
    assert unfinished(jobs, tmp_path / "absent.jsonl") == jobs
    before = output.read_bytes()
    assert list(benchmark([jobs[0], jobs[2]], output)) == []
    assert output.read_bytes() == before
    assert unfinished([replace(jobs[0], overrides=("seed=9",))], output)
    done = [outcome for outcome in outcomes if not outcome.error]
    cut = tmp_path / "cut.jsonl"
    lines = before.splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[: len(done[0].rows) + 3]) + lines[-1][:20])
    assert len(read_rows(cut)) == len(done[0].rows) + 3
    assert unfinished([o.job for o in done], cut) == [done[1].job]


def test_a_job_done_again_replaces_what_a_cut_file_kept_of_it(
    finished: tuple[Path, list[JobOutcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, outcomes = finished
    done = {outcome.job.key: outcome for outcome in outcomes if not outcome.error}
    monkeypatch.setattr("anysite.benchmark._run_job_apart", lambda job, *_: done[job.key])
    cut = tmp_path / "cut.jsonl"
    lines = output.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:-6]) + lines[-6][:9])
    assert len(list(benchmark([o.job for o in done.values()], cut))) == 1
    assert sorted(cut.read_text().splitlines()) == sorted(output.read_text().splitlines())


def test_a_job_is_done_only_under_the_settings_its_rows_were_made_with(
    jobs: list[Job], finished: tuple[Path, list[JobOutcome]], tmp_path: Path
) -> None:
    output, _ = finished
    job = jobs[0]
    assert unfinished([job], output) == []
    for other in (replace(job, budget_s=60.0), replace(job, metrics=("dice", "hd95"))):
        assert unfinished([other], output) == [other]
    assert count_others([job], output) == 0
    assert count_others([replace(job, budget_s=60.0), jobs[1], replace(job, labels=1)], output) == 1
    early = tmp_path / "early.jsonl"  # as written before rows named their job
    write_rows(early, [{k: v for k, v in row.items() if k != "job"} for row in read_rows(output)])
    longer = replace(job, budget_s=60.0)
    assert unfinished([job, longer, jobs[1], replace(job, metrics=("iou",))], early) == [
        jobs[1],
        replace(job, metrics=("iou",)),
    ]


def test_a_preset_file_names_its_method_by_its_stem_and_its_edits_make_another_job(
    jobs: list[Job], tmp_path: Path
) -> None:
    preset = tmp_path / "presets" / "mine.toml"
    preset.parent.mkdir()
    content = '[network]\nname = "unet"\n[objectives.supervised]\n'
    preset.write_text(content)
    job = replace(jobs[0], method=str(preset))
    outcome = run_job(job, 1, None)
    assert not outcome.error
    assert {row["method"] for row in outcome.rows} == {"mine"}
    write_rows(tmp_path / "rows.jsonl", outcome.rows)
    assert unfinished([job], tmp_path / "rows.jsonl") == []
    preset.write_text(content + "[train]\nlearning_rate = 0.5\n")
    assert unfinished([job], tmp_path / "rows.jsonl") == [job]


def test_a_job_that_starts_from_other_weights_is_another_job(
    jobs: list[Job], phantom: Dataset, tmp_path: Path
) -> None:
    starts = [tmp_path / name / "start" for name in ("a", "b")]
    for seed, start in enumerate(starts):
        train(phantom, small_config("train.steps=1", "test_domains=['west']", f"seed={seed}"), start)

    def starting(start: Path) -> Job:
        return replace(jobs[0], overrides=(*TINY, f"pretrained={start}"))

    one, other = map(starting, starts)
    assert one.digest != other.digest
    assert one.overrides_text != other.overrides_text  # which keeps them apart in reports
    assert "start@" in one.overrides_text
    assert str(tmp_path) not in one.overrides_text
    key = one.key
    shutil.move(starts[0], tmp_path / "start")
    assert starting(tmp_path / "start").key == key
    assert starting(tmp_path / "nothing there").digest


def test_what_a_training_warns_of_is_told(jobs: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    job = replace(jobs[0], overrides=(*TINY, "train.unlabelled_share=0.5"))
    outcome = run_job(job, 1, None)
    assert any("train.unlabelled_share does nothing" in note for note in outcome.notes)
    console.show_job(outcome, 1, 1, 0.0)
    assert "train.unlabelled_share does nothing" in " ".join(capsys.readouterr().out.split())


def test_a_site_that_trains_nothing_is_not_named_as_trained_on(jobs: list[Job], phantom: Dataset) -> None:
    job = next(job for job in jobs if job.test_domains == ("north",))
    tested = next(case.patient for case in phantom.cases if case.domain == "north")
    renamed = phantom.with_cases(
        replace(case, patient=tested) if case.domain == "east" else case for case in phantom.cases
    )
    with pytest.raises(DataError, match="nothing to learn from at east"):
        score_job(job, renamed, Path("unused"), 1)


def test_seeds_and_sites_named_twice_are_one_job(phantom: Dataset, phantom_folder: Path) -> None:
    listed = list_jobs(
        phantom, phantom_folder, ["baseline"], [0, 0], "leave-one-out", TINY, test_domains=["west", "west"],
        labels=[None, None],
    )  # fmt: skip
    assert len(listed) == 1


def test_another_metric_of_a_finished_job_joins_the_rows_it_has(
    jobs: list[Job], finished: tuple[Path, list[JobOutcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = next(outcome for outcome in finished[1] if outcome.job == jobs[0])
    job = replace(jobs[0], metrics=("iou",))
    rows = [{**row, "metric": row["metric"].replace("dice", "iou")} for row in dice.rows]
    monkeypatch.setattr("anysite.benchmark._run_job_apart", lambda *_: JobOutcome(job, rows))
    output = tmp_path / "rows.jsonl"
    write_rows(output, dice.rows)
    assert len(list(benchmark([job], output))) == 1
    kept = Counter(row["metric"] for row in read_rows(output))
    expected = Counter(row["metric"] for row in dice.rows)
    assert kept == {**expected, "iou": expected["dice"]}
    assert unfinished([replace(job, metrics=("dice", "iou"))], output) == []


def test_rows_of_another_training_of_the_same_job_do_not_stay(
    jobs: list[Job], finished: tuple[Path, list[JobOutcome]], tmp_path: Path
) -> None:
    dice = next(outcome for outcome in finished[1] if outcome.job == jobs[0])
    job, output = replace(jobs[0], metrics=("iou",)), tmp_path / "rows.jsonl"
    anew = [
        {**row, "metric": row["metric"].replace("dice", "iou"), "config": "other weights"}
        for row in dice.rows
    ]
    write_rows(output, dice.rows)
    benchmarking._append(output, JobOutcome(job, anew))
    assert not any(row["metric"] == "dice" for row in read_rows(output))
    assert unfinished([jobs[0]], output) == [jobs[0]]


def test_a_job_is_done_again_where_its_labels_or_images_changed(
    jobs: list[Job], finished: tuple[Path, list[JobOutcome]], phantom_folder: Path, tmp_path: Path
) -> None:
    folder, output = tmp_path / "elsewhere", tmp_path / "rows.jsonl"
    shutil.copytree(phantom_folder, folder)
    shutil.copy(finished[0], output)

    def listed() -> list[Job]:
        return list_jobs(open_dataset(folder), folder, ["baseline"], [0], "leave-one-out", TINY)

    moved = [replace(job, dataset=jobs[0].dataset) for job in listed()]
    assert [job.data for job in moved] == [job.data for job in jobs]
    assert [job.key for job in unfinished(moved, output)] == [jobs[1].key]
    assert benchmarking.count_outdated(moved, output) == 0
    case = open_dataset(folder).cases[0]
    assert case.label_path is not None
    Image.fromarray(255 - np.asarray(Image.open(case.label_path))).save(case.label_path)
    mended = [
        replace(job, dataset=jobs[0].dataset, data=listed_job.data)
        for job, listed_job in zip(jobs, listed(), strict=True)
    ]
    assert unfinished(mended, output) == mended
    assert benchmarking.count_outdated(mended, output) == 2
    unsaid = [{k: v for k, v in row.items() if k != "data"} for row in read_rows(output)]
    write_rows(output, unsaid)  # as written before rows named their data
    assert unfinished(mended, output) == [mended[1]]
    former = next(job for job in jobs if unfinished([job], finished[0]) == [])
    rows = [{**row, "data": former.data} for row in unsaid if benchmarking._key_of(row) == former.key]
    extra = [{**row, "metric": "hd95"} for row in rows if row["metric"] == "dice"]
    write_rows(output, [*rows, *extra])
    benchmarking._append(output, JobOutcome(mended[0], [{**row, "data": mended[0].data} for row in rows]))
    assert {row["metric"] for row in read_rows(output)} == {"dice", *COSTS}
    before = listed()[0].data
    case.image_paths[0].write_bytes(case.image_paths[0].read_bytes() + b"1")
    assert listed()[0].data != before


def test_a_cost_that_is_not_measured_again_stays(
    jobs: list[Job], finished: tuple[Path, list[JobOutcome]], tmp_path: Path
) -> None:
    dice = next(outcome for outcome in finished[1] if outcome.job == jobs[0])
    output = tmp_path / "rows.jsonl"
    write_rows(output, dice.rows)
    again = [
        row for row in dice.rows if row["metric"] != "predict_seconds_per_case"
    ]  # of masks that were kept
    benchmarking._append(output, JobOutcome(jobs[0], again))
    assert sorted(row["metric"] for row in read_rows(output) if row["split"] == "run") == sorted(COSTS)


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_benchmark_does_not_speak_of_a_state_that_is_gone(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    def stop(*arguments: object) -> list:
        raise InterruptedTraining("stopped", where="run")

    monkeypatch.setattr(benchmarking, "score_job", stop)
    with pytest.raises(Interrupted, match="Run the same command again"):
        list(benchmark([jobs[0]], tmp_path / "rows.jsonl", parallel=0, keep_runs=tmp_path if kept else None))


def test_only_cases_that_the_judge_learned_from_are_marked(tmp_path: Path) -> None:
    """Also where the first case scored is one of them: its mark belongs to no corrupted copy and no other image."""
    folder = write_phantom(tmp_path / "phantom", patients_per_site=4)
    settings = [
        "train.validation_fraction=0.3",
        "judge.held_out_cases=1",
        "judge.shifted_copies=0",
        "judge.detectors={histogram={}}",
    ]
    (job,) = list_jobs(
        open_dataset(folder), folder, ["baseline"], [0], "leave-one-out", [*TINY, *settings],
        test_domains=["west"], metrics=["dice", "verdict"], corruptions=["gaussian_noise"], severities=[3],
    )  # fmt: skip
    outcome = run_job(job, 1, None)
    assert not outcome.error
    marked = [row for row in outcome.rows if row.get("judge_learned")]
    assert marked
    assert {row["split"] for row in marked} == {"in_domain"}
    learned = {(row["domain"], row["patient"]) for row in marked}
    assert all(
        bool(row.get("judge_learned")) == ((row["domain"], row["patient"]) in learned)
        for row in outcome.rows
        if row["split"] != "run"
    )
    assert len(learned) == 1 < len({(row["domain"], row["patient"]) for row in outcome.rows})


def test_every_metric_of_every_adapter_has_to_be_there(jobs: list[Job]) -> None:
    job = replace(jobs[0], metrics=("dice", "hd95"), adapt=("none", "tent"))
    assert {("hd95", "", 0), ("hd95", "", 0, "tent"), ("adapted", "", 0, "tent")} <= job.topics


def test_two_writers_of_one_file_keep_each_others_rows(
    finished: tuple[Path, list[JobOutcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would read before either writes, were reading and writing not one step."""
    done = [outcome for outcome in finished[1] if not outcome.error]
    both_read = threading.Barrier(2)

    def read_together(path: Path) -> list[dict]:
        rows = read_rows(path)
        try:
            both_read.wait(0.3)
        except threading.BrokenBarrierError:
            both_read.reset()
        return rows

    output = tmp_path / "rows.jsonl"
    output.touch()
    monkeypatch.setattr(benchmarking, "read_rows", read_together)
    writers = [threading.Thread(target=benchmarking._append, args=(output, outcome)) for outcome in done]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(output.read_text().splitlines()) == sorted(finished[0].read_text().splitlines())


def test_a_system_that_counts_no_memory_leaves_that_row_out(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "PROCESS", tmp_path / "none")  # as on other systems than Linux
    rows = run_job(jobs[0], 1, None).rows
    assert [row["metric"] for row in rows if row["split"] == "run"] == COSTS[:3]


def test_the_report_shows_what_the_benchmark_writes(
    finished: tuple[Path, list[JobOutcome]], tmp_path: Path
) -> None:
    rows = read_rows(finished[0])
    value = {m: np.mean([r["value"] for r in rows if r["metric"] == m]) for m in COSTS}
    alone = write_report([finished[0]], tmp_path / "alone.html").read_text()
    assert f"2 steps, {value['peak_memory']:.0f} MB</dd>" in alone
    both = [*rows, *({**row, "method": "other"} for row in rows)]
    write_rows(tmp_path / "both.jsonl", both)
    page = write_report([tmp_path / "both.jsonl"], tmp_path / "both.html").read_text()
    assert page.count(f"2 steps</small> <small>{round(value['peak_memory'])} MB</small>") == 2
    for method in summarise_methods(split_by_method([ReportRow.model_validate(r) for r in both]), "baseline"):
        costs = (
            method.train_seconds,
            method.train_steps,
            method.predict_seconds_per_case,
            method.peak_memory_mb,
        )
        assert costs == pytest.approx(list(value.values()))
        assert method.left_out == (0, 0)


def test_kept_runs_of_other_settings_are_never_taken_for_a_jobs_own(jobs: list[Job], tmp_path: Path) -> None:
    first = run_job(jobs[0], 1, tmp_path)
    folders = list(tmp_path.iterdir())
    assert len(folders) == 1
    assert {path.name for path in folders[0].iterdir()} == {"run", "masks"}
    again = run_job(jobs[0], 1, tmp_path)
    assert scores(again) == scores(first)
    # The memory that the training took was counted then, and this process did not train.
    told = [{r["metric"] for r in outcome.rows if r["split"] == "run"} for outcome in (first, again)]
    assert "peak_memory" not in told[1]
    assert told[0] >= told[1] >= {"train_seconds", "train_steps"}
    other = replace(jobs[0], overrides=(*jobs[0].overrides, "train.steps=3"))
    steps = [r["value"] for r in run_job(other, 1, tmp_path).rows if r["metric"] == "train_steps"]
    assert steps == [3]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_kept_run_of_other_defaults_is_refused(jobs: list[Job], tmp_path: Path) -> None:
    """The digest that names its folder knows only what differs from the defaults."""
    run_job(jobs[0], 1, tmp_path)
    (folder,) = tmp_path.iterdir()
    config = json.loads((folder / "run" / "config.json").read_text())
    config["train"]["average_share"] = 0.125
    (folder / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"a kept run trained with another train\.average_share"):
        score_job(jobs[0], open_dataset(Path(jobs[0].dataset_path)), folder, 1)


def test_sites_in_another_order_are_still_the_same_job(
    phantom: Dataset, phantom_folder: Path, tmp_path: Path
) -> None:
    """The key must not depend on which site's patients happen to be held out first."""
    lines = (phantom_folder / "index.csv").read_text().splitlines()
    shuffled = list(np.random.default_rng(3).permutation(lines[1:]))
    rows = [line.split(",") for line in shuffled]
    text = [",".join([*r[:3], *(str(phantom_folder / path) for path in r[3:])]) for r in rows]
    (tmp_path / "index.csv").write_text("\n".join([lines[0], *text]) + "\n")
    (tmp_path / "dataset.json").write_bytes((phantom_folder / "dataset.json").read_bytes())
    dataset = open_dataset(tmp_path)
    for seed in range(20):  # until the first case listed is one held out
        (job,) = list_jobs(dataset, tmp_path, ["baseline"], [seed], "pooled", TINY)
        training, _ = dataset.hold_out_patients(0.2, seed)
        if training.domains != job.train_domains:
            break
    else:
        pytest.fail("no seed changes the order of the sites")
    outcome = run_job(job, 1, None)
    assert not outcome.error
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in outcome.rows))
    assert unfinished([job], tmp_path / "rows.jsonl") == []


def test_a_job_without_a_case_to_score_says_so(jobs: list[Job]) -> None:
    pooled = replace(jobs[0], test_domains=(), overrides=(*TINY, "train.validation_fraction=0"))
    assert "no case is left to score" in run_job(pooled, 1, None).error


def scores(outcome: JobOutcome) -> list[tuple]:
    return [(r["case"], r["class"], r["value"]) for r in outcome.rows if r["split"] != "run"]


def test_an_ensemble_is_a_method_of_its_own_whose_members_share_the_split(
    tmp_path: Path,
) -> None:
    sites = ("north", "east", "west")
    phantom_folder = write_phantom(tmp_path / "phantom", patients_per_site=6, size=64, sites=sites)
    phantom = open_dataset(phantom_folder)
    judged = [
        *SMALL, "train.steps=2", "train.validation_fraction=0.3", "judge.shifted_copies=2",
        "judge.detectors={histogram = {}, entropy = {}}",
    ]  # fmt: skip

    def listed(members: int) -> list[Job]:
        return list_jobs(
            phantom, phantom_folder, ["baseline"], [3], "leave-one-out", judged, test_domains=["west"],
            metrics=["dice", "verdict"], corruptions=["gaussian_noise"], severities=[5], members=members,
        )  # fmt: skip

    for members in (2, 1):
        (outcome,) = benchmark(
            listed(members), tmp_path / "rows.jsonl", parallel=0, keep_runs=tmp_path / "runs"
        )
        assert not outcome.error
        assert not unfinished(listed(members), tmp_path / "rows.jsonl")
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {(row["method"], row["seed"]) for row in rows} == {("baseline_x2", 3), ("baseline", 3)}
    disagreement = [row for row in rows if row["metric"] == "score_ensemble"]
    assert {row["method"] for row in disagreement} == {"baseline_x2"}
    assert {row["corruption"] for row in disagreement} == {"none", "gaussian_noise"}
    one, other = (open_run(path) for path in sorted((tmp_path / "runs").glob("*/run_*")))
    (alone,) = (open_run(path) for path in (tmp_path / "runs").glob("*/run"))
    assert one.splits == other.splits == alone.splits
    assert (one.config.member, other.config.member) == (0, 1)
    (job,) = listed(1)
    score_job(replace(job, overrides=(*judged, "member=1")), phantom, tmp_path / "second", threads=1)
    assert open_run(tmp_path / "second" / "run").config.member == 1
    weights = [run.network().state_dict() for run in (one, other, alone)]
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_classes_outside_anysite_are_trusted_by_the_processes_of_jobs_too(
    phantom: Dataset, phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside.py").write_text(
        "from anysite.adapters.tent import Tent\n"
        "from anysite.objectives.supervised import Supervised\n\n"
        "class Mine(Supervised):\n    pass\n\n\nclass Change(Tent):\n    pass\n"
    )
    (tmp_path / "mine.toml").write_text('[network]\nname = "unet"\n\n[objectives."outside:Mine"]\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_plugins", set())
    methods, adapters = [str(tmp_path / "mine.toml")], ["outside:Change:always"]
    arguments = (phantom, phantom_folder, methods, [0], "leave-one-out", TINY)
    with pytest.raises(ConfigError, match="--plugin outside:"):
        list_jobs(*arguments, test_domains=["west"], adapt=adapters)
    registry.trust("outside:Mine")
    registry.trust("outside:Change")
    (job,) = list_jobs(*arguments, test_domains=["west"], adapt=adapters)
    (outcome,) = benchmark([job], tmp_path / "rows.jsonl", parallel=1)
    assert not outcome.error
    assert {row["adapt"] for row in outcome.rows} == {"none", "outside:Change:always"}
    assert {row["value"] for row in outcome.rows if row["metric"] == "adapted"} <= {0.0, 1.0}


def test_a_structure_that_the_test_site_alone_shows_is_named(tmp_path: Path) -> None:
    """It must not give the network an output, nor be counted as another one."""
    folder = write_phantom(tmp_path / "phantom", patients_per_site=3, size=32, sites=("north", "west"))
    (folder / "dataset.json").unlink()
    for case in open_dataset(folder).cases:
        if case.domain == "north" and case.label_path is not None:
            array = np.array(Image.open(case.label_path))
            Image.fromarray(np.where(array > 1, 0, array)).save(case.label_path)
    job = list_jobs(open_dataset(folder), folder, ["baseline"], [0], "leave-one-out", TINY, None, ["west"])[0]
    assert "label values 0, 1 at the training sites and 0, 1, 2" in run_job(job, 1, None).error
