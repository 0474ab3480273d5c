"""The tables of docs/test_time.md and docs/adaptation_results.md, written from the rows in results/ alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

from evidence_page import RESULTS, between_markers, describe_origin, read_index, read_results

from anysite import registry
from anysite.guard import find_reason_against
from anysite.judge import COMBINED, Verdict
from anysite.judgement import ADAPTED, SCORE
from anysite.report.adaptation import KINDS, PLAIN, AdaptationResult, Gain, Key, describe_adaptations
from anysite.report.read import Row
from anysite.settings import AdaptSettings
from anysite.statistics import Estimate

HEAD = (
    "adapter", "images", "number", "adapted", "gain in Dice points, all images", "gain, adapted ones",
    "lost more than 1 point", "gained more than 1", "worst",
)  # fmt: skip
GATE = "behind the gate"
GLANCED = ("standard_views", "refseg", "fourier_prompt")  # the adapters of the short table


def write_adaptation_glance(text: str) -> str:
    """Return the text of the page on test-time adaptation with its short table written anew.

    One row for every kind of network, with what adapters behind gate and checks did at unseen sites.
    """
    found: dict[str, dict[str, Gain]] = defaultdict(dict)
    for name, entry in read_index().items():
        if "glance" not in entry or not (RESULTS / name).is_file():
            continue
        for result in _read_adaptations(name, entry.get("gate", "")):
            adapter, _, gate = result.adapter.partition(" ")
            if adapter in GLANCED and (gate == GATE) == ("gate" in entry):
                gains = {gain.kind: gain for gain in result.gains}
                found[f"{entry['glance']}, trained by `{result.method}`"][adapter] = gains["unseen"]
    head = [f"`{name}`: gain | harmed | worst" for name in GLANCED]
    lines = [f"| unseen sites of | {' | '.join(head)} |", "|---" * (1 + 3 * len(head)) + "|"]
    for title, gains in found.items():
        cells = [cell for name in GLANCED for cell in _cells_of(gains.get(name))]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return between_markers(text, lines)


def write_adaptation_tables(text: str) -> str:
    """Return the text of the page on measured test-time adaptation with its tables of results written anew."""
    lines: list[str] = []
    for name, entry in read_index().items():
        if "adaptation" not in entry or not (RESULTS / name).is_file():
            continue
        results = _read_adaptations(name, entry.get("gate", ""))
        for method in dict.fromkeys(result.method for result in results):
            lines += [f"**{entry['title']}, trained by `{method}`**", ""]
            chosen = [result for result in results if result.method == method]
            if "brief" in entry:
                lines += _describe_briefly(chosen)
            else:
                lines += [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
                lines += [_describe(result.adapter, gain) for result in chosen for gain in result.gains]
            lines.append("")
        lines += describe_origin(name, entry)
    return between_markers(text, lines)


@cache
def _read_adaptations(name: str, gates: str) -> tuple[AdaptationResult, ...]:
    """Return what every adapter did in a file of rows, and what it would have done behind gates of these doubts."""
    rows = list(read_results(name))
    for least_doubt in gates.split():
        rows += let_the_gate_decide(rows, float(least_doubt))
    return describe_adaptations(rows)


def let_the_gate_decide(rows: Sequence[Row], least_doubt: float) -> list[Row]:
    """Return the rows of adapters that were given every image as the gate would have had them.

    Where it stays closed the mask is that without adaptation. The gate's own function decides, by the scores that lie
    beside.
    """
    shift_scores = {COMBINED, *(n for n in registry.DETECTORS if registry.find("detector", n).of_shift)}
    scores: dict[Key, dict[str, float | None]] = defaultdict(dict)
    plain: dict[Key, float | None] = {}
    for row in rows:
        if row.adapt in PLAIN and row.metric.startswith(SCORE):
            scores[_image(row)][row.metric.removeprefix(SCORE)] = row.value
        elif row.adapt in PLAIN and row.metric == "dice":
            plain[*_image(row), row.class_name] = row.value
    settings, decided = AdaptSettings(least_doubt=least_doubt), []
    gate = " " + GATE + ("" if settings == AdaptSettings() else f", `least_doubt={least_doubt:g}`")
    for row in rows:
        if (
            " " in row.adapt
            or row.adapt in PLAIN
            or row.adapt.endswith(":always")
            or row.metric not in ("dice", ADAPTED)
        ):
            continue
        verdict = Verdict("review", (), scores[_image(row)])
        closed = bool(find_reason_against(settings, verdict, shift_scores))
        before = 0.0 if row.metric == ADAPTED else plain[*_image(row), row.class_name]
        value = before if closed else row.value
        decided.append(row.model_copy(update={"adapt": row.adapt + gate, "value": value}))
    return decided


def _image(row: Row) -> Key:
    run = (row.dataset, row.method, row.seed, row.train_domains, row.labels, row.overrides)
    return (*run, row.domain, row.case, row.corruption_version, row.severity)


def _describe(adapter: str, gain: Gain) -> str:
    share, low, high = (100 * value for value in gain.harmed_share)
    harmed = f"{gain.harmed} ({share:.1f} [{low:.1f}, {high:.1f}] %)"
    worst = f"{100 * gain.worst[0][1]:.1f}" if gain.worst else "-"
    name, _, gate = adapter.partition(" ")
    cells = [
        f"`{name}` {gate}".strip(),
        KINDS[gain.kind],
        str(gain.images),
        str(gain.adapted),
        _text(gain.gain),
    ]
    cells += [_text(gain.gain_adapted), harmed, str(gain.helped), worst]
    return f"| {' | '.join(cells)} |"


def _describe_briefly(results: Sequence[AdaptationResult]) -> list[str]:
    """Return one row an adapter: of each kind of images the gain, how many were harmed, and the worst."""
    kinds = dict.fromkeys(gain.kind for result in results for gain in result.gains)
    head = [f"{KINDS[kind]}: gain | harmed | worst" for kind in kinds]
    lines = [f"| adapter | {' | '.join(head)} |", "|---" * (1 + 3 * len(head)) + "|"]
    for result in results:
        name, _, gate = result.adapter.partition(" ")
        gains = {gain.kind: gain for gain in result.gains}
        cells = [f"`{name}` {gate}".strip(), *(cell for kind in kinds for cell in _cells_of(gains.get(kind)))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cells_of(gain: Gain | None) -> list[str]:
    """Return the mean gain, how many images were harmed, and the largest loss; dashes where nothing was scored."""
    if gain is None:
        return ["-", "-", "-"]
    worst = f"{100 * gain.worst[0][1]:.1f}" if gain.worst else "-"
    return [_text(gain.gain), f"{gain.harmed} of {gain.images}", worst]


def _text(found: Estimate | None) -> str:
    if found is None:
        return "-"
    mean = f"{100 * found.mean:+.1f}"
    if found.low is None or found.high is None:
        return f"{mean} (n = 1)"
    return f"{mean} [{100 * found.low:+.1f}, {100 * found.high:+.1f}], n = {found.n_patients}"
