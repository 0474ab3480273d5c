"""Several datasets trained on jointly, and images without a label beside labelled ones."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from anysite import atomic
from anysite.calibration import fold_unknown
from anysite.config import Config
from anysite.data import files
from anysite.data.case import Case, Dataset
from anysite.data.check import inspect_dataset, require_sound
from anysite.data.layouts import find_cases, open_dataset
from anysite.errors import AnysiteError, ConfigError, DataError, FaultyDataError, LabelError
from anysite.evaluate import evaluate
from anysite.learner import build_learner, build_network
from anysite.manifest import describe_case, describe_dataset
from anysite.objectives.supervised import Supervised, hide_unknown
from anysite.patches import PatchSampler, PreparedCases
from anysite.plan import Plan
from anysite.planning import learn_plan
from anysite.predict import predict
from anysite.report.pictures import draw_case
from anysite.report.read import PredictedCase, PredictedDataset
from anysite.roles import patients_judged_from, split_of
from anysite.rows import read_rows
from anysite.runs import CALIBRATION, open_run
from anysite.segment import Segmenter
from anysite.settings import AugmentSettings, PlanSettings, TrainSettings
from anysite.splits import split
from anysite.train import train
from anysite.transfer import require_unseen
from anysite.validation import dice_of_maps
from conftest import small_config


def write_volumes(
    folder: Path, sites: dict[str, int], spacing: float = 1.0, values: tuple[int, ...] = (1, 2),
    low: float = 0.0, contrast: float = 80, declared: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write volumes with a bright block for each label value, so many patients a site."""
    rng = np.random.default_rng(0)
    for site, patients in sites.items():
        for number in range(patients):
            image = rng.normal(100, 5, (16, 16, 16)) + low
            label = np.zeros(image.shape, np.uint8)
            for index, value in enumerate(values):
                place = (slice(2 + 6 * index, 7 + 6 * index), slice(3, 9), slice(4, 10))
                image[place] += contrast * (index + 1)
                label[place] = value
            affine = np.diag([spacing] * 3 + [1.0])
            for kind, array in (("images", image.astype(np.float32)), ("masks", label)):
                path = folder / site / kind / f"{site}{number}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(array, affine), path)  # pyright: ignore[reportPrivateImportUsage]
    if declared:
        (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **declared}}))
    return folder


def write_list(path: Path, datasets: dict[str, Any], **more: Any) -> Path:
    listed = {name: {"path": one} if isinstance(one, str) else one for name, one in datasets.items()}
    path.write_text(json.dumps({"name": "organs", "datasets": listed, **more}))
    return path


@pytest.fixture
def organs(tmp_path: Path) -> Path:
    """A heart of two declared structures at two sites, a head of one at another spacing."""
    write_volumes(tmp_path / "heart_mr", {"a": 3, "b": 3}, declared={"ventricle": 1, "muscle": 2})
    write_volumes(
        tmp_path / "head_mr",
        {"a": 3},
        spacing=2.0,
        values=(7, 9),
        contrast=-80,
        declared={"left": 7, "right": 9},
    )
    datasets = {"heart": "heart_mr", "head": {"path": "head_mr", "labels": {"hippocampus": [7, 9]}}}
    return write_list(tmp_path / "organs.json", datasets)


def test_an_image_copied_into_two_datasets_is_found_and_one_listed_in_both_is_not(tmp_path: Path) -> None:
    """It would be trained on under one name and tested on under the other."""
    write_volumes(tmp_path / "one", {"a": 2})
    write_volumes(tmp_path / "other", {"b": 2}, low=50)
    both = write_list(tmp_path / "both.json", {"first": "one", "second": "one"})
    require_sound(open_dataset(both))
    assert not [p for p in inspect_dataset(both).problems if "identical images" in p.rule]
    shutil.copy(tmp_path / "one/a/images/a0.nii.gz", tmp_path / "other/b/images/b1.nii.gz")
    organs = write_list(tmp_path / "organs.json", {"first": "one", "second": "other"})
    (found,) = [p for p in inspect_dataset(organs).problems if p.rule == "identical images"]
    assert (found.severity, found.case) == ("error", "second_b1")
    assert "the same voxels as case first_a0" in found.observed
    with pytest.raises(FaultyDataError, match="the very same file in both datasets"):
        require_sound(open_dataset(organs))


def test_a_list_of_datasets_is_one_dataset(organs: Path) -> None:
    dataset = open_dataset(organs)
    assert dataset.name == "organs"
    assert dataset.classes == ("background", "ventricle", "muscle", "hippocampus")
    assert dataset.domains == ("heart/a", "heart/b", "head/a")
    assert Counter(case.task for case in dataset.cases) == {"heart": 6, "head": 3}
    first, last = dataset.cases[0], dataset.cases[-1]
    assert (first.id, first.patient) == ("heart_a0", "heart/a0")
    assert dataset.known_to(first) == (0, 1, 2)
    assert dataset.known_to(last) == (0, 3)
    assert set(np.unique(dataset.label_of(first).array)) == {0, 1, 2}
    # Two label values of the head are one structure of all.
    inside = last.label().array > 0
    assert np.array_equal(dataset.label_of(last).array, 3 * inside)


def test_every_dataset_is_among_the_first_by_turns(organs: Path) -> None:
    dataset = open_dataset(organs)
    chosen = dataset.first_by_turns(2)
    assert Counter(case.domain for case in chosen) == {"heart/a": 1, "heart/b": 1, "head/a": 2}
    assert [case.task for case in chosen] == ["heart", "heart", "head", "head"]  # by turns of their sites
    assert {*dataset.first_by_turns(99)} == {*dataset.cases}
    alone = dataset.of_task("heart")
    assert alone.first_by_turns(3) == alone.cases_by_turns[:3]


def test_values_beyond_those_declared_are_refused_and_beyond_those_gathered_are_background(
    organs: Path, tmp_path: Path
) -> None:
    write_volumes(
        tmp_path / "heart_mr", {"a": 3, "b": 3}, values=(1, 5), declared={"ventricle": 1, "muscle": 2}
    )
    dataset = open_dataset(organs)
    with pytest.raises(LabelError, match="label value 5.*heart"):
        dataset.label_of(dataset.cases[0])
    write_list(organs, {"head": {"path": "head_mr", "labels": {"left": 7}}})
    head = open_dataset(organs)
    assert set(np.unique(head.label_of(head.cases[0]).array)) == {0, 1}


def test_structures_of_one_name_are_one_class_and_names_that_say_nothing_are_told_apart(
    tmp_path: Path,
) -> None:
    write_volumes(tmp_path / "one", {"a": 2}, declared={"liver": 1, "spleen": 2})
    write_volumes(tmp_path / "two", {"a": 2}, declared={"kidney": 1, "liver": 2})
    write_volumes(tmp_path / "three", {"a": 2})
    path = write_list(tmp_path / "all.json", {"one": "one", "two": "two", "three": "three"})
    dataset = open_dataset(path)
    assert dataset.classes == ("background", "liver", "spleen", "kidney", "three_class_1", "three_class_2")
    assert dataset.tasks["two"].indices == {0: 0, 1: 3, 2: 1}
    shared = open_dataset(write_list(path, {"one": "one", "three": "three"}, structures="shared"))
    assert shared.classes == ("background", "organ")
    assert set(np.unique(shared.label_of(shared.cases[0]).array)) == {0, 1}
    # Before labels are read, cases are known and classes are not.
    assert not find_cases(path).classes
    assert len(find_cases(path).cases) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "x", "datasets": {}}, "datasets"),
        ({"datasets": {"a": {"path": "heart_mr"}}}, "name"),
        ({"name": "x", "datasets": {"a": {"path": "heart_mr"}}, "structure": "own"}, "structure"),
        ({"name": "x", "datasets": {"a/b": {"path": "heart_mr"}}}, "a/b"),
        ({"name": "x", "datasets": {"a": {"path": "nowhere"}}}, "nowhere"),
        ({"name": "x", "datasets": {"a": {"path": "heart_mr", "labels": {"v": 8}}}}, "label values.*8"),
        ({"name": "x", "datasets": {"a": {"path": "heart_mr", "labels": {"v": 1, "w": [1, 2]}}}}, "labels"),
        ({"name": "x", "datasets": {"a": {"path": "heart_mr", "labels": {"background": 1}}}}, "background"),
        ({"name": "x", "datasets": {"a": {"path": "heart_mr", "labels": {}}}}, "structures none"),
        ({"name": "x", "datasets": {"a": {"path": "organs.json"}}}, "a list itself"),
    ],
)
def test_a_wrong_list_is_refused_by_its_key(organs: Path, content: dict[str, Any], message: str) -> None:
    organs.write_text(json.dumps(content))
    with pytest.raises(AnysiteError, match=message):
        open_dataset(organs)


def test_overlapping_classes_are_refused(organs: Path, tmp_path: Path) -> None:
    declaration = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    (tmp_path / "heart_mr" / "dataset.json").write_text(json.dumps(declaration))
    with pytest.raises(DataError, match="overlapping classes in heart"):
        open_dataset(organs)


def test_check_reads_every_dataset_by_its_own_labels(organs: Path, tmp_path: Path) -> None:
    assert not [problem for problem in inspect_dataset(organs).problems if problem.severity == "error"]
    write_volumes(tmp_path / "heart_mr", {"a": 1}, values=(1, 5))
    (problem,) = [p for p in inspect_dataset(open_dataset(organs)).problems if p.severity == "error"]
    assert (problem.rule, problem.case) == ("label values", "heart_a0")
    assert [site.domain for site in inspect_dataset(organs).sites] == ["heart/a", "heart/b", "head/a"]


def learned(path: Path, **settings: Any) -> tuple[Dataset, Plan]:
    dataset = open_dataset(path)
    return dataset, learn_plan(dataset, PlanSettings(**settings))


def test_an_image_takes_spacing_and_normalisation_of_the_dataset_it_is_nearest_to(
    organs: Path, tmp_path: Path
) -> None:
    write_volumes(
        tmp_path / "belly_ct", {"a": 2}, spacing=2.0, low=-1100.0, declared={"liver": 1, "spleen": 2}
    )
    listed = {"heart": "heart_mr", "head": "head_mr", "belly": "belly_ct"}
    dataset, plan = learned(write_list(organs, listed))
    assert [(v.task, v.spacing, v.normalisation[0].kind) for v in plan.variants] == [
        ("heart", (1.0,) * 3, "case"),
        ("head", (2.0,) * 3, "case"),
        ("belly", (2.0,) * 3, "dataset"),
    ]
    for case in dataset.cases:
        image = case.image()
        assert plan.variant_of(image).task == case.task
        grid = plan.to_grid(image)
        assert tuple(grid.shape[1:]) == image.shape  # at its own spacing nothing is resampled
        assert plan.label_to_grid(dataset.label_of(case), image).shape == image.shape
    assert plan.classes[2] == "muscle"
    assert plan.variants[0].classes == (0, 1, 2)
    heart = plan.for_task("heart")
    assert heart.to_grid(dataset.cases[-1].image()).shape[1:] == (32, 32, 32)
    logits = torch.tensor([[1.0, 0.5, 0.2, 3.0, *[-1.0] * (plan.outputs - 4)]]).view(1, -1, 1, 1)
    every = torch.softmax(logits, 1)
    told = heart.as_probabilities(logits)
    assert not told[:, 3:].any()
    torch.testing.assert_close(
        told[:, 1:3], every[:, 1:3]
    )  # as learned: what is of others is background here
    torch.testing.assert_close(told[:, :1], 1 - every[:, 1:3].sum(1, keepdim=True))
    alone = plan.for_task("heart", "left_out").as_probabilities(logits)
    torch.testing.assert_close(alone[:, :3], torch.softmax(logits[:, :3], 1))
    with pytest.raises(ConfigError, match="'lung'.*heart, head, belly"):
        plan.for_task("lung")
    with pytest.raises(ConfigError, match="one dataset"):
        plan.model_copy(update={"variants": ()}).for_task("heart")


@pytest.mark.parametrize("unknown", ["background", "left_out"])
def test_unknown_classes_join_the_background_or_leave_the_softmax(unknown: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, 5, 6, generator=generator)
    known = torch.tensor([[True, True, False, False], [True, False, True, True]])
    found = hide_unknown(logits, known, unknown).softmax(1)
    for sample in range(2):
        for place in np.ndindex(5, 6):
            chance = logits[sample, :, *place].softmax(0)
            expected = torch.where(known[sample], chance, 0.0)
            if unknown == "background":
                expected[0] += chance[~known[sample]].sum()
            else:
                expected /= expected.sum()
            torch.testing.assert_close(found[sample, :, *place], expected)


def objective_for(plan: Plan, **settings: Any) -> Supervised:
    objective = Supervised(**settings)
    objective.attach(build_network(configure(), plan), plan, ("a",))
    return objective


def test_a_joint_batch_costs_what_its_known_classes_cost(organs: Path) -> None:
    plan = learned(organs)[1]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 6, 6, generator=generator)
    label = torch.randint(0, 2, (2, 6, 6), generator=generator)
    known = torch.tensor([[True, True, False, False]] * 2)
    # Background and unknown classes taken together, one class is left: a problem of two classes.
    merged = torch.stack([logits[:, [0, 2, 3]].logsumexp(1), logits[:, 1]], 1)
    two = plan.model_copy(update={"classes": ("background", "ventricle")})
    expected = objective_for(two).compare(merged, label)
    torch.testing.assert_close(objective_for(plan).compare(logits, label, known), expected)
    left_out = objective_for(plan, unknown="left_out").compare(logits, label, known)
    torch.testing.assert_close(left_out, objective_for(two).compare(logits[:, :2], label))
    with pytest.raises(ConfigError, match="unknown"):
        build_learner(configure('objectives.supervised.unknown="ignored"'), plan, ("a",))


def test_samples_without_a_label_cost_nothing_and_push_nothing(organs: Path) -> None:
    objective = objective_for(learned(organs)[1])
    logits = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label = torch.ones(3, 6, 6).long()
    known = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    loss = objective.compare(logits, label, known)
    torch.testing.assert_close(loss, objective.compare(logits[[0, 2]], label[[0, 2]]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[1].abs().max() == 0
    assert gradient[0].abs().max() > 0
    nothing = objective.compare(logits, label, torch.zeros_like(known))
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, logits)[0].abs().max() == 0


def draw(
    dataset: Dataset, plan: Plan, steps: int, unlabelled: tuple[Case, ...] = (), **settings: Any
) -> list:
    cases = PreparedCases(dataset, plan, dataset.domains, 1.0, unlabelled).cases
    sampler = PatchSampler(cases, plan, TrainSettings(**settings), AugmentSettings(enabled=False), 0)
    return [sampler.batch(step) for step in range(steps)]


def test_datasets_take_turns_and_their_patients_are_drawn_alike(tmp_path: Path) -> None:
    write_volumes(tmp_path / "many", {"a": 9, "b": 3}, declared={"liver": 1, "spleen": 2})
    write_volumes(tmp_path / "few", {"a": 2}, declared={"kidney": 1, "lung": 2})
    dataset, plan = learned(write_list(tmp_path / "all.json", {"many": "many", "few": "few"}))
    # One patient of the few has two images.
    twice = [case for case in dataset.cases if case.task == "few"]
    renamed = Case("few_again", twice[0].patient, "few/a", twice[0].image_paths, twice[0].label_path, "few")
    dataset = dataset.with_cases([*dataset.cases, renamed])
    batches = draw(dataset, plan, 300, sampling="task", batch_size=2)
    count = Counter(name for batch in batches for name in batch.case_ids)
    assert sum(n for name, n in count.items() if name.startswith("many")) == 300
    assert count["few_a1"] == pytest.approx(150, abs=35)
    assert count["few_a0"] + count["few_again"] == pytest.approx(150, abs=35)
    for batch in batches[:5]:
        for name, known in zip(batch.case_ids, batch.known, strict=True):
            assert known.tolist() == [
                True,
                *[name.startswith(task) for task in ("many", "many", "few", "few")],
            ]


def test_a_share_of_every_batch_is_without_labels_and_every_site_has_its_turn(organs: Path) -> None:
    dataset, plan = learned(organs)
    labelled = dataset.with_cases(case for case in dataset.cases if case.id.endswith(("0", "1")))
    others = tuple(case for case in dataset.cases if case.id.endswith("2"))
    batches = draw(labelled, plan, 12, others, batch_size=4, unlabelled_share=0.5, sampling="domain")
    for batch in batches:
        assert [bool(known.any()) for known in batch.known] == [True, True, False, False]
        assert all(name.endswith("2") for name in batch.case_ids[2:])
        assert batch.label[2:].max() == 0
    sites = Counter(int(domain) for batch in batches for domain in batch.domain[:2])
    assert sites == {0: 8, 1: 8, 2: 8}
    with pytest.raises(ConfigError, match=r"train\.batch_size"):
        draw(labelled, plan, 1, others, batch_size=1, unlabelled_share=0.5)


def test_leaving_out_a_whole_dataset_whose_classes_nobody_declares_is_refused_in_words(
    tmp_path: Path,
) -> None:
    write_volumes(tmp_path / "one", {"a": 2}, declared={"liver": 1, "spleen": 2})
    write_volumes(tmp_path / "two", {"b": 2})
    path = write_list(tmp_path / "all.json", {"one": "one", "two": "two"})
    with pytest.raises(LabelError, match="[Dd]eclare them in dataset.json"):
        open_dataset(path, {"two/b"})
    assert open_dataset(path, {"one/a"}).classes[-1] == "two_class_2"


def test_classes_that_a_label_does_not_tell_of_are_background_to_calibration() -> None:
    chances = np.array([[0.1, 0.6], [0.2, 0.3], [0.7, 0.1]])
    folded = fold_unknown(chances, (0, 1), overlapping=False)
    np.testing.assert_allclose(folded, [[0.8, 0.7], [0.2, 0.3], [0, 0]])
    assert fold_unknown(chances, (0, 1, 2), overlapping=False) is chances
    assert fold_unknown(chances, (0,), overlapping=True) is chances


JOINT = ["plan.dimension=3d", "plan.patch_size=[16, 16, 16]", "network.depth=2", "train.sampling=task"]


def configure(*more: str) -> Config:
    return small_config(*JOINT, "train.steps=300", "augment.enabled=false", *more)


def test_one_network_learns_two_datasets_and_is_scored_on_what_each_labels(
    organs: Path, tmp_path: Path
) -> None:
    dataset = open_dataset(organs)
    run = train(dataset, configure(), tmp_path / "run")
    held_out = [case for case in dataset.cases if case.id in run.splits["held_out"]]
    assert {case.task for case in held_out} == {"heart", "head"}
    assert all(o.status == "done" for o in predict([run], held_out, tmp_path / "masks", dataset=dataset))
    assert len(run.temperature.values) == len(dataset.classes)
    assert atomic.read_json(run.path / CALIBRATION)["kind"] == "per_class"
    evaluate(tmp_path / "masks", dataset)
    rows = [row for row in read_rows(tmp_path / "masks" / "rows.jsonl") if row["metric"] == "dice"]
    named = {(row["domain"].partition("/")[0], row["class"]) for row in rows}
    assert named == {("heart", "ventricle"), ("heart", "muscle"), ("head", "hippocampus")}
    assert np.mean([row["value"] for row in rows]) > 0.7
    list(predict([run], held_out, tmp_path / "told", dataset=dataset, task="head"))
    for case in held_out:
        found = np.asarray(nib.load(tmp_path / "told" / f"{case.id}.nii.gz").dataobj)  # pyright: ignore
        assert set(np.unique(found)) <= {0, 3}
    with pytest.raises(ConfigError, match="lung"):
        list(predict([run], held_out, tmp_path / "other", dataset=dataset, task="lung"))


def test_the_truth_in_the_report_is_drawn_in_the_classes_of_all(organs: Path, tmp_path: Path) -> None:
    dataset = open_dataset(organs)
    case = dataset.cases[-1]
    nothing = case.label().with_array(np.zeros((1, 16, 16, 16), np.int32))
    files.write_label(nothing, tmp_path / "mask.nii.gz")
    described = describe_case(case, tmp_path) | {"mask": "mask.nii.gz"}
    shown = PredictedDataset.model_validate(describe_dataset(dataset))
    picture = draw_case(tmp_path, case.id, PredictedCase.model_validate(described), shown)
    assert 'class="truth c2"' in picture.svg  # the third structure of all, 7 and 9 in its file


def test_images_beyond_the_labelled_patients_are_learned_from_without_their_labels(
    organs: Path, tmp_path: Path
) -> None:
    dataset = open_dataset(organs)
    few = ["train.labelled_patients=2", "train.unlabelled_share=0.5", "objectives.medcontext={}"]
    config = configure(
        *few, "train.steps=4", "train.batch_size=4", "train.sampling=case", 'test_domains=["heart/b"]'
    )
    splits = split(dataset, config)
    assert {case.domain for case in splits.unlabelled} == {"heart/a", "head/a"} - {"heart/b"}
    assert not {case.id for case in splits.unlabelled} & {case.id for case in splits.training.cases}
    kept_out = {case.patient for case in (*splits.held_out.cases, *splits.test.cases)}
    assert not {case.patient for case in splits.unlabelled} & kept_out
    run = train(dataset, config, tmp_path / "run")
    assert sorted(run.splits["unlabelled"]) == sorted(case.id for case in splits.unlabelled)
    opened = open_run(tmp_path / "run")
    assert set(run.manifest["train_domains"]) >= {case.domain for case in splits.unlabelled}
    # To the network they are known, whatever became of their labels.
    assert {split_of(case, [opened]) for case in splits.unlabelled} == {"training"}
    notes: list[str] = []
    alone = configure("train.unlabelled_share=0.5", "train.steps=2")
    run = train(dataset, alone, tmp_path / "alone", on_progress=lambda progress: notes.append(progress.note))
    assert any("train.unlabelled_share does nothing" in note for note in notes)
    assert "unlabelled" not in run.splits


def test_a_class_has_to_beat_all_that_its_dataset_does_not_label(organs: Path) -> None:
    _, plan = learned(organs)
    chances = np.random.default_rng(0).dirichlet(np.ones(4), 500).T.astype(np.float32)
    expected = np.zeros(500, np.int32)
    for voxel, (background, ventricle, muscle, hippocampus) in enumerate(chances.T):
        if max(ventricle, muscle) > background + hippocampus:
            expected[voxel] = 1 if ventricle > muscle else 2
        if hippocampus > background + ventricle + muscle:
            assert expected[voxel] == 0  # never a class of each
            expected[voxel] = 3
    assert np.array_equal(plan.decide(chances), expected)
    assert set(expected) == {0, 1, 2, 3}
    # What is shown while training is measured on masks that are decided alike.
    label = torch.from_numpy(expected)
    assert dice_of_maps(torch.from_numpy(chances), label, plan, [0, 1, 2, 3]) == [1.0, 1.0, 1.0]
    left_out = plan.model_copy(update={"unknown": "left_out"})
    assert np.array_equal(left_out.decide(chances), chances.argmax(0))
    # The same as being told which dataset it is, where that one wins at all.
    for name, own in (("heart", [1, 2]), ("head", [3])):
        told = plan.for_task(name).as_probabilities(torch.from_numpy(chances).log()[None])[0].numpy()
        of_task = plan.for_task(name).decide(told)
        assert np.array_equal(np.where(np.isin(expected, own), expected, 0), of_task)


def test_thick_slices_of_one_dataset_are_cut_along_in_all(tmp_path: Path) -> None:
    write_volumes(tmp_path / "head_mr", {"a": 2}, declared={"left": 1, "right": 2})
    write_volumes(tmp_path / "chest_mr", {"a": 2}, spacing=1.1, declared={"up": 1, "down": 2})
    for name, axis in (("heart_mr", 2), ("spine_mr", 0)):
        folder = write_volumes(tmp_path / name, {"a": 2}, declared={f"{name} x": 1, f"{name} y": 2})
        for path in folder.rglob("*.nii.gz"):
            volume = nib.load(path)  # pyright: ignore[reportPrivateImportUsage]
            affine = np.eye(4)
            affine[axis, axis] = 8
            array = np.asarray(volume.dataobj)  # pyright: ignore[reportAttributeAccessIssue]
            nib.save(nib.Nifti1Image(array, affine), path)  # pyright: ignore[reportPrivateImportUsage]
    listed = write_list(tmp_path / "two.json", {n: f"{n}_mr" for n in ("head", "chest", "heart")})
    _, plan = learned(listed)
    assert (plan.axes, plan.dimension, plan.context_slices) == ("SRA", 2, 0)
    assert any("heart: slices along S" in reason for reason in plan.reasons)
    listed = write_list(tmp_path / "all.json", {n: f"{n}_mr" for n in ("head", "chest", "heart", "spine")})
    with pytest.raises(ConfigError, match="plan.slice_axis: thick slices of heart along S, spine along R"):
        learned(listed)
    assert learned(listed, slice_axis="A")[1].axes == "ARS"


def test_datasets_in_hounsfield_units_share_a_window(tmp_path: Path) -> None:
    for name, low in (("lung", -1100.0), ("liver", -1000.5)):
        write_volumes(
            tmp_path / name, {"a": 2}, low=low, spacing=1 + (low > -1100), declared={name: 1, f"{name} b": 2}
        )
    write_volumes(tmp_path / "head", {"a": 2}, declared={"left": 1, "right": 2})
    _, plan = learned(write_list(tmp_path / "ct.json", {n: n for n in ("lung", "liver", "head")}))
    lung, liver, head = (variant.normalisation for variant in plan.variants)
    assert lung == liver
    assert lung[0].kind == "dataset"
    assert head[0].kind == "case"


def test_a_patient_in_two_datasets_is_one_person(tmp_path: Path) -> None:
    write_volumes(tmp_path / "heart_mr", {"a": 6}, declared={"ventricle": 1, "muscle": 2})
    datasets = {
        "one": {"path": "heart_mr", "labels": {"ventricle": 1}},
        "two": {"path": "heart_mr", "labels": {"muscle": 2}},
    }
    dataset = open_dataset(write_list(tmp_path / "readers.json", datasets))
    assert len(dataset.cases) == 12
    assert len({case.patient for case in dataset.cases}) == 6
    parts = split(dataset, small_config())
    trained, held_out = ({case.patient for case in part.cases} for part in (parts.training, parts.held_out))
    assert held_out
    assert not trained & held_out


def test_people_are_one_by_way_of_others(tmp_path: Path) -> None:
    """One list knows that two scans are one person's; the other takes every scan for a person."""
    write_volumes(tmp_path / "scans", {"a": 4}, declared={"ventricle": 1, "muscle": 2})
    paired = tmp_path / "paired"
    paired.mkdir()
    lines = [
        f"p{number},a{number // 2},x,{case.image_paths[0].resolve()},{case.label_path}"
        for number, case in enumerate(open_dataset(tmp_path / "scans").cases)
    ]
    (paired / "index.csv").write_text("case,patient,domain,image,label\n" + "\n".join(lines) + "\n")
    (paired / "dataset.json").write_text('{"labels": {"background": 0, "ventricle": 1, "muscle": 2}}')
    for order in (("scans", "paired"), ("paired", "scans")):
        joined = open_dataset(write_list(tmp_path / "all.json", {name: {"path": name} for name in order}))
        people: dict[str, set[str]] = {}
        for case in joined.cases:
            people.setdefault(str(case.image_paths[0].resolve()), set()).add(case.patient)
        assert all(len(names) == 1 for names in people.values())
        assert len({name for names in people.values() for name in names}) == 2


def test_masks_of_other_programs_hold_the_values_of_their_dataset(organs: Path, tmp_path: Path) -> None:
    dataset, folder = open_dataset(organs), tmp_path / "others"
    folder.mkdir()
    for case in dataset.cases:
        assert case.label_path is not None
        (folder / f"{case.id}.nii.gz").write_bytes(case.label_path.read_bytes())
    result = evaluate(folder, dataset)
    assert not result.failed
    dice = [row["value"] for row in result.rows if row["metric"] == "dice"]
    assert dice
    assert set(dice) == {1.0}


def test_cases_of_a_joint_training_are_known_again_in_their_own_dataset(organs: Path, tmp_path: Path) -> None:
    dataset = open_dataset(organs)
    run = train(dataset, configure("train.steps=2"), tmp_path / "run")
    segmenter = Segmenter([run])
    grid = run.plan.to_grids(dataset.cases[0].image())
    seen = segmenter._predict(grid, segmenter.members[0], watch=True)
    # What is judged is the mask that is written: here the background, though one class is the likeliest.
    chances = np.zeros_like(seen.probabilities)
    chances[:] = np.array([0.3, 0.4, 0.05, 0.25])[:, None, None, None]
    unsure = replace(seen, probabilities=chances)
    assert np.array_equal(unsure.label, segmenter.plan.decide(chances))
    assert not unsure.foreground.any()
    alone = open_dataset(tmp_path / "heart_mr")
    roles = {"training": "training", "held_out": "in_domain"}
    for case in (
        case for case in alone.cases if case.domain == "b"
    ):  # of site a the head has cases of the same ids
        role = next(role for role, ids in run.splits.items() if f"heart_{case.id}" in ids)
        assert split_of(case, [run]) == roles[role]
    kept = next(id for id in run.splits["held_out"] if id.startswith("heart_b"))
    run.manifest["judge_learned_from"] = [kept]
    judged = patients_judged_from([run], alone.cases)
    assert [patient for _, patient in judged] == [kept.removeprefix("heart_")]
    learned_from = {id.removeprefix("heart_") for id in run.splits["training"]}
    parts = split(alone, small_config("seed=3"))
    kept_out = {case.id for case in parts.held_out.cases}
    assert set(require_unseen(run, alone, parts)) >= kept_out & learned_from
    assert kept_out & learned_from
