from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anysite.data.case import Case, Dataset
from anysite.data.volume import Volume
from anysite.errors import DataError, GeometryError, LabelError
from anysite.splits import split
from conftest import small_config


def dataset_of(cases: list[tuple[str, str]], **settings) -> Dataset:
    built = [Case(f"c{i}", patient, site, (Path("x"),)) for i, (patient, site) in enumerate(cases)]
    return Dataset("d", tuple(built), **{"classes": ("background", "a"), "label_values": (0, 1), **settings})


cases = st.lists(st.tuples(st.sampled_from("pqrstuvw"), st.sampled_from("XYZ")), min_size=1, max_size=30)


@given(cases, st.floats(0, 0.9), st.integers(0, 99))
def test_no_patient_is_on_both_sides(pairs, fraction, seed):
    dataset = dataset_of(pairs)
    train, held_out = dataset.hold_out_patients(fraction, seed)
    assert {c.patient for c in train.cases}.isdisjoint(c.patient for c in held_out.cases)
    assert sorted(c.id for c in train.cases + held_out.cases) == sorted(c.id for c in dataset.cases)
    assert (train, held_out) == dataset.hold_out_patients(fraction, seed)


@given(st.dictionaries(st.sampled_from("XYZ"), st.integers(1, 12), min_size=1), st.floats(0.05, 0.5))
def test_every_site_with_two_patients_gives_some_and_keeps_some(sizes, fraction):
    dataset = dataset_of([(f"{site}{i // 2}", site) for site, n in sizes.items() for i in range(2 * n)])
    train, held_out = dataset.hold_out_patients(fraction, seed=0)
    for site, patients in sizes.items():
        kept = {c.patient for c in train.cases if c.domain == site}
        given_away = {c.patient for c in held_out.cases if c.domain == site}
        expected = min(max(1, round(fraction * patients)), patients - 1)
        assert (len(kept), len(given_away)) == (patients - expected, expected)


@given(cases)
def test_turns_hold_every_case_once_and_every_site_from_the_start(pairs):
    dataset = dataset_of(pairs)
    turns = dataset.cases_by_turns
    assert sorted(case.id for case in turns) == sorted(case.id for case in dataset.cases)
    assert {case.domain for case in turns[: len(dataset.domains)]} == {*dataset.domains}


def test_patients_begin_their_turns_with_different_images():
    dataset = dataset_of([(patient, "X") for patient in "pqrs" for _ in range(2)])
    first = [int(case.id.removeprefix("c")) % 2 for case in dataset.cases_by_turns[:4]]
    assert sorted(first) == [0, 0, 1, 1]


def test_another_seed_holds_out_other_patients():
    dataset = dataset_of([(f"p{i}", "X") for i in range(30)])
    chosen = [{c.id for c in dataset.hold_out_patients(0.3, seed)[1].cases} for seed in range(3)]
    assert chosen[0] != chosen[1] != chosen[2]


@given(cases, st.sets(st.sampled_from("XYZ")))
def test_leaving_sites_out(pairs, domains):
    dataset = dataset_of(pairs)
    domains &= set(dataset.domains)
    others, left_out = dataset.leave_out(domains)
    assert set(left_out.domains) == domains
    assert set(others.domains) == set(dataset.domains) - domains
    with pytest.raises(DataError, match="no site named 'W'; expected one of"):
        dataset.leave_out(["W"])


@given(
    st.sets(st.integers(0, 300) | st.integers(2**30, 2**31 - 1), min_size=2, max_size=9).map(sorted),
    st.randoms(),
)
def test_label_values_become_class_indices(values, random):
    names = tuple(f"n{v}" for v in values)
    dataset = dataset_of([("p", "X")], classes=names, label_values=tuple(values))
    array = np.array([[[random.choice(values) for _ in range(4)] for _ in range(3)]], np.int32)
    indices = dataset.class_indices(Volume.of_pixels(array)).array
    assert [[values[i] for i in row] for row in indices[0]] == array[0].tolist()
    array[0, 1, 2] = 301
    with pytest.raises(LabelError, match=r"^here: label value 301; expected only .*dataset\.json"):
        dataset.class_indices(Volume.of_pixels(array), where="here")


def test_channels_are_stacked_only_on_one_grid(tmp_path):
    def save(name, shape, origin=0.0):
        affine = np.eye(4)
        affine[0, 3] = origin
        nibabel.Nifti1Image(np.full(shape, len(name), np.int16), affine).to_filename(tmp_path / name)
        return tmp_path / name

    first, second = save("a.nii", (2, 3, 4)), save("bb.nii", (2, 3, 4))
    image = Case("c", "p", "X", (first, second)).image()
    np.testing.assert_array_equal(image.array[:, 0, 0, 0], [5, 6])
    for other in (save("shape.nii", (2, 3, 5)), save("moved.nii", (2, 3, 4), origin=1.0)):
        with pytest.raises(GeometryError, match=f"{other.name}.*the grid of a.nii"):
            Case("c", "p", "X", (first, other)).image()
    assert Case("c", "p", "X", (first,), second).label().array.max() == 6
    with pytest.raises(DataError, match="c: a case without a label"):
        Case("c", "p", "X", (first,)).label()


def test_who_the_dataset_itself_holds_out_is_held_out():
    dataset = dataset_of([(patient, site) for patient in "pqrs" for site in "XY"])
    marked = dataset.with_cases(
        replace(c, held_out=c.patient == "q" and c.domain == "X") for c in dataset.cases
    )
    for seed in range(3):
        train, held_out = marked.hold_out_patients(0.5, seed)
        assert {c.patient for c in held_out.cases} == {"q"}
        assert {c.patient for c in train.cases} == {"p", "r", "s"}
    assert not marked.hold_out_patients(0, 0)[1].cases


def test_of_several_datasets_only_the_one_with_a_list_is_held_out_by_it():
    dataset = dataset_of([(f"{site}{n}", site) for site in "XY" for n in range(10)])
    marked = dataset.with_cases(
        replace(c, task=c.domain, held_out=c.patient in ("X0", "X1")) for c in dataset.cases
    )
    held_out = {c.patient for c in marked.hold_out_patients(0.2, 0)[1].cases}
    assert {p for p in held_out if p.startswith("X")} == {"X0", "X1"}
    assert len({p for p in held_out if p.startswith("Y")}) == 2


def test_images_of_those_held_out_by_a_list_are_not_learned_from_without_labels():
    labelled = [Case(f"l{n}", f"l{n}", "X", (Path("x"),), Path("y")) for n in range(6)]
    apart = [Case(f"v{n}", f"v{n}", "X", (Path("x"),), held_out=True) for n in range(2)]
    found = split(dataset_of([]).with_cases([*labelled, *apart]), small_config("train.unlabelled_share=0.5"))
    assert not {case.id for case in (*found.unlabelled, *found.images.cases)} & {"v0", "v1"}
    assert found.held_out.cases  # a share of those with labels


def test_images_alone_are_held_out_as_they_are_with_labels():
    """So that a training may start from what was learned from the images of a dataset of which a part is labelled."""
    cases = [
        Case(f"{site}{n}", f"{site}{n}", site, (Path("x"),), Path("y") if n % 2 else None)
        for site in "AB"
        for n in range(20)
    ]
    for seed in range(5):
        dataset, config = dataset_of([]).with_cases(cases), small_config(f"seed={seed}")
        with_labels, images = split(dataset, config), split(dataset.without_labels(), config)
        assert [c.id for c in images.held_out.cases] == [c.id for c in with_labels.held_out.cases]
        assert len(images.training.cases) + len(images.held_out.cases) == len(cases)
    nothing_labelled = dataset_of([]).with_cases(replace(case, label_path=None) for case in cases)
    assert split(nothing_labelled.without_labels(), small_config()).held_out.cases
