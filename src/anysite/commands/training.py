"""Training and pretraining."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anysite.commands import (
    Budget,
    DatasetPath,
    Overrides,
    Plugins,
    Preset,
    Resume,
    RunOutput,
    Seed,
    TestDomains,
    parse_duration,
    trust,
)
from anysite.errors import ConfigError, DataError

if TYPE_CHECKING:
    from anysite.config import Config
    from anysite.data.case import Dataset


def train(
    dataset: DatasetPath,
    output: RunOutput,
    preset: Preset = "robust",
    set_: Overrides = None,
    test_domain: TestDomains = None,
    seed: Seed = None,
    budget: Budget = None,
    resume: Resume = False,
    plugin: Plugins = None,
) -> None:
    """Train on every site but the test sites, and write a run folder."""
    trust(plugin)
    from anysite import config
    from anysite.data.layouts import open_dataset

    settings = config.load(preset, _overrides(set_, test_domain, seed))
    _train(open_dataset(dataset, unseen=settings.test_domains), settings, preset, output, budget, resume)


def pretrain(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="a dataset, labelled or not, or a folder of images")
    ],
    output: RunOutput,
    method: Annotated[str, typer.Option(help="an objective that needs no labels")] = "tile_autoencoder",
    preset: Preset = "robust",
    set_: Overrides = None,
    test_domain: TestDomains = None,
    seed: Seed = None,
    budget: Budget = None,
    resume: Resume = False,
    plugin: Plugins = None,
) -> None:
    """Learn an encoder from images alone; anysite train --set pretrained=RUN starts from it."""
    trust(plugin)
    from anysite import config, registry
    from anysite.data.case import Dataset
    from anysite.data.layouts import find_cases, open_images
    from anysite.settings import PretrainSettings

    if registry.find("objective", method).needs_label:
        raise ConfigError(f"--method {method}, which needs labels", fix="use anysite train")
    settings = config.load(preset, _overrides(set_, test_domain, seed))
    chosen = settings.objectives | settings.pretrain.objectives
    # What is said of the training itself counts before what the group says of a pretraining within one.
    given = settings.pretrain.model_fields_set - {"objectives"} - settings.train.model_fields_set
    of_train = {name: getattr(settings.pretrain, name) for name in given}
    settings = settings.model_copy(
        update={
            "objectives": {method: chosen.get(method, {})},
            "pretrain": PretrainSettings(),
            "train": settings.train.model_copy(update=of_train),
        }
    )
    try:
        dataset = find_cases(images)
    except DataError:
        cases = open_images(images)  # says again what is wrong where it is a dataset after all
        dataset = Dataset(images.resolve().name, cases, (), ())
    _train(dataset, settings, preset, output, budget, resume)


def reflect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run of anysite train")],
    dataset: DatasetPath,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="of the objective reflection, such as width=8"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="default: as many as the training had", min=1)] = None,
    replace: Annotated[bool, typer.Option("--replace", help="learn anew what the run has already")] = False,
    plugin: Plugins = None,
) -> None:
    """Learn for a finished run what test-time reflection needs, from its training cases; its network stays."""
    trust(plugin)
    from anysite import config, console
    from anysite import reflect as reflecting
    from anysite.data.layouts import open_dataset

    named = [f"objectives.reflection.{override}" for override in set_ or []]
    settings = config.load("baseline", named).objectives.get("reflection", {})
    with console.training_bar() as advance:
        finished = reflecting.reflect(
            open_dataset(dataset), run, settings, steps=steps, replace=replace, on_progress=advance
        )
    console.say(f"{finished.path} can be predicted with --adapt refseg now")


def _overrides(set_: list[str] | None, test_domain: list[str] | None, seed: int | None) -> list[str]:
    from anysite.config import override_sites

    overrides = list(set_ or [])
    if test_domain:
        overrides.append(override_sites(test_domain))
    if seed is not None:
        overrides.append(f"seed={seed}")
    return overrides


def _train(
    dataset: Dataset, settings: Config, preset: str, output: Path, budget: str | None, resume: bool
) -> None:
    budget_s = None if budget is None else parse_duration(budget)
    from anysite import console
    from anysite import train as training

    with console.training_bar() as advance:
        run = training.train(
            dataset,
            settings,
            output,
            budget_s=budget_s,
            resume=resume,
            on_progress=advance,
            facts={"preset": Path(preset).stem},
        )
    console.show_run(run)
