"""Cases and datasets: which files belong together, to which patient, from which site."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from anysite.data import files
from anysite.data.dicom_members import split_choice
from anysite.data.volume import Volume
from anysite.errors import DataError, GeometryError, LabelError

LARGEST_TABLE = 2**20  # of label values: numbers of an atlas are looked up otherwise


@dataclass(frozen=True)
class Case:
    """One image to segment, with its files, patient and site; nothing is read until asked for."""

    id: str
    patient: str
    domain: str
    image_paths: tuple[Path, ...]
    label_path: Path | None = None
    task: str = ""
    held_out: bool = False  # by the dataset itself
    label_unused: bool = False  # there is one that is disregarded

    def image(self) -> Volume:
        """Read the image, one file or one file a channel, as `(C, *S)`.

        Raises:
            FileFormatError: a file cannot be read.
            GeometryError: the channels do not lie on one grid.
            DataError: every voxel has the same value.
        """
        channels = [files.read(path) for path in self.image_paths]
        for path, channel in zip(self.image_paths, channels, strict=True):
            if not channel.same_grid(channels[0]):
                raise GeometryError(
                    f"shape {channel.shape} and spacing {_rounded(channel.spacing)}",
                    where=path,
                    expected=f"the grid of {self.image_paths[0].name}: shape {channels[0].shape} and "
                    f"spacing {_rounded(channels[0].spacing)}",
                    fix="resample the channels of a case to one grid",
                )
        image = channels[0]
        if len(channels) > 1:
            image = image.with_array(np.concatenate([channel.array for channel in channels]))
        if image.array.min() == image.array.max():
            raise DataError(
                f"every voxel is {image.array.flat[0]:g}",
                where=self.image_paths[0],
                expected="contrast",
                fix="exclude the case",
            )
        return image

    def without_folders(self, text: str) -> str:
        """Return a text in which the case's files have no folders, whose names may identify people."""
        for path in (*self.image_paths, *([self.label_path] if self.label_path else [])):
            base, _ = split_choice(path)  # what messages name, of one series among several
            text = text.replace(str(path), path.name).replace(str(base), base.name)
        return text

    def label(self) -> Volume:
        """Read the label map `(1, *S)` with the values stored in its file.

        Raises:
            DataError: the case has no label.
            FileFormatError, LabelError: the file is no label map.
            GeometryError: DICOM that does not lie on the image's grid.
        """
        if self.label_path is None:
            raise DataError("a case without a label", where=self.id)
        return files.read_label(self.label_path, self.image_paths[0])


@dataclass(frozen=True)
class Task:
    """One of the datasets that are trained on jointly: what its labels mean in the classes of all.

    Attributes:
        classes: The class indices it labels, background included; of the others its labels say nothing.
        indices: The class index of each of its label values, of some perhaps the background's.
    """

    classes: tuple[int, ...]
    indices: dict[int, int]


@dataclass(frozen=True)
class Dataset:
    """Cases with their class names and where they come from.

    Attributes:
        classes: Names by class index; index 0 is the background.
        label_values: The value in label files that stands for each class index.
        regions: For overlapping classes, the class indices that make up each region (nnU-Net's region
            training); empty otherwise.
        region_names: One name for each region.
        region_classes: The class index that each region stands for in a label map, where the regions are
            painted over each other in their order (nnU-Net's `regions_class_order`).
        provenance: Licence, link, modality and the like, for people.
        unlabelled: Whether labels are disregarded altogether, as a pretraining does.
        tasks: Of several datasets in one, what each of them labels, by `Case.task`; empty otherwise.
    """

    name: str
    cases: tuple[Case, ...]
    classes: tuple[str, ...]
    label_values: tuple[int, ...]
    regions: tuple[tuple[int, ...], ...] = ()
    region_names: tuple[str, ...] = ()
    region_classes: tuple[int, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)
    unlabelled: bool = False
    tasks: dict[str, Task] = field(default_factory=dict)

    @property
    def domains(self) -> tuple[str, ...]:
        """The sites, in the order of their first case."""
        return tuple(dict.fromkeys(case.domain for case in self.cases))

    @property
    def cases_by_turns(self) -> tuple[Case, ...]:
        """The cases, sites and within them patients taking turns, so that any beginning of them holds all alike.

        Patients begin with different ones of their cases: the first may always be of one kind, a phase of the heart.
        """

        def take_turns(groups: Iterable[Sequence[Case]]) -> list[Case]:
            return [case for turn in itertools.zip_longest(*groups) for case in turn if case is not None]

        by_site = []
        for domain in self.domains:
            cases = [case for case in self.cases if case.domain == domain]
            patients = dict.fromkeys(case.patient for case in cases)
            own = [[case for case in cases if case.patient == patient] for patient in patients]
            shifted = [(group * 2)[n % len(group) :][: len(group)] for n, group in enumerate(own)]
            by_site.append(take_turns(shifted))
        return tuple(take_turns(by_site))

    def first_by_turns(self, count: int) -> tuple[Case, ...]:
        """Return that many of the cases that take turns, of each dataset where there are several."""
        taken: Counter[str] = Counter()
        chosen = []
        for case in self.cases_by_turns:
            taken[case.task] += 1
            if taken[case.task] <= count:
                chosen.append(case)
        return tuple(chosen)

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The cases that have a label file."""
        return tuple(case for case in self.cases if case.label_path is not None)

    @property
    def usable(self) -> tuple[Case, ...]:
        """The cases that can be trained on: those with a label file, or all where labels are disregarded."""
        return self.cases if self.unlabelled else self.labelled

    def without_labels(self) -> Dataset:
        """Return this dataset as images alone, in which nothing but background is known."""
        return Dataset(
            self.name,
            tuple(
                replace(case, label_path=None, label_unused=case.label_path is not None)
                for case in self.cases
            ),
            ("background", "foreground"),
            (0, 1),
            provenance=self.provenance,
            unlabelled=True,
        )

    def with_cases(self, cases: Iterable[Case]) -> Dataset:
        """Return this dataset with other cases."""
        return replace(self, cases=tuple(cases))

    def leave_out(self, domains: Collection[str]) -> tuple[Dataset, Dataset]:
        """Split into (all other sites, the sites `domains`).

        Raises:
            DataError: a site that the dataset does not have.
        """
        for domain in domains:
            if domain not in self.domains:
                raise DataError(
                    f"no site named {domain!r}", where=self.name, expected=f"one of {', '.join(self.domains)}"
                )
        return (
            self.with_cases(c for c in self.cases if c.domain not in domains),
            self.with_cases(c for c in self.cases if c.domain in domains),
        )

    def hold_out_patients(self, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """Split into (training, held out) by patient, a like share of every site with two or more patients.

        All cases of a patient stay together, also where a patient appears at several sites. Where the dataset
        says itself who is held out, that counts in place of a share, unless nobody is to be.
        """
        chosen = {case.task for case in self.cases if case.held_out}  # of several datasets those that say so
        held_out = {case.patient for case in self.cases if case.held_out} if fraction > 0 else set[str]()
        for domain in self.domains:
            if fraction > 0 and chosen.intersection(c.task for c in self.cases if c.domain == domain):
                continue
            patients = sorted({c.patient for c in self.cases if c.domain == domain} - held_out)
            count = min(max(1, round(fraction * len(patients))), len(patients) - 1) if fraction > 0 else 0
            held_out.update(random.Random(f"{seed}/{domain}").sample(patients, max(0, count)))
        return (
            self.with_cases(c for c in self.cases if c.patient not in held_out),
            self.with_cases(c for c in self.cases if c.patient in held_out),
        )

    def label_of(self, case: Case) -> Volume:
        """Read a case's label map as class indices `(1, *S)`.

        Raises:
            DataError: the case has no label.
            FileFormatError, LabelError: the file is no label map, or holds a value that stands for no class.
        """
        return self.indices_of(case.label(), case, where=case.label_path)

    def indices_of(self, label: Volume, case: Case, where: object = "") -> Volume:
        """Return a label map with the values of the case's dataset as class indices.

        Raises:
            LabelError: a value that stands for no class.
        """
        task = self.tasks.get(case.task)
        if task is None:
            return self.class_indices(label, where=where)
        found = np.unique(label.array)
        unknown = [int(value) for value in found if value not in task.indices]
        if unknown:
            raise LabelError(
                f"label value{'s' if len(unknown) > 1 else ''} {', '.join(map(str, unknown[:10]))}",
                where=where,
                expected=f"only {', '.join(map(str, sorted(task.indices)))}, as {case.task} declares",
            )
        positions = np.array([task.indices[int(value)] for value in found], np.int32)
        return label.with_array(positions[np.searchsorted(found, label.array)])

    def known_to(self, case: Case) -> tuple[int, ...]:
        """Return the class indices that the case's label tells of: all, or those of its dataset among several."""
        task = self.tasks.get(case.task)
        return task.classes if task else tuple(range(len(self.classes)))

    def of_task(self, name: str) -> Dataset:
        """Return one of several datasets by itself, with a class for each value that its labels may hold."""
        values = self.tasks[name].indices
        classes = tuple(self.classes[index] for index in values.values())
        cases = tuple(case for case in self.cases if case.task == name)
        return replace(self, cases=cases, classes=classes, label_values=tuple(values), tasks={})

    def class_indices(self, label: Volume, where: object = "") -> Volume:
        """Return a label map as read from file with its values replaced by class indices.

        Raises:
            LabelError: a value that stands for no declared class.
        """
        values = np.asarray(self.label_values)
        found = np.unique(label.array)
        unknown = [int(v) for v in found if v not in self.label_values]
        if unknown:
            raise LabelError(
                f"label value{'s' if len(unknown) > 1 else ''} {', '.join(map(str, unknown[:10]))}",
                where=where,
                expected=f"only {', '.join(map(str, self.label_values))} "
                f"({', '.join(self.classes[:8])}{', ...' if len(self.classes) > 8 else ''})",
                fix='declare the classes in dataset.json ("labels": {"background": 0, "name": value}) '
                "or mend the label",
            )
        if self.label_values == tuple(range(len(values))):
            return label
        if values.max() > LARGEST_TABLE:  # such as numbers of an atlas
            order = np.argsort(values)
            return label.with_array(order[np.searchsorted(values[order], label.array)].astype(np.int32))
        lookup = np.zeros(int(values.max()) + 1, np.int32)
        lookup[values] = np.arange(len(values))
        return label.with_array(lookup[label.array])


def _rounded(spacing: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(s, 4) for s in spacing)
