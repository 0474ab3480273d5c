"""Train, predict and evaluate over sites, methods and seeds; rows are kept, finished jobs are skipped."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anysite import compute, config, runs
from anysite.data.case import Dataset
from anysite.errors import AnysiteError, ConfigError, DataError, InterruptedTraining
from anysite.evaluate import Row, evaluate, read_rows, write_rows
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

    @property
    def key(self) -> tuple[str, str, int, str, str]:
        """What tells this job's rows from those of others."""
        settings = " ".join(self.overrides)
        return self.dataset, self.method, self.seed, "+".join(self.train_domains), settings


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
) -> list[Job]:
    """Return the jobs of a protocol: every site left out in turn, every site alone, or all sites pooled.

    Args:
        protocol: "leave-one-out", "train-on-one" or "pooled".
        test_domains: Only these sites are left out; all of them where empty.
        metrics: Which metrics to keep rows of.

    Raises:
        ConfigError: an unknown protocol, method, metric or site, or test sites where the protocol names them.
    """
    for method in methods:
        config.load(method, overrides)
    for metric in metrics:
        if metric not in METRICS:
            raise ConfigError(f"no metric {metric!r}", expected=f"one of {', '.join(METRICS)}")
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
            tuple(d for d in domains if d not in out), budget_s, tuple(metrics))
        for seed in seeds for out in left_out for method in methods
    ]  # fmt: skip


def benchmark(
    jobs: Sequence[Job], output: Path, *, parallel: int = 1, keep_runs: Path | None = None
) -> Iterator[JobOutcome]:
    """Run every job whose rows are not in `output` yet, append its rows, and yield what became of it.

    Args:
        parallel: Jobs at once, each in a process of its own with its share of the cores.
        keep_runs: Folder for run folders and masks; they are deleted after scoring where it is None.
    """
    waiting = unfinished(jobs, output)
    threads = max(1, compute.count_cores() // parallel)
    with ThreadPoolExecutor(parallel) as pool:
        for future in as_completed([pool.submit(_run_apart, job, threads, keep_runs) for job in waiting]):
            outcome = future.result()
            if outcome.rows:
                _append(output, outcome)
            yield outcome


def unfinished(jobs: Sequence[Job], output: Path) -> list[Job]:
    """Return the jobs whose rows are not in the file `output` yet, down to the costs, which come last."""
    rows = read_rows(output) if output.is_file() else []
    done = {_key_of(row) for row in rows if row.get("split") == "run"}
    return [job for job in jobs if job.key not in done]


def run_job(job: Job, threads: int, keep_runs: Path | None) -> JobOutcome:
    """Train, predict and evaluate one job in this process."""
    import tempfile

    from anysite.data.layouts import open_dataset

    name = "-".join(str(part).replace("/", "_") for part in (*job.key[:3], *job.test_domains))
    if job.overrides or job.budget_s:  # a kept run of other settings must not be taken for this job's
        name += "-" + runs.fingerprint([job.overrides, job.budget_s])
    folder = Path(keep_runs) / name if keep_runs else Path(tempfile.mkdtemp(prefix="anysite-"))
    try:
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

    settings = config.load(
        job.method,
        [*job.overrides, f"seed={job.seed}", f"train.threads={threads}",
         "test_domains=[" + ", ".join(f'"{d}"' for d in job.test_domains) + "]"],
    )  # fmt: skip
    run = train(
        dataset, settings, folder / "run", budget_s=job.budget_s, resume=True, facts={"preset": job.method}
    )
    trained_on = set(run.splits["training"])
    cases = [case for case in dataset.labelled if case.id not in trained_on]
    if not cases:
        raise DataError(
            "no case is left to score", where=job.dataset, fix="set train.validation_fraction above 0"
        )
    began = time.monotonic()
    failures = [o for o in predict([run], cases, folder / "masks") if o.status == "failed"]
    predicting_s = time.monotonic() - began
    # The splits list the sites in the order of their cases, which may differ from the job's.
    context = {"train_domains": "+".join(job.train_domains), "overrides": " ".join(job.overrides)}
    result = evaluate(folder / "masks", dataset, threads=threads, context=context)
    if failures or result.failed:
        raise DataError(
            f"{len(result.failed)} cases failed, such as {next(iter(result.failed.items()), '')}",
            where=job.dataset,
        )
    common = {k: result.rows[0][k] for k in ("dataset", "method", "adapt", "seed", "train_domains", "corruption",
                                              "severity", "labels", "commit", "config", "overrides")}  # fmt: skip
    costs: list[tuple[str, Any, str]] = [
        ("train_seconds", run.manifest["seconds"], "s"),
        ("train_steps", run.manifest["steps"], "1"),
        ("predict_seconds_per_case", round(predicting_s / len(cases), 3), "s"),
        ("peak_memory", round(_peak_memory_mb()), "MB"),
    ]
    rows = [row for row in result.rows if row["metric"] in job.metrics]
    empty = {"domain": "", "split": "run", "patient": "", "case": "", "class": ""}
    return rows + [{**common, **empty, "metric": m, "value": v, "unit": u} for m, v, u in costs]


def _append(output: Path, outcome: JobOutcome) -> None:
    existing = read_rows(output) if output.is_file() else []
    # Rows of this job can be there already where a copy of the file was cut off.
    write_rows(output, [*(row for row in existing if _key_of(row) != outcome.job.key), *outcome.rows])


def _key_of(row: Row) -> tuple[Any, ...]:
    return *(row.get(name) for name in ("dataset", "method", "seed", "train_domains")), row.get(
        "overrides", ""
    )


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
