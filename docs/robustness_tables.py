"""The tables of docs/robustness.md, written from the rows in results/ and nothing else."""

from __future__ import annotations

from evidence_page import RESULTS, between_markers, describe_origin, read_index, read_results

from anysite.report.curves import describe_corruptions, keep_shared
from anysite.report.methods import split_by_method
from anysite.report.read import Row
from anysite.report.summary import estimate, is_clean, score_cases
from anysite.statistics import Estimate, compare_paired

SHOWN = 4  # corruptions named a method, the worst


def write_robustness_tables(text: str) -> str:
    """Return the text of the page on robustness with its tables of results written anew."""
    lines: list[str] = []
    for name, entry in read_index().items():
        if "corruptions" not in entry or not (RESULTS / name).is_file():
            continue
        files = [name, *entry.get("beside", "").split()]
        every = [row for file in files for row in read_results(file)]
        corrupted = {_trained(row) for row in every if not is_clean(row)}
        rows = [row for row in every if _trained(row) in corrupted and row.metric == "dice"]
        lines += [f"**{entry['corruptions']}**", "", *_describe(rows, entry.get("baseline", "baseline")), ""]
        lines += [line for file in files for line in describe_origin(file, read_index()[file])]
    return between_markers(text, lines)


def _trained(row: Row) -> tuple[object, ...]:
    return row.method, row.overrides, row.labels, row.train_domains, row.seed


def _describe(rows: list[Row], baseline: str) -> list[str]:
    """Return one row a method: clean and corrupted Dice of the same cases, both beside the baseline's."""
    lines = [
        "| method | clean | against baseline, paired | corrupted | against baseline, paired | gap | unseen, clean "
        "| relative drop by corruption, worst first | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = keep_shared(rows)
    curves = describe_corruptions(rows)
    assert curves is not None
    methods = split_by_method(rows)
    for result in curves.results:
        own = methods[result.method]
        clean = [row for row in own if is_clean(row) and row.split != "unseen"]
        worse = [row for row in own if not is_clean(row)]
        plain = [] if result.method == baseline else methods[baseline]
        against_clean = _compare(clean, [row for row in plain if is_clean(row) and row.split != "unseen"])
        against_worse = _compare(worse, [row for row in plain if not is_clean(row)])
        unseen = estimate(score_cases(row for row in own if is_clean(row) and row.split == "unseen"))
        worst = sorted(result.drops.items(), key=lambda drop: -drop[1])[:SHOWN]
        drops = ", ".join(f"{name} {100 * drop:.0f} %" for name, drop in worst)
        gap = "-" if result.gap is None else f"{100 * result.gap:.1f}"
        cells = [result.method, _text(result.clean), against_clean, _text(result.corrupted), against_worse]
        cells += [gap, _text(unseen), drops, str(len({row.seed for row in own}))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _compare(rows: list[Row], baseline: list[Row]) -> str:
    """Return the mean difference over patients, of the same cases of both."""
    mine, other = (
        {(s.domain, s.case): s for s in score_cases(part) if s.value is not None} for part in (rows, baseline)
    )
    shared = sorted(mine.keys() & other.keys())
    if not shared:
        return "-"
    before, after = ({key: scores[key].value or 0.0 for key in shared} for scores in (other, mine))
    comparison = compare_paired(after, before, {key: mine[key].person for key in shared})
    return _text(comparison.difference, signed=True)


def _text(found: Estimate | None, signed: bool = False) -> str:
    if found is None:
        return "-"
    form = "+.1f" if signed else ".1f"
    if found.low is None or found.high is None:
        return f"{format(100 * found.mean, form)} (n = 1)"
    limits = f"[{format(100 * found.low, form)}, {format(100 * found.high, form)}]"
    return f"{format(100 * found.mean, form)} {limits}, n = {found.n_patients}"
