"""Train, predict and evaluate over sites, methods and seeds; rows are kept, finished jobs are skipped."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anysite import atomic, compute, config, registry
from anysite.adapters import require_batch_normalisation
from anysite.calibration import CALIBRATION_METRICS
from anysite.config import choose_adapter
from anysite.corrupt import CORRUPTIONS, fingerprint
from anysite.data.case import Dataset
from anysite.data.content import digest_content
from anysite.data.layouts import open_dataset
from anysite.errors import (
    AnysiteError,
    ConfigError,
    Interrupted,
    InterruptedTraining,
    LabelError,
    WorkerError,
    describe_error,
)
from anysite.experiment import NO_ADAPTER, Job, name_of, score_job, topic_of
from anysite.judgement import VERDICT
from anysite.metrics import METRICS
from anysite.rows import Row, read_rows, write_rows
from anysite.workers import Workers


@dataclass(frozen=True)
class JobOutcome:
    """A finished job with its rows and what its trainings warned of, or the error that ended it."""

    job: Job
    rows: list[Row]
    error: str = ""
    notes: tuple[str, ...] = ()


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
    others: Sequence[Path] = (),
    adapt: Sequence[str] = (),
    members: int = 1,
) -> list[Job]:
    """Return the jobs of a protocol: every site left out in turn, every site alone, or all sites pooled.

    Args:
        protocol: "leave-one-out", "train-on-one" or "pooled".
        test_domains: Only these sites are left out; all of them where empty.
        metrics: Which metrics to keep rows of.
        corruptions: Which corruptions of the held-out images to score as well, or "all".
        severities: Of the corruptions.
        others: Paths of other datasets, whose images are judged.
        adapt: Adapters to score all images with.
        members: Networks of every job, whose probabilities are averaged.
        labels: From how many labelled patients to learn, None for all; fewer are a subset of more.

    Raises:
        ConfigError: an unknown protocol, method, metric, corruption, severity or site, methods of one name, a
            negative seed, or test sites where the protocol names them.
    """
    for method in methods:
        config.load(method, overrides)
    names = [name_of(method) for method in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{len(twice)} methods named {twice[0]!r}", fix="rename the preset's file")
    if few := [count for count in labels if count is not None and count < 1]:
        raise ConfigError(f"{few[0]} labelled patients", expected="1 or more, or all")
    if negative := [seed for seed in seeds if seed < 0]:
        raise ConfigError(f"seed {negative[0]}", expected="0 or above")
    for metric in metrics:
        if metric not in (known := [*METRICS, *CALIBRATION_METRICS, VERDICT]):
            known = ", ".join(known)
            raise ConfigError(f"no metric {metric!r}", expected=f"one of {known}")
    if VERDICT in metrics and "dice" not in metrics:
        raise ConfigError("the metric verdict alone", expected="dice,verdict: a failure is told by its Dice")
    corruptions = tuple(CORRUPTIONS) if list(corruptions) == ["all"] else tuple(corruptions)
    if members < 1:
        raise ConfigError(f"{members} members", expected="1 or more")
    for name in corruptions:
        fingerprint(name)  # so that an unknown name is refused before anything runs
    if strange := [severity for severity in severities if severity not in range(1, 6)]:
        raise ConfigError(f"severity {strange[0]}", expected="1, 2, 3, 4 or 5")
    for domain in test_domains:
        if domain not in dataset.domains:
            raise ConfigError(f"no site {domain!r}", expected=f"one of {', '.join(dataset.domains)}")
    named = tuple((open_dataset(path).name, str(path)) for path in others)
    if same := [name for name, _ in named if [dataset.name, *(known for known, _ in named)].count(name) > 1]:
        raise ConfigError(f"another dataset named {same[0]!r}", expected="a dataset of another name")
    adapters = dict.fromkeys([NO_ADAPTER, *adapt])
    for name in adapters:
        for method in methods:
            _check_adapter(config.load(method, overrides), name)
    domains = tuple(dict.fromkeys(case.domain for case in dataset.labelled))
    if test_domains and protocol != "leave-one-out":
        raise ConfigError(f"test sites with protocol {protocol!r}", expected="leave-one-out")
    if protocol == "leave-one-out":
        left_out: list[tuple[str, ...]] = [(domain,) for domain in dict.fromkeys(test_domains or domains)]
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
    data = digest_content(dataset)
    return [
        Job(str(dataset_path), dataset.name, method, tuple(overrides), seed, out,
            tuple(d for d in domains if d not in out), budget_s, tuple(metrics), count,
            corruptions, tuple(severities), named, tuple(adapters), members, data)
        for seed in dict.fromkeys(seeds) for count in dict.fromkeys(labels) for out in left_out for method in methods
    ]  # fmt: skip


def _check_adapter(settings: config.Config, name: str) -> None:
    """Find out before anything runs whether an adapter exists, takes its settings and will have what it needs.

    Raises:
        ConfigError: it does not.
    """
    if settings.predict.adapt.method != NO_ADAPTER:
        raise ConfigError(
            settings.predict.adapt.method, where="predict.adapt.method", expected="none in a benchmark",
            fix=f"use --adapt {settings.predict.adapt.method}",
        )  # fmt: skip
    adapt = choose_adapter(settings.predict, name).adapt
    if adapt.method == NO_ADAPTER:
        return
    chosen = registry.AUTO_ADAPTER if adapt.method == "auto" else adapt.method
    adapter = registry.build("adapter", chosen, **adapt.settings)
    if adapter.needs_reflection and "reflection" not in settings.objectives:
        raise ConfigError(
            f"--adapt {name} without reflection", expected="a training with the objective reflection",
            fix="add --set objectives.reflection={}",
        )  # fmt: skip
    if adapter.needs_batch_normalisation:
        network = settings.network
        built = registry.build("network", network.name, 1, 2, (64, 64), **network.arguments)
        require_batch_normalisation(built)


def benchmark(
    jobs: Sequence[Job], output: Path, *, parallel: int = 1, keep_runs: Path | None = None
) -> Iterator[JobOutcome]:
    """Run every job whose rows are not in `output` yet, append its rows, and yield what became of it.

    Args:
        parallel: Jobs at once, each in a process of its own with its share of the cores; 0: one after the other in
            this process.
        keep_runs: Folder for run folders and masks; they are deleted after scoring where it is None.

    Raises:
        ConfigError: fewer than no jobs at once.
        FileFormatError: `output` cannot be written.
    """
    if parallel < 0:
        raise ConfigError(f"{parallel} jobs at once", expected="0 or more")
    waiting = unfinished(jobs, output)
    ran = _run_here(waiting, keep_runs) if parallel == 0 else _run_apart(waiting, parallel, keep_runs)
    return _keep_rows(ran, output)


def _keep_rows(outcomes: Iterator[JobOutcome], output: Path) -> Iterator[JobOutcome]:
    for outcome in outcomes:
        if outcome.rows:
            _append(output, outcome)
        yield outcome


def _run_here(waiting: Sequence[Job], keep_runs: Path | None) -> Iterator[JobOutcome]:
    for job in waiting:
        try:
            yield run_job(job, compute.count_cores(), keep_runs)
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - one job ends no other
            yield JobOutcome(job, [], describe_error(error))


def _run_apart(waiting: Sequence[Job], parallel: int, keep_runs: Path | None) -> Iterator[JobOutcome]:
    threads = max(1, compute.count_cores() // parallel)
    with ThreadPoolExecutor(parallel) as pool, Workers() as workers:
        futures = [pool.submit(_run_job_apart, job, threads, keep_runs, workers) for job in waiting]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _run_job_apart(job: Job, threads: int, keep_runs: Path | None, workers: Workers) -> JobOutcome:
    """Run one job in a process of its own, whose end by whatever cause ends no other job."""
    try:
        return workers.run(_run_trusting, registry.list_trusted(), job, threads, keep_runs)
    except WorkerError as error:
        return JobOutcome(job, [], str(error))


def _run_trusting(plugins: Sequence[str], job: Job, threads: int, keep_runs: Path | None) -> JobOutcome:
    for plugin in plugins:
        registry.trust(plugin)
    return run_job(job, threads, keep_runs)


def unfinished(jobs: Sequence[Job], output: Path) -> list[Job]:
    """Return the jobs of which a metric or the costs, which come last, are not in the file `output` yet.

    Rows of other data than are there now do not count; those that do not say of which data they are do.
    """
    found: dict[tuple[Any, ...], set[tuple[Any, ...]]] = defaultdict(set)
    for row in read_rows(output) if output.is_file() else []:
        found[*_key_of(row), row.get("data", "")].add(topic_of(row))
    return [
        job
        for job in jobs
        if not any(job.topics <= found[*key, job.data] | found[*key, ""] for key in job.keys)
    ]


def count_outdated(jobs: Sequence[Job], output: Path) -> int:
    """Return of how many jobs `output` has rows of other data than are there now, by labels and sizes of images."""
    found = {(*_key_of(row), row.get("data", "")) for row in (read_rows(output) if output.is_file() else [])}
    return sum(
        any((*key,) in job.keys and data not in ("", job.data) for *key, data in found) for job in jobs
    )


def count_others(jobs: Sequence[Job], output: Path) -> int:
    """Return of how many jobs `output` has rows under the same names that other settings or budgets made."""
    digests: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for row in read_rows(output) if output.is_file() else []:
        *name, digest = _key_of(row)
        digests[*name, row.get("labels", "all")].add(digest)
    found = 0
    for job in jobs:
        *name, digest = job.key
        labels = str(job.settings.train.labelled_patients or "all")
        found += bool(digests[*name, labels] - {digest, ""})
    return found


def run_job(job: Job, threads: int, keep_runs: Path | None) -> JobOutcome:
    """Train, predict and evaluate one job in this process."""
    folder = Path(tempfile.mkdtemp(prefix="anysite-")) if keep_runs is None else Path(keep_runs)
    try:
        if keep_runs is not None:  # a kept run of other settings must not be taken for this job's
            count = job.labels or "all"
            parts = job.dataset, job.name, job.seed, *job.test_domains, count, job.digest, job.data
            folder /= "-".join(str(part).replace("/", "_") for part in parts)
        notes: list[str] = []
        rows = score_job(job, _open(job), folder, threads, notes.append)
        return JobOutcome(job, [{**row, "data": job.data} for row in rows], notes=tuple(dict.fromkeys(notes)))
    except InterruptedTraining:
        # A run that nobody keeps cannot be continued, and one that is kept goes on where the benchmark does.
        raise Interrupted("interrupted", fix="run the same command again: finished jobs are kept") from None
    except AnysiteError as error:
        return JobOutcome(job, [], str(error))
    finally:
        if keep_runs is None:
            shutil.rmtree(folder, ignore_errors=True)


def _open(job: Job) -> Dataset:
    """Return the job's dataset with the classes that its training sites show, where nobody declared them.

    Raises:
        LabelError: the test sites' labels hold other values.
    """
    path = Path(job.dataset_path)
    if not job.test_domains:
        return open_dataset(path)
    known, everything = open_dataset(path, unseen=job.test_domains), open_dataset(path)
    if known.label_values != everything.label_values:
        values = (", ".join(map(str, dataset.label_values)) for dataset in (known, everything))
        raise LabelError(
            "label values {} at the training sites and {} at all".format(*values), where=path,
            expected="the same classes everywhere", fix="declare the classes in dataset.json",
        )  # fmt: skip
    return known


def _append(output: Path, outcome: JobOutcome) -> None:
    """Write a job's rows in place of its earlier ones; what else a finished job kept before stays."""
    with atomic.locked(output, wait=True):
        existing = read_rows(output) if output.is_file() else []
        keys = outcome.job.keys
        replaced = {(*topic_of(row), _cost_of(row)) for row in outcome.rows}
        # Without its costs a job was cut off when the file was copied, and no metric of it is complete.
        finished = {_key_of(row) for row in existing if row.get("split") == "run"}
        if not _same_networks([row for row in existing if _key_of(row) in keys], outcome.rows):
            finished = set()
        versions = {row.get("corruption"): row.get("corruption_version") for row in outcome.rows}
        kept = [
            row
            for row in existing
            if (key := _key_of(row)) not in keys
            or (
                key in finished
                and (*topic_of(row), _cost_of(row)) not in replaced
                and row.get("data", "") in ("", outcome.job.data)
                # Another version of a corruption scored anew is another corruption.
                and row.get("corruption_version")
                == versions.get(row.get("corruption"), row.get("corruption_version"))
            )
        ]
        write_rows(output, [*kept, *outcome.rows])


def _cost_of(row: Row) -> str:
    """Return which cost a row is, of which a job that is done in part may not have all anew."""
    return str(row.get("metric")) if row.get("split") == "run" else ""


def _same_networks(former: Sequence[Row], rows: Sequence[Row]) -> bool:
    """Tell whether rows are of the very networks that earlier ones were: else they are no rows of one training."""
    was, now = (
        {row.get("config", "") for row in part if row.get("adapt", NO_ADAPTER) in ("", NO_ADAPTER)} - {""}
        for part in (former, rows)
    )
    return not was or not now or bool(was & now)


def _key_of(row: Row) -> tuple[Any, ...]:
    names = ("dataset", "method", "seed", "train_domains")
    return *(row.get(name) for name in names), row.get("overrides", ""), row.get("job", "")
