"""The tables of docs/judging.md and docs/judging_results.md, written from the rows in results/ alone."""

from __future__ import annotations

from functools import cache

from evidence_page import RESULTS, between_markers, describe_origin, read_index, read_results

from anysite.judgement import DECISIONS
from anysite.report.format import count
from anysite.report.judging import FailureRanking, Judgement, Passed, Shift, describe_judgement

KINDS = {
    "in_domain": "training sites, other patients", "unseen": "unseen site", "corrupted": "corrupted",
    "other": "another dataset", "unknown": "role unknown", "all": "all",
}  # fmt: skip
GLANCED = ("histogram", "power_spectrum", "spectral", "combined")  # the scores of the short table


def write_judging_glance(text: str) -> str:
    """Return the text of the page on judging with its short table written anew: one row for every dataset."""
    heads = ("networks of", "known images beyond a limit", "unseen masks: accepted", "of these failed")
    told = [f"`{score}`: AUROC (FPR95), all shifts" for score in GLANCED]
    sorted_by = "failures sorted, AURC above the best: `referral` (`entropy`)"
    lines = _head(
        (*heads, "other organs rejected", "known masks with the Dice as predicted", *told, sorted_by)
    )
    for _, entry, judgements in _read_judgements():
        if "glance" not in entry:
            continue
        judgement = judgements[0]  # later ones are of other noise of the same made-up images
        passed = {group.kind: group for group in judgement.passed}
        known, unseen, other = (passed.get(kind) for kind in ("in_domain", "unseen", "other"))
        ranked = {ranking.score: f"{ranking.excess_aurc:.3f}" for ranking in judgement.rankings[0][-1]}
        cells = [
            entry["glance"],
            f"{known.beyond} of {known.images}" if known else "-",
            f"{unseen.decisions['accept']} of {unseen.images}" if unseen else "-",
            f"{unseen.silent}" if unseen else "-",
            f"{other.decisions['reject'] + other.refused} of {other.images}" if other else "-",
            f"{known.within} of {known.predicted}" if known else "-",
            *(_describe_shift(judgement.means[-1], (score,)) for score in GLANCED),
            f"{ranked['referral']} ({ranked['entropy']})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return between_markers(text, lines)


def write_judging_tables(text: str) -> str:
    """Return the text of the page on measured judgement with its tables of results written anew."""
    lines: list[str] = []
    for name, entry, judgements in _read_judgements():
        lines += [f"### {entry['title']}", ""]
        for one in judgements:
            lines += [f"{one.method}, {count(one.runs, 'training')}:", "", *_describe(one)]
        lines += describe_origin(name, entry)
    return between_markers(text, lines)


@cache
def _read_judgements() -> tuple[tuple[str, dict[str, str], list[Judgement]], ...]:
    """Return the name and entry of every file with verdicts, and what its rows say, a dataset each."""
    found: list[tuple[str, dict[str, str], list[Judgement]]] = []
    for name, entry in read_index().items():
        if "judging" not in entry or not (RESULTS / name).is_file():
            continue
        rows = read_results(name)
        judgements: list[Judgement] = []
        for dataset in dict.fromkeys(row.dataset for row in rows):
            judgement = describe_judgement(dataset, [row for row in rows if row.dataset == dataset])
            assert judgement is not None, f"{name} holds no verdicts"
            judgements.append(judgement)
        found.append((name, entry, judgements))
    return tuple(found)


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
