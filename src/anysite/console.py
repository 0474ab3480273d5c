"""What the commands print: tables, progress and one-line errors, in the terminal's own width."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from anysite.errors import FaultyDataError

if TYPE_CHECKING:
    from pathlib import Path

    from anysite.benchmark import JobOutcome
    from anysite.data.check import Inspection, Problem
    from anysite.data.check.shift import Shift
    from anysite.evaluate import Evaluation
    from anysite.loop import Progress
    from anysite.predict import CaseOutcome
    from anysite.runs import Run
    from anysite.statistics import Estimate

output = Console(highlight=False)
NAMED = 8  # cases in one line
SHOWN = 20  # problems of one rule
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line as it is; paths and names are never read as markup."""
    output.print(_as_it_is(text), soft_wrap=True)


def complain(error: Exception) -> None:
    """Print an error as one line on standard error, and where it is many, each on its own below."""
    errors.print(Text.assemble(("error: ", "bold red"), _as_it_is(" ".join(str(error).splitlines()))))
    if isinstance(error, FaultyDataError) and len(error.faults) > 1:
        for fault in error.faults:
            errors.print(_as_it_is(f"  {fault}"))


def _as_it_is(text: str) -> Text:
    """Return a text of which nothing is markup; parts of file names that are no UTF-8 are escapes."""
    return Text(text.encode(errors="backslashreplace").decode())


def as_json(content: Any) -> None:
    """Print anything JSON-able, and nothing else, on standard output."""
    output.print(Text(json.dumps(content, indent=1, default=_plain)), soft_wrap=True)


def table(*columns: str, title: str = "") -> Table:
    """Return an empty table whose first column is text and whose others are numbers."""
    result = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        result.add_column(_as_it_is(column), justify="left" if index == 0 else "right", overflow="fold")
    return result


def show_inspection(inspection: Inspection) -> None:
    """Print a dataset's sites and every problem found."""
    sites = table("site", "cases", "patients", "labelled", "shape", "spacing", title="Sites")
    for site in inspection.sites:
        sites.add_row(
            Text(site.domain), str(site.cases), str(site.patients), str(site.labelled),
            " x ".join(_range(*r) for r in site.shape),
            f"{' x '.join(_range(*r) for r in site.spacing)} {site.unit}",
        )  # fmt: skip
    output.print(sites)
    for shift in inspection.shift:
        _show_shift(shift)
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in inspection.problems:
        groups.setdefault((problem.severity, problem.rule), []).append(problem)
    for (severity, rule), problems in groups.items():
        colour = "red" if severity == "error" else "yellow"
        count = f" ({len(problems)})" if len(problems) > 1 else ""
        output.print(Text.assemble((f"{severity}: ", f"bold {colour}"), (rule, "bold"), count))
        for number, problem in enumerate(problems[:SHOWN]):
            place = " ".join(part for part in (problem.case, problem.file) if part)
            last = number + 1 == len(problems[:SHOWN]) or problems[number + 1].fix != problem.fix
            say(
                f"  {place + ': ' if place else ''}{problem.observed}; expected {problem.expected}"
                + (f"\n  -> {problem.fix}" if last else "")
            )
        if len(problems) > SHOWN:
            say(f"  and {len(problems) - SHOWN} more, which --json and --output list")
    count = {s: sum(p.severity == s for p in inspection.problems) for s in ("error", "warning")}
    say(f"{count['error']} errors, {count['warning']} warnings")


def _show_shift(shift: Shift) -> None:
    """Print the sites from the one that differs most, with their distances in intensity."""
    names = [site.domain for site in shift.sites]
    distances = table("site", "mean", *names, title="Distances in intensity")
    for site, row in zip(shift.sites, shift.intensity, strict=True):
        cells = (
            "-" if name == site.domain else f"{value:.2f}" for name, value in zip(names, row, strict=True)
        )
        distances.add_row(Text(site.domain), f"{site.distance:.2f}", *cells)
    output.print(distances)
    if len(names) > 2:
        say(f"most different: {names[0]}")


@contextmanager
def training_bar() -> Iterator[Any]:
    """Show a progress bar with loss, Dice and time left; yields the function that takes each `Progress`."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    with _bar(*columns) as bar:
        task = bar.add_task("", text="", total=None)

        shown = -1

        def advance(progress: Progress) -> None:
            nonlocal shown
            if (
                10 * progress.step // max(1, progress.steps) < shown
            ):  # a pretraining ended, the training begins
                shown = -1
            if progress.note:
                errors.print(Text(f"warning: {progress.note}"))
                return
            dice = "" if progress.dice is None else f"  held-out Dice {100 * progress.dice:.1f}"
            text = f"loss {progress.loss:.3f}{dice}  {format_seconds(progress.seconds_left)} left"
            bar.update(task, completed=progress.step, total=progress.steps, text=text)
            tenth = 10 * progress.step // progress.steps
            if not errors.is_terminal and tenth > shown:  # a log file wants lines, and few of them
                shown = tenth
                errors.print(Text(f"step {progress.step} of {progress.steps}  {text}"))

        yield advance


def show_run(run: Run) -> None:
    """Print what a finished training amounts to."""
    for reason in run.plan.reasons:
        say(f"  plan: {reason}")
    facts = run.manifest
    if started_from := facts.get("started_from"):
        say(f"  {describe_transfer(started_from)}")
    say(
        f"trained {facts['steps']} steps in {format_seconds(facts['seconds'])} on "
        f"{len(run.splits['training'])} cases of {', '.join(facts['train_domains'])}; "
        f"{len(run.splits['held_out'])} held out, {len(run.splits['test'])} of test sites; run folder {run.path}"
    )
    if set(run.temperature.values) != {1.0}:
        say(f"probabilities are calibrated by {_describe_temperature(run)}, from held-out patients")
    if run.postprocessing.classes:
        names = ", ".join(run.plan.classes[index] for index in run.postprocessing.classes)
        say(f"fragments are taken out of masks of {names}, which the labels of training show in one piece")


def _describe_temperature(run: Run) -> str:
    values, classes = run.temperature.values, run.plan.classes
    if len(values) == 1:
        return f"a temperature of {values[0]:.2f}"
    groups = run.plan.regions or [(index,) for index in range(len(classes))]
    names = ["+".join(classes[index] for index in group) for group in groups]
    told = ", ".join(f"{value:.2f} for {name}" for name, value in zip(names, values, strict=True))
    return f"temperatures of {told}"


def describe_transfer(started_from: dict[str, Any]) -> str:
    """Return one line on which weights a training started from; `anysite info RUN --json` has every tensor."""
    reasons = Counter(started_from["skipped"].values())
    parts = [f"{len(started_from['taken'])} tensors taken from {started_from['run']}"]
    parts += [f"{name} reshaped to other channels" for name in started_from["reshaped"]]
    parts += [f"{count} {reason}" for reason, count in reasons.items()]
    return f"{', '.join(parts)}: {100 * started_from['encoder_share']:.0f} % of the encoder"


@contextmanager
def case_bar(total: int, verb: str) -> Iterator[Any]:
    """Show a progress bar over cases; yields the function to call after each with its outcome."""
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _bar(*columns) as bar:
        task = bar.add_task("", total=total)

        def advance(outcome: CaseOutcome | None = None) -> None:
            if outcome is not None and outcome.error:
                errors.print(Text.assemble(("failed: ", "bold red"), f"{outcome.case.id}: {outcome.error}"))
            bar.advance(task)

        yield advance


def show_verdicts(verdicts: Mapping[str, Mapping[str, Any]], cases: int, folder: Path) -> None:
    """Print how many masks may be used, and which may not, from the verdict on every case."""
    from anysite.verdicts import is_passed_over

    judged = {case: verdict["verdict"] for case, verdict in verdicts.items()}
    if not judged:
        if cases:
            say("no verdicts: the run has no judge")
        return
    count = Counter(judged.values())
    say(
        f"verdicts: {count['accept']} accept, {count['review']} review, {count['reject']} reject; "
        f"the reasons are in {folder / 'verdicts.json'}"
    )
    for decision in ("reject", "review"):
        named = [case for case, given in judged.items() if given == decision]
        if named:
            more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
            say(f"  {decision}: {', '.join(named[:NAMED])}{more}")
    if passed_over := sum(map(is_passed_over, verdicts.values())):
        say(f"  of those accepted, {passed_over} would be reviewed without --referral")


def show_evaluation(evaluation: Evaluation) -> None:
    """Print Dice by site with intervals over patients, and what could not be scored."""
    shown = {"unseen": "unseen", "in_domain": "in domain", "training": "trained on", "unknown": ""}
    result = table("site", "", "patients", "Dice", "95 %", "HD95", "surface", title="Mean over patients")
    groups = dict.fromkeys((row["domain"], row["split"]) for row in evaluation.rows)
    for domain, split in groups:
        rows = [r for r in evaluation.rows if (r["domain"], r["split"]) == (domain, split)]
        found = {
            m: _estimate([r for r in rows if r["metric"] == m]) for m in ("dice", "hd95", "surface_dice")
        }
        dice, distance, surface = found.values()
        if dice is None:
            continue
        unit = next((r["unit"] for r in rows if r["metric"] == "hd95"), "")
        result.add_row(
            Text(domain), shown[split], str(dice.n_patients), f"{100 * dice.mean:.1f}",
            "one patient" if dice.low is None or dice.high is None else f"{100 * dice.low:.1f}-{100 * dice.high:.1f}",
            f"{distance.mean:.1f} {unit}" if distance else "-",
            f"{100 * surface.mean:.1f}" if surface else "-",
        )  # fmt: skip
    output.print(result)
    for case, error in evaluation.failed.items():
        errors.print(Text.assemble(("failed: ", "bold red"), f"{case}: {error}"))
    if evaluation.unpredicted:
        say(
            f"{len(evaluation.unpredicted)} other labelled cases have no mask here, such as {evaluation.unpredicted[0]}"
        )


def _estimate(rows: Sequence[dict[str, Any]]) -> Estimate | None:
    from anysite.statistics import estimate_mean

    defined = [row for row in rows if row["value"] is not None]
    return (
        estimate_mean([r["value"] for r in defined], [f"{r['domain']}/{r['patient']}" for r in defined])
        if defined
        else None
    )


def show_job(outcome: JobOutcome, number: int, total: int, seconds_left: float) -> None:
    """Print one line on a finished benchmark job."""
    job = outcome.job
    name = f"{number}/{total}  {job.name}  seed {job.seed}  trained on {'+'.join(job.train_domains)}"
    if job.labels is not None:
        name += f"  {job.labels} labelled"
    if job.settings.predict.normalisation == "batch":
        name += "  normalised by test batches"
    if outcome.error:
        errors.print(Text.assemble(("failed: ", "bold red"), f"{name}: {outcome.error}"))
        return
    parts = []
    for split, text in (("in_domain", "in domain"), ("unseen", "unseen")):
        values = [
            r["value"]
            for r in outcome.rows
            if (r["split"], r["metric"], r.get("corruption", "none"), r.get("adapt", "none"))
            == (split, "dice", "none", "none")
            and r["value"] is not None
        ]
        if values:
            parts.append(f"{text} {100 * sum(values) / len(values):.1f}")
    say(f"{name}: Dice {', '.join(parts)};  {format_seconds(seconds_left)} left")
    for note in outcome.notes:
        say(f"  warning: {note}")


def format_seconds(seconds: float) -> str:
    """Return a duration for people, such as "2 min 05 s"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _bar(*columns: ProgressColumn) -> Bar:
    # In a log file a bar would be a line of noise between the errors.
    return Bar(*columns, console=errors, refresh_per_second=2, disable=not errors.is_terminal)


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def _plain(value: Any) -> Any:
    return (
        dataclasses.asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else str(value)
    )
