"""Train, predict and evaluate over sites, methods and seeds; rows are kept, finished jobs are skipped."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anysite import atomic, config
from anysite.data.case import Dataset
from anysite.errors import AnysiteError, ConfigError, DataError
from anysite.evaluate import Row, evaluate, read_rows
from anysite.metrics import METRICS

Protocol = Literal["leave-one-out", "train-on-one", "pooled"]


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
    protocol: Protocol,
    overrides: Sequence[str] = (),
    budget_s: float | None = None,
    test_domains: Sequence[str] = (),
    metrics: Sequence[str] = ("dice",),
) -> list[Job]:
    """Return the jobs of a protocol: every site left out in turn, every site alone, or all sites pooled.

    Args:
        test_domains: Only these sites are left out; all of them where empty.
        metrics: Which metrics to keep rows of.

    Raises:
        ConfigError: an unknown protocol, method or site.
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
    threads = max(1, (os.cpu_count() or 1) // parallel)
    # Fresh processes: a forked one would inherit the parent's threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(parallel, mp_context=context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(run_job, job, threads, keep_runs) for job in waiting]
        for future in as_completed(futures):
            outcome = future.result()
            if outcome.rows:
                _append(output, outcome.rows)
            yield outcome


def unfinished(jobs: Sequence[Job], output: Path) -> list[Job]:
    """Return the jobs whose rows are not in the file `output` yet."""
    done = {_key_of(row) for row in read_rows(output)} if output.is_file() else set()
    return [job for job in jobs if job.key not in done]


def run_job(job: Job, threads: int, keep_runs: Path | None) -> JobOutcome:
    """Train, predict and evaluate one job in this process."""
    import tempfile

    from anysite.data.layouts import open_dataset

    name = "-".join(str(part).replace("/", "_") for part in (*job.key[:3], *job.test_domains))
    folder = Path(keep_runs) / name if keep_runs else Path(tempfile.mkdtemp(prefix="anysite-"))
    try:
        rows = _score(job, open_dataset(Path(job.dataset_path)), folder, threads)
        return JobOutcome(job, rows)
    except AnysiteError as error:
        return JobOutcome(job, [], str(error))
    finally:
        if keep_runs is None:
            shutil.rmtree(folder, ignore_errors=True)


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
    result = evaluate(folder / "masks", dataset, threads=threads)
    if failures or result.failed:
        raise DataError(
            f"{len(result.failed)} cases failed, such as {next(iter(result.failed.items()), '')}",
            where=job.dataset,
        )
    common = {k: result.rows[0][k] for k in ("dataset", "method", "adapt", "seed", "train_domains", "corruption",
                                              "severity", "labels", "commit", "config")}  # fmt: skip
    common["overrides"] = " ".join(job.overrides)
    costs: list[tuple[str, Any, str]] = [
        ("train_seconds", run.manifest["seconds"], "s"),
        ("train_steps", run.manifest["steps"], "1"),
        ("predict_seconds_per_case", round(predicting_s / len(cases), 3), "s"),
        ("peak_memory", round(_peak_memory_mb()), "MB"),
    ]
    rows = [{**row, "overrides": common["overrides"]} for row in result.rows if row["metric"] in job.metrics]
    empty = {"domain": "", "split": "run", "patient": "", "case": "", "class": ""}
    return rows + [{**common, **empty, "metric": m, "value": v, "unit": u} for m, v, u in costs]


def _append(output: Path, rows: Sequence[Row]) -> None:
    import json

    existing = output.read_text(encoding="utf-8") if output.is_file() else ""
    atomic.write_text(output, existing + "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _key_of(row: Row) -> tuple[str, str, int, str, str]:
    return row["dataset"], row["method"], row["seed"], row["train_domains"], row.get("overrides", "")


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
