"""Run folders: sealed, compared, locked; whatever was done to a file, the error names it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from anysite import atomic, provenance, runs
from anysite.config import Config, load
from anysite.errors import RunError
from anysite.learner import build_network
from anysite.normalisation import Normalisation
from anysite.plan import Plan

PLAN = Plan(
    dimension=2,
    image_dimension=2,
    spacing=(1.0, 1.5),
    unit="px",
    channels=1,
    normalisation=(Normalisation(kind="dataset", mean=0.1, std=1 / 3, low=-1e-7, high=2.5),),
    patch_size=(16, 16),
    classes=("background", "organ", "nodule"),
    label_values=(0, 1, 7),
    regions=((1, 2), (2,)),
    region_names=("whole", "nodule"),
    region_classes=(1, 2),
    reasons=("because",),
)
SETTINGS = load("baseline", ["network.width=4", "network.depth=2", "test_domains=['west']"])
SPLITS = {"training": ["a", "b"], "held_out": ["c"], "test": ["d"]}
TENSORS = {"weight": torch.arange(12.0).reshape(3, 4), "step": torch.tensor(7), "flag": torch.tensor([True])}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    runs.start(path, SETTINGS, PLAN, SPLITS, dataset="phantom")
    torch.manual_seed(0)
    runs.finish(path, build_network(SETTINGS, PLAN), steps=3)
    return path


def seal(run: Path, **changes: Any) -> None:
    """Make the manifest fit the files as they are now."""
    manifest = json.loads((run / runs.MANIFEST).read_text()) | changes
    manifest["files"] = {name: atomic.sha256(run / name) for name in manifest["files"]}
    atomic.write_json(run / runs.MANIFEST, manifest)


def test_a_finished_run_comes_back(run: Path) -> None:
    opened = runs.open_run(run)
    assert (opened.config, opened.plan, opened.splits) == (SETTINGS, PLAN, SPLITS)
    assert (opened.manifest["dataset"], opened.manifest["steps"]) == ("phantom", 3)
    assert opened.manifest["versions"]["torch"] == torch.__version__
    torch.manual_seed(0)
    expected = build_network(SETTINGS, PLAN).eval()
    network = opened.network()
    assert not network.training
    image = torch.randn(1, 1, 16, 16)
    assert torch.equal(network(image), expected(image))
    folds = json.loads((run / "splits_final.json").read_text())
    assert folds == [{"train": ["a", "b"], "val": ["c"]}]


def test_a_run_under_way_is_refused(tmp_path: Path) -> None:
    runs.start(tmp_path / "run", SETTINGS, PLAN, SPLITS)
    assert not runs.is_finished(tmp_path / "run")
    with pytest.raises(RunError, match=r"not finished.*--resume"):
        runs.open_run(tmp_path / "run")
    with pytest.raises(RunError, match=r"no run\.json"):
        runs.open_run(tmp_path / "elsewhere")


def test_finishing_leaves_no_checkpoint(run: Path) -> None:
    runs.save_tensors(run / runs.CHECKPOINT, TENSORS)
    runs.finish(run, build_network(SETTINGS, PLAN))
    assert not (run / runs.CHECKPOINT).exists()
    assert sorted(json.loads((run / runs.MANIFEST).read_text())["files"]) == sorted(runs.SEALED)


@pytest.mark.parametrize("name", runs.SEALED)
def test_every_sealed_file_is_compared(run: Path, name: str) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunError, match="altered since training") as caught:
        runs.open_run(run)
    assert caught.value.where == str(run / name)
    (run / name).unlink()
    with pytest.raises(RunError, match="no such file") as caught:
        runs.open_run(run)
    assert caught.value.where == str(run / name)


@pytest.mark.parametrize("name", runs.SEALED)
def test_a_manifest_cannot_leave_a_file_out(run: Path, name: str) -> None:
    manifest = json.loads((run / runs.MANIFEST).read_text())
    del manifest["files"][name]
    atomic.write_json(run / runs.MANIFEST, manifest)
    with pytest.raises(RunError, match="altered"):
        runs.open_run(run)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "3",
        "null",
        '"run"',
        "{",
        '{"finished": true}',
        '{"finished": true, "files": []}',
        "[" * 99999,
    ]
    + ['{"finished": 1, "files": {"../../x": "0"}}', '{"finished": 1, "files": {"weights.safetensors": 3}}'],
)
def test_a_manifest_of_another_form_is_a_run_error(run: Path, content: str) -> None:
    (run / runs.MANIFEST).write_text(content)
    with pytest.raises(RunError):
        runs.open_run(run)


@pytest.mark.parametrize("name", [runs.CONFIG, runs.PLAN, runs.SPLITS])
@pytest.mark.parametrize("content", ["[]", "null", "3", '{"odd": 1}', "{", '{"training": [1]}'])
def test_a_sealed_part_of_another_form_names_the_file(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    seal(run)
    with pytest.raises(RunError) as caught:
        runs.open_run(run)
    assert caught.value.where == str(run / name)


def test_weights_of_another_network_are_refused(run: Path) -> None:
    wider = SETTINGS.model_copy(update={"network": load("baseline", ["network.width=6"]).network})
    runs.save_tensors(run / runs.WEIGHTS, build_network(wider, PLAN).state_dict())
    seal(run)
    opened = runs.open_run(run)
    with pytest.raises(RunError, match=r"tensors that do not fit.*expected \(4, 8, 3, 3\)") as caught:
        opened.network()
    assert caught.value.where == str(run / runs.WEIGHTS)
    (run / runs.WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(RunError):
        opened.network()


def test_splits_and_facts_of_a_run_do_not_reach_the_digest_of_settings() -> None:
    assert provenance.fingerprint({"a": 1, "b": [2]}) == provenance.fingerprint({"b": [2], "a": 1})
    assert provenance.fingerprint({"a": 1}) != provenance.fingerprint({"a": 2})
    assert provenance.fingerprint(SETTINGS.model_dump(mode="json")) != provenance.fingerprint(
        Config().model_dump(mode="json")
    )


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.arange(10)[::2],
        torch.ones(1).expand(5),
        torch.randn(3).bfloat16(),
        torch.tensor(3),
        torch.empty(0, 2),
        torch.randn(2, requires_grad=True),
    ],
    ids=["transposed", "channels_last", "strided", "expanded", "bfloat16", "scalar", "empty", "gradient"],
)
def test_tensors_come_back(tmp_path: Path, tensor: Tensor) -> None:
    facts = {"step": 3, "best": 0.1, "names": ["ä"]}
    runs.save_tensors(tmp_path / "t.safetensors", {"x": tensor, "same": tensor}, facts)
    loaded, found = runs.load_tensors(tmp_path / "t.safetensors")
    assert found == facts
    assert loaded.keys() == {"x", "same"}
    assert loaded["x"].dtype == tensor.dtype
    assert torch.equal(loaded["x"], tensor.detach())
    assert torch.equal(loaded["same"], tensor.detach())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "c"
    runs.save_tensors(path, TENSORS, {"step": 3})
    return path.read_bytes()


@pytest.mark.parametrize("share", [i / 20 for i in range(20)])
def test_a_checkpoint_cut_short_is_a_run_error(tmp_path: Path, checkpoint: bytes, share: float) -> None:
    (tmp_path / "c").write_bytes(checkpoint[: int(share * len(checkpoint))])
    with pytest.raises(RunError, match="not readable as a checkpoint") as caught:
        runs.load_tensors(tmp_path / "c")
    assert caught.value.where == str(tmp_path / "c")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_damaged_checkpoint_never_gives_another_error(
    tmp_path: Path, checkpoint: bytes, place: int, value: int
) -> None:
    damaged = bytearray(checkpoint)
    damaged[place % len(damaged)] = value
    (tmp_path / "c").write_bytes(damaged)
    with contextlib.suppress(RunError):
        runs.load_tensors(tmp_path / "c")


def test_a_missing_checkpoint_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="not readable as a checkpoint"):
        runs.load_tensors(tmp_path / "none")
    runs.save_tensors(tmp_path / "c", {"x": torch.ones(2)})

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match="No space left.*Free space"):
        runs.save_tensors(tmp_path / "c", {"x": torch.zeros(2)})
    monkeypatch.undo()
    assert torch.equal(runs.load_tensors(tmp_path / "c")[0]["x"], torch.ones(2))


def test_a_second_holder_is_refused(tmp_path: Path) -> None:
    with runs.locked(tmp_path):
        with pytest.raises(RunError, match="in use by another process"), runs.locked(tmp_path):
            pytest.fail("two holders")
        with (
            pytest.raises(RunError, match="in use"),
            runs.locked(tmp_path),
        ):  # the refused one did not free it
            pytest.fail("two holders")
    with runs.locked(tmp_path):
        pass


def test_an_error_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), runs.locked(tmp_path / "new"):
        raise ZeroDivisionError
    with runs.locked(tmp_path / "new"):
        pass


def test_another_process_is_refused_and_its_violent_end_frees_the_lock(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from anysite import runs\n"
        "with runs.locked(Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(RunError, match="in use"), runs.locked(tmp_path):
            pytest.fail("two holders")
        holder.kill()
        holder.wait()
    with runs.locked(tmp_path):
        pass
