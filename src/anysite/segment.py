"""From an image to a prediction on the image's own grid, by one run or an ensemble."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from anysite import compute, registry
from anysite.adapters import Adapter
from anysite.axes import choose_flip_axes
from anysite.calibration import Temperature
from anysite.config import Config
from anysite.data.volume import Volume
from anysite.detectors import Agreement, Layer, Output, add_layers
from anysite.errors import CASE_ERRORS, ConfigError, RunError, describe_error
from anysite.guard import (
    NO_BETTER,
    NOTHING_FOUND,
    Adaptation,
    changed_share,
    find_fault,
    find_reason_against,
)
from anysite.judge import Judge, Verdict, average_verdicts
from anysite.maps import GridMaps, Prediction, average
from anysite.networks import Network
from anysite.observations import count_agreement, count_shared, sum_layers
from anysite.plan import GridImage, Plan
from anysite.postprocessing import combine
from anysite.runs import Run, is_pretraining
from anysite.settings import PredictSettings
from anysite.windows import cut_patch, place_windows, slide


class Segmenter:
    """Segments images with the networks of one or several runs, whose probabilities are averaged.

    Args:
        runs: Whose plans, settings and temperatures count.
        settings: Of prediction; none: those of the first run.
        accelerator: "auto", "cpu" or "cuda".
        networks: Those of the runs where they are in memory already; none: loaded from the run folders.

    Raises:
        RunError: the runs do not segment the same classes, or one of them is a pretraining.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        settings: PredictSettings | None = None,
        accelerator: str = "auto",
        networks: Sequence[Network] | None = None,
    ) -> None:
        for run in runs:
            if is_pretraining(run):
                raise RunError(
                    "a pretraining, which segments nothing",
                    where=run.path,
                    expected="a run of anysite train",
                    fix=f"train from it with --set pretrained={run.path}",
                )
        for run in runs[1:]:
            if (run.plan.classes, run.plan.regions) != (runs[0].plan.classes, runs[0].plan.regions):
                raise RunError(
                    f"classes {', '.join(run.plan.classes)}",
                    where=run.path,
                    expected=f"{', '.join(runs[0].plan.classes)} as in {runs[0].path}, to average the two",
                )
        self.settings = settings or runs[0].config.predict
        self.device = torch.device(compute.choose_accelerator(accelerator))
        self.precision = compute.choose_precision(self.settings.precision, self.device.type)
        loaded = networks or [run.network() for run in runs]
        task = self.settings.task
        self.members = [
            _Member(self._place(network, run.path), _choose_plan(run, task), run.config)
            for network, run in zip(loaded, runs, strict=True)
        ]
        self.judges = [run.judge for run in runs]
        self.adapters = [
            self._build_adapter(run, member) for run, member in zip(runs, self.members, strict=True)
        ]
        self.reasons = {name: text for judge in self.judges if judge for name, text in judge.reasons.items()}
        self.plan = self.members[0].plan
        # The mean of several is less sure than each of them, so that their temperatures would overdo it.
        calibrate = self.settings.calibrate and len(runs) == 1
        self.temperature = runs[0].temperature if calibrate else Temperature()
        self.postprocessing = combine([run.postprocessing for run in runs])
        compute.keep_freed_memory()

    def segment(self, image: Volume) -> Prediction:
        """Segment one image.

        Raises:
            GeometryError: the image has other channels or spatial axes than the training cases had.
        """
        verdicts: list[Verdict] = []
        adaptations: list[Adaptation] = []
        drawings: dict[str, Tensor] = {}
        first: list[tuple[Plan, Tensor]] = []
        last: list[tuple[Plan, Tensor]] = []
        native = image.without_voxels()
        grids = _to_grids(image, [member.plan for member in self.members])
        del image  # a large one would lie beside all that follows
        for grid, member, judge, adapter in zip(grids, self.members, self.judges, self.adapters, strict=True):
            watch = judge is not None or adapter is not None
            before = after = self._predict(grid, member, watch=watch)
            verdict = None
            if judge is not None:
                image_alone = not segments_as_judged(member.config, member.plan, self.settings)
                verdict = judge.judge(before, self.settings.least_dice, image_alone=image_alone)
                verdicts.append(verdict)
            if adapter is not None:
                adaptation, after, drawn = self._adapt(grid, member, adapter, before, verdict, judge)
                adaptations.append(adaptation)
                drawings = drawings or drawn
            first.append((member.plan, torch.from_numpy(before.probabilities)))
            last.append((member.plan, torch.from_numpy(after.probabilities)))
        maps = GridMaps(native, tuple(last))
        if 4 * maps.values > compute.KEPT_BYTES:
            compute.release_freed_memory()
        label, agreement = self._decide(maps)
        unadapted, judged = None, label
        if any(adaptation.kept for adaptation in adaptations):
            judged, agreement = self._decide(GridMaps(native, tuple(first)))
            unadapted = judged
        verdict = None
        if verdicts or agreement is not None:  # what networks disagree about needs no judge
            empty, least_dice = not judged.array.any(), self.settings.least_dice
            verdict = average_verdicts(verdicts, self.reasons, empty, least_dice, agreement)
        overlapping = bool(self.plan.regions)
        return Prediction(
            label, maps, self.temperature, overlapping, verdict, tuple(adaptations), unadapted, drawings
        )

    def observe(self, image: Volume, flips: bool | None = None) -> Output:
        """Return what an image makes of the first run's network, on its plan's grid.

        Args:
            image: On its own grid.
            flips: Whether to average over mirrored views; none: as prediction does.
        """
        member = self.members[0]
        return self._predict(member.plan.to_grids(image), member, watch=True, flips=flips)

    def label_of(self, output: Output, image: Volume) -> Volume:
        """Return the label map on an image's own grid that an output of the first run's network means."""
        part = (self.members[0].plan, torch.from_numpy(output.probabilities))
        return self._decide(GridMaps(image, (part,)))[0]

    def _decide(self, maps: GridMaps) -> tuple[Volume, float | None]:
        """Return the label map on the image's own grid, and the mean Dice of each two of several networks."""
        smallest = np.uint8 if len(self.plan.classes) <= 256 else np.int32
        label = np.empty((1, *maps.native.shape), smallest)
        shared: np.ndarray | None = None
        for rows in maps.blocks():
            views = maps.rows(rows)
            label[0, rows] = self.plan.decide(average(views))
            if len(views) > 1:
                counted = count_shared([self._as_maps(view) for view in views])
                shared = counted if shared is None else shared + counted
        if self.settings.postprocess:
            self.postprocessing.apply(label[0])
        agreement = None if shared is None else Agreement(shared).pairwise_dice
        return maps.native.with_array(label), agreement

    def _build_adapter(self, run: Run, member: _Member) -> Adapter | None:
        method = self.settings.adapt.method
        if method == "none":
            return None
        reflection = run.reflection()
        method = registry.AUTO_ADAPTER if method == "auto" else method
        adapter: Adapter = registry.build("adapter", method, **self.settings.adapt.settings)
        adapter.name = method
        reflection = None if reflection is None else reflection.to(self.device)
        usual = None if run.judge is None else run.judge.usual_intensities
        adapter.attach(member.network, member.plan, reflection, usual)
        return adapter

    def _adapt(
        self, grid: GridImage, member: _Member, adapter: Adapter, before: Output,
        verdict: Verdict | None, judge: Judge | None,
    ) -> tuple[Adaptation, Output, dict[str, Tensor]]:  # fmt: skip
        """Return what became of adapting to an image, the output to go on with, and drawings where it is new."""
        settings = self.settings.adapt
        of_shift = set() if judge is None else judge.shift_scores
        reason = find_reason_against(settings, verdict, of_shift)
        if reason:
            return Adaptation(adapter.name, False, reason), before, {}
        windows = choose_windows(grid.seen, before, member.plan, self.settings.overlap, settings.windows)
        if windows is None:
            return Adaptation(adapter.name, False, NOTHING_FOUND), before, {}
        try:
            windows = windows.to(self.device).contiguous(memory_format=member.network.memory_format)
            shown = windows[len(windows) // 2][None]
            # Not the state of the process: the same image gives the same mask whatever came before it.
            with torch.random.fork_rng(devices=[]), self._autocast(learning=True):
                torch.default_generator.manual_seed(0)
                drawn = [adapter.draw(shown)]
                adapter.look(grid.seen)
                observed = adapter.adapt(windows)
                drawn.append(adapter.draw(shown))
            facts = {name: value for name, value in observed.items() if math.isfinite(value)}
            if not facts.get("kept"):
                return Adaptation(adapter.name, False, NO_BETTER, facts), before, {}
            adapted = _Member(member.network, member.plan, member.config, adapter.predict)
            after = self._predict(grid, adapted, watch=before.agreement is not None)
        except CASE_ERRORS as error:  # the mask before is there already
            reason = f"it could not be computed ({describe_error(error)})"
            return Adaptation(adapter.name, False, reason), before, {}
        finally:
            adapter.reset()
        fault, changed = find_fault(settings, before, after)
        if fault:
            return Adaptation(adapter.name, False, fault, facts, changed), before, {}
        own = 1 - settings.first_share
        mixed = own * after.probabilities + settings.first_share * before.probabilities
        after = replace(after, probabilities=mixed)
        changed = changed_share(before, after)
        return Adaptation(adapter.name, True, "", facts, changed), after, _before_and_after(*drawn)

    def _autocast(self, *, learning: bool = False) -> torch.autocast:
        # Copies of weights in bfloat16 must not outlast a step that changes them.
        enabled = self.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=not learning)

    def _as_maps(self, probabilities: Float[np.ndarray, "k *s"]) -> Bool[np.ndarray, "m *s"]:
        """Return which voxels belong to every region, or every class but the background."""
        if self.plan.regions:
            return probabilities > 0.5
        return self.plan.as_maps(self.plan.decide(probabilities))[1:]

    def _place(self, network: Network, path: Path) -> Network:
        if self.settings.normalisation == "batch":
            use_batch_statistics(network, path)
        return network.to(self.device, memory_format=network.memory_format)  # pyright: ignore[reportCallIssue]

    def predict_grid(self, image: Float[Tensor, "c *s"]) -> list[Float[Tensor, "k *s"]]:
        """Return each member's probabilities for an image that lies on its plan's grid already."""
        outputs = [self._predict(GridImage(image), member, watch=False) for member in self.members]
        return [torch.from_numpy(output.probabilities) for output in outputs]

    def _predict(
        self, image: GridImage, member: _Member, *, watch: bool, flips: bool | None = None
    ) -> Output:  # fmt: skip
        """Return the merged probabilities of all windows, and with `watch` the sums over the encoder's layers."""
        network, plan = member.network, member.plan
        mirrored = self.settings.flips if flips is None else flips
        sets = flip_combinations(plan, member.config) if mirrored else [()]
        layers: tuple[Layer, ...] = ()
        agreement: Agreement | None = None

        def predict(windows: Tensor) -> Tensor:
            nonlocal layers
            windows = windows.contiguous(memory_format=network.memory_format)
            views = []
            for axes in sets:
                view = torch.flip(windows, axes)
                if member.predict is None:
                    features = network.encode(view)
                    if watch and not axes:
                        layers = add_layers(layers, sum_layers(features))
                    logits = network.decode(features).float()
                else:
                    logits = member.predict(view).float()
                views.append(torch.flip(plan.as_probabilities(logits), axes))
            if len(views) == 1:
                return views[0]
            if watch:
                compare(views)
            return torch.stack(views).mean(0)

        def compare(views: Sequence[Tensor], where: Tensor | None = None) -> None:
            nonlocal agreement
            found = count_agreement(views, bool(plan.regions), where)
            agreement = found if agreement is None else agreement + found

        def compare_windows(before: Tensor, now: Tensor, shared: Tensor) -> None:
            compare([before[None], now[None]], shared[None])

        # Windows that overlap see the same voxels, each in a context of its own.
        other_views = watch and len(sets) == 1
        with torch.inference_mode(), self._autocast():
            probabilities = slide(
                image.seen.to(self.device), predict, plan, self.settings.overlap, self.settings.batch_size,
                compare_windows if other_views else None,
            )  # fmt: skip
        return Output(
            image.seen.cpu().numpy(), probabilities.cpu().numpy(), bool(plan.regions), layers, agreement,
            None if image.whole is None else image.whole.numpy(), image.nothing, plan.slice_wise, plan.decide,
        )  # fmt: skip


def _before_and_after(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return drawings of both, those that are the same once."""
    shown = {name: drawing for name, drawing in before.items() if torch.equal(drawing, after[name])}
    for name in before.keys() - shown.keys():
        shown |= {f"{name} before": before[name], f"{name} after": after[name]}
    return shown


@dataclass(frozen=True, eq=False)
class _Member:
    network: Network
    plan: Plan
    config: Config
    predict: Callable[[Tensor], Tensor] | None = None  # an adapted network in place of the run's


def _choose_plan(run: Run, task: str | None) -> Plan:
    unknown = run.config.objectives.get("supervised", {}).get("unknown", "background")
    return run.plan.for_task(task, unknown) if task else run.plan.model_copy(update={"unknown": unknown})


def _to_grids(image: Volume, plans: Sequence[Plan]) -> Iterator[GridImage]:
    """Yield the image on every plan's grid, made once for equal plans in a row.

    Neither it nor the voxels of the image are kept for longer than something needs them.
    """
    *others, (last, count) = [(plan, len(list(group))) for plan, group in itertools.groupby(plans)]
    for plan, times in others:
        yield from itertools.repeat(plan.to_grids(image), times)
    grids = last.to_grids(image)
    del image
    yield from itertools.repeat(grids, count)


def choose_windows(
    image: Float[Tensor, "c *s"], output: Output, plan: Plan, overlap: float, count: int
) -> Float[Tensor, "b n *p"] | None:
    """Return the windows of an image in which most was found, at most `count`; none where nothing was.

    Windows that hold less than a quarter of the fullest one tell little, and the others are taken evenly.
    """
    size = (1, *plan.patch_size) if plan.slice_wise else plan.patch_size
    found = torch.from_numpy(output.foreground)[None]
    starts = place_windows(image.shape[1:], size, overlap)
    held = [int(cut_patch(found, start, size).sum()) for start in starts]
    full = sorted((s for s, n in zip(starts, held, strict=True) if n and 4 * n >= max(held)))
    if not full:
        return None
    chosen = [full[round(i)] for i in np.linspace(0, len(full) - 1, min(count, len(full)))]
    context = plan.context_slices if plan.slice_wise else None
    return torch.stack([cut_patch(image, start, size, context) for start in chosen])


def use_batch_statistics(network: nn.Module, where: Path) -> None:
    """Let every batch normalisation use the statistics of the batch it sees, and keep none of them.

    Raises:
        ConfigError: the network has no batch normalisation, and nothing would change.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]
    if not norms:
        raise ConfigError(
            "a network without batch normalisation",
            where=f"predict.normalisation for {where}",
            expected="eval",
            fix="leave predict.normalisation out",
        )
    for norm in norms:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = None


def segments_as_judged(config: Config, plan: Plan, settings: PredictSettings) -> bool:
    """Tell whether a run's network is asked as it was when its judge's limits were learned.

    Mirrored views that are averaged, or classes that are left out, alter how sure a segmentation seems to be.
    """
    mirrors = len(flip_combinations(plan, config)) > 1
    return settings.task is None and (settings.flips == config.predict.flips or not mirrors)


def flip_combinations(plan: Plan, config: Config) -> list[tuple[int, ...]]:
    """Return every set of tensor axes mirrored in training, the empty one first: views the network knows."""
    augment = config.augment
    if not augment.enabled or augment.flip == 0:
        return [()]
    tensor_axes = [axis + 2 for axis in choose_flip_axes(augment, plan.dimension)]
    sets = itertools.chain.from_iterable(
        itertools.combinations(tensor_axes, count) for count in range(len(tensor_axes) + 1)
    )
    return list(sets)
