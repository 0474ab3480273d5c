"""The list of all cases, through which the page steps: scores, verdict and picture of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anysite.report.format import image_folders, without_folders
from anysite.report.gallery import Gallery
from anysite.report.pictures import Picture
from anysite.report.read import PredictedCase, PredictedVerdict, Row
from anysite.report.summary import CaseScore, score_cases, worst_first
from anysite.report.volumes import SmallVolume


@dataclass(frozen=True)
class CaseLine:
    """One case; `picture` is None where the page draws none, `score` where there is no truth."""

    case: str
    domain: str
    split: str
    status: str
    score: CaseScore | None
    hd95: float | None
    seconds: float | None
    verdict: PredictedVerdict | None
    error: str
    picture: Picture | None
    volume: SmallVolume | None

    @property
    def decision(self) -> str:
        """What the judge said, or nothing."""
        return self.verdict.decision if self.verdict else ""


def list_cases(
    rows: Sequence[Row], scores: Sequence[CaseScore], gallery: Gallery, pictures: int
) -> tuple[CaseLine, ...]:
    """List failed cases first, then those of lowest Dice, then those without; the first `pictures` are drawn."""
    distances = {(s.case, s.domain, s.split): s.value for s in score_cases(rows, "hd95")}
    cases = gallery.predictions.cases
    ordered = _ordered(scores, cases)
    with_mask = [name for name, *_ in ordered if name in cases and cases[name].mask]
    wanted = {*with_mask[:pictures], *gallery.volumes}
    lines = []
    for name, domain, split, score in ordered:
        case = cases.get(name, PredictedCase())
        lines.append(
            CaseLine(
                case=name,
                domain=domain,
                split=split,
                status=case.status,
                score=score,
                hd95=distances.get((name, domain, split)),
                seconds=case.seconds,
                verdict=case.verdict,
                error=without_folders(case.error or "", image_folders(case.images)),
                picture=gallery.draw(name) if name in wanted else None,
                volume=gallery.volumes.get(name) if name in wanted else None,
            )
        )
    return tuple(lines)


def _ordered(
    scores: Sequence[CaseScore], cases: dict[str, PredictedCase]
) -> list[tuple[str, str, str, CaseScore | None]]:
    ranked = [*worst_first(scores), *(score for score in scores if score.value is None)]
    found = [(score.case, score.domain, score.split, score) for score in ranked]
    scored = {score.case for score in scores}
    rest = [(name, case.domain, case.split, None) for name, case in cases.items() if name not in scored]
    return sorted([*found, *rest], key=lambda item: item[0] not in cases or cases[item[0]].status != "failed")
