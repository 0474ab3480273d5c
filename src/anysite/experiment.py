"""One job of a benchmark: a training, and the scoring of every case it was not trained on."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from anysite import config, provenance, runs
from anysite.calibration import CALIBRATION_METRICS
from anysite.corrupt import corrupt, fingerprint
from anysite.data.case import Case, Dataset
from anysite.errors import CASE_ERRORS, DataError, RunError
from anysite.evaluate import evaluate, score_probabilities, score_volume
from anysite.judgement import ADAPTED, VERDICT, is_judgement
from anysite.metrics import METRICS, Score
from anysite.roles import patients_judged_from
from anysite.rows import ALL_CLASSES, Row, describe_adaptation, describe_verdict, join_sites, rows_of
from anysite.splits import split

if TYPE_CHECKING:
    from anysite.loop import Progress

NO_ADAPTER = "none"  # no adapter
OTHER = "other"  # the split of images of another dataset
OTHER_CASES = 40  # of another dataset at most
PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Job:
    """One training and the scoring of every case it was not trained on.

    Attributes:
        others: Name and path of other datasets, whose images are judged.
        adapt: With which adapters all images are scored, "none" for none.
        members: Networks whose probabilities are averaged, trained on the same split.
        data: Digest of the dataset's labels and the sizes of its images; empty where nobody asks.
    """

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
    others: tuple[tuple[str, str], ...] = ()
    adapt: tuple[str, ...] = (NO_ADAPTER,)
    members: int = 1
    data: str = ""

    @property
    def name(self) -> str:
        """The method's name in rows: the preset, or the stem of its file, and how many networks if several."""
        return name_of(self.method) + (f"_x{self.members}" if self.members > 1 else "")

    @property
    def overrides_text(self) -> str:
        """The overrides as rows name them: of a run to start from its name and weights, its folders may be people's."""
        parts = (override.partition("=") for override in self.overrides)
        return " ".join(
            f"{name}={Path(value.strip()).name}{self._start[:7]}" if name.strip() == "pretrained"
            else f"{name}{sign}{value}"
            for name, sign, value in parts
        )  # fmt: skip

    @property
    def _start(self) -> str:
        """What tells the weights to start from from others, after an "@"; empty where there are none."""
        start = self.settings.pretrained
        if start is None or not (Path(start) / runs.MANIFEST).is_file():
            return ""
        return "@" + runs.read_manifest(Path(start)).get("files", {}).get(runs.WEIGHTS, "")

    @property
    def settings(self) -> config.Config:
        """The preset as it is now, with the job's overrides, seed, test sites and number of labelled patients."""
        own = [f"seed={self.seed}", config.override_sites(self.test_domains)]
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
        if start := self._start:  # wherever it lies
            settings["pretrained"] = start
        return provenance.fingerprint(
            [settings, self.budget_s, *([self.members] if self.members > 1 else [])]
        )

    @property
    def topics(self) -> set[tuple[Any, ...]]:
        """What its rows are about once finished: every metric, clean and corrupted, and every other dataset."""
        others = {(VERDICT, f"{OTHER}/{name}", 0) for name, _ in self.others}
        corrupted = itertools.product(map(version_of, self.corruptions), self.severities)
        pictures = [("", 0), *corrupted]
        adapted = [name for name in self.adapt if name != NO_ADAPTER]
        # The verdict is that on the mask before adaptation, and need not be told twice.
        own = [metric for metric in (*self.metrics, ADAPTED) if metric != VERDICT]
        return (
            {(metric, *picture) for metric in self.metrics for picture in pictures}
            | {(metric, *p, name) for metric in own for p in pictures for name in adapted}
            | others
            | {("run", "", 0)}
        )

    @property
    def key(self) -> tuple[str, str, int, str, str, str]:
        """What tells this job's rows from those of others."""
        return (
            self.dataset, self.name, self.seed, join_sites(self.train_domains), self.overrides_text,
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


def score_job(
    job: Job, dataset: Dataset, folder: Path, threads: int, on_note: Callable[[str], None] = lambda note: None
) -> list[Row]:
    """Train one job in `folder`, and return a row for every case, class and metric, and for what it cost.

    Args:
        on_note: Is told what the trainings warn of.

    Raises:
        AnysiteError: a training that failed or leaves a site out that rows would name, no case to score, or one that
            could not be.
    """
    _forget_peak_memory()
    _require_all_sites(job, dataset)
    kept_runs = [_folder_of(job, member, folder) for member in range(job.members)]
    learned_now = not all((run / runs.MANIFEST).is_file() and runs.is_finished(run) for run in kept_runs)
    members = [_train_member(job, number, dataset, folder, threads, on_note) for number in range(job.members)]
    run = members[0]
    # Of the training sites only the held-out patients, so that all numbers of labels are scored on the same cases.
    held_out = [case for case in dataset.labelled if case.id in set(run.splits["held_out"])]
    test = [case for case in dataset.labelled if case.id in set(run.splits["test"])]
    if not held_out + test:
        raise DataError(
            "no case is left to score", where=job.dataset, fix="set train.validation_fraction above 0"
        )
    if job.corruptions and not held_out:
        raise DataError(
            "no held-out case to corrupt", where=job.dataset, fix="set train.validation_fraction above 0"
        )
    if (VERDICT in job.metrics or job.others) and any(member.judge is None for member in members):
        raise DataError("a run that does not judge", where=job.dataset, fix="drop verdict from --metrics")
    cases = held_out + test
    rows, predicting_s = _score_images(job, members, cases, dataset, folder / "masks", threads, NO_ADAPTER)
    learned_from = patients_judged_from(members, dataset.cases)
    common = {**rows[0], "domain": "", "patient": "", "case": "", "class": ""}
    common.pop("judge_learned", None)  # that is of one case
    for adapt in job.adapt:
        if adapt != NO_ADAPTER:
            masks = folder / f"masks_{adapt.replace(':', '_')}"
            rows += _score_images(job, members, cases, dataset, masks, threads, adapt)[0]
        rows += _score_corrupted(job, members, held_out, dataset, common | {"adapt": adapt})
    for name, path in job.others:
        rows += _judge_others(members, name, Path(path), common)
    costs: list[tuple[str, Any, str]] = [
        ("train_seconds", sum(member.manifest["seconds"] for member in members), "s"),
        ("train_steps", run.manifest["steps"], "1"),
    ]
    if predicting_s:  # none where all masks were kept from before
        costs.append(("predict_seconds_per_case", round(fmean(predicting_s), 3), "s"))
    # Of a training, which one that was kept from before has not cost again.
    if learned_now and (peak := _peak_memory_mb()) is not None:
        costs.append(("peak_memory", round(peak), "MB"))
    for row in rows:
        if row["split"] == "in_domain" and (row["domain"], row["patient"]) in learned_from:
            row["judge_learned"] = True
    kept = [row for row in rows if _is_wanted(row["metric"], job.metrics) or row["split"] == OTHER]
    return kept + [{**common, "split": "run", "metric": m, "value": v, "unit": u} for m, v, u in costs]


def _require_all_sites(job: Job, dataset: Dataset) -> None:
    settings = job.settings
    if settings.train.labelled_patients is not None:  # of few patients some sites may have none
        return
    learned = split(dataset, settings).learned_domains
    if lost := [site for site in job.train_domains if site not in learned]:
        raise DataError(
            f"nothing to learn from at {', '.join(lost)}, which rows would name as trained on", where=job.dataset,
            fix="a patient who is also at a test site, or held out at another, trains nothing: give patients of "
            "different sites different names",
        )  # fmt: skip


def _train_member(
    job: Job, member: int, dataset: Dataset, folder: Path, threads: int, on_note: Callable[[str], None]
) -> runs.Run:
    from anysite.train import train

    settings = job.settings
    own = {
        "train": settings.train.model_copy(update={"threads": threads}),
        "member": settings.member + member,
    }
    settings, run = settings.model_copy(update=own), _folder_of(job, member, folder)
    if (run / runs.MANIFEST).is_file():
        _require_settings(run, settings)

    def tell(progress: Progress) -> None:
        if progress.note:
            on_note(progress.note)

    return train(
        dataset, settings, run, budget_s=job.budget_s, resume=True, facts={"preset": job.name},
        on_progress=tell,
    )  # fmt: skip


def _require_settings(run: Path, settings: config.Config) -> None:
    """Refuse a kept run that an earlier program trained with other defaults, which a job's digest does not name.

    Raises:
        RunError: its settings differ, beside the number of threads and how a run to start from is named.
    """
    differing = config.differing_settings(settings, runs.read_config(run))
    names = sorted({text.removeprefix("no ").partition("=")[0] for text in differing})
    if others := [name for name in names if name not in ("train.threads", "pretrained")]:
        raise RunError(
            f"a kept run trained with another {', '.join(others)}", where=run,
            fix="choose another --keep-runs, or delete that folder",
        )  # fmt: skip


def _folder_of(job: Job, member: int, folder: Path) -> Path:
    return folder / ("run" if job.members == 1 else f"run_{member}")


def topic_of(row: Row) -> tuple[Any, ...]:
    """Return what a row is about, as `Job.topics` has it."""
    if row.get("split") == "run":
        return "run", "", 0
    if row.get("split") == OTHER:
        return row.get("metric"), f"{OTHER}/{row.get('other')}", 0
    adapt = row.get("adapt", NO_ADAPTER)
    more = () if adapt in ("", NO_ADAPTER) else (adapt,)
    return row.get("metric"), row.get("corruption_version", ""), row.get("severity", 0), *more


@cache
def version_of(corruption: str) -> str:
    """Return a corruption's name with the digest of its source and strengths."""
    return f"{corruption}/{fingerprint(corruption)}"


def name_of(method: str) -> str:
    """Return the name of a method in rows: its preset, or the stem of its file."""
    return Path(method).stem if method.endswith(".toml") else method


def _score_images(
    job: Job,
    members: Sequence[runs.Run],
    cases: Sequence[Case],
    dataset: Dataset,
    masks: Path,
    threads: int,
    adapt: str,
) -> tuple[list[Row], list[float]]:
    """Return a row for every case, class and metric, and the seconds that each prediction made now took."""
    from anysite.predict import predict

    save = not CALIBRATION_METRICS.keys().isdisjoint(job.metrics)
    outcomes = list(predict(members, cases, masks, dataset=dataset, save_probabilities=save, adapt=adapt))
    # The splits list the sites in the order of their cases, which may differ from the job's.
    context = {
        "train_domains": join_sites(job.train_domains), "overrides": job.overrides_text, "job": job.digest,
        "labels": str(job.settings.train.labelled_patients or "all"), "adapt": adapt, "seed": job.seed,
    }  # fmt: skip
    result = evaluate(masks, dataset, threads=threads, context=context)
    if result.failed or any(outcome.status == "failed" for outcome in outcomes):
        raise DataError(
            f"cases that failed ({len(result.failed)} of them to be scored){_name_first(result.failed)}",
            where=job.dataset, fix="run anysite check, then the same command again",
        )  # fmt: skip
    return result.rows, [outcome.seconds for outcome in outcomes if outcome.status == "done"]


def _name_first(failed: Mapping[str, str]) -> str:
    return next((f", such as {case}: {error}" for case, error in failed.items()), "")


def _score_corrupted(
    job: Job, members: Sequence[runs.Run], cases: Sequence[Case], dataset: Dataset, common: Row
) -> list[Row]:
    """Score corrupted copies of held-out images, so that no other site's shift is mixed in."""
    if not job.corruptions:
        return []
    from anysite.segment import Segmenter

    settings = config.choose_adapter(members[0].config.predict, common["adapt"])
    segmenter, rows = Segmenter(members, settings), []
    masked = [metric for metric in job.metrics if metric in METRICS]
    calibrated = [metric for metric in job.metrics if metric in CALIBRATION_METRICS]
    for case in cases:
        image, label = case.image(), dataset.label_of(case)
        for name, severity in itertools.product(job.corruptions, job.severities):
            # The same draw at every severity and for every method.
            image_seed = zlib.crc32(case.id.encode())
            prediction = segmenter.segment(corrupt(image, name, severity, image_seed))
            scores = score_volume(prediction.label, label, dataset, case, metrics=masked)
            if calibrated:
                chances = prediction.probabilities.array
                scores += score_probabilities(chances, prediction.label, label, dataset, case, calibrated)
            if prediction.verdict:
                scores += describe_verdict(asdict(prediction.verdict))
            scores += describe_adaptation([asdict(one) for one in prediction.adaptations])
            place = common | {
                "corruption": name, "severity": severity, "corruption_version": version_of(name)
            }  # fmt: skip
            rows += rows_of(scores, case, "in_domain", place)
    return rows


def _judge_others(members: Sequence[runs.Run], name: str, path: Path, common: Row) -> list[Row]:
    """Judge images of another dataset; one that the network cannot take has an undefined verdict."""
    from anysite.data.layouts import open_dataset
    from anysite.segment import Segmenter

    settings = config.choose_adapter(members[0].config.predict, NO_ADAPTER)
    segmenter, rows = Segmenter(members, settings), []
    for case in open_dataset(path).cases_by_turns[:OTHER_CASES]:
        try:
            verdict = segmenter.segment(case.image()).verdict
        except CASE_ERRORS:
            verdict = None
        scores = describe_verdict(asdict(verdict)) if verdict else [Score(ALL_CLASSES, VERDICT, None, "1")]
        rows += rows_of(scores, case, OTHER, common | {"other": name})
    return rows


def _is_wanted(metric: str, wanted: Sequence[str]) -> bool:
    return metric in wanted or metric == ADAPTED or (VERDICT in wanted and is_judgement(metric))


def _forget_peak_memory() -> None:
    """Count the process's largest memory anew, so that what came before a job is not taken for its own."""
    with suppress(OSError):  # Linux alone can
        (PROCESS / "clear_refs").write_text("5")


def _peak_memory_mb() -> float | None:
    """Return the process's largest memory since `_forget_peak_memory`, or None where nothing counts it."""
    with suppress(OSError, StopIteration, ValueError):
        lines = (PROCESS / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    return None
