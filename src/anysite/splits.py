"""Which cases train, which are held out, which are tested; by patient, never by image."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain, zip_longest

from anysite.config import Config
from anysite.data.case import Case, Dataset
from anysite.errors import DataError


@dataclass(frozen=True)
class Splits:
    """The cases by role; patients never appear in two of them.

    Attributes:
        held_out: Patients of the training sites that are not trained on: they measure, and choose no weights.
        test: The sites kept out of training altogether.
        images: All cases of training sites, labelled or not, whose patients are neither held out nor tested: what
            a pretraining may see.
        unlabelled: The cases among them that are learned from without a label, where that was asked for.
        dropped: Cases of training sites left out because their patient is also at a test site.
    """

    training: Dataset
    held_out: Dataset
    test: Dataset
    images: Dataset
    unlabelled: tuple[Case, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def source_domains(self) -> tuple[str, ...]:
        """The sites whose patients are trained on or held out."""
        return tuple(dict.fromkeys(case.domain for case in (*self.training.cases, *self.held_out.cases)))

    @property
    def learned_domains(self) -> tuple[str, ...]:
        """The sites whose images are learned from."""
        return tuple(dict.fromkeys(case.domain for case in (*self.training.cases, *self.unlabelled)))

    def as_ids(self) -> dict[str, list[str]]:
        """Return the case ids by role."""
        parts = {"training": self.training, "held_out": self.held_out, "test": self.test}
        ids = {role: [case.id for case in part.cases] for role, part in parts.items()}
        return ids | ({"unlabelled": [case.id for case in self.unlabelled]} if self.unlabelled else {})


def split(dataset: Dataset, config: Config) -> Splits:
    """Keep the test sites out, then hold out source patients; a patient of a test site trains nowhere.

    Raises:
        DataError: an unknown site, or no labelled case left to train on.
    """
    everything, test = dataset.leave_out(config.test_domains)
    tested = {case.patient for case in test.cases}
    dropped = tuple(case.id for case in everything.usable if case.patient in tested)
    source = everything.with_cases(case for case in everything.usable if case.patient not in tested)
    # Images alone are held out as with their labels, so that a training may start from what was learned from them.
    with_label = [case for case in source.cases if case.label_path is not None or case.label_unused]
    labelled = source.with_cases(with_label or source.cases)
    _, drawn = labelled.hold_out_patients(config.train.validation_fraction, config.seed)
    patients = {case.patient for case in drawn.cases}
    training = source.with_cases(case for case in source.cases if case.patient not in patients)
    held_out = source.with_cases(case for case in source.cases if case.patient in patients)
    apart = tested | {case.patient for case in held_out.cases}
    if config.train.validation_fraction > 0:  # also of images without a label
        apart |= {case.patient for case in everything.cases if case.held_out}
    images = everything.with_cases(case for case in everything.cases if case.patient not in apart)
    if config.train.labelled_patients is not None:
        chosen = draw_patients(training, config.train.labelled_patients, config.seed)
        training = training.with_cases(case for case in training.cases if case.patient in chosen)
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
    unlabelled = ()
    if config.train.unlabelled_share and not dataset.unlabelled:
        labelled = {case.id for case in training.cases}
        unlabelled = tuple(case for case in images.cases if case.id not in labelled)
    return Splits(training, held_out, test, images, unlabelled, dropped)


def draw_patients(dataset: Dataset, count: int, seed: int) -> set[str]:
    """Return `count` patients, the sites taking turns; a smaller count gives a subset of the same seed's.

    Raises:
        DataError: there are not so many.
    """
    orders = []
    for domain in dataset.domains:
        patients = sorted({case.patient for case in dataset.cases if case.domain == domain})
        orders.append(random.Random(f"{seed}/{domain}/labelled").sample(patients, len(patients)))
    turns = chain.from_iterable(zip_longest(*orders))
    patients = list(dict.fromkeys(patient for patient in turns if patient is not None))
    if count > len(patients):
        raise DataError(
            f"{len(patients)} labelled patients to train on",
            where=dataset.name,
            expected=f"at least train.labelled_patients={count}",
        )
    return set(patients[:count])
