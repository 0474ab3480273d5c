"""The run folder: configuration, plan, splits, weights and log; data only, never code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from anysite import __version__, atomic, config, provenance, registry
from anysite.calibration import Temperature
from anysite.errors import (
    AnysiteError,
    ConfigError,
    FileFormatError,
    RunError,
    describe_error,
    describe_invalid,
)
from anysite.judge import Judge
from anysite.learner import build_network
from anysite.networks import Network
from anysite.objectives.reflection import Reflection
from anysite.plan import Plan
from anysite.postprocessing import Postprocessing

CONFIG, PLAN, SPLITS, WEIGHTS = "config.json", "plan.json", "splits.json", "weights.safetensors"
CHECKPOINT, MANIFEST, LOG = "checkpoint.safetensors", "run.json", "log.jsonl"
CALIBRATION, POSTPROCESSING = "calibration.json", "postprocessing.json"
JUDGE, REFLECTION = "judge.safetensors", "reflection.safetensors"
SEALED = (CONFIG, PLAN, SPLITS, WEIGHTS)
MAX_HEADER = 2**22  # bytes; thousands of tensors need a tenth of it


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run, ready to segment.

    Attributes:
        splits: Case ids by role: "training", "held_out" (source patients not trained on), "test".
        temperature: Of its probabilities, from the held-out patients.
        judge: Of its masks; none where none was wanted, or nothing could be learned from.
        postprocessing: Of its masks.
    """

    path: Path
    config: config.Config
    plan: Plan
    splits: dict[str, list[str]]
    manifest: dict[str, Any]
    temperature: Temperature = Temperature()
    judge: Judge | None = None
    postprocessing: Postprocessing = Postprocessing()

    def network(self) -> Network:
        """Build the network and load its weights.

        Raises:
            RunError: the weights do not fit the network that the configuration describes.
        """
        network = self._build()
        _load_weights(network, self.path / WEIGHTS)
        return network.eval()

    def _build(self) -> Network:
        try:
            return build_network(self.config, self.plan)
        except (TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
            raise RunError(
                f"{CONFIG} and {PLAN} describe no network that can be built ({describe_error(error)})",
                where=self.path,
                fix="restore the folder from its source",
            ) from error

    def reflection(self) -> Reflection | None:
        """Build what test-time reflection needs and load its weights; none where nobody learned it.

        Raises:
            RunError: the weights do not fit the settings that lie beside them.
        """
        path = self.path / REFLECTION
        if REFLECTION not in self.manifest.get("files", {}):
            return None
        _, settings = load_tensors(path)
        try:
            reflection: Reflection = registry.build("objective", "reflection", **settings)
        except (ConfigError, TypeError) as error:
            raise RunError(f"settings that do not fit ({error})", where=path) from None
        reflection.attach(self._build(), self.plan, ())
        _load_weights(reflection, path)
        return reflection.eval().requires_grad_(False)


def _load_weights(module: nn.Module, path: Path) -> None:
    weights, _ = load_tensors(path)
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise RunError(
            f"{len(odd)} tensors that do not fit, such as {odd[0]} ({found.get(odd[0])})",
            where=path,
            expected=f"{expected.get(odd[0])}, as config.json and plan.json describe the network",
            fix="restore the folder from its source",
        )
    module.load_state_dict(weights)


def open_run(path: Path) -> Run:
    """Open a finished run folder and compare every file with its manifest.

    Raises:
        RunError: the folder is no finished run, or a file is missing, altered or of another version's form.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if not is_finished(path):
        raise RunError(
            "training that has not finished", where=path, fix="continue it with anysite train --resume"
        )
    for name in dict.fromkeys([*SEALED, *manifest["files"]]):
        if not (path / name).is_file():
            raise RunError("no such file", where=path / name, fix="restore the run folder from its source")
        if atomic.sha256(path / name) != manifest["files"].get(name):
            raise RunError(
                "a file altered since training",
                where=path / name,
                fix="restore the run folder from its source",
            )
    return Run(
        path,
        read_config(path),
        read_plan(path),
        read_splits(path),
        manifest,
        read_temperature(path) if CALIBRATION in manifest["files"] else Temperature(),
        read_judge(path) if JUDGE in manifest["files"] else None,
        read_postprocessing(path) if POSTPROCESSING in manifest["files"] else Postprocessing(),
    )


def is_pretraining(run: Run) -> bool:
    """Tell whether a run learned from images alone, so that it segments nothing."""
    return run.manifest.get("kind") == "pretraining"


def is_finished(path: Path) -> bool:
    """Tell whether the training in a run folder came to its end."""
    return bool(read_manifest(path).get("finished"))


def read_config(path: Path) -> config.Config:
    """Read a run folder's configuration.

    Raises:
        RunError: it is not a configuration of this version.
    """
    content = _read_part(path / CONFIG)
    if not isinstance(content, dict):
        raise RunError("not a group of settings", where=path / CONFIG)
    try:
        return config.parse(content)
    except ConfigError as error:
        raise RunError(str(error), where=path / CONFIG) from None


def read_plan(path: Path) -> Plan:
    """Read a run folder's plan.

    Raises:
        RunError: it is not a plan of this version.
    """
    try:
        return Plan.model_validate(_read_part(path / PLAN))
    except ValidationError as error:
        raise RunError(describe_invalid(error), where=path / PLAN) from None


def read_splits(path: Path) -> dict[str, list[str]]:
    """Read a run folder's case ids by role.

    Raises:
        RunError: it is not lists of names.
    """
    content = _read_part(path / SPLITS)
    if not isinstance(content, dict) or not all(
        isinstance(ids, list) and all(isinstance(name, str) for name in ids) for ids in content.values()
    ):
        raise RunError("not lists of case ids by role", where=path / SPLITS)
    return content


def read_temperature(path: Path) -> Temperature:
    """Read the temperature of a run folder's probabilities.

    Raises:
        RunError: it is not positive numbers.
    """
    content = _read_part(path / CALIBRATION)
    values = content.get("temperature") if isinstance(content, dict) else None
    if (
        not isinstance(values, list)
        or not values
        or not all(isinstance(v, int | float) and v > 0 for v in values)
    ):
        raise RunError("no temperature", where=path / CALIBRATION, expected="positive numbers")
    return Temperature(tuple(map(float, values)))


def read_postprocessing(path: Path) -> Postprocessing:
    """Read what a run folder takes out of its masks.

    Raises:
        RunError: it is not of this version.
    """
    try:
        return Postprocessing.model_validate(_read_part(path / POSTPROCESSING))
    except ValidationError as error:
        raise RunError(describe_invalid(error), where=path / POSTPROCESSING) from None


def read_judge(path: Path) -> Judge:
    """Read a run folder's judge.

    Raises:
        RunError: it does not fit the configuration.
    """
    tensors, facts = load_tensors(path / JUDGE)
    try:
        judge = Judge(read_config(path).judge)
        judge.recall({name: tensor.numpy() for name, tensor in tensors.items()}, facts)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"not a judge of this configuration ({error})", where=path / JUDGE) from None
    return judge


def start(
    path: Path, settings: config.Config, plan: Plan, splits: dict[str, list[str]], **facts: Any
) -> None:
    """Write the parts of a run folder that are known before training."""
    path.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path / CONFIG, settings.model_dump(mode="json"))
    atomic.write_json(path / PLAN, plan.model_dump(mode="json"))
    atomic.write_json(path / SPLITS, splits)
    # The shape nnU-Net users know: a list of folds, here one.
    atomic.write_json(path / "splits_final.json", [{"train": splits["training"], "val": splits["held_out"]}])
    atomic.write_json(
        path / MANIFEST, {"anysite": __version__, "created": provenance.now(), "finished": False, **facts}
    )


def note(path: Path, **facts: Any) -> None:
    """Add facts to what the manifest of an unfinished run says."""
    atomic.write_json(path / MANIFEST, read_manifest(path) | facts)


def finish(
    path: Path,
    network: Network,
    calibration: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
    reflection: nn.Module | None = None,
    postprocessing: Mapping[str, Any] | None = None,
    **facts: Any,
) -> None:
    """Write all that was learned and seal the folder: a digest of every file that prediction relies on."""
    save_tensors(path / WEIGHTS, network.state_dict())
    if calibration is not None:
        atomic.write_json(path / CALIBRATION, dict(calibration))
    if postprocessing is not None:
        atomic.write_json(path / POSTPROCESSING, dict(postprocessing))
    if judge is not None:
        arrays, learned = judge.memory()
        save_tensors(path / JUDGE, {name: torch.from_numpy(a.copy()) for name, a in arrays.items()}, learned)
    if reflection is not None:
        settings = read_config(path).objectives["reflection"]
        save_tensors(path / REFLECTION, reflection.state_dict(), settings)
    manifest = {k: v for k, v in read_manifest(path).items() if k != "files"}
    manifest.update(facts, finished=True, finished_at=provenance.now())
    manifest.update(versions=provenance.versions(), commit=provenance.commit())
    names = [*SEALED]
    parts = {CALIBRATION: calibration, POSTPROCESSING: postprocessing, JUDGE: judge, REFLECTION: reflection}
    names += [name for name, part in parts.items() if part is not None]
    manifest["files"] = {name: atomic.sha256(path / name) for name in names}
    atomic.write_json(path / MANIFEST, manifest)
    (path / CHECKPOINT).unlink(missing_ok=True)


def take_reflection(path: Path, learned: Path) -> None:
    """Put into a finished run what another one has learned to reflect by, and seal it."""
    tensors, settings = load_tensors(learned / REFLECTION)
    manifest = read_manifest(path)
    files = {name: digest for name, digest in manifest["files"].items() if name != REFLECTION}
    # Between these writes the run is one that has not learned to reflect, never one with an altered file.
    atomic.write_json(path / MANIFEST, manifest | {"files": files})
    save_tensors(path / REFLECTION, tensors, settings)
    files[REFLECTION] = atomic.sha256(path / REFLECTION)
    atomic.write_json(path / MANIFEST, manifest | {"files": files})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
    """Write tensors and a JSON-able dictionary as one safetensors file, atomically.

    Raises:
        RunError: the file cannot be written.
    """
    content = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        with atomic.replacing(path) as temporary:
            save_file(content, temporary, {"facts": json.dumps(facts or {})})
    except FileFormatError as error:
        raise RunError(error.found, where=path, fix=error.fix) from error
    except SafetensorError as error:  # its writer's word for a full disk
        raise RunError(
            f"cannot be written ({error})", where=path, fix="free space or choose another folder"
        ) from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise RunError(
                f"a header of {length} bytes", where=path, expected=f"a checkpoint's, at most {MAX_HEADER}"
            )
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"not readable as a checkpoint ({describe_error(error)})", where=path) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a run folder for one writer; the lock ends with the process that holds it, however that ends.

    Raises:
        RunError: another process holds it.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunError("in use by another process", where=path, fix="wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def tidy(path: Path) -> None:
    """Remove what a killed training left in a run folder that the caller has locked."""
    atomic.sweep(path)
    if (path / MANIFEST).is_file() and is_finished(path):
        (path / CHECKPOINT).unlink(missing_ok=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read what a run folder says of itself.

    Raises:
        RunError: it is missing or of another form.
    """
    if not (path / MANIFEST).is_file():
        raise RunError(f"no {MANIFEST}", where=path, expected="a run folder written by anysite train")
    content = _read_part(path / MANIFEST)
    if not isinstance(content, dict) or (
        content.get("finished") and not isinstance(content.get("files"), dict)
    ):
        raise RunError("not a run's manifest", where=path / MANIFEST)
    return content


def _read_part(path: Path) -> Any:
    try:
        return atomic.read_json(path)
    except AnysiteError as error:
        raise RunError(error.found, where=path, fix="restore the run folder from its source") from None
