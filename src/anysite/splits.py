"""Which cases train, which are held out, which are tested; by patient, never by image."""

from __future__ import annotations

from dataclasses import dataclass

from anysite.config import Config
from anysite.data.case import Dataset
from anysite.errors import DataError


@dataclass(frozen=True)
class Splits:
    """The cases by role; patients never appear in two of them.

    Attributes:
        held_out: Patients of the training sites that are not trained on: they measure, and choose nothing.
        test: The sites kept out of training altogether.
        dropped: Cases of training sites left out because their patient is also at a test site.
    """

    training: Dataset
    held_out: Dataset
    test: Dataset
    dropped: tuple[str, ...] = ()

    def as_ids(self) -> dict[str, list[str]]:
        """Return the case ids by role."""
        parts = {"training": self.training, "held_out": self.held_out, "test": self.test}
        return {role: [case.id for case in part.cases] for role, part in parts.items()}


def split(dataset: Dataset, config: Config) -> Splits:
    """Keep the test sites out, then hold out source patients; a patient of a test site trains nowhere.

    Raises:
        DataError: an unknown site, or no labelled case left to train on.
    """
    source, test = dataset.leave_out(config.test_domains)
    tested = {case.patient for case in test.cases}
    dropped = tuple(case.id for case in source.labelled if case.patient in tested)
    source = source.with_cases(case for case in source.labelled if case.patient not in tested)
    training, held_out = source.hold_out_patients(config.train.validation_fraction, config.seed)
    if not training.cases:
        raise DataError(
            "no labelled cases to train on",
            where=dataset.name,
            expected="labelled cases of a site that is not a test site",
            fix=f"{len(dropped)} cases were dropped because their patient is also at a test site: give patients of "
            "different sites different names"
            if dropped
            else "",
        )
    return Splits(training, held_out, test, dropped)
