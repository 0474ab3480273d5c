"""Training: golden result, bit-identical resume, signals, non-finite losses, two processes."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anysite import atomic, runs
from anysite.data.case import Dataset
from anysite.errors import ConfigError, DataError, InterruptedTraining, RunError, TrainingError
from anysite.loop import Progress, Training, learning_rate
from anysite.patches import Batch
from anysite.settings import TrainSettings
from anysite.splits import split
from anysite.train import train
from conftest import small_config


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / runs.WEIGHTS)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def uninterrupted(phantom: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(phantom, small_config("test_domains=['west']"), path)
    return path


def test_a_second_run_gives_the_same_bits(phantom: Dataset, uninterrupted: Path, tmp_path: Path) -> None:
    train(phantom, small_config("test_domains=['west']", "train.prefetch=false"), tmp_path / "run")
    assert equal(weights(uninterrupted), weights(tmp_path / "run"))


def test_another_seed_gives_other_weights(phantom: Dataset, uninterrupted: Path, tmp_path: Path) -> None:
    train(phantom, small_config("test_domains=['west']", "seed=1"), tmp_path / "run")
    assert not equal(weights(uninterrupted), weights(tmp_path / "run"))


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resuming_is_bit_identical(
    phantom: Dataset, uninterrupted: Path, tmp_path: Path, stop: int, number: signal.Signals
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == stop:
            os.kill(os.getpid(), number)

    settings, former = small_config("test_domains=['west']"), signal.getsignal(number)
    with pytest.raises(InterruptedTraining, match=f"step {stop} of 6") as caught:
        train(phantom, settings, tmp_path / "run", on_progress=interrupt)
    assert caught.value.exit_code == 3
    assert not list(tmp_path.glob("run/.*partial*"))
    with pytest.raises(RunError, match="not finished"):
        runs.open_run(tmp_path / "run")
    train(phantom, settings, tmp_path / "run", resume=True)
    assert equal(weights(uninterrupted), weights(tmp_path / "run"))
    logs = [(folder / runs.LOG).read_text() for folder in (uninterrupted, tmp_path / "run")]
    assert logs[0] == logs[1]
    assert signal.getsignal(number) is former


def test_resuming_with_other_settings_says_that_they_are_ignored(phantom: Dataset, tmp_path: Path) -> None:
    notes: list[str] = []

    def watch(progress: Progress) -> None:
        notes.append(progress.note)
        if progress.step == 2 and not progress.note:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedTraining):
        train(phantom, small_config(), tmp_path / "run", on_progress=watch)
    assert not any(notes)
    other = small_config("train.learning_rate=0.5", "network.width=8", "objectives.medcontext={}")
    run = train(phantom, other, tmp_path / "run", resume=True, on_progress=watch)
    assert [note for note in notes if note] == [
        "resuming with the run's own settings; ignored: network.width=8, objectives.medcontext={}, "
        "train.learning_rate=0.5"
    ]
    assert run.config == small_config()


def test_resuming_says_that_another_budget_is_ignored(phantom: Dataset, tmp_path: Path) -> None:
    notes: list[str] = []
    train(phantom, small_config(), tmp_path / "run")
    for budget in (None, 30.0):
        train(
            phantom, small_config(), tmp_path / "run", resume=True, budget_s=budget,
            on_progress=lambda progress: notes.append(progress.note),
        )  # fmt: skip
    assert [note for note in notes if note] == [
        "resuming with the run's own number of steps; --budget is ignored"
    ]


def test_a_wrong_setting_leaves_no_run_behind(phantom: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no setting 'widht'"):
        train(phantom, small_config("network.widht=8"), tmp_path / "run")
    for setting, message in (
        ("augment.flip_axes=[2]", "augment.flip_axes: axis 2; expected spatial axes 0 to 1"),
        ("train={batch_size = 1, unlabelled_share = 0.5}", "train.batch_size: 1; expected 2 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(phantom, small_config(setting), tmp_path / "run")
        assert not (tmp_path / "run" / "run.json").exists()
    train(phantom, small_config("train.steps=1"), tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(phantom: Dataset, uninterrupted: Path) -> None:
    before = atomic.sha256(uninterrupted / runs.MANIFEST)
    train(phantom, small_config("test_domains=['west']"), uninterrupted, resume=True)
    assert atomic.sha256(uninterrupted / runs.MANIFEST) == before


def test_a_run_is_never_overwritten(phantom: Dataset, uninterrupted: Path) -> None:
    with pytest.raises(RunError, match="already there"):
        train(phantom, small_config(), uninterrupted)


def test_resuming_on_other_cases_is_refused(phantom: Dataset, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedTraining):
        train(phantom, small_config(), tmp_path / "run", on_progress=interrupt)
    fewer = phantom.with_cases(c for c in phantom.cases if c.domain != "east")
    with pytest.raises(RunError, match="differ from those"):
        train(fewer, small_config(), tmp_path / "run", resume=True)


def test_nothing_of_the_test_site_reaches_the_run(
    phantom: Dataset, uninterrupted: Path, tmp_path: Path
) -> None:
    """Training with the test site's files deleted gives the same bits."""
    kept = [
        case
        if case.domain != "west"
        else type(case)(case.id, case.patient, case.domain, (tmp_path / "gone.png",))
        for case in phantom.cases
    ]
    train(phantom.with_cases(kept), small_config("test_domains=['west']"), tmp_path / "run")
    assert equal(weights(uninterrupted), weights(tmp_path / "run"))
    assert runs.read_plan(tmp_path / "run") == runs.read_plan(uninterrupted)


def test_split_keeps_patients_apart(phantom: Dataset) -> None:
    parts = split(phantom, small_config("test_domains=['west']"))
    people = [{c.patient for c in part.cases} for part in (parts.training, parts.held_out, parts.test)]
    assert all(people)
    assert sum(map(len, people)) == len(set.union(*people))
    with pytest.raises(DataError, match="no site named 'mars'"):
        split(phantom, small_config("test_domains=['mars']"))
    with pytest.raises(DataError, match="no labelled cases to train on"):
        split(phantom, small_config("test_domains=['west', 'north', 'east']"))


def test_a_patient_of_the_test_site_trains_nowhere(phantom: Dataset) -> None:
    moved = [c for c in phantom.cases if c.domain == "west"][0]
    twin = type(moved)("twin", moved.patient, "north", moved.image_paths, moved.label_path)
    parts = split(phantom.with_cases([*phantom.cases, twin]), small_config("test_domains=['west']"))
    assert "twin" not in {c.id for part in (parts.training, parts.held_out) for c in part.cases}
    assert parts.dropped == ("twin",)


def test_patients_named_alike_at_every_site_are_explained(phantom: Dataset) -> None:
    alike = [type(c)(c.id, "p1", c.domain, c.image_paths, c.label_path) for c in phantom.cases]
    with pytest.raises(
        DataError, match="dropped because their patient is also at a test site: give patients"
    ):
        split(phantom.with_cases(alike), small_config("test_domains=['west']"))


def test_a_loss_that_is_not_finite_stops_at_once(
    phantom: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anysite.objectives.supervised import Supervised

    calls = []

    def poisoned(self: Supervised, step: object) -> Tensor:
        calls.append(step)
        return torch.tensor(math.nan if len(calls) == 3 else 1.0, requires_grad=True) + 0 * sum(
            p.sum()
            for p in step.network.parameters()  # pyright: ignore[reportAttributeAccessIssue]
        )

    monkeypatch.setattr(Supervised, "forward", poisoned)
    with pytest.raises(TrainingError, match=r"loss nan at step 3 .* on cases ") as caught:
        train(phantom, small_config("train.checkpoint_every=2"), tmp_path / "run")
    assert any(case.id in str(caught.value) for case in phantom.cases)
    assert len(calls) == 3
    tensors, facts = runs.load_tensors(tmp_path / "run" / runs.CHECKPOINT)
    assert facts["step"] == 2
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_the_budget_chooses_the_steps_and_leaves_no_trace(phantom: Dataset, tmp_path: Path) -> None:
    run = train(phantom, small_config("test_domains=['west']"), tmp_path / "budget", budget_s=8)
    steps = run.manifest["steps"]
    assert steps > 6
    fixed = small_config("test_domains=['west']", f"train.steps={steps}")
    train(phantom, fixed, tmp_path / "fixed")
    assert equal(weights(tmp_path / "budget"), weights(tmp_path / "fixed"))


def test_averaged_weights_are_the_mean_over_the_last_steps_however_often_it_was_interrupted(
    phantom: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    take_step = Training.take_step

    def watch(self: Training, batch: Batch) -> dict[str, float]:
        values = take_step(self, batch)
        seen.append({name: t.clone() for name, t in self.learner.network.state_dict().items()})
        return values

    monkeypatch.setattr(Training, "take_step", watch)
    settings = small_config("test_domains=['west']", "train.average_share=0.5", "train.schedule=constant")
    train(phantom, settings, tmp_path / "run")
    averaged = weights(tmp_path / "run")
    assert len(seen) == 6
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, torch.stack([each[name] for each in seen[3:]]).mean(0))
    assert not equal(averaged, seen[-1])

    def interrupt(progress: Progress) -> None:
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedTraining):
        train(phantom, settings, tmp_path / "again", on_progress=interrupt)
    train(phantom, settings, tmp_path / "again", resume=True)
    assert equal(averaged, weights(tmp_path / "again"))


def test_a_checkpoint_of_before_weights_were_averaged_can_be_continued(
    phantom: Dataset, tmp_path: Path
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = small_config("test_domains=['west']")
    with pytest.raises(InterruptedTraining):
        train(phantom, settings, tmp_path / "run", on_progress=interrupt)
    tensors, facts = runs.load_tensors(tmp_path / "run" / runs.CHECKPOINT)
    former = {name: tensor for name, tensor in tensors.items() if not name.startswith("average.")}
    assert former.keys() < tensors.keys()
    runs.save_tensors(tmp_path / "run" / runs.CHECKPOINT, former, facts)
    assert train(phantom, settings, tmp_path / "run", resume=True).manifest["steps"] == 6


def test_averaged_weights_get_statistics_of_batches_of_their_own(phantom: Dataset, tmp_path: Path) -> None:
    settings = small_config("train.average_share=0.5", "train.schedule=constant", "network.norm=batch")
    run = train(phantom, settings, tmp_path / "run")
    plain = train(phantom, small_config("train.average_share=0", "network.norm=batch"), tmp_path / "plain")
    one, other = weights(run.path), weights(plain.path)
    moments = [name for name in one if name.endswith("running_mean")]
    assert moments
    assert not any(torch.equal(one[name], other[name]) for name in moments)
    assert all(one[name].isfinite().all() for name in one)


def test_learning_rate_schedules() -> None:
    for name, half in (("cosine", 0.5), ("polynomial", 0.5**0.9), ("constant", 1.0)):
        settings = TrainSettings(learning_rate=2.0, schedule=name, warmup_steps=10)  # pyright: ignore[reportArgumentType]
        assert learning_rate(0, 110, settings) == pytest.approx(0.2)
        assert learning_rate(10, 110, settings) == pytest.approx(2.0)
        assert learning_rate(60, 110, settings) == pytest.approx(2.0 * half)
        # A budget is measured by more steps than a short training has.
        assert learning_rate(5, 3, settings) == learning_rate(3, 3, settings)


def test_training_learns(phantom: Dataset, tmp_path: Path) -> None:
    run = train(phantom, small_config("train.steps=40", "train.learning_rate=0.01"), tmp_path / "run")
    losses = [json.loads(line)["total"] for line in (run.path / runs.LOG).read_text().splitlines()]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


@pytest.mark.slow
def test_two_processes_end_with_the_same_parameters(phantom: Dataset, tmp_path: Path) -> None:
    """Two gloo ranks see different batches and must still agree on every bit."""
    import subprocess
    import sys

    script = tmp_path / "two.py"
    script.write_text(
        "import sys, torch, hashlib\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from conftest import small_config\n"
        "from anysite import loop, runs, train\n"
        "from anysite.data.layouts import open_dataset\n"
        "def digest(learner):\n"
        "    return hashlib.sha256(b''.join(t.detach().numpy().tobytes() for t in learner.state_dict().values()))\n"
        "class Watched(loop.Training):\n"
        "    def run(self):\n"
        "        super().run()\n"
        f"        Path({str(tmp_path)!r}, f'rank{{self.fabric.global_rank}}').write_text(\n"
        "            digest(self.learner).hexdigest() + ' ' + '/'.join(self.sampler.batch(0).case_ids))\n"
        "train.Training = Watched\n"
        f"train.train(open_dataset(Path({str(phantom.cases[0].image_paths[0].parents[2])!r})),\n"
        f"    small_config('train.devices=2', 'train.accelerator=cpu'), Path({str(tmp_path / 'run')!r}))\n"
    )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=29531",
        str(script),
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    first, second = ((tmp_path / f"rank{rank}").read_text().split(" ") for rank in (0, 1))
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert runs.open_run(tmp_path / "run").manifest["steps"] == 6


def test_every_objective_is_in_the_log(uninterrupted: Path) -> None:
    line = json.loads((uninterrupted / runs.LOG).read_text().splitlines()[-1])
    assert {"step", "supervised", "total", "gradient_norm", "learning_rate", "dice"} <= line.keys()
