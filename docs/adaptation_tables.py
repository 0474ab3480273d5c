"""The tables of docs/test_time.md, written from the rows in results/ and nothing else."""

from __future__ import annotations

from evidence_page import RESULTS, between_markers, read_index

from anysite.report.adaptation import KINDS, Gain, describe_adaptations
from anysite.report.read import read_sources
from anysite.rows import read_rows
from anysite.statistics import Estimate

HEAD = (
    "adapter", "images", "number", "adapted", "gain in Dice points, all images", "gain, adapted ones",
    "lost more than 1 point", "gained more than 1", "worst",
)  # fmt: skip


def write_adaptation_tables(text: str) -> str:
    """Return the text of the page on test-time adaptation with its tables of results written anew."""
    lines: list[str] = []
    for name, entry in read_index().items():
        if "adaptation" not in entry or not (RESULTS / name).is_file():
            continue
        rows = [row for source in read_sources([RESULTS / name]) for row in source.rows]
        commits = ", ".join(sorted({f"`{row['commit']}`" for row in read_rows(RESULTS / name)}))
        results = describe_adaptations(rows)
        for method in dict.fromkeys(result.method for result in results):
            lines += [f"**{entry['title']}, trained by `{method}`**", ""]
            lines += [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
            chosen = [result for result in results if result.method == method]
            lines += [_describe(result.adapter, gain) for result in chosen for gain in result.gains]
            lines.append("")
        lines += [f"```\n{entry['command']}\n```", "", f"Commit {commits}.", ""]
    return between_markers(text, lines)


def _describe(adapter: str, gain: Gain) -> str:
    low, high = gain.harmed_interval
    harmed = f"{gain.harmed} ({100 * gain.harmed / gain.images:.1f} [{100 * low:.1f}, {100 * high:.1f}] %)"
    worst = f"{100 * gain.worst[0][1]:.1f}" if gain.worst else "-"
    cells = [f"`{adapter}`", KINDS[gain.kind], str(gain.images), str(gain.adapted), _text(gain.gain)]
    cells += [_text(gain.gain_adapted), harmed, str(gain.helped), worst]
    return f"| {' | '.join(cells)} |"


def _text(found: Estimate | None) -> str:
    if found is None:
        return "-"
    mean = f"{100 * found.mean:+.1f}"
    if found.low is None or found.high is None:
        return f"{mean} (n = 1)"
    return f"{mean} [{100 * found.low:+.1f}, {100 * found.high:+.1f}], n = {found.n_patients}"
