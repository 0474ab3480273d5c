"""The main job at the demo's size: the phantom keeps its promise, and the chain from files to rows holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from anysite import config
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.evaluate import evaluate
from anysite.predict import predict
from anysite.statistics import estimate_mean
from anysite.train import train

# By dimension: settings and patients a site. In 3-D it takes long: a speck where no nodule is counts as 0.
SIZES = {
    2: (["train.steps=500", "predict.flips=false"], 12),
    3: (["train.steps=3000", "plan.patch_size=[48, 48, 48]"], 16),
}


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [2, 3])
def test_a_network_learns_the_phantom_and_loses_at_the_unseen_site(dimension: int, tmp_path: Path) -> None:
    overrides, patients = SIZES[dimension]
    folder = write_phantom(tmp_path / "phantom", dimension=dimension, patients_per_site=patients)
    dataset = open_dataset(folder)
    settings = config.load("baseline", [*overrides, 'test_domains=["west"]', "train.threads=1"])
    run = train(dataset, settings, tmp_path / "run")
    cases = [case for case in dataset.cases if case.id not in run.splits["training"]]
    outcomes = list(predict([run], cases, tmp_path / "masks"))
    assert {outcome.status for outcome in outcomes} == {"done"}
    rows = [row for row in evaluate(tmp_path / "masks", dataset).rows if row["metric"] == "dice"]
    means = {}
    for split in ("in_domain", "unseen"):
        chosen = [row for row in rows if row["split"] == split and row["value"] is not None]
        means[split] = estimate_mean([r["value"] for r in chosen], [r["patient"] for r in chosen]).mean
    assert means["in_domain"] > 0.9
    assert means["in_domain"] - means["unseen"] > 0.10
