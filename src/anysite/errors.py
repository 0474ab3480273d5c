"""The exceptions a user may meet: what was found, what was expected, what to do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import ValidationError


class AnysiteError(Exception):
    """An error whose one-line text names the place, the finding, the expectation and the remedy.

    Shown by the command line without a traceback; `exit_code` follows the documented codes
    (1: some cases failed, 2: misuse or bad input).
    """

    exit_code = 2

    def __init__(self, found: str, *, where: object = "", expected: str = "", fix: str = "") -> None:
        self.found, self.where, self.expected, self.fix = found, str(where), expected, fix
        sentences = [found.rstrip(".")]
        if expected:
            sentences.append(f"expected {expected.rstrip('.')}")
        text = "; ".join(sentences) + "."
        if fix:
            text += f" {fix[0].upper()}{fix[1:].rstrip('.')}" + ("" if fix.endswith("?") else ".")
        super().__init__(f"{self.where}: {text}" if self.where else text)


# What one case of a batch may raise: memory that runs out for one large image, or a network that cannot take it, says
# nothing of the next.
CASE_ERRORS = (AnysiteError, OSError, RuntimeError, MemoryError, ValueError, ArithmeticError)


def describe_cause(error: BaseException, path: Path) -> str:
    """Return what a library says of a file as one line, without the folder, whose name may identify people."""
    text = str(error)
    for folder in (path.parent, path.parent.resolve()):
        text = text.replace(f"{folder}{os.sep}", "")
    return " ".join(text.split())[:200] or type(error).__name__


def describe_error(error: BaseException) -> str:
    """Return one line on any error: our own as it is, another's by its type and first line."""
    if isinstance(error, AnysiteError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def describe_invalid(error: ValidationError) -> str:
    """Return the place and the text of the first fault that pydantic found."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"


class ConfigError(AnysiteError):
    """A setting that is unknown, of the wrong type or out of range."""


class DataError(AnysiteError):
    """A dataset, case or file that cannot be used as it is."""


class FileFormatError(DataError):
    """A file that is missing, unreadable, truncated or of a kind no reader knows."""


class GeometryError(DataError):
    """Shapes, spacings or orientations that contradict each other."""


class LabelError(DataError):
    """Label values outside the declared classes."""


class FaultyDataError(DataError):
    """A dataset with errors, all of which are told: `faults` has one line for each."""

    def __init__(self, faults: list[str], *, where: object = "") -> None:
        self.faults = tuple(faults)
        if len(faults) == 1:
            super().__init__(faults[0])
        else:
            found = f"{len(faults)} errors in the cases to learn from"
            super().__init__(found, where=where, fix="mend or exclude them; anysite check says how")


class RunError(AnysiteError):
    """A run folder with a missing, altered or incompatible part."""


class TrainingError(AnysiteError):
    """Training that had to stop: non-finite loss, no usable cases, no time."""


class WorkerError(AnysiteError):
    """A process of its own that ended without doing its work."""


class BatchError(AnysiteError):
    """A batch of which some cases failed while the rest was completed."""

    exit_code = 1


class RejectedMasks(BatchError):  # noqa: N818 (an outcome, not a fault)
    """Masks that were written and that the judge rejects."""


class InterruptedTraining(AnysiteError):  # noqa: N818 (an outcome, not a fault)
    """Training that a signal stopped after it saved a checkpoint."""

    exit_code = 3


class Interrupted(AnysiteError):  # noqa: N818 (an outcome, not a fault)
    """A command that the user ended; the code is the one by which shells know it."""

    exit_code = 130
