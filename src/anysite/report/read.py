"""Reading what a report shows: prediction folders and files of result rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from anysite import atomic
from anysite.errors import DataError, FileFormatError, describe_invalid
from anysite.manifest import join_parts, read_content
from anysite.rows import SHARED, number_rows, split_sites


class Row(BaseModel):
    """One measured value: a metric of one class of one case, or of one run where `case` is empty.

    `value` is None where the metric is undefined.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    dataset: str = ""
    method: str = ""
    adapt: str = ""
    seed: str = ""
    train_domains: tuple[str, ...] = ()
    domain: str = ""
    split: str = "unknown"
    patient: str = ""
    case: str = ""
    class_name: str = Field("", alias="class")
    metric: str
    value: float | None
    unit: str = ""
    corruption: str = ""
    severity: str = ""
    corruption_version: str = ""
    labels: str = ""
    other: str = ""
    judge_learned: bool = False
    commit: str = ""
    config: str = ""
    overrides: str = ""
    job: str = ""

    @field_validator("train_domains", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _sites_of(value)
        return tuple(sorted(value)) if isinstance(value, list) else value or ()

    @field_validator("value")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, content: Any) -> Any:
        """Name the surface Dice by another tolerance than usual as a metric of its own, and take null as empty."""
        if isinstance(content, dict) and "tolerance" in content:
            content = content | {"metric": f"{content.get('metric')}@{content['tolerance']}"}
        if not isinstance(content, dict) or None not in content.values():
            return content
        kept = ("value", "train_domains", "judge_learned")
        return {name: "" if value is None and name not in kept else value for name, value in content.items()}

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two rows measurements of the same thing, of which the later one counts."""
        return _MEASURED(self)


@cache
def _sites_of(text: str) -> tuple[str, ...]:
    return tuple(sorted(split_sites(text)))


_MEASURED = attrgetter(
    *(name for name in Row.model_fields if name not in ("value", "unit", "commit", "config"))
)

# One record, or one for every share of a prediction that several machines made.
MANIFESTS = "predictions*.json"
VERDICTS = "verdicts.json"
RELIABILITY, SUMMARY = "reliability.json", "summary.json"


class PredictedVerdict(BaseModel):
    """The judge's word on one mask."""

    model_config = ConfigDict(extra="ignore")

    decision: str = ""
    reasons: list[str] = []
    predicted_dice: tuple[float, float, float] | None = None
    least_dice: float = 0.0


class PredictedAdaptation(BaseModel):
    """What became of adapting one network to an image."""

    model_config = ConfigDict(extra="ignore")

    method: str = ""
    kept: bool = False
    reason: str = ""
    changed_share: float | None = None
    facts: dict[str, float] = {}


class PredictedCase(BaseModel):
    """What `predictions.json` says of one case."""

    model_config = ConfigDict(extra="ignore")

    status: str = "done"
    mask: str | None = None
    images: list[str] = []
    label: str | None = None
    domain: str = ""
    task: str = ""
    split: str = "unknown"
    seconds: float | None = None
    error: str | None = None
    verdict: PredictedVerdict | None = None
    adaptation: list[PredictedAdaptation] = []
    drawings: str | None = None


class PredictedDataset(BaseModel):
    """The dataset that was predicted; `label_values` are those of its label files, by class index.

    Of several datasets in one, `tasks` has the class index by label value of each.
    """

    model_config = ConfigDict(extra="ignore")

    name: str = ""
    classes: list[str] = []
    label_values: list[int] = []
    tasks: dict[str, dict[int, int]] = {}


class Predictions(BaseModel):
    """The content of `predictions.json`."""

    model_config = ConfigDict(extra="ignore")

    anysite: str = ""
    created: str = ""
    origin: str = ""
    dataset: PredictedDataset = PredictedDataset()
    runs: list[dict[str, Any]] = []
    cases: dict[str, PredictedCase] = {}


Counts = list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class Reliability(BaseModel):
    """Sums over the voxels of each bin of confidence."""

    voxels: Counts
    right: Counts
    confidence: Counts

    @model_validator(mode="after")
    def _counts_alike(self) -> Reliability:
        if not len(self.voxels) == len(self.right) == len(self.confidence):
            raise ValueError("voxels, right and confidence of different lengths")
        return self


@dataclass(frozen=True, eq=False)
class Source:
    """A prediction folder with its rows, or a file of rows, for which `predictions` is None.

    Attributes:
        reliability: By split, how often voxels were right by how sure the network was.
        unscored: Cases that could not be scored, and why.
        unpredicted: Cases that have a label and no mask here, such as those trained on.
        outdated: Whether scores lie there of other masks, which are left out.
    """

    path: Path
    rows: tuple[Row, ...]
    predictions: Predictions | None = None
    reliability: dict[str, Reliability] = field(default_factory=dict)
    unscored: dict[str, str] = field(default_factory=dict)
    unpredicted: tuple[str, ...] = ()
    outdated: bool = False


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """Read prediction folders, `.jsonl` files of rows, and folders that hold such.

    Raises:
        FileFormatError: a file that is missing, or is not what its name says.
        DataError: a folder without any of these.
    """
    return [source for path in paths for source in _sources_of(Path(path))]


def _sources_of(path: Path) -> Iterator[Source]:
    if not path.is_dir():
        yield Source(path, _read_rows(path))
        return
    folders = sorted({found.parent for found in path.rglob(MANIFESTS)})
    results = [
        found
        for found in sorted(path.rglob("*.jsonl"))
        if not any(found.is_relative_to(folder) for folder in folders) and _holds_rows(found)
    ]
    if not folders and not results:
        raise DataError(
            "neither predictions.json nor result rows in this folder",
            where=path,
            fix="pass the output folder of a prediction, or a .jsonl file of results",
        )
    for folder in folders:
        yield _read_folder(folder)
    for result in results:
        yield Source(result, _read_rows(result))


def _read_folder(folder: Path) -> Source:
    path, predictions = folder / "rows.jsonl", _read_predictions(folder)
    rows = _read_rows(path) if path.exists() else ()
    # Masks predicted anew by another run leave the scores of the former ones behind.
    if any(row.config not in ("", predictions.origin) for row in rows) and predictions.origin:
        return Source(folder, (), predictions, outdated=True)
    unscored, unpredicted = _read_unscored(folder / SUMMARY)
    reliability = _read_reliability(folder / RELIABILITY)
    return Source(folder, rows, predictions, reliability, unscored, unpredicted)


def _read_unscored(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    summary = atomic.read_json(path) if path.is_file() else {}
    if not isinstance(summary, dict):
        return {}, ()
    failed, absent = summary.get("failed", {}), summary.get("unpredicted", ())
    reasons = {str(case): str(reason) for case, reason in failed.items()} if isinstance(failed, dict) else {}
    return reasons, tuple(case for case in absent if isinstance(case, str))


def _read_predictions(folder: Path) -> Predictions:
    parts: list[Predictions] = []
    for path in sorted(folder.glob(MANIFESTS)):
        try:
            parts.append(Predictions.model_validate(read_content(path)))
        except ValidationError as error:
            raise FileFormatError(
                describe_invalid(error), where=path, expected="the record of a prediction"
            ) from None
    cases = join_parts([part.cases for part in parts], lambda case: case.status)
    for name, verdict in _read_verdicts(folder).items():
        if name in cases:
            cases[name] = cases[name].model_copy(update={"verdict": verdict})
    return parts[0].model_copy(update={"cases": cases})


def _read_reliability(path: Path) -> dict[str, Reliability]:
    if not path.is_file():
        return {}
    try:
        counted = TypeAdapter(dict[str, Reliability]).validate_python(atomic.read_json(path))
    except ValidationError as error:
        raise FileFormatError(describe_invalid(error), where=path, expected="counts by split") from None
    if len({len(split.voxels) for split in counted.values()}) > 1:
        raise FileFormatError("splits of different bins", where=path, expected="counts by split")
    return counted


def _read_verdicts(folder: Path) -> dict[str, PredictedVerdict]:
    """Return the verdicts beside the masks, which may be those of a referral; they are the ones users see."""
    path = folder / VERDICTS
    if not path.is_file():
        return {}
    try:
        found = atomic.read_json(path)["cases"]
        return {
            name: PredictedVerdict.model_validate({**verdict, "decision": verdict["verdict"]})
            for name, verdict in found.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):  # pydantic's errors are ValueErrors
        raise FileFormatError("not readable", where=path, expected="verdicts by case") from None


def _holds_rows(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
    return any(f'"{name}"' in first for name in ("metric", SHARED))


def _read_rows(path: Path) -> tuple[Row, ...]:
    if not path.is_file():
        raise FileFormatError("no such file", where=path, expected="a prediction folder or a .jsonl file")
    rows: dict[tuple[object, ...], Row] = {}
    for number, content in number_rows(path, whole=True):
        try:
            row = Row.model_validate(content)
        except ValidationError as error:
            raise FileFormatError(
                describe_invalid(error),
                where=f"{path}:{number}",
                expected="a result row with metric and value",
            ) from None
        rows[row.key] = row
    return tuple(rows.values())
