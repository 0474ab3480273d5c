"""Train, predict and evaluate over sites, methods and seeds; rows are kept, finished jobs are skipped."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from anysite import compute, config, runs
from anysite.calibration import CALIBRATION_METRICS
from anysite.corrupt import CORRUPTIONS, corrupt, fingerprint
from anysite.data.case import Case, Dataset
from anysite.errors import AnysiteError, ConfigError, DataError, InterruptedTraining
from anysite.evaluate import Row, evaluate, read_rows, rows_of, score_probabilities, score_volume, write_rows
from anysite.metrics import METRICS


@dataclass(frozen=True)
class Job:
    """One training and the scoring of every case it was not trained on."""

    dataset_path: str
    dataset: str
    method: str
    overrides: tuple[str, ...]
    seed: int
    test_domains: tuple[str, ...]
    train_domains: tuple[str, ...]
    budget_s: float | None
    metrics: tuple[str, ...]
    labels: int | None = None
    corruptions: tuple[str, ...] = ()
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)

    @property
    def name(self) -> str:
        """The method's name in rows: the preset, or the stem of its file."""
        return _name_of(self.method)

    @property
    def settings(self) -> config.Config:
        """The preset as it is now, with the job's overrides, seed, test sites and number of labelled patients."""
        sites = ", ".join(f'"{domain}"' for domain in self.test_domains)
        own = [f"seed={self.seed}", f"test_domains=[{sites}]"]
        if self.labels is not None:
            own.append(f"train.labelled_patients={self.labels}")
        return config.load(self.method, [*self.overrides, *own])

    @property
    def digest(self) -> str:
        """A digest of all that a result depends on beside the data and the program.

        Of the settings only those that differ from the program's defaults: a new one, off by default, leaves
        every finished job finished.
        """
        settings = self.settings.model_dump(mode="json", exclude_defaults=True)
        return runs.fingerprint([settings, self.budget_s])

    @property
    def topics(self) -> set[tuple[Any, ...]]:
        """What the rows of a finished job are about: every metric, clean and of every corruption as it is now."""
        corrupted = itertools.product(map(_version_of, self.corruptions), self.severities)
        pictures = [("", 0), *corrupted]
        return {(metric, *picture) for metric in self.metrics for picture in pictures} | {("run", "", 0)}

    @property
    def key(self) -> tuple[str, str, int, str, str, str]:
        """What tells this job's rows from those of others."""
        return (
            self.dataset, self.name, self.seed, "+".join(self.train_domains), " ".join(self.overrides),
            self.digest,
        )  # fmt: skip

    @property
    def keys(self) -> set[tuple[Any, ...]]:
        """The key, and that of rows written before they named the job's digest, all of which used all labels."""
        dataset, _, seed, train_domains, overrides, _ = self.key
        former = (
            {(dataset, self.method, seed, train_domains, overrides, "")} if self.labels is None else set()
        )
        return {self.key} | former


@dataclass(frozen=True)
class JobOutcome:
    """A finished job with its rows, or the error that ended it."""

    job: Job
    rows: list[Row]
    error: str = ""


def list_jobs(
    dataset: Dataset,
    dataset_path: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    protocol: str,
    overrides: Sequence[str] = (),
    budget_s: float | None = None,
    test_domains: Sequence[str] = (),
    metrics: Sequence[str] = ("dice",),
    labels: Sequence[int | None] = (None,),
    corruptions: Sequence[str] = (),
    severities: Sequence[int] = (1, 2, 3, 4, 5),
) -> list[Job]:
    """Return the jobs of a protocol: every site left out in turn, every site alone, or all sites pooled.

    Args:
        protocol: "leave-one-out", "train-on-one" or "pooled".
        test_domains: Only these sites are left out; all of them where empty.
        metrics: Which metrics to keep rows of.
        corruptions: Which corruptions of the held-out images to score as well, or "all".
        severities: Of the corruptions.
        labels: From how many labelled patients to learn, None for all; fewer are a subset of more.

    Raises:
        ConfigError: an unknown protocol, method, metric, corruption, severity or site, methods of one name, a
            negative seed, or test sites where the protocol names them.
    """
    for method in methods:
        config.load(method, overrides)
    names = [_name_of(method) for method in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{len(twice)} methods named {twice[0]!r}", fix="rename the preset's file")
    if few := [count for count in labels if count is not None and count < 1]:
        raise ConfigError(f"{few[0]} labelled patients", expected="1 or more, or all")
    if negative := [seed for seed in seeds if seed < 0]:
        raise ConfigError(f"seed {negative[0]}", expected="0 or above")
    for metric in metrics:
        if metric not in METRICS | CALIBRATION_METRICS:
            known = ", ".join(METRICS | CALIBRATION_METRICS)
            raise ConfigError(f"no metric {metric!r}", expected=f"one of {known}")
    corruptions = tuple(CORRUPTIONS) if list(corruptions) == ["all"] else tuple(corruptions)
    for name in corruptions:
        fingerprint(name)  # so that an unknown name is refused before anything runs
    if strange := [severity for severity in severities if severity not in range(1, 6)]:
        raise ConfigError(f"severity {strange[0]}", expected="1, 2, 3, 4 or 5")
    for domain in test_domains:
        if domain not in dataset.domains:
            raise ConfigError(f"no site {domain!r}", expected=f"one of {', '.join(dataset.domains)}")
    domains = tuple(dict.fromkeys(case.domain for case in dataset.labelled))
    if test_domains and protocol != "leave-one-out":
        raise ConfigError(f"test sites with protocol {protocol!r}", expected="leave-one-out")
    if protocol == "leave-one-out":
        left_out: list[tuple[str, ...]] = [(domain,) for domain in test_domains or domains]
    elif protocol == "train-on-one":
        left_out = [tuple(d for d in domains if d != domain) for domain in domains]
    elif protocol == "pooled":
        left_out = [()]
    else:
        raise ConfigError(f"protocol {protocol!r}", expected="leave-one-out, train-on-one or pooled")
    if protocol != "pooled" and len(domains) < 2:
        raise ConfigError(
            f"only the site {', '.join(domains)!r}", where=dataset.name, fix="use --protocol pooled"
        )
    return [
        Job(str(dataset_path), dataset.name, method, tuple(overrides), seed, out,
            tuple(d for d in domains if d not in out), budget_s, tuple(metrics), count,
            corruptions, tuple(severities))
        for seed in seeds for count in labels for out in left_out for method in methods
    ]  # fmt: skip


def benchmark(
    jobs: Sequence[Job], output: Path, *, parallel: int = 1, keep_runs: Path | None = None
) -> Iterator[JobOutcome]:
    """Run every job whose rows are not in `output` yet, append its rows, and yield what became of it.

    Args:
        parallel: Jobs at once, each in a process of its own with its share of the cores.
        keep_runs: Folder for run folders and masks; they are deleted after scoring where it is None.

    Raises:
        ConfigError: fewer than 1 job at once.
    """
    if parallel < 1:
        raise ConfigError(f"{parallel} jobs at once", expected="1 or more")
    return _run_all(unfinished(jobs, output), output, parallel, keep_runs)


def _run_all(
    waiting: Sequence[Job], output: Path, parallel: int, keep_runs: Path | None
) -> Iterator[JobOutcome]:
    threads = max(1, compute.count_cores() // parallel)
    with ThreadPoolExecutor(parallel) as pool:
        for future in as_completed([pool.submit(_run_apart, job, threads, keep_runs) for job in waiting]):
            outcome = future.result()
            if outcome.rows:
                _append(output, outcome)
            yield outcome


def unfinished(jobs: Sequence[Job], output: Path) -> list[Job]:
    """Return the jobs of which a metric or the costs, which come last, are not in the file `output` yet."""
    found: dict[tuple[Any, ...], set[tuple[Any, ...]]] = defaultdict(set)
    for row in read_rows(output) if output.is_file() else []:
        found[_key_of(row)].add(_topic_of(row))
    return [job for job in jobs if not any(job.topics <= found.get(key, set()) for key in job.keys)]


def run_job(job: Job, threads: int, keep_runs: Path | None) -> JobOutcome:
    """Train, predict and evaluate one job in this process."""
    import tempfile

    from anysite.data.layouts import open_dataset

    folder = Path(tempfile.mkdtemp(prefix="anysite-")) if keep_runs is None else Path(keep_runs)
    try:
        if keep_runs is not None:  # a kept run of other settings must not be taken for this job's
            parts = (job.dataset, job.name, job.seed, *job.test_domains, job.labels or "all", job.digest)
            folder /= "-".join(str(part).replace("/", "_") for part in parts)
        rows = _score(job, open_dataset(Path(job.dataset_path)), folder, threads)
        return JobOutcome(job, rows)
    except InterruptedTraining:
        raise
    except AnysiteError as error:
        return JobOutcome(job, [], str(error))
    finally:
        if keep_runs is None:
            shutil.rmtree(folder, ignore_errors=True)


def _run_apart(job: Job, threads: int, keep_runs: Path | None) -> JobOutcome:
    """Run one job in a process of its own, whose end by whatever cause ends no other job."""
    # A fresh process: a forked one would inherit the parent's threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        future = process.submit(run_job, job, threads, keep_runs)
        error = future.exception()
        if isinstance(error, InterruptedTraining):
            raise error
        return JobOutcome(job, [], f"{type(error).__name__}: {error}") if error else future.result()


def _score(job: Job, dataset: Dataset, folder: Path, threads: int) -> list[Row]:
    from anysite.predict import predict
    from anysite.train import train

    digest, settings = job.digest, job.settings
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"threads": threads})})
    run = train(
        dataset, settings, folder / "run", budget_s=job.budget_s, resume=True, facts={"preset": job.name}
    )
    # Of the training sites only the held-out patients, so that all numbers of labels are scored on the same cases.
    scored = {*run.splits["held_out"], *run.splits["test"]}
    cases = [case for case in dataset.labelled if case.id in scored]
    if not cases:
        raise DataError(
            "no case is left to score", where=job.dataset, fix="set train.validation_fraction above 0"
        )
    began = time.monotonic()
    save = not CALIBRATION_METRICS.keys().isdisjoint(job.metrics)
    outcomes = list(predict([run], cases, folder / "masks", dataset=dataset, save_probabilities=save))
    failures = [outcome for outcome in outcomes if outcome.status == "failed"]
    predicting_s = time.monotonic() - began
    # The splits list the sites in the order of their cases, which may differ from the job's.
    context = {
        "train_domains": "+".join(job.train_domains), "overrides": " ".join(job.overrides), "job": digest,
        "labels": str(settings.train.labelled_patients or "all"),
    }  # fmt: skip
    result = evaluate(folder / "masks", dataset, threads=threads, context=context)
    if failures or result.failed:
        raise DataError(
            f"{len(result.failed)} cases failed, such as {next(iter(result.failed.items()), '')}",
            where=job.dataset,
        )
    held_out = [case for case in cases if case.id in run.splits["held_out"]]
    if job.corruptions and not held_out:
        raise DataError(
            "no held-out case to corrupt", where=job.dataset, fix="set train.validation_fraction above 0"
        )
    corrupted = _score_corrupted(job, run, held_out, dataset, result.rows[0] if result.rows else {})
    costs: list[tuple[str, Any, str]] = [
        ("train_seconds", run.manifest["seconds"], "s"),
        ("train_steps", run.manifest["steps"], "1"),
        ("predict_seconds_per_case", round(predicting_s / len(cases), 3), "s"),
    ]
    if (peak := _peak_memory_mb()) is not None:
        costs.append(("peak_memory", round(peak), "MB"))
    rows = [row for row in [*result.rows, *corrupted] if row["metric"] in job.metrics]
    empty = {"domain": "", "split": "run", "patient": "", "case": "", "class": ""}
    return rows + [{**result.rows[0], **empty, "metric": m, "value": v, "unit": u} for m, v, u in costs]


def _score_corrupted(
    job: Job, run: runs.Run, cases: Sequence[Case], dataset: Dataset, common: Row
) -> list[Row]:
    """Score corrupted copies of held-out images, so that no other site's shift is mixed in."""
    if not job.corruptions:
        return []
    from anysite.segment import Segmenter

    segmenter, rows = Segmenter([run]), []
    for case in cases:
        image, label = case.image(), dataset.class_indices(case.label(), where=case.label_path)
        for name, severity in itertools.product(job.corruptions, job.severities):
            # The same draw at every severity and for every method.
            image_seed = zlib.crc32(case.id.encode())
            prediction = segmenter.segment(corrupt(image, name, severity, image_seed))
            masked = [metric for metric in job.metrics if metric in METRICS]
            scores = score_volume(prediction.label, label, dataset, metrics=masked)
            if len(masked) < len(job.metrics):
                chances = prediction.probabilities.array
                scores += score_probabilities(chances, prediction.label, label, dataset, job.metrics)
            place = common | {
                "corruption": name, "severity": severity, "corruption_version": _version_of(name)
            }  # fmt: skip
            rows += rows_of(scores, case, "in_domain", place)
    return rows


@cache
def _version_of(corruption: str) -> str:
    return f"{corruption}/{fingerprint(corruption)}"


def _name_of(method: str) -> str:
    return Path(method).stem if method.endswith(".toml") else method


def _append(output: Path, outcome: JobOutcome) -> None:
    """Write a job's rows in place of its earlier ones; what else a finished job kept before stays."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.with_name(f"{output.name}.lock")):
        existing = read_rows(output) if output.is_file() else []
        keys, replaced = outcome.job.keys, {_topic_of(row) for row in outcome.rows}
        # Without its costs a job was cut off when the file was copied, and no metric of it is complete.
        finished = {_key_of(row) for row in existing if row.get("split") == "run"}
        versions = {row.get("corruption"): row.get("corruption_version") for row in outcome.rows}
        kept = [
            row
            for row in existing
            if (key := _key_of(row)) not in keys
            or (
                key in finished
                and _topic_of(row) not in replaced
                # Another version of a corruption scored anew is another corruption.
                and row.get("corruption_version")
                == versions.get(row.get("corruption"), row.get("corruption_version"))
            )
        ]
        write_rows(output, [*kept, *outcome.rows])


def _topic_of(row: Row) -> tuple[Any, ...]:
    if row.get("split") == "run":
        return "run", "", 0
    return row.get("metric"), row.get("corruption_version", ""), row.get("severity", 0)


def _key_of(row: Row) -> tuple[Any, ...]:
    names = ("dataset", "method", "seed", "train_domains")
    return *(row.get(name) for name in names), row.get("overrides", ""), row.get("job", "")


def _peak_memory_mb() -> float | None:
    """Return the process's largest memory so far, or None on Windows, which has no such count."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
