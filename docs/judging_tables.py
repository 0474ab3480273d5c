"""The tables of docs/judging.md, written from the rows in results/ and nothing else."""

from __future__ import annotations

from evidence_page import RESULTS, between_markers, describe_origin, read_index, read_results

from anysite.judgement import DECISIONS
from anysite.report.format import count
from anysite.report.judging import FailureRanking, Judgement, Passed, Shift, describe_judgement

KINDS = {
    "in_domain": "training sites, other patients", "unseen": "unseen site", "corrupted": "corrupted",
    "other": "another dataset", "unknown": "role unknown", "all": "all",
}  # fmt: skip


def write_judging_tables(text: str) -> str:
    """Return the text of the page on judging with its tables of results written anew."""
    lines: list[str] = []
    for name, entry in read_index().items():
        if "judging" not in entry or not (RESULTS / name).is_file():
            continue
        rows = list(read_results(name))
        lines += [f"### {entry['title']}", ""]
        for dataset in dict.fromkeys(row.dataset for row in rows):
            judgement = describe_judgement(dataset, [row for row in rows if row.dataset == dataset])
            assert judgement is not None, f"{name} holds no verdicts"
            lines += [f"{dataset}, {count(judgement.runs, 'training')}:", "", *_describe(judgement)]
        lines += describe_origin(name, entry)
    return between_markers(text, lines)


def _describe(judgement: Judgement) -> list[str]:
    heads = (
        "images",
        "number",
        *DECISIONS,
        "refused",
        "beyond a limit",
        "failed",
        "silent",
        "Dice as predicted",
    )
    lines = _head(heads) + [_describe_passed(group) for group in judgement.passed]
    lines += ["", *_head(("AUROC (FPR95)", "images", *judgement.scores))]
    for shift in (*judgement.means, *judgement.shifts):
        name = f"**{KINDS[shift.kind]}, {shift.name}**" if shift in judgement.means else shift.name
        lines.append(f"| {name} | {shift.images} | {_describe_shift(shift, judgement.scores)} |")
    for name, images, failed, rankings in judgement.rankings:
        head = f"failures, {name} ({failed} of {images})"
        lines += ["", *_head((head, "AURC", "excess", "AUGRC", "rank correlation", "caught in the fifth"))]
        lines += [_describe_ranking(ranking) for ranking in rankings]
    return [*lines, ""]


def _head(cells: tuple[str, ...]) -> list[str]:
    return [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]


def _describe_passed(group: Passed) -> str:
    interval = group.silent_interval
    patients = f"{group.silent_patients[0]} of {group.silent_patients[1]} patients"
    share = f" ({patients}, [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}] %)" if interval else ""
    counts = " | ".join(str(group.decisions[decision]) for decision in DECISIONS)
    within = f"{group.within} of {group.predicted}" if group.predicted else "-"
    cells = [
        KINDS[group.kind],
        str(group.images),
        counts,
        str(group.refused),
        str(group.beyond),
        str(group.failed),
    ]
    return f"| {' | '.join(cells)} | {group.silent}{share} | {within} |"


def _describe_shift(shift: Shift, scores: tuple[str, ...]) -> str:
    found = [shift.scores.get(score) for score in scores]
    return " | ".join("-" if pair is None else f"{pair[0]:.2f} ({pair[1]:.2f})" for pair in found)


def _describe_ranking(ranking: FailureRanking) -> str:
    areas = [f"{value:.3f}" for value in (ranking.aurc, ranking.excess_aurc, ranking.augrc)]
    correlation = "-" if ranking.correlation is None else f"{ranking.correlation:.2f}"
    caught = "-" if ranking.caught is None else f"{100 * ranking.caught:.0f} %"
    return f"| {' | '.join([ranking.score, *areas, correlation, caught])} |"
