"""Verdicts on a folder of masks: files beside them, and which of them a person gets to see."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anysite import atomic
from anysite.errors import ConfigError, FileFormatError
from anysite.judgement import DECISIONS, EMPTY_REASON, LEAST_DICE, suspicion

VERDICTS = "verdicts.json"
VERDICT_FILES = (VERDICTS, "verdicts.csv")
REFERRED = "among the images that most speaks against, of which a share is looked at"
PASSED_OVER = "more speaks against others, and only a share is looked at"

Verdicts = dict[str, dict[str, Any]]


def write_verdicts(
    folder: Path, judged: Mapping[str, Mapping[str, Any]], referral: float | None = None
) -> Verdicts:
    """Write verdicts.json and verdicts.csv, and return the verdicts by case as the former holds them.

    Args:
        folder: Where the masks are.
        judged: Of every case the fields of a `judge.Verdict`; without any, files of earlier ones are removed.
        referral: Share of the cases that a person can look at; none: as many as the verdicts say.

    Raises:
        ConfigError: a share outside 0 to 1.
        FileFormatError: the files cannot be written.
    """
    cases: Verdicts = {
        case: {"verdict": v["decision"], "reasons": list(v["reasons"]), "predicted_dice": v.get("predicted_dice"),
               "scores": v["scores"]} | ({LEAST_DICE: v[LEAST_DICE]} if v.get(LEAST_DICE) else {})
        for case, v in sorted(judged.items())
    }  # fmt: skip
    if referral is not None:
        cases = refer(cases, referral)
    if not cases:
        for name in VERDICT_FILES:
            (folder / name).unlink(missing_ok=True)
        return cases
    atomic.write_json(folder / VERDICTS, {"cases": cases})
    atomic.write_text(folder / VERDICT_FILES[1], _as_table(cases))
    return cases


def read_verdicts(folder: Path) -> Verdicts:
    """Return what verdicts.json holds, nothing where there is none.

    Raises:
        FileFormatError: it cannot be read.
    """
    path = folder / VERDICTS
    if not path.is_file():
        return {}
    try:
        return dict(atomic.read_json(path)["cases"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"not readable ({error})", where=path, expected="verdicts by case") from error


def require_own(folder: Path) -> None:
    """Refuse a folder where verdicts would replace files that anysite did not write.

    Raises:
        ConfigError: there is such a file.
    """
    present = [name for name in VERDICT_FILES if (folder / name).exists()]
    try:
        own = all(verdict["verdict"] in DECISIONS for verdict in read_verdicts(folder).values())
        own = own and (folder / VERDICTS).is_file()
    except (FileFormatError, KeyError, TypeError, ValueError):
        own = False
    if present and not own:
        raise ConfigError(
            f"{present[0]} would be replaced, but anysite did not write it", where=folder,
            fix="choose another output folder, or move that file away",
        )  # fmt: skip


def refer(cases: Verdicts, share: float) -> Verdicts:
    """Return verdicts of which a stated share, rounded down, is to be reviewed: those that most speaks against.

    Rejected ones come first and stay rejected, also beyond the share, and after them those in which nothing was
    found, about which networks agree well; reviews beyond the share become acceptances.

    Raises:
        ConfigError: a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"{share:g}", where="--referral", expected="0 to 1")

    def place(case: str) -> tuple[bool, bool, float, str]:
        verdict = cases[case]
        empty = EMPTY_REASON in verdict["reasons"]
        return verdict["verdict"] != "reject", not empty, -suspicion(verdict["scores"]), case

    order = sorted(cases, key=place)
    seen = set(order[: math.floor(share * len(order) + 1e-9)])
    result: Verdicts = {}
    for case, verdict in cases.items():
        decision, reasons = verdict["verdict"], verdict["reasons"]
        if case in seen and decision == "accept":
            decision, reasons = "review", [REFERRED]
        elif case not in seen and decision == "review":
            decision, reasons = "accept", [PASSED_OVER, *reasons]
        result[case] = verdict | {"verdict": decision, "reasons": reasons}
    return result


def is_passed_over(verdict: Mapping[str, Any]) -> bool:
    """Tell whether a verdict accepts a mask only because others are referred before it."""
    return verdict["verdict"] == "accept" and PASSED_OVER in verdict["reasons"]


def _as_table(cases: Verdicts) -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for verdict in cases.values() for name in verdict["scores"]))
    table = csv.writer(text, lineterminator="\n")
    bounds = ("predicted_dice_low", "predicted_dice", "predicted_dice_high")
    table.writerow(["case", "verdict", "reasons", *bounds, *names])
    for case, verdict in cases.items():
        values = [
            *(verdict["predicted_dice"] or [None] * 3),
            *(verdict["scores"].get(name) for name in names),
        ]
        numbers = ["" if value is None else f"{value:.3f}" for value in values]
        # A spreadsheet would take these for formulas.
        name = f"'{case}" if case.startswith(("=", "+", "-", "@")) else case
        assert verdict["verdict"] in DECISIONS
        table.writerow([name, verdict["verdict"], "; ".join(verdict["reasons"]), *numbers])
    return text.getvalue()
