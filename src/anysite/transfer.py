"""Starting a network from the weights of an earlier run, and saying which of them it took."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from anysite import runs
from anysite.config import Config
from anysite.data.case import Dataset
from anysite.errors import ConfigError
from anysite.networks import Network, encoder_tensors
from anysite.plan import Plan
from anysite.splits import Splits

LEAST_SHARE = 0.5  # of the encoder's values; with fewer a training would all but start from scratch


@dataclass(frozen=True)
class Transfer:
    """What became of each tensor of a network that starts from a run.

    Attributes:
        reshaped: Taken from a network of other input channels: the mean over them, once for each of ours.
        skipped: Why each of the rest keeps its random values.
        encoder_share: Share of the encoder's values that were taken or reshaped.
    """

    taken: tuple[str, ...]
    reshaped: tuple[str, ...]
    skipped: dict[str, str]
    encoder_share: float


def locate_start(config: Config, output: Path) -> Config:
    """Name the run to start from as seen from the run folder: the folders above both may be named after people."""
    if config.pretrained is None:
        return config
    start = str(Path(config.pretrained).resolve())
    with suppress(ValueError):  # another drive on Windows
        start = os.path.relpath(start, output.resolve())
    return config.model_copy(update={"pretrained": start})


def open_start(pretrained: str, output: Path) -> runs.Run:
    """Open the run to start from, named as seen from the run folder `output`.

    Raises:
        RunError: no run that can be read lies there.
    """
    return runs.open_run((output.resolve() / pretrained).resolve())


def transfer(run: runs.Run, network: Network) -> Transfer:
    """Put the weights of `run` into `network` wherever they fit: of a pretraining the encoder's, else all.

    Raises:
        ConfigError: so little fits that the network would all but train from scratch.
        RunError: the weights cannot be read.
    """
    found, _ = runs.load_tensors(run.path / runs.WEIGHTS)
    offered = set(run.manifest["encoder"]) if runs.is_pretraining(run) else set(found)
    state = network.state_dict()
    encoder = {name for name in encoder_tensors(network) if state[name].is_floating_point()}
    taken: dict[str, Tensor] = {}
    reshaped: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    for name, tensor in state.items():
        source = found.get(name)
        if source is None:
            skipped[name] = "absent from the run"
        elif name not in offered:
            skipped[name] = "not pretrained"
        elif source.shape == tensor.shape:
            taken[name] = source
        elif (
            _takes_the_image(source, run.plan.network_channels)
            and _takes_the_image(tensor, network.channels)
            and (source.shape[0], *source.shape[2:]) == (tensor.shape[0], *tensor.shape[2:])
        ):
            reshaped[name] = source.mean(1, keepdim=True).expand_as(tensor) * (
                source.shape[1] / tensor.shape[1]
            )
        else:
            skipped[name] = "of another shape"
    fitting = sum(state[name].numel() for name in encoder & (taken.keys() | reshaped.keys()))
    share = fitting / sum(state[name].numel() for name in encoder)
    result = Transfer(tuple(taken), tuple(reshaped), skipped, share)
    if share < LEAST_SHARE:
        raise ConfigError(
            f"a run whose weights fit {100 * share:.0f} % of the encoder",
            where=f"pretrained={run.path}",
            expected=f"at least {100 * LEAST_SHARE:.0f} %: network {run.config.network.name} of the same settings and "
            f"patch size {list(run.plan.patch_size)}",
            fix="use the settings of that run, or leave pretrained out to train from scratch",
        )
    network.load_state_dict({**state, **taken, **reshaped})
    return result


def compare_intensities(theirs: Plan, ours: Plan) -> str:
    """Return how images that weights come from are normalised otherwise than those to come; empty where alike."""
    then, now = (sorted({one.kind for one in plan.normalisation}) for plan in (theirs, ours))
    if then == now:
        return ""
    return (
        f"pretrained: its images were normalised by {' and '.join(then)}, these are by {' and '.join(now)}, so that "
        f"its weights fit less well; --set plan.normalisation={then[0]} would be as there"
    )


def cases_seen(run: runs.Run) -> dict[str, set[str]]:
    """Return the ids of all cases that a run learned from, by dataset, with those of the runs it started from."""
    started_from = run.manifest.get("started_from", {})
    seen = {dataset: set(ids) for dataset, ids in started_from.get("seen", {}).items()}
    own = {*run.splits["training"], *run.splits.get("unlabelled", ())}
    if (run.path / "pretraining" / runs.SPLITS).is_file():
        own |= {*runs.read_splits(run.path / "pretraining")["training"]}
    seen.setdefault(run.manifest.get("dataset", ""), set()).update(own)
    return seen


def cases_pretrained_on(run: runs.Run) -> set[str]:
    """Return the ids of all cases that the runs learned from whose weights this one started from."""
    seen = run.manifest.get("started_from", {}).get("seen", {}).values()
    return {id for ids in seen for id in (*ids, *_without_prefix({*ids}, run.plan))}


def require_unseen(run: runs.Run, dataset: Dataset, splits: Splits) -> list[str]:
    """Refuse weights that have learned from what this training is tested on.

    Returns the ids of such cases that datasets of other names have too, which may be the same images or not.

    Raises:
        ConfigError: the earlier run, or one that it started from, saw test or held-out cases of this one.
    """
    seen = cases_seen(run)
    kept_out = {case.id for case in (*splits.held_out.cases, *splits.test.cases)}
    if both := sorted(seen.pop(dataset.name, set()) & kept_out):
        raise ConfigError(
            f"a run that learned from {len(both)} cases that this training holds out or tests, such as {both[0]}",
            where=f"pretrained={run.path}",
            expected="one of other cases",
            fix="give both the same seed and test sites, or pretrain in the same command by pretrain.objectives",
        )
    # A list of datasets puts their names before the ids of their cases.
    elsewhere = {id for name, ids in seen.items() for id in (*ids, *_without_prefix(ids, run.plan))}
    tasks = dataset.tasks
    own = {case.id: case.id.removeprefix(f"{case.task}_") if case.task in tasks else case.id
           for case in (*splits.held_out.cases, *splits.test.cases)}  # fmt: skip
    return sorted(id for id, plain in own.items() if {id, plain} & elsewhere)


def _without_prefix(ids: set[str], plan: Plan) -> set[str]:
    prefixes = [f"{variant.task}_" for variant in plan.variants if variant.task]
    return {id.removeprefix(prefix) for id in ids for prefix in prefixes if id.startswith(prefix)}


def _takes_the_image(weight: Tensor, channels: int) -> bool:
    return weight.ndim > 2 and weight.shape[1] == channels
