"""Rules on patients, sites and splits, which only names tell."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from anysite import atomic
from anysite.data.case import Dataset
from anysite.data.check.problems import Problem, of_dataset
from anysite.data.csv_manifest import read_table
from anysite.data.layouts import MANIFESTS

SPLITS = "splits_final.json"
SPLIT_COLUMNS = ("split", "fold", "subset", "partition")
SHARED = 0.6  # of the cases whose names differ in the last part alone
FEW = 6  # cases a patient has at most, if they are told apart by words
WORDS = re.compile(
    r"ed|es|l|r|od|os|left|right|pre|post|base(line)?|follow(up)?|[ab]|(t|v|s|visit|time|tp|frame|slice|phase|scan)\d+",
    re.IGNORECASE,
)


def check_patients(dataset: Dataset) -> Iterator[Problem]:
    """Yield patients and sites that cannot be what their names say."""
    patients, sites = defaultdict(set), defaultdict(set)
    for case in dataset.cases:
        patients[case.domain].add(case.patient)
        sites[case.patient].add(case.domain)
    for patient, domains in sites.items():
        if len(domains) > 1:
            yield of_dataset(
                "patient at several sites",
                f"patient {patient} at {', '.join(sorted(domains))}",
                "one site",
                "rename the patients if they are different people",
            )
    for domain, names in patients.items():
        if len(names) < 2:
            yield of_dataset(
                "too few patients",
                f"site {domain}: one patient",
                "two or more, so that one can be held out",
                "merge the site with another or add patients",
            )
    yield from _check_unnamed_patients(dataset)


def _check_unnamed_patients(dataset: Dataset) -> Iterator[Problem]:
    """Yield that every case is a patient by itself, although their names say that some belong together."""
    if any(case.patient != case.id for case in dataset.cases):
        return
    for domain in dataset.domains:
        cases = [case for case in dataset.cases if case.domain == domain]
        groups: dict[str, list[str]] = defaultdict(list)
        for case in cases:
            stem, _, last = re.sub(r"[-_ ]+", "_", case.id).rpartition("_")
            if re.search(r"\d", stem) and (WORDS.fullmatch(last) or last.isdecimal()):
                groups[stem].append(last)
        several = {stem: lasts for stem, lasts in groups.items() if len(lasts) > 1}
        shared = sum(map(len, several.values()))
        words = [WORDS.fullmatch(last) is not None for lasts in several.values() for last in lasts]
        if len(several) < 2 or shared < SHARED * len(cases):
            continue
        if median(map(len, several.values())) <= FEW or not all(words):
            stem, lasts = next(iter(several.items()))
            yield of_dataset(
                "patients unknown",
                f"site {domain}: {len(cases)} cases, each its own patient, but names such as "
                + " and ".join(f"{stem}_{last}" for last in lasts[:2]),
                "the patient of every case, so that no patient is trained on and tested",
                "write a CSV manifest with a column patient",
            )


def check_site(dataset: Dataset, path: Path | None) -> Iterator[Problem]:
    """Yield that nothing names sites: all cases are of one, called after the dataset."""
    defaults = {dataset.name} | (
        {path.name, path.parent.name} if path and path.is_file() else {path.name} if path else set()
    )
    if len(dataset.domains) == 1 and dataset.domains[0] in defaults and not dataset.tasks:
        yield of_dataset(
            "site unknown",
            f"all {len(dataset.cases)} cases at one site, called {dataset.domains[0]} after the dataset",
            "the site of every case, so that one can be left out",
            "add a column domain, domain_mapping.json or a folder for each site, if there are several",
        )


def check_splits(dataset: Dataset, path: Path) -> Iterator[Problem]:
    """Yield patients that splits beside the dataset both train on and test.

    Read are nnU-Net's splits_final.json and a column such as `split` of the CSV manifest.

    Raises:
        FileFormatError: splits_final.json is no JSON.
    """
    folder = path if path.is_dir() else path.parent
    patient_of = {case.id: case.patient for case in dataset.cases}
    if (file := folder / SPLITS).is_file():
        content = atomic.read_json(file)
        for number, fold in enumerate(content if isinstance(content, list) else [content]):
            if isinstance(fold, dict):
                parts = {
                    str(name): [str(case) for case in cases]
                    for name, cases in fold.items()
                    if isinstance(cases, list)
                }
                yield from _check_parts(parts, patient_of, f"fold {number}", file)
    table = path if path.is_file() else next((p for n in MANIFESTS if (p := path / n).is_file()), None)
    if table is None or table.suffix.lower() != ".csv":
        return
    columns, rows = read_table(table)
    for column in (name for name in SPLIT_COLUMNS if name in columns):
        parts = defaultdict(list)
        for _, row in rows:
            if row[column]:
                parts[row[column]].append(row["case"])
        yield from _check_parts(parts, patient_of, f"column {column}", table)


def _check_parts(
    parts: dict[str, list[str]], patient_of: dict[str, str], where: str, file: Path
) -> Iterator[Problem]:
    seen: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    unknown = []
    for part, cases in parts.items():
        for case in cases:
            if case in patient_of:
                seen[patient_of[case]][part].append(case)
            else:
                unknown.append(case)
    for patient, found in seen.items():
        if len(found) > 1:
            named = " and ".join(f"{cases[0]} in {part}" for part, cases in found.items())
            yield of_dataset(
                "patient in two splits", f"{where}: patient {patient}, {named}", "a patient in one of them",
                "split by patient", file,
            )  # fmt: skip
    if unknown:
        yield of_dataset(
            "unknown case in splits",
            f"{where}: {len(unknown)} names, such as {', '.join(unknown[:3])}",
            "cases of this dataset",
            "correct the names", file,
        )  # fmt: skip
