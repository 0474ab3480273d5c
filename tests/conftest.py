"""Small datasets that several tests share."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from anysite import config
from anysite.data.case import Dataset
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom

SMALL = [
    "network.width=4",
    "network.depth=3",
    "plan.patch_size=[32, 32]",
    "train.batch_size=2",
    "train.threads=1",
    "train.precision=32-true",
    "train.validation_cases=2",
    "predict.flips=false",
    "judge.detectors={}",  # of networks that have learned nothing it says nothing
    "predict.precision=32-true",
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the tests run side by side


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs of a benchmark that run in this process, as most may, take one thread."""
    monkeypatch.setattr("anysite.benchmark.compute.count_cores", lambda: 1)


@pytest.fixture(scope="session", autouse=True)
def network_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Refuse and record connections to other machines, in this process and in those that tests start."""
    report = tmp_path_factory.mktemp("network") / "connections.txt"
    os.environ["ANYSITE_TEST_CONNECTIONS"] = str(report)
    folder = Path(__file__).parent / "offline"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    )
    runpy.run_path(str(folder / "sitecustomize.py"))
    return report


@pytest.fixture(autouse=True)
def _no_connections(network_report: Path) -> Iterator[None]:
    yield
    if network_report.is_file():
        connections = network_report.read_text()
        network_report.unlink()
        pytest.fail(f"connections to other machines: {connections}")


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites of small pictures, two patients each and more."""
    folder = tmp_path_factory.mktemp("phantom")
    return write_phantom(folder / "phantom", patients_per_site=3, size=64, sites=("north", "east", "west"))


@pytest.fixture(scope="session")
def phantom(phantom_folder: Path) -> Dataset:
    """The dataset in `phantom_folder`."""
    return open_dataset(phantom_folder)


def small_config(*overrides: str) -> config.Config:
    """Return settings that train in seconds."""
    return config.load("baseline", [*SMALL, "train.steps=6", *overrides])


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(0)
