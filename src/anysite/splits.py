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
    """

    training: Dataset
    held_out: Dataset
    test: Dataset

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
    source = source.with_cases(c for c in source.labelled if c.patient not in tested)
    training, held_out = source.hold_out_patients(config.train.validation_fraction, config.seed)
    if not training.cases:
        raise DataError(
            "no labelled cases to train on",
            where=dataset.name,
            expected="labelled cases of a site that is not a test site",
        )
    return Splits(training, held_out, test)
