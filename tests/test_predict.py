"""Prediction: masks on the image's own grid, manifests, repeated calls, shares, failures."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from anysite import atomic, cli, predict, runs
from anysite.data import files
from anysite.data.case import Case, Dataset
from anysite.data.layouts import open_dataset, open_images
from anysite.data.phantom import write_phantom
from anysite.data.volume import Volume
from anysite.describe import describe
from anysite.errors import ConfigError, DataError, FileFormatError
from anysite.postprocessing import combine
from anysite.roles import split_of
from anysite.runs import Run
from anysite.segment import Segmenter
from anysite.train import train
from conftest import small_config

TURN = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])


@pytest.fixture(scope="module")
def run(phantom: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "run"
    return train(phantom, small_config("test_domains=['west']", "train.learning_rate=0.01"), path)


@pytest.fixture(scope="module")
def other_run(phantom: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "other"
    return train(phantom, small_config("test_domains=['north']", "seed=1", "train.steps=1"), path)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("volumes") / "phantom"
    return open_dataset(write_phantom(folder, dimension=3, patients_per_site=2, size=24, sites=("north",)))


@pytest.fixture(scope="module")
def volume_run(volumes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = small_config(
        *("plan.dimension=3d", "plan.patch_size=[16, 16, 16]", "network.depth=2", "train.steps=20"),
        *("train.learning_rate=0.01", "train.validation_fraction=0", "plan.spacing=[8.0, 8.0, 8.0]"),
    )
    return train(volumes, settings, tmp_path_factory.mktemp("runs") / "volumes")


def segment(members: Sequence[Run], cases: Sequence[Case], output: Path, **options) -> dict[str, str]:
    """Predict, and return the status of every case."""
    return {o.case.id: o.status for o in predict.predict(members, cases, output, **options)}


def few(phantom: Dataset, count: int = 3) -> tuple[Case, ...]:
    return phantom.cases[:count]


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_file()]


def write_volume(volume: Volume, path: Path) -> Case:
    nibabel.save(nibabel.Nifti1Image(volume.array[0], volume.affine), path)
    return Case(files.stem_of(path), "p", "s", (path,))


@pytest.mark.parametrize("axes", ["LPS", "PIR", "SAL"])
def test_volumes_keep_shape_and_affine_and_their_orientation_does_not_matter(
    volumes: Dataset, volume_run: Run, tmp_path: Path, axes: str
) -> None:
    image = volumes.cases[0].image().oriented("RAS")
    affine = image.affine.copy()
    affine[:3] = TURN @ affine[:3] + [[0, 0, 0, 31.5], [0, 0, 0, -7.25], [0, 0, 0, 4]]
    upright = Volume(image.array, affine)
    stored = [
        write_volume(upright, tmp_path / "upright.nii"),
        write_volume(upright.oriented(axes), tmp_path / "turned.nii.gz"),
    ]
    assert segment([volume_run], stored, tmp_path / "out") == {"upright": "done", "turned": "done"}
    masks = [files.read_label(tmp_path / "out" / case.image_paths[0].name) for case in stored]
    for case, mask in zip(stored, masks, strict=True):
        source = nibabel.Nifti1Image.from_filename(case.image_paths[0])
        assert mask.shape == source.shape
        np.testing.assert_array_equal(mask.affine, source.affine)
    assert masks[1].axes == axes
    assert len(np.unique(masks[0].array)) > 1
    np.testing.assert_array_equal(masks[1].oriented("RAS").array, masks[0].array)


def test_pictures_keep_their_kind_of_file_and_jpeg_becomes_png(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (41, 67)).astype(np.uint8)  # smaller than a multiple of anything
    for name in ("a.png", "b.jpg", "c.JPEG", "d.tif"):
        Image.fromarray(grey).save(tmp_path / name)
    segment([run], open_images(tmp_path), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("a.png", "b.png", "c.png", "d.tif", "predictions.json")
    ]
    masks = [files.read_label(tmp_path / "out" / name) for name in ("a.png", "d.tif")]
    assert masks[0].shape == (41, 67)
    np.testing.assert_array_equal(masks[0].array, masks[1].array)


def test_the_manifest_tells_all_and_a_second_call_skips_everything(
    phantom: Dataset, run: Run, tmp_path: Path
) -> None:
    assert set(segment([run], phantom.cases, tmp_path).values()) == {"done"}
    manifest = json.loads((tmp_path / "predictions.json").read_text())
    assert [entry["seed"] for entry in manifest["runs"]] == [0]
    assert manifest["runs"][0]["train_domains"] == ["north", "east"]
    for case in phantom.cases:
        entry = manifest["cases"][case.id]
        assert entry["mask"] == f"{case.id}.png"
        assert entry["sha256"] == atomic.sha256(tmp_path / entry["mask"])
        assert (entry["patient"], entry["domain"]) == (case.patient, case.domain)
        role = next(role for role, ids in run.splits.items() if case.id in ids)
        assert entry["split"] == {"training": "training", "held_out": "in_domain", "test": "unseen"}[role]
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert set(segment([run], phantom.cases, tmp_path).values()) == {"skipped"}
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert not hidden(tmp_path)


def test_a_deleted_or_altered_mask_is_made_again(phantom: Dataset, run: Run, tmp_path: Path) -> None:
    first, second, third = few(phantom)
    segment([run], (first, second, third), tmp_path)
    digests = {path.name: atomic.sha256(path) for path in tmp_path.glob("*.png")}
    (tmp_path / f"{first.id}.png").unlink()
    (tmp_path / f"{second.id}.png").write_bytes((tmp_path / f"{third.id}.png").read_bytes() + b"\0")
    statuses = segment([run], (first, second, third), tmp_path)
    assert list(statuses.values()) == ["done", "done", "skipped"]
    assert digests == {path.name: atomic.sha256(path) for path in tmp_path.glob("*.png")}


def test_other_weights_or_settings_make_everything_again(
    phantom: Dataset, run: Run, other_run: Run, tmp_path: Path
) -> None:
    cases = few(phantom)
    for members, options, expected in (
        ([run], {}, "done"),
        ([run], {"flips": True}, "done"),
        ([run, other_run], {}, "done"),
        ([other_run], {}, "done"),
        ([other_run], {}, "skipped"),
    ):
        assert set(segment(members, cases, tmp_path, **options).values()) == {expected}
    predicted = predict.read_manifests(tmp_path)
    assert [entry["seed"] for entry in predicted["runs"]] == [1]
    assert len(predicted["cases"]) == len(cases)


def test_an_ensemble_averages_probabilities_and_knows_what_any_member_saw(
    phantom: Dataset, run: Run, other_run: Run, tmp_path: Path
) -> None:
    segment([run, other_run], phantom.cases, tmp_path)
    entries = predict.read_manifests(tmp_path)["cases"]
    trained = {*run.splits["training"], *other_run.splits["training"]}
    held_out = {*run.splits["held_out"], *other_run.splits["held_out"]} - trained
    assert {name for name, e in entries.items() if e["split"] == "training"} == trained
    assert {name for name, e in entries.items() if e["split"] == "in_domain"} == held_out
    image = phantom.cases[0].image()
    plain = run.config.predict.model_copy(update={"calibrate": False})
    alone = [Segmenter([member], plain).segment(image).probabilities.array for member in (run, other_run)]
    expected = ((alone[0] + alone[1]) / 2).argmax(axis=0)
    combine([run.postprocessing, other_run.postprocessing]).apply(expected)
    mask = files.read_label(tmp_path / f"{phantom.cases[0].id}.png")
    np.testing.assert_array_equal(mask.array[0], expected)


def test_parts_are_disjoint_and_together_complete(
    phantom: Dataset, run: Run, other_run: Run, tmp_path: Path
) -> None:
    cases = few(phantom, 8)
    parts = [segment([run], cases, tmp_path, part=f"{i}/3") for i in (1, 2, 3)]
    assert [len(part) for part in parts] == [3, 3, 2]
    assert {*parts[0], *parts[1], *parts[2]} == {case.id for case in cases}
    assert not (tmp_path / "predictions.json").exists()
    joined = predict.read_manifests(tmp_path)
    assert joined["cases"].keys() == {case.id for case in cases}
    assert joined["runs"][0]["seed"] == 0
    alone = {**joined, "cases": {**joined["cases"], cases[0].id: {"status": "failed", "error": "disk full"}}}
    atomic.write_json(tmp_path / "predictions.json", alone)  # of a call before, which failed on one of them
    assert predict.read_manifests(tmp_path)["cases"][cases[0].id]["status"] == "done"
    (tmp_path / "predictions.json").unlink()
    segment([other_run], cases, tmp_path, part="2/3")
    with pytest.raises(DataError, match=r"predictions.1-of-3.json, .* of different runs"):
        predict.read_manifests(tmp_path)


def test_images_are_found_from_an_output_folder_that_is_a_link(
    phantom: Dataset, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "masks").symlink_to(tmp_path / "far" / "away")
    (case,) = few(phantom, 1)
    segment([run], [case], tmp_path / "masks")
    (image,) = predict.read_manifests(tmp_path / "masks")["cases"][case.id]["images"]
    assert (tmp_path / "masks" / image).samefile(case.image_paths[0])


@pytest.mark.parametrize("part", ["", "1", "0/2", "3/2", "1/0", "-1/2", "a/b", "1/2/3", "²/8"])
def test_malformed_parts_are_refused(part: str) -> None:
    with pytest.raises(ConfigError, match=r"--part .*; expected I/N"):
        predict.select_part((), part)


def test_a_case_that_fails_is_named_and_the_rest_goes_on(phantom: Dataset, run: Run, tmp_path: Path) -> None:
    first, second, third = few(phantom)
    damaged = tmp_path / "surname" / "damaged.png"
    damaged.parent.mkdir()
    damaged.write_bytes(second.image_paths[0].read_bytes()[:200])
    output = tmp_path / "out"
    segment([run], few(phantom), output)
    cases = (first, replace(second, image_paths=(damaged,)), third)
    outcomes = list(predict.predict([run], cases, output))
    assert [o.status for o in outcomes] == ["skipped", "failed", "skipped"]
    assert str(damaged) in outcomes[1].error
    entry = predict.read_manifests(output)["cases"][second.id]
    assert (entry["status"], "mask" in entry) == ("failed", False)
    assert entry["error"].startswith("damaged.png: not readable as a picture")
    assert str(tmp_path) not in entry["error"]
    assert not (output / f"{second.id}.png").exists()  # of the earlier call
    assert segment([run], few(phantom), output)[second.id] == "done"


def test_a_full_disk_leaves_no_partial_file(
    phantom: Dataset, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(volume: Volume, path: Path, image_path: Path | None = None) -> None:
        path.write_bytes(b"half a mask")
        raise OSError(errno.ENOSPC, "No space left on device")

    case = phantom.cases[0]
    with monkeypatch.context() as patched:
        patched.setattr("anysite.data.image2d.write_label", fill)
        outcome = next(iter(predict.predict([run], [case], tmp_path / "out")))
    assert outcome.status == "failed"
    assert "No space left on device" in outcome.error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.json"]
    entry = predict.read_manifests(tmp_path / "out")["cases"][case.id]
    assert entry["status"] == "failed"
    assert entry["error"].startswith(f"{case.id}.png: cannot be written (No space left on device)")
    with monkeypatch.context() as patched:
        patched.setattr("numpy.savez_compressed", lambda file, **_: fill(case.image(), Path(file.name)))
        outcomes = predict.predict([run], [case], tmp_path / "out", save_probabilities=True)
        assert [o.status for o in outcomes] == ["failed"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.json"]
    assert str(tmp_path) not in (tmp_path / "out" / "predictions.json").read_text().replace(
        str(run.path.parent), ""
    )


def test_probabilities_come_back_and_agree_with_the_mask(phantom: Dataset, run: Run, tmp_path: Path) -> None:
    case = phantom.cases[0]
    assert segment([run], [case], tmp_path) == {case.id: "done"}
    assert segment([run], [case], tmp_path, save_probabilities=True) == {
        case.id: "done"
    }  # the npz was missing
    assert segment([run], [case], tmp_path, save_probabilities=True) == {case.id: "skipped"}
    segment([run], [case], tmp_path / "whole", save_probabilities=True, postprocess=False)
    np.testing.assert_array_equal(  # that fragments were taken out, they do not know
        predict.read_probabilities(tmp_path / f"{case.id}.npz"),
        predict.read_probabilities(tmp_path / "whole" / f"{case.id}.npz"),
    )
    probabilities = predict.read_probabilities(tmp_path / f"{case.id}.npz")
    mask = files.read_label(tmp_path / "whole" / f"{case.id}.png").array[0]
    assert probabilities.shape == (len(phantom.classes), *mask.shape)
    assert np.abs(probabilities.sum(axis=0) - 1).max() < 5e-3
    chosen = np.take_along_axis(probabilities, mask[None].astype(np.int64), axis=0)[0]
    assert (chosen >= probabilities.max(axis=0)).all()  # half precision may tie, never contradict
    (tmp_path / "other.npz").write_bytes(b"no archive")
    for name in ("other.npz", "absent.npz"):
        with pytest.raises(FileFormatError, match=r"not readable as probabilities"):
            predict.read_probabilities(tmp_path / name)


def test_one_identifier_for_two_cases_is_refused(phantom: Dataset, run: Run, tmp_path: Path) -> None:
    first, second = few(phantom, 2)
    with pytest.raises(DataError, match="two cases named"):
        segment([run], (first, replace(second, id=first.id)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_never_replace_images_or_labels(phantom: Dataset, run: Run) -> None:
    case = phantom.cases[0]
    assert case.label_path is not None
    for path in (case.image_paths[0], case.label_path):
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=f"would replace {case.id}.png"):
            segment([run], [case], path.parent)
        assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", [".png", ".npz"])
def test_files_of_others_are_neither_replaced_nor_deleted(
    phantom: Dataset, run: Run, tmp_path: Path, suffix: str
) -> None:
    images, labels = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    labels.mkdir()
    for case in few(phantom):
        (images / f"{case.id}.png").write_bytes(case.image_paths[0].read_bytes()[:99])  # every one fails
        (labels / f"{case.id}{suffix}").write_bytes(b"a label drawn by hand")
    with pytest.raises(
        ConfigError, match=rf"{suffix} and 2 more files would be replaced, but .* did not write"
    ):
        segment([run], open_images(images), labels, save_probabilities=True)
    assert {path.read_bytes() for path in labels.iterdir()} == {b"a label drawn by hand"}
    assert len(list(labels.iterdir())) == 3
    if suffix == ".npz":  # nor without probabilities, when a case fails or is done
        for cases, status in ((open_images(images), "failed"), (few(phantom), "done")):
            assert set(segment([run], cases, labels).values()) == {status}
            assert {path.read_bytes() for path in labels.glob("*.npz")} == {b"a label drawn by hand"}


def test_a_mask_altered_by_hand_outlives_a_failure(phantom: Dataset, run: Run, tmp_path: Path) -> None:
    first, second = few(phantom, 2)
    segment([run], (first, second), tmp_path)
    corrected = tmp_path / f"{first.id}.png"
    corrected.write_bytes(b"corrected")
    absent = [replace(case, image_paths=(tmp_path / f"absent-{case.id}.png",)) for case in (first, second)]
    assert set(segment([run], absent, tmp_path).values()) == {"failed"}
    assert corrected.read_bytes() == b"corrected"
    assert not (tmp_path / f"{second.id}.png").exists()


def test_another_image_under_a_known_id_is_predicted_again(
    phantom: Dataset, run: Run, tmp_path: Path
) -> None:
    first, second = few(phantom, 2)
    image = tmp_path / "image.png"
    case = replace(first, image_paths=(image,))
    for source, statuses in ((first, ["done", "skipped"]), (second, ["done", "skipped"])):
        image.write_bytes(source.image_paths[0].read_bytes())
        for status in statuses:
            assert segment([run], [case], tmp_path / "out") == {case.id: status}
        entry = predict.read_manifests(tmp_path / "out")["cases"][case.id]
        assert entry["image_sha256"] == [atomic.sha256(image)]


def test_an_interrupted_call_continues(
    phantom: Dataset, run: Run, other_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a mask and its entry, and with other runs' masks still there."""
    segment([other_run], few(phantom), tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(predict, "image_digests", lambda case: (_ for _ in ()).throw(KeyboardInterrupt))
        for folder in (tmp_path, tmp_path / "fresh"):
            with pytest.raises(KeyboardInterrupt):
                segment([run], few(phantom), folder)
            assert (folder / f"{phantom.cases[0].id}.png").is_file()
            assert predict.read_manifests(folder)["cases"] == {}
    for folder in (tmp_path, tmp_path / "fresh"):
        assert set(segment([run], few(phantom), folder).values()) == {"done"}


def test_what_a_killed_call_had_done_is_in_its_journal(phantom: Dataset, run: Run, tmp_path: Path) -> None:
    cases = phantom.cases[:4]
    going = predict.predict([run], cases, tmp_path / "killed")
    assert isinstance(going, Generator)
    done = {next(going).case.id, next(going).case.id}
    assert json.loads((tmp_path / "killed" / "predictions.json").read_text())["cases"] == {}
    shutil.copytree(tmp_path / "killed", tmp_path / "copy", ignore=shutil.ignore_patterns("*.lock"))
    (journal,) = (tmp_path / "copy").glob("*.journal")
    for torn in ("", '{"cases": {"half'):
        atomic.append(journal, torn)
        found = predict.read_manifests(tmp_path / "copy")
        assert found["cases"].keys() == done
        assert all(found["files"][entry["mask"]] == entry["sha256"] for entry in found["cases"].values())
    assert describe(tmp_path / "copy")["cases"] == {"done": 2}
    kept = journal.read_text()
    statuses = {o.case.id: o.status for o in predict.predict([run], cases, tmp_path / "copy")}
    assert {case for case, status in statuses.items() if status == "skipped"} == done
    assert not journal.exists()
    assert predict.read_manifests(tmp_path / "copy")["cases"].keys() == {case.id for case in cases}
    journal.write_text(kept.replace(min(done), "other"))  # of the manifest that was there before
    assert "other" not in predict.read_manifests(tmp_path / "copy")["cases"]
    going.close()  # interrupted, not killed: the manifest is whole
    assert json.loads((tmp_path / "killed" / "predictions.json").read_text())["cases"].keys() == done
    assert not list((tmp_path / "killed").glob("*.journal"))


def test_a_case_more_does_not_write_all_others_again(
    phantom: Dataset, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write_json = atomic.write_json
    monkeypatch.setattr(
        atomic, "write_json", lambda path, content: (written.append(path.name), write_json(path, content))
    )
    list(predict.predict([run], phantom.cases[:5], tmp_path))
    assert written.count("predictions.json") == 2  # before the first and after the last


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
            "OutOfMemoryError: CUDA out of memory.",
        ),
        (RuntimeError("sizes differ"), "RuntimeError: sizes differ"),
        (MemoryError(), "MemoryError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_memory_that_runs_out_fails_one_case_alone(
    phantom: Dataset, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    segment_one, large = Segmenter.segment, few(phantom)[1].image().array

    def exhaust(segmenter: Segmenter, image: Volume):
        if np.array_equal(image.array, large):
            raise error
        return segment_one(segmenter, image)

    monkeypatch.setattr(Segmenter, "segment", exhaust)
    outcomes = list(predict.predict([run], few(phantom), tmp_path))
    assert [o.status for o in outcomes] == ["done", "failed", "done"]
    assert (
        outcomes[1].error == predict.read_manifests(tmp_path)["cases"][outcomes[1].case.id]["error"] == text
    )


def test_probabilities_of_an_earlier_run_are_not_taken_for_this_ones(
    phantom: Dataset, run: Run, other_run: Run, tmp_path: Path
) -> None:
    case = phantom.cases[0]
    segment([run], [case], tmp_path, save_probabilities=True)
    segment([other_run], [case], tmp_path)
    assert not (tmp_path / f"{case.id}.npz").exists()
    assert segment([other_run], [case], tmp_path, save_probabilities=True) == {case.id: "done"}


def test_the_site_decides_about_ids_of_other_datasets(phantom: Dataset, run: Run, other_run: Run) -> None:
    trained, held_out = run.splits["training"][0], run.splits["held_out"][0]
    by_id = {case.id: case for case in phantom.cases}
    elsewhere = replace(by_id[trained], domain="south")
    new = replace(by_id[trained], id="new")  # at a site that was trained on
    assert split_of(by_id[trained], [run]) == "training"
    assert split_of(by_id[held_out], [run]) == "in_domain"
    assert split_of(elsewhere, [run]) == "unseen"
    assert split_of(new, [run]) == "unknown"
    assert split_of(replace(new, domain="west"), [run]) == "unseen"
    assert split_of(replace(new, domain="west"), [run, other_run]) == "unknown"
    assert split_of(by_id[trained], [run], sites_known=False) == "unknown"
    started_from = {"seen": {"scans": [by_id[trained].id, "organ_new"]}}
    pretrained = replace(run, manifest={**run.manifest, "started_from": started_from})
    assert split_of(elsewhere, [pretrained]) == "unknown"  # perhaps one of the images pretrained on
    assert split_of(new, [pretrained]) == "unknown"  # of another dataset, whose name is not in the plan
    assert split_of(by_id[held_out], [pretrained]) == "in_domain"
    new_as_pretrained = replace(run, manifest={**run.manifest, "started_from": {"seen": {"scans": ["new"]}}})
    assert split_of(new, [new_as_pretrained]) == "training"


def test_the_command_leaves_out_what_was_trained_on_and_no_namesakes(
    phantom: Dataset, phantom_folder: Path, run: Run, tmp_path: Path
) -> None:
    trained = [case for case in phantom.cases if case.id in run.splits["training"]]
    for folder in (tmp_path / "plain", tmp_path / "data" / "south" / "images"):  # images of other places
        folder.mkdir(parents=True)
        for case in trained:
            (folder / f"{case.id}.png").write_bytes(case.image_paths[0].read_bytes())
    for source, ids, splits in (
        (phantom_folder, {c.id for c in phantom.cases} - {c.id for c in trained}, {"in_domain", "unseen"}),
        (tmp_path / "plain", {c.id for c in trained}, {"unknown"}),
        (tmp_path / "data", {c.id for c in trained}, {"unseen"}),
    ):
        cli.predict([run.path, source], tmp_path / f"masks of {source.name}")
        manifest = predict.read_manifests(tmp_path / f"masks of {source.name}")
        assert manifest["cases"].keys() == ids
        assert {entry["split"] for entry in manifest["cases"].values()} == splits
        assert manifest["dataset"]["name"] == source.name


def test_an_input_is_a_dataset_or_images_of_unknown_sites(
    phantom: Dataset, phantom_folder: Path, run: Run, tmp_path: Path
) -> None:
    dataset, sites_known = predict.open_input(phantom_folder, run.plan)
    assert (dataset, sites_known) == (phantom, True)
    images, sites_known = predict.open_input(phantom.cases[0].image_paths[0].parent, run.plan)
    assert (images.name, images.classes, sites_known) == ("images", run.plan.classes, False)
    site = tmp_path / "site"
    (site / "images").mkdir(parents=True)
    (site / "images" / "a.png").write_bytes(phantom.cases[0].image_paths[0].read_bytes())
    unlabelled, sites_known = predict.open_input(site, run.plan)
    assert (unlabelled.cases[0].domain, unlabelled.classes, sites_known) == ("site", run.plan.classes, True)
    (tmp_path / "index.csv").write_text("id,image\n")
    with pytest.raises(DataError, match="no column 'case'"):
        predict.open_input(tmp_path, run.plan)


def test_the_manifest_describes_the_dataset_that_was_predicted(
    phantom: Dataset, run: Run, tmp_path: Path
) -> None:
    values = tuple(50 * index for index in range(len(phantom.classes)))
    segment([run], few(phantom, 1), tmp_path, dataset=replace(phantom, name="other", label_values=values))
    described = predict.read_manifests(tmp_path)["dataset"]
    assert described == {"name": "other", "classes": list(phantom.classes), "label_values": list(values)}


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"cases": {"a": 1}}', '{"cases": {"a": {"status": "done"}}}']
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "predictions.json").write_text(content)
    with pytest.raises(FileFormatError, match="not a manifest of predictions"):
        predict.read_manifests(tmp_path)


def test_without_a_manifest_there_is_nothing_to_join(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"no predictions.json; expected a folder written by anysite"):
        predict.read_manifests(tmp_path)


def test_weights_of_another_network_are_refused(phantom: Dataset, run: Run, tmp_path: Path) -> None:
    wider = replace(run, config=small_config("network.width=8"))
    with pytest.raises(runs.RunError, match="tensors that do not fit"):
        segment([wider], few(phantom), tmp_path)


def test_numbered_pictures_are_cases_of_their_own(phantom: Dataset, run: Run, tmp_path: Path) -> None:
    for index, case in enumerate(few(phantom)):
        (tmp_path / f"frame_{index:04d}.png").write_bytes(case.image_paths[0].read_bytes())
    dataset, _ = predict.open_input(tmp_path, run.plan)
    assert [case.id for case in dataset.cases] == ["frame_0000", "frame_0001", "frame_0002"]
    assert [case.patient for case in dataset.cases] == [case.id for case in dataset.cases]
    channels = run.plan.model_copy(update={"channels": 3})
    assert [case.id for case in predict.open_input(tmp_path, channels)[0].cases] == ["frame"]
    (tmp_path / "other_0000.png").write_bytes((tmp_path / "frame_0000.png").read_bytes())
    (tmp_path / "other_0001.png").write_bytes((tmp_path / "frame_0000.png").read_bytes())
    assert [case.id for case in predict.open_input(tmp_path, channels)[0].cases] == ["frame", "other"]
    for index in range(2):
        (tmp_path / f"other_{index:04d}.png").unlink()
    for index in range(3, 9):
        (tmp_path / f"frame_{index:04d}.png").write_bytes((tmp_path / "frame_0000.png").read_bytes())
    assert len(open_images(tmp_path)) == 9
