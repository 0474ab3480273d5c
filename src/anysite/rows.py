"""Rows of results: one a case, class and metric; how they are written, read and averaged."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anysite import atomic
from anysite.data.case import Case
from anysite.errors import FileFormatError
from anysite.judgement import ADAPTED, DECISIONS, LEAST_DICE, PREDICTED, SCORE, VERDICT, is_judgement
from anysite.metrics import TOLERANCE, Score
from anysite.statistics import mean_defined

ROWS, SUMMARY = "rows.jsonl", "summary.json"
ALL_CLASSES = "all classes"  # what the rows of calibration and judgement are about

Row = dict[str, Any]

# What all rows of a run's images of one kind say alike, and the name of a line that says it for those below.
OF_A_RUN = (
    "dataset", "method", "adapt", "seed", "train_domains", "corruption", "severity", "corruption_version", "labels",
    "commit", "config", "overrides", "job", "data",
)  # fmt: skip
SHARED = "shared"


def join_sites(sites: Iterable[str]) -> str:
    """Return the names of sites as one text, joined by "+"; one within a name is written as in addresses, %2B."""
    return "+".join(site.replace("%", "%25").replace("+", "%2B") for site in sites)


def split_sites(text: str) -> list[str]:
    """Return the names that `join_sites` joined."""
    names = [name.strip() for name in text.split("+")]
    return [name.replace("%2B", "+").replace("%25", "%") for name in names if name]


def name_adapter(settings: Mapping[str, Any]) -> str:
    """Return the name that `--adapt` takes, from the settings of an adaptation."""
    always = not (settings.get("only_shifted", True) or settings.get("guard", True))
    return f"{settings.get('method', 'none')}{':always' if always else ''}"


def describe_verdict(verdict: Mapping[str, Any] | None) -> list[Score]:
    """Return what was said of a mask as values: the decision, every score, and the Dice to expect.

    A score that was not finite is undefined, and counts as beyond all limits.
    """
    if not verdict:
        return []
    values = {VERDICT: float(DECISIONS.index(verdict["decision"]))}
    values |= {f"{SCORE}{name}": value for name, value in verdict["scores"].items()}
    if verdict.get("predicted_dice"):
        values |= dict(zip(PREDICTED, verdict["predicted_dice"], strict=True))
    if verdict.get(LEAST_DICE):
        values[LEAST_DICE] = verdict[LEAST_DICE]
    return [Score(ALL_CLASSES, name, value, "1") for name, value in values.items()]


def describe_adaptation(adaptations: Sequence[Mapping[str, Any]] | None) -> list[Score]:
    """Return whether the mask is that of a network adapted to the image; nothing where none was asked for."""
    if not adaptations:
        return []
    kept = float(any(adaptation["kept"] for adaptation in adaptations))
    return [Score(ALL_CLASSES, ADAPTED, kept, "1")]


def rows_of(
    scores: Sequence[Score], case: Case, split: str, common: Row, tolerance: float = TOLERANCE
) -> list[Row]:
    """Return one row a score, with the fields of its case and those in `common`.

    Args:
        tolerance: Of the surface Dice, which its rows name where it is not the usual one.
    """
    place = {**common, "domain": case.domain, "split": split, "patient": case.patient, "case": case.id}
    rows = [
        {**place, "class": s.class_name, "metric": s.metric, "value": _rounded(s.value), "unit": s.unit}
        for s in scores
    ]
    for row in rows if tolerance != TOLERANCE else ():
        if row["metric"] == "surface_dice":
            row["tolerance"] = tolerance
    return rows


def summarise(rows: Sequence[Row], failed: dict[str, str], unpredicted: Sequence[str] = ()) -> dict[str, Any]:
    """Return nnU-Net's `summary.json` keys (foreground_mean, mean, metric_per_case), and ours by site and split.

    Means leave out undefined values; "undefined" says how many there were. What was judged is left out.
    """
    rows = [row for row in rows if not is_judgement(row["metric"])]
    metrics = list(dict.fromkeys(row["metric"] for row in rows if row["class"] != ALL_CLASSES))
    calibrated = list(dict.fromkeys(row["metric"] for row in rows if row["class"] == ALL_CLASSES))
    classes = list(dict.fromkeys(row["class"] for row in rows if row["class"] != ALL_CLASSES))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    by_case: dict[str, dict[str, dict[str, float | None]]] = {case: {} for case in cases}
    values: dict[tuple[str, str, str], list[float | None]] = defaultdict(list)
    for row in rows:
        for name in ("class", "domain", "split"):
            values[name, row[name], row["metric"]].append(row["value"])
        if row["class"] != ALL_CLASSES:
            by_case[row["case"]].setdefault(row["class"], {})[row["metric"]] = row["value"]
    groups = {
        name: {
            group: {m: mean_defined(values[name, group, m]) for m in [*metrics, *calibrated]}
            for group in dict.fromkeys(row[name] for row in rows)
        }
        for name in ("domain", "split")
    }
    means = {c: {m: mean_defined(values["class", c, m]) for m in metrics} for c in classes}
    return {
        # As in nnU-Net the mean of the classes' means, so that a rare class counts as much as any.
        "foreground_mean": {m: mean_defined([means[c][m] for c in classes]) for m in metrics},
        "mean": means,
        "metric_per_case": [{"case": case, "metrics": by_case[case]} for case in cases],
        "by_domain": groups["domain"],
        "by_split": groups["split"],
        "undefined": {
            m: sum(r["value"] is None for r in rows if r["metric"] == m) for m in [*metrics, *calibrated]
        },
        "failed": failed,
        "unpredicted": list(unpredicted),
    }


def write_rows(path: Path, rows: Sequence[Row], *, shared: bool = False) -> None:
    """Write rows as JSON lines, atomically.

    Args:
        shared: Say once, in a line of its own before them, what rows that follow each other have in common. Such
            a file is a fraction as long; `read_rows` reads both kinds.
    """
    lines: list[Row] = []
    common: Row = {}
    for row in rows:
        if shared:
            own = {name: value for name, value in row.items() if name not in OF_A_RUN}
            if (others := {name: row[name] for name in OF_A_RUN if name in row}) != common:
                common = others
                lines.append({SHARED: common})
            row = own
        lines.append(row)
    atomic.write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def read_rows(path: Path) -> list[Row]:
    """Read rows from JSON lines; a last line cut off by a crash is left out.

    Raises:
        FileFormatError: the file is missing, or another line is not a JSON object.
    """
    return [row for _, row in number_rows(path)]


def number_rows(path: Path, *, whole: bool = False) -> Iterator[tuple[int, Row]]:
    """Yield every row of a file with the number of its line, together with what lines above say of it.

    Args:
        whole: Refuse a last line that was cut off as well.

    Raises:
        FileFormatError: as `read_rows`.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"not readable ({error})", where=path, expected="rows as JSON lines") from None
    common: Row = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if whole or number < len(lines):
                raise FileFormatError(f"line {number} is not JSON", where=path) from None
            continue
        if not isinstance(row, dict):
            raise FileFormatError(f"line {number} is not a row", where=path, expected="a JSON object")
        if row.keys() == {SHARED} and isinstance(row[SHARED], dict):
            common = row[SHARED]
        else:
            yield number, common | row


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
