"""Learning to reflect after the training: the run gains what adapting needs, and nothing else of it changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anysite import atomic, runs
from anysite.data.case import Dataset
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.errors import ConfigError, InterruptedTraining, RunError
from anysite.loop import Progress
from anysite.objectives.reflection import Reflection
from anysite.predict import predict
from anysite.reflect import FOLDER, reflect
from anysite.runs import Run, open_run
from anysite.train import train
from conftest import small_config

SMALL = {"width": 4, "prior_width": 4, "margin_voxels": 6}
JUDGED = "judge.detectors={histogram = {}}"


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("sites") / "phantom"
    return open_dataset(write_phantom(folder, patients_per_site=4, size=64, sites=("north", "west")))


@pytest.fixture
def plain(phantom: Dataset, tmp_path: Path) -> Run:
    config = small_config('test_domains=["west"]', "train.steps=6", JUDGED)
    return train(phantom, config, tmp_path / "run")


def test_masks_of_before_are_made_anew_and_a_second_writer_is_refused(
    plain: Run, phantom: Dataset, tmp_path: Path
) -> None:
    cases = [case for case in phantom.cases if case.domain == "west"][:1]

    def status(adapt: str) -> str:
        (outcome,) = predict([open_run(plain.path)], cases, tmp_path / adapt, adapt=adapt)
        return outcome.status

    for adapt in ("auto", "none"):
        assert [status(adapt), status(adapt)] == ["done", "skipped"]
    with runs.locked(plain.path), pytest.raises(RunError, match="in use by another process"):
        reflect(phantom, plain.path, SMALL, steps=1)
    learned = reflect(phantom, plain.path, SMALL)
    assert learned.manifest["steps"] == plain.manifest["steps"]
    assert status("auto") == "done"
    assert status("none") == "skipped"


def test_a_finished_run_learns_to_reflect_and_is_otherwise_the_same(plain: Run, phantom: Dataset) -> None:
    before = dict(plain.manifest["files"])
    assert plain.reflection() is None
    learned = reflect(phantom, plain.path, SMALL, steps=4)
    reflection = learned.reflection()
    assert isinstance(reflection, Reflection)
    assert reflection.width == 4
    after = {name: digest for name, digest in learned.manifest["files"].items() if name != runs.REFLECTION}
    assert after == before
    assert {name: atomic.sha256(plain.path / name) for name in before} == before
    assert not (plain.path / FOLDER).exists()
    cases = [case for case in phantom.cases if case.domain == "west"][:1]
    (outcome,) = predict([learned], cases, plain.path.parent / "masks", adapt="refseg:always")
    assert (outcome.status, outcome.error) == ("done", "")


def test_what_was_learned_is_what_training_with_the_objective_learns(
    phantom: Dataset, tmp_path: Path
) -> None:
    """The loss falls: the drawing comes closer to the image than that of weights drawn at random."""
    config = small_config('test_domains=["west"]', "train.steps=6")
    run = train(phantom, config, tmp_path / "run")
    losses = []
    for steps in (1, 60):
        learned = reflect(phantom, run.path, SMALL, steps=steps, replace=steps > 1).reflection()
        assert learned is not None
        case = phantom.cases[0]
        image = run.plan.to_grid(case.image())[None]
        label = run.plan.label_to_grid(phantom.label_of(case), case.image())[None].long()
        drawn = learned.synthesiser(learned.as_maps(label))
        losses.append(float((drawn - learned.target(image)).abs().mean()))
    assert losses[1] < 0.9 * losses[0]


def test_runs_that_cannot_or_need_not_learn_it_are_refused(
    plain: Run, phantom: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="depth"):
        reflect(phantom, plain.path, {"depth": 3}, steps=2)
    with pytest.raises(RunError, match="was trained on"):
        reflect(phantom.with_cases(phantom.cases[2:]), plain.path, SMALL, steps=2)
    reflect(phantom, plain.path, SMALL, steps=2)
    with pytest.raises(RunError, match="--replace"):
        reflect(phantom, plain.path, SMALL, steps=2)
    again = reflect(phantom, plain.path, SMALL | {"width": 6}, steps=2, replace=True).reflection()
    assert again is not None
    assert again.width == 6
    alone = small_config("objectives={masked_autoencoder = {}}", "train.steps=2", 'test_domains=["west"]')
    pretrained = train(phantom, alone, tmp_path / "pretrained")
    with pytest.raises(RunError, match="a pretraining"):
        reflect(phantom, pretrained.path, SMALL, steps=2)


def test_interrupted_it_continues(plain: Run, phantom: Dataset) -> None:
    whole = reflect(phantom, plain.path, SMALL, steps=6).reflection()

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise InterruptedTraining("stopped", where=plain.path)

    with pytest.raises(InterruptedTraining):
        reflect(phantom, plain.path, SMALL, steps=6, replace=True, on_progress=stop)
    still = open_run(plain.path).reflection()
    continued = reflect(phantom, plain.path, SMALL, steps=6, replace=True).reflection()
    assert whole is not None
    assert still is not None
    assert continued is not None
    for one, other in zip(whole.state_dict().values(), continued.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_what_was_learned_is_kept_where_only_the_last_copy_failed(
    plain: Run, phantom: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise RunError("no space", where=plain.path)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "take_reflection", refuse)
        with pytest.raises(RunError, match="no space"):
            reflect(phantom, plain.path, SMALL, steps=3)
    learned = open_run(plain.path / FOLDER).reflection()
    steps: list[int] = []
    taken = reflect(phantom, plain.path, SMALL, steps=3, on_progress=lambda p: steps.append(p.step))
    assert steps == []
    found = taken.reflection()
    assert learned is not None
    assert found is not None
    for one, other in zip(learned.state_dict().values(), found.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_run_stays_sound_when_the_last_write_fails(
    plain: Run, phantom: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reflect(phantom, plain.path, SMALL, steps=2)

    def refuse(*arguments: object) -> None:
        raise RunError("no space", where=plain.path)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_tensors", refuse)
        with pytest.raises(RunError, match="no space"):
            runs.take_reflection(plain.path, plain.path)
    assert open_run(plain.path).reflection() is None
