"""Learning a plan from the training cases: grid, intensities, dimension and patch size, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from anysite.data.case import Case, Dataset
from anysite.data.limits import HOUNSFIELD_BELOW
from anysite.data.volume import Volume
from anysite.errors import ConfigError, DataError, GeometryError
from anysite.normalisation import CLIP_PERCENTILES, Normalisation
from anysite.plan import Plan, Variant
from anysite.settings import PlanSettings

ANISOTROPY_LIMIT = 3.0
LOCAL_SHARE = 1 / 8  # of a training image's extent in its plane: how far a voxel's surroundings reach


@dataclass(frozen=True)
class _Fingerprint:
    """What one training case tells."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    unit: Literal["mm", "px"]
    channels: int
    minimum: tuple[float, ...]
    foreground: np.ndarray


def learn_plan(dataset: Dataset, settings: PlanSettings, threads: int = 2) -> Plan:
    """Choose grid, normalisation, dimension and patch size from the usable cases of `dataset`.

    Pass the training cases and nothing else: whatever is in `dataset` shapes the plan.

    Raises:
        DataError: no labelled cases, or cases that differ in channels or spatial axes.
        ConfigError: a setting that does not fit the data.
    """
    cases = dataset.usable
    if not cases:
        raise DataError("no labelled training cases", where=dataset.name)
    with ThreadPoolExecutor(threads) as pool:
        prints = list(pool.map(lambda case: _fingerprint(case, dataset), cases))
    for case, found in zip(cases, prints, strict=True):
        if (len(found.shape), found.channels) != (len(prints[0].shape), prints[0].channels):
            raise DataError(
                f"{len(found.shape)} spatial axes and {found.channels} channels",
                where=case.id,
                expected=f"{len(prints[0].shape)} and {prints[0].channels} as in {cases[0].id}",
            )
        if found.unit != prints[0].unit:
            raise DataError(
                f"spacing in {found.unit}",
                where=case.id,
                expected=f"{prints[0].unit} as in {cases[0].id}",
            )
    image_dimension = len(prints[0].shape)
    by_task: dict[str, list[_Fingerprint]] = {}
    for case, found in zip(cases, prints, strict=True):
        by_task.setdefault(case.task if dataset.tasks else "", []).append(found)
    # Of several datasets each counts alike, however many cases it has.
    medians = {task: np.median([p.spacing for p in own], axis=0) for task, own in by_task.items()}
    spacing = np.median(list(medians.values()), axis=0)
    extents = np.array([np.multiply(p.shape, p.spacing) for p in prints])
    reasons: list[str] = []
    axes, order = "", list(range(image_dimension))
    anisotropic = False
    if image_dimension == 3:
        shapes = {task: np.median([p.shape for p in own], axis=0) for task, own in by_task.items()}
        anisotropic, slice_axis, why = _choose_slice_axis(settings, medians, shapes)
        reasons.append(why)
        order = [slice_axis, *(a for a in range(3) if a != slice_axis)]
        axes = "".join("RAS"[a] for a in order)
    spacing, extents = spacing[order], extents[:, order]
    if settings.spacing is not None:
        if len(settings.spacing) != image_dimension:
            raise ConfigError(
                f"{settings.spacing}",
                where="plan.spacing",
                expected=f"{image_dimension} numbers, slice axis first",
            )
        spacing = np.array(settings.spacing)
        reasons.append(f"spacing {_listed(spacing)} as set")
    else:
        reasons.append(
            f"spacing {_listed(spacing)} {prints[0].unit}: the median of {len(prints)} training cases"
        )
    dimension, context = _choose_dimension(settings, image_dimension, anisotropic, reasons)
    if settings.spacing is None and len(medians) > 1:
        tasks = [case.task for case in cases]
        extents = extents / np.array([medians[task][order] for task in tasks]) * spacing
    shape = np.median(extents / spacing, axis=0)[image_dimension - dimension :]
    limit = settings.max_patch_voxels or (2**16 if dimension == 2 else 2**18)
    if settings.patch_size is not None:
        patch_size = settings.patch_size
        if len(patch_size) != dimension:
            raise ConfigError(f"{patch_size}", where="plan.patch_size", expected=f"{dimension} numbers")
        reasons.append(f"patch size {_listed(patch_size)} as set")
    else:
        patch_size = choose_patch_size(shape, limit)
        reasons.append(
            f"patch size {_listed(patch_size)}: median shape {_listed(shape)} on the grid, at most {limit} voxels"
        )
    sigma = _choose_sigma(prints, order, spacing, dimension)
    normalisation = _choose_normalisation(settings, prints, sigma, reasons)
    variants = ()
    if len(by_task) > 1:
        variants = tuple(
            _learn_variant(settings, task, own, order, dimension).model_copy(
                update={"classes": dataset.tasks[task].classes}
            )
            for task, own in by_task.items()
        )
        variants = _share_hounsfield_window(settings, variants, by_task)
        reasons.append("spacing and normalisation of its own for each of " + ", ".join(by_task))
    return Plan(
        dimension=2 if dimension == 2 else 3,
        image_dimension=2 if image_dimension == 2 else 3,
        axes=axes,
        spacing=tuple(float(s) for s in spacing),
        unit=prints[0].unit,
        channels=prints[0].channels,
        normalisation=normalisation,
        context_slices=context,
        patch_size=tuple(patch_size),
        classes=dataset.classes,
        label_values=dataset.label_values,
        regions=dataset.regions,
        region_names=dataset.region_names,
        region_classes=dataset.region_classes,
        variants=variants,
        reasons=tuple(reasons),
    )


def choose_patch_size(shape: Sequence[float] | np.ndarray, max_voxels: int) -> tuple[int, ...]:
    """Return a patch of at most `max_voxels` that covers `shape`, or as much of it as the limit allows.

    The longest axis is shortened first, so that the patch nears a cube and short axes stay whole. Sizes are
    rounded up to multiples of a power of two that lets a U-Net halve them.

    Raises:
        ConfigError: no patch is that small.
    """
    smallest = _round_up(1) ** len(shape)
    if max_voxels < smallest:
        raise ConfigError(
            f"{max_voxels} voxels", where="plan.max_patch_voxels", expected=f"at least {smallest}"
        )
    size = [float(n) for n in shape]
    rounded = [_round_up(n) for n in size]
    while np.prod(rounded) > max_voxels:
        largest = int(np.argmax(size))
        size[largest] *= 0.97
        rounded = [_round_up(n) for n in size]
    return tuple(rounded)


def _round_up(size: float) -> int:
    multiple = 32 if size >= 96 else 16 if size >= 32 else 8 if size >= 12 else 4
    return int(np.ceil(size / multiple)) * multiple


def _fingerprint(case: Case, dataset: Dataset) -> _Fingerprint:
    image = case.image().oriented("RAS")
    if dataset.unlabelled:
        # Air and the black around a picture are no part of what is imaged.
        spatial = tuple(range(1, image.array.ndim))
        return _describe(image, (image.array > image.array.mean(spatial, keepdims=True)).any(0))
    label = dataset.label_of(case).oriented("RAS")
    if not image.same_grid(label):
        raise GeometryError(
            f"a label of shape {label.shape} and spacing {_listed(label.spacing)}",
            where=case.id,
            expected=f"the image's shape {image.shape} and spacing {_listed(image.spacing)}, at the same place",
            fix="run anysite check to list every such case",
        )
    return _describe(image, label.array[0] > 0)


def _describe(image: Volume, inside: np.ndarray) -> _Fingerprint:
    foreground = image.array[:, inside].astype(np.float32)
    if foreground.shape[1] > 2000:  # enough for percentiles, and the same voxels every time
        foreground = foreground[:, np.random.default_rng(0).choice(foreground.shape[1], 2000, replace=False)]
    minimum = tuple(float(c.min()) for c in image.array)
    return _Fingerprint(image.shape, image.spacing, image.unit, image.array.shape[0], minimum, foreground)


def _choose_slice_axis(
    settings: PlanSettings, spacings: dict[str, np.ndarray], shapes: dict[str, np.ndarray]
) -> tuple[bool, int, str]:
    """Return whether the grid is anisotropic, the slice axis, and why: thick slices of one dataset decide for all.

    Raises:
        ConfigError: two datasets have thick slices along different axes.
    """
    found = {task: _find_slice_axis(spacings[task], shapes[task]) for task in spacings}
    thick = {task: axis for task, (anisotropic, axis, _) in found.items() if anisotropic}
    if settings.slice_axis != "auto":
        return bool(thick), "RAS".index(settings.slice_axis), f"slices along {settings.slice_axis} as set"
    if len(set(thick.values())) > 1:
        told = ", ".join(f"{task} along {'RAS'[axis]}" for task, axis in thick.items())
        raise ConfigError(
            f"thick slices of {told}", where="plan.slice_axis", fix="set it to one of R, A and S"
        )
    if len(found) == 1 or not thick:
        return _find_slice_axis(
            np.median([*spacings.values()], axis=0), np.median([*shapes.values()], axis=0)
        )
    task, axis = next(iter(thick.items()))
    return True, axis, f"{task}: {found[task][2]}"


def _find_slice_axis(spacing: np.ndarray, shape: np.ndarray) -> tuple[bool, int, str]:
    """Return (whether the grid is anisotropic, the slice axis, why)."""
    if shape.min() > 1 and spacing.max() / spacing.min() >= ANISOTROPY_LIMIT:
        axis = int(spacing.argmax())
        return (
            True,
            axis,
            f"slices along {'RAS'[axis]}: its spacing is {spacing.max() / spacing.min():.1f} x the finest",
        )
    if shape.min() * 4 <= np.median(shape):
        axis = int(shape.argmin())
        return (
            True,
            axis,
            f"slices along {'RAS'[axis]}: {shape.min():.0f} of them against {np.median(shape):.0f} voxels",
        )
    return False, int(shape.argmin()), "no slice axis stands out: the grid is nearly isotropic"


def _choose_dimension(
    settings: PlanSettings, image_dimension: int, anisotropic: bool, reasons: list[str]
) -> tuple[int, int]:
    if image_dimension == 2:
        if settings.dimension not in ("auto", "2d"):
            raise ConfigError(
                f"{settings.dimension!r} for images with two axes",
                where="plan.dimension",
                expected="'auto' or '2d'",
            )
        return 2, 0
    if settings.dimension == "auto":
        chosen = "2d" if anisotropic else "3d"
        reasons.append(f"{chosen}: {'thick slices' if anisotropic else 'nearly isotropic volumes'}")
    else:
        chosen = settings.dimension
        reasons.append(f"{chosen} as set")
    return (3, 0) if chosen == "3d" else (2, settings.context_slices if chosen == "2.5d" else 0)


def _share_hounsfield_window(
    settings: PlanSettings, variants: tuple[Variant, ...], by_task: dict[str, list[_Fingerprint]]
) -> tuple[Variant, ...]:
    """Give all datasets in Hounsfield units one window: by its spacing alone an image is told which it is like."""
    hounsfield = [v.task for v in variants if all(n.kind == "dataset" for n in v.normalisation)]
    if len(hounsfield) < 2:
        return variants
    common = _choose_normalisation(settings, [p for task in hounsfield for p in by_task[task]], (), [])
    return tuple(
        variant.model_copy(update={"normalisation": common}) if variant.task in hounsfield else variant
        for variant in variants
    )


def _learn_variant(
    settings: PlanSettings, task: str, prints: list[_Fingerprint], order: list[int], dimension: int
) -> Variant:
    spacing = settings.spacing or np.median([p.spacing for p in prints], axis=0)[order]
    try:
        sigma = _choose_sigma(prints, order, spacing, dimension)
        normalisation = _choose_normalisation(settings, prints, sigma, [])
    except DataError as error:
        raise DataError(f"{task}: {error}") from None
    return Variant(task=task, spacing=tuple(float(s) for s in spacing), normalisation=normalisation)


def _choose_sigma(
    prints: list[_Fingerprint], order: list[int], spacing: Sequence[float] | np.ndarray, dimension: int
) -> tuple[float, ...]:
    """Return how far surroundings reach on the grid, alike in mm along all axes that a network sees together."""
    extents = np.median([np.multiply(p.shape, p.spacing) for p in prints], axis=0)[order]
    sigma = LOCAL_SHARE * extents[-2:].min() / np.asarray(spacing)
    sigma[: len(sigma) - dimension] = 0.0
    return tuple(float(s) for s in np.round(sigma, 3))


def _choose_normalisation(
    settings: PlanSettings, prints: list[_Fingerprint], sigma: tuple[float, ...], reasons: list[str]
) -> tuple[Normalisation, ...]:
    foreground = np.concatenate([p.foreground for p in prints], axis=1)
    if foreground.shape[1] == 0:
        raise DataError("no training case has any foreground", fix="check the labels with anysite check")
    result: list[Normalisation] = []
    for channel in range(prints[0].channels):
        kind = settings.normalisation
        # Hounsfield units are the one common intensity scale with meaning.
        hounsfield = float(np.median([p.minimum[channel] for p in prints])) <= HOUNSFIELD_BELOW
        if kind in ("auto", "local"):
            kind = "dataset" if hounsfield else "case" if kind == "auto" else "local"
            why = (
                "values below -500 look like Hounsfield units" if hounsfield else "no common intensity scale"
            )
            how = {"case": "by case", "dataset": "by dataset", "local": "by case, then locally"}[kind]
            reasons.append(f"channel {channel} normalised {how}: {why}")
        values = foreground[channel]
        low, high = (float(v) for v in np.percentile(values, CLIP_PERCENTILES))
        clipped = np.clip(values, low, high)
        result.append(
            Normalisation(
                kind=kind,
                mean=float(clipped.mean()),
                std=float(max(clipped.std(), 1e-6)),
                low=low,
                high=high,
                sigma_voxels=sigma if kind == "local" else (),
                least_contrast=settings.least_contrast,
                noise_contrast=settings.noise_contrast,
            )
        )
    return tuple(result)


def _listed(numbers: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{n:g}" for n in np.round(np.asarray(numbers, float), 3))
