"""The evidence page and the README's table, written from the rows in results/ and nothing else."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from anysite.report.methods import MethodSummary, split_by_method, summarise_methods
from anysite.report.read import Row as ReportRow
from anysite.report.read import read_sources
from anysite.report.summary import is_clean
from anysite.rows import Row, read_rows
from anysite.statistics import Estimate, estimate_mean

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
MARKERS = ("<!-- table: written by make docs -->", "<!-- end of table -->")

ASIDE = ("method", "judging", "adaptation", "calibration")  # entries with a page of their own
INTRODUCTION = """# Evidence

Every number on this page is computed from the rows in `results/` by `make docs`; a test fails where page and rows
differ. Dice is in points (x 100), averaged over classes, cases and seeds by patient first; brackets hold the 95 %
interval over patients, which speaks of other patients for these trained networks. The spread over seeds is the
standard deviation of the seeds' means. *In domain* are held-out patients of the training sites, *unseen* is the
site left out altogether. The gap between the two compares different patients at different sites, so it also holds
how much harder a site is. A pair of masks counts where both have a Dice, which an empty mask of an empty truth has
not, so that a paired gain may differ from the difference of two means. The trainings are short ones that fit two CPU
cores: they measure the gap, not the best Dice that the data allow.

Commands with `--set plan.dimension=2.5d` were run when slices of volumes brought their neighbours along as channels by
default, which every method of such a table, and the baseline, did. Those that end in
`--set train.schedule=cosine --set train.average_share=0` were run before weights were averaged over the end of a
training by default: all of such a table were trained without. Masks of those with
`--set postprocessing.fragments=kept` hold the fragments that the default takes out since. With
`--set plan.normalisation=auto` the default was itself before it normalised intensities by each voxel's surroundings.

The fundus images are DRIVE, STARE, CHASE_DB1 and HRF at 512 px; the cardiac ones M&Ms vendor A, centre 1, and ACDC
(their true spacing is lost, so nothing is measured in mm); the hippocampus is Task04 of the Medical Segmentation
Decathlon, one site, so there is no gap to measure. DATA stands for the folder that holds them.
"""

HEADER = [
    "| data | trained on | tested on | in domain | unseen | gap | seeds (spread) | minutes a training |",
    "|---|---|---|---|---|---|---|---|",
]
RECIPE, FORMER = "robust", "without_local"
RECIPE_HEADER = [
    "| data | trained on | tested on | baseline, unseen | {0}, unseen | gain, paired | share of the gap closed "
    "| baseline, in domain | {0} in domain, paired | seeds |",
    "|---|---|---|---|---|---|---|---|---|---|",
]
COMPARISON_HEADER = [
    "| method | unseen | against baseline, paired | p, one-sided | by site, worst first | in domain "
    "| against baseline, paired | seeds | minutes a training |",
    "|---|---|---|---|---|---|---|---|---|",
]


def describe_evidence() -> str:
    """Return the evidence page."""
    index = read_index()
    lines = [INTRODUCTION]
    heads = {RECIPE: "What the default closes of the gap", FORMER: "Without local normalisation"}
    for recipe, head in heads.items():
        lines += [f"## {head}", "", *recipe_table(recipe), "", *_describe_share(recipe)]
    lines += ["## The gap of the baseline", "", *baseline_table(index), ""]
    for page, entries in _comparisons(index).items():
        lines += [f"## Compared: [{page}](methods/{page}.md)", "", *comparison_tables(entries)]
    for name, entry in index.items():
        if (RESULTS / name).is_file() and entry.keys().isdisjoint(ASIDE):
            rows = read_rows(RESULTS / name)
            commits = ", ".join(sorted({f"`{row['commit']}`" for row in rows}))
            lines += [
                f"## {entry['title']}",
                "",
                f"```\n{entry['command']}\n```",
                "",
                f"Commit {commits}. The baseline by class:",
                "",
            ]
            # Of the baseline on clean images alone, as the rest of this page.
            plain = [r for r in rows if r["method"] == "baseline" and r["corruption"] == "none"]
            lines += [*class_table(plain), ""]
    return "\n".join(lines)


def write_readme_table(readme: str) -> str:
    """Return the README's text with its results table written anew."""
    return between_markers(readme, recipe_table())


def write_method_table(page: str, text: str) -> str:
    """Return the text of the method page `page` with its tables of results, if it has any, written anew."""
    if MARKERS[0] not in text:
        return text
    return between_markers(text, comparison_tables(_comparisons(read_index()).get(page, {})))


def recipe_table(recipe: str = RECIPE) -> list[str]:
    """Return, for every file that measures a recipe and set of training sites, what it gains and closes."""
    lines = [head.format(recipe) for head in RECIPE_HEADER]
    for title, trained_on, base, found in _compare_recipe(recipe):
        lines.append(_describe_recipe(title, trained_on, base, found))
    return lines


@cache
def _compare_recipe(recipe: str) -> tuple[tuple[str, str, MethodSummary, MethodSummary], ...]:
    """Return the task, the training sites, and what baseline and recipe reach, of every file that measures it."""
    compared: list[tuple[str, str, MethodSummary, MethodSummary]] = []
    for name, entry in read_index().items():
        if "recipe" not in entry or not (RESULTS / name).is_file():
            continue
        rows = [row for row in read_results(name) if is_clean(row)]
        for sites in dict.fromkeys(row.train_domains for row in rows):
            methods = split_by_method([row for row in rows if row.train_domains == sites])
            if recipe in methods and "baseline" in methods:
                chosen = {method: methods[method] for method in ("baseline", recipe)}
                base, found = summarise_methods(chosen, "baseline")
                compared.append((entry["recipe"], ", ".join(sites), base, found))
    return tuple(compared)


def _describe_share(recipe: str) -> list[str]:
    """Return a sentence on the share of the gap that a recipe closes, for each task and in the mean over tasks."""
    gains: dict[str, list[tuple[float, float]]] = {}
    for title, _, base, found in _compare_recipe(recipe):
        if found.comparison is not None and base.gap is not None:
            gains.setdefault(title, []).append((found.comparison.difference.mean, base.gap))
    shares = {
        title: 100 * sum(gain for gain, _ in pairs) / sum(gap for _, gap in pairs)
        for title, pairs in gains.items()
    }
    if not shares:
        return []
    told = "; ".join(f"{title}: {share:.0f} %" for title, share in shares.items())
    mean = sum(shares.values()) / len(shares)
    return [f"All gains of a task by all of its gaps: {told}. **The mean over tasks: {mean:.0f} %.**", ""]


def _describe_recipe(title: str, trained_on: str, base: MethodSummary, recipe: MethodSummary) -> str:
    gain, cost = (
        "-" if c is None else _text(c.difference, signed=True) for c in (recipe.comparison, recipe.cost)
    )
    closed = "-"
    if recipe.comparison is not None and base.gap is not None and base.gap > 0:
        closed = f"{round(100 * recipe.comparison.difference.mean / base.gap)} % of {100 * base.gap:.1f}"
    tested_on = ", ".join(recipe.sites) or "-"
    cells = [title, trained_on, tested_on, _text(base.unseen), _text(recipe.unseen), gain, closed,
             _text(base.in_domain), cost, str(len(recipe.seeds))]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def baseline_table(index: dict[str, dict[str, str]]) -> list[str]:
    """Return one row for every result file and set of training sites."""
    lines = list(HEADER)
    for name, entry in index.items():
        if not (RESULTS / name).is_file() or not entry.keys().isdisjoint((*ASIDE, "aside")):
            continue
        rows = [row for row in read_rows(RESULTS / name) if row["method"] == "baseline"]
        for trained_on in dict.fromkeys(row["train_domains"] for row in rows):
            chosen = [row for row in rows if row["train_domains"] == trained_on]
            lines.append(f"| {entry['title']} | {trained_on.replace('+', ', ')} | {_summarise(chosen)} |")
    return lines


def comparison_tables(entries: dict[str, dict[str, str]]) -> list[str]:
    """Return, for every result file that compares methods, its command and one row a method."""
    return [line for name in entries for line in _compare_methods(name)]


@cache
def _compare_methods(name: str) -> tuple[str, ...]:
    """Return the tables of one file; a method's page and that of evidence both show them."""
    entry = read_index()[name]
    lines: list[str] = []
    rows = [row for row in read_results(name) if is_clean(row)]
    counts = sorted({row.labels for row in rows}, key=lambda count: (not count.isdigit(), count.zfill(9)))
    for count in counts:
        methods = split_by_method([row for row in rows if row.labels == count])
        patients = "patient" if count == "1" else "patients"
        learned = f", {count} labelled {patients}" if len(counts) > 1 else ""
        lines += [f"**{entry['title']}{learned}**", "", *COMPARISON_HEADER]
        baseline = entry.get("baseline", "baseline")
        lines += [_describe_method(summary) for summary in summarise_methods(methods, baseline)]
        lines.append("")
        for other in entry.get("also_against", "").split(","):
            if other in methods:
                lines += [*_compare_again(methods, other), ""]
    return (*lines, *describe_origin(name, entry))


def _compare_again(methods: dict[str, list[ReportRow]], baseline: str) -> list[str]:
    """Return the paired differences of every method to another baseline."""
    lines = [f"| against {baseline}, paired | unseen | in domain |", "|---|---|---|"]
    for summary in summarise_methods(methods, baseline)[1:]:
        pair = (
            "-" if c is None else _text(c.difference, signed=True) for c in (summary.comparison, summary.cost)
        )
        lines.append(f"| {summary.name} | {' | '.join(pair)} |")
    return lines


def _describe_method(summary: MethodSummary) -> str:
    unseen, cost = summary.comparison, summary.cost
    gain, loss = ("-" if c is None else _text(c.difference, signed=True) for c in (unseen, cost))
    probability = None if unseen is None else unseen.probability_not_better
    chance = "-" if probability is None else "< 0.001" if probability < 0.001 else f"{probability:.3f}"
    minutes = "-" if summary.train_seconds is None else f"{summary.train_seconds / 60:.1f}"
    sites = sorted((100 * estimate.mean, domain) for domain, estimate in summary.sites.items())
    by_site = ", ".join(f"{domain} {mean:.1f}" for mean, domain in sites)
    cells = [summary.name, _text(summary.unseen), gain, chance, by_site, _text(summary.in_domain), loss]
    return f"| {' | '.join(cells)} | {len(summary.seeds)} | {minutes} |"


def read_index() -> dict[str, dict[str, str]]:
    """Return what results/index.json says of every file of rows."""
    return json.loads((RESULTS / "index.json").read_text(encoding="utf-8"))


@cache
def read_results(name: str) -> tuple[ReportRow, ...]:
    """Return the rows of a file in results/, which several pages show."""
    return tuple(row for source in read_sources([RESULTS / name]) for row in source.rows)


def describe_origin(name: str, entry: dict[str, str]) -> list[str]:
    """Return the lines below a table: the command that printed its rows, and the commits it ran at."""
    commits = ", ".join(sorted({f"`{row.commit}`" for row in read_results(name)}))
    return [f"```\n{entry['command']}\n```", "", f"Commit {commits}.", ""]


def _comparisons(index: dict[str, dict[str, str]]) -> dict[str, dict[str, dict[str, str]]]:
    """Return the entries that compare methods, by the method whose page they belong to."""
    pages: dict[str, dict[str, dict[str, str]]] = {}
    for name, entry in index.items():
        if "method" in entry and (RESULTS / name).is_file():
            pages.setdefault(entry["method"], {})[name] = entry
    return pages


def between_markers(text: str, lines: list[str]) -> str:
    """Return a page with the lines between its markers replaced."""
    before, _, rest = text.partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    return "\n".join([before + MARKERS[0], *lines, MARKERS[1] + after])


def class_table(rows: list[Row]) -> list[str]:
    """Return Dice by training sites, tested site and class."""
    lines = ["| trained on | site | split | patients | class | Dice |", "|---|---|---|---|---|---|"]
    dice = [row for row in rows if row["metric"] == "dice" and row["value"] is not None and _is_plain(row)]
    keys = dict.fromkeys((r["train_domains"], r["domain"], r["split"], r["class"]) for r in dice)
    for trained_on, domain, split, name in keys:
        found = [
            r
            for r in dice
            if (r["train_domains"], r["domain"], r["split"], r["class"]) == (trained_on, domain, split, name)
        ]
        estimate = estimate_mean([r["value"] for r in found], [_person(r) for r in found])
        kind = "unseen" if split == "unseen" else "in domain"
        sites = trained_on.replace("+", ", ")
        lines.append(f"| {sites} | {domain} | {kind} | {estimate.n_patients} | {name} | {_text(estimate)} |")
    return lines


def _summarise(rows: list[Row]) -> str:
    inside, outside = (_estimate(rows, split) for split in ("in_domain", "unseen"))
    sites = ", ".join(dict.fromkeys(row["domain"] for row in rows if row["split"] == "unseen")) or "-"
    gap = f"{100 * (inside.mean - outside.mean):.1f}" if inside and outside else "-"
    shown = "unseen" if outside else "in_domain"
    seeds = sorted({row["seed"] for row in rows})
    means = [e.mean for seed in seeds if (e := _estimate([r for r in rows if r["seed"] == seed], shown))]
    average = sum(means) / len(means)
    spread = (sum((m - average) ** 2 for m in means) / max(1, len(means) - 1)) ** 0.5
    seconds = [row["value"] for row in rows if row["metric"] == "train_seconds"]
    seeds_text = f"{len(seeds)} ({100 * spread:.1f})"
    return " | ".join(
        [sites, _text(inside), _text(outside), gap, seeds_text, f"{sum(seconds) / len(seconds) / 60:.1f}"]
    )


def _estimate(rows: list[dict[str, Any]], split: str) -> Estimate | None:
    chosen = [r for r in rows if (r["split"], r["metric"]) == (split, "dice") and r["value"] is not None]
    chosen = [r for r in chosen if _is_plain(r)]
    return estimate_mean([r["value"] for r in chosen], [_person(r) for r in chosen]) if chosen else None


def _is_plain(row: Row) -> bool:
    """Tell whether a row is of the image as it is, learned from all labels."""
    return row["corruption"] == "none" and row["labels"] == "all"


def _person(row: Row) -> str:
    """Return a name that two sites numbering their patients alike do not share."""
    return f"{row['domain']}/{row['patient']}"


def _text(estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return "-"
    form = "+.1f" if signed else ".1f"
    mean = format(100 * estimate.mean, form)
    if estimate.low is None or estimate.high is None:
        return f"{mean} (n = 1)"
    return f"{mean} [{100 * estimate.low:{form}}, {100 * estimate.high:{form}}], n = {estimate.n_patients}"
