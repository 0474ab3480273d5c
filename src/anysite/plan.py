"""What the training cases taught: grid, intensities, patch size; the way onto the grid and back."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from anysite.config import PlanSettings
from anysite.data.case import Case, Dataset
from anysite.data.volume import Volume, interpolation_matrix
from anysite.errors import ConfigError, DataError, GeometryError

ANISOTROPY_LIMIT = 3.0
CLIP_PERCENTILES = (0.5, 99.5)
HOUNSFIELD_BELOW = -500.0  # air lies near -1000, and no other common scale goes so low


class Normalisation(BaseModel):
    """How one channel's intensities are brought to zero mean and unit variance.

    "case" uses the statistics of the image at hand, "dataset" those of the training cases' foreground (for
    units that mean something, as in CT), "none" leaves the values alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["case", "dataset", "none"] = "case"
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 1.0


class Variant(BaseModel):
    """What differs between datasets that are trained on jointly: spacing, normalisation and classes of one of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    task: str
    spacing: tuple[float, ...]
    normalisation: tuple[Normalisation, ...]
    classes: tuple[int, ...] = ()


class Plan(BaseModel):
    """The grid a network works on, learned from training cases alone and stored in the run folder.

    Attributes:
        dimension: Spatial axes of a patch; 2 for a volume means slice by slice.
        image_dimension: Spatial axes of the image files.
        axes: Orientation on the grid, the slice axis first; empty for pictures.
        spacing: Voxel size on the grid, slice axis first, in `unit`.
        context_slices: Neighbouring slices on each side that a slice brings along as channels.
        patch_size: Voxels of a patch, as many as `dimension`.
        variants: Of several datasets trained on jointly, each one's own spacing and normalisation; an image takes
            those it is nearest to, since nobody says which dataset it is like.
        reasons: Why each choice was made, for people.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    dimension: Literal[2, 3]
    image_dimension: Literal[2, 3]
    axes: str = ""
    spacing: tuple[float, ...]
    unit: Literal["mm", "px"]
    channels: int
    normalisation: tuple[Normalisation, ...]
    context_slices: int = 0
    patch_size: tuple[int, ...]
    classes: tuple[str, ...]
    label_values: tuple[int, ...]
    regions: tuple[tuple[int, ...], ...] = ()
    region_names: tuple[str, ...] = ()
    region_classes: tuple[int, ...] = ()
    variants: tuple[Variant, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def slice_wise(self) -> bool:
        """Whether volumes are segmented slice by slice."""
        return self.image_dimension == 3 and self.dimension == 2

    @property
    def network_channels(self) -> int:
        """Input channels of the network, neighbouring slices included."""
        return self.channels * (2 * self.context_slices + 1)

    @property
    def outputs(self) -> int:
        """Maps the network puts out: one a class (softmax), or one a region (sigmoid)."""
        return len(self.regions) or len(self.classes)

    def on_grid(self, image: Volume) -> Volume:
        """Return the image oriented and resampled to the plan's grid, intensities untouched.

        Raises:
            GeometryError: other channels or spatial axes than the training cases had.
        """
        if (image.dimension, image.array.shape[0]) != (self.image_dimension, self.channels):
            raise GeometryError(
                f"an image with {image.dimension} spatial axes and {image.array.shape[0]} channels",
                expected=f"{self.image_dimension} spatial axes and {self.channels} channels as in training",
            )
        if image.unit != self.unit:
            raise GeometryError(f"an image in {image.unit}", expected=f"{self.unit} as in training")
        oriented = image.oriented(self.axes)
        return oriented.resampled(self.variant_of(oriented).spacing, "cubic")

    def variant_of(self, image: Volume) -> Variant:
        """Return the spacing and normalisation for an image: of several datasets' those nearest to it.

        First those for its kind of intensities, Hounsfield units or not, then the nearest spacing.
        """
        own = Variant(task="", spacing=self.spacing, normalisation=self.normalisation)
        if not self.variants:
            return own
        spacing = image.oriented(self.axes).spacing
        hounsfield = float(image.array[0].min()) <= HOUNSFIELD_BELOW

        def distance(variant: Variant) -> tuple[bool, float]:
            steps = np.abs(np.log(np.divide(variant.spacing, spacing))).sum()
            return (variant.normalisation[0].kind == "dataset") != hounsfield, float(steps)

        return min(self.variants, key=distance)

    def to_grid(self, image: Volume) -> Float[Tensor, "c *s"]:
        """Return the image on the plan's grid, normalised, slice axis first."""
        array = self.on_grid(image).array.astype(np.float32)
        normalisation = self.variant_of(image).normalisation
        channels = [_normalise(a, n) for a, n in zip(array, normalisation, strict=True)]
        return torch.from_numpy(np.stack(channels))

    def for_task(self, name: str) -> Plan:
        """Return the plan for images that are known to be like those of one of several datasets.

        Raises:
            ConfigError: it was not trained on a dataset of that name.
        """
        chosen = tuple(variant for variant in self.variants if variant.task == name)
        if not chosen:
            known = ", ".join(variant.task for variant in self.variants)
            raise ConfigError(
                f"{name!r}", where="task",
                expected=f"one of {known}" if known else "none: the run was trained on one dataset",
            )  # fmt: skip
        return self.model_copy(update={"variants": chosen})

    def label_to_grid(self, label: Volume, image: Volume) -> Integer[Tensor, "*s"]:
        """Return a label map of class indices on the plan's grid for its image; for training only."""
        array = label.oriented(self.axes).resampled(self.variant_of(image).spacing, "label").array[0]
        return torch.from_numpy(
            np.ascontiguousarray(array.astype(np.uint8 if len(self.classes) < 256 else np.int16))
        )

    def from_grid(self, probabilities: Float[Tensor, "k *s"], native: Volume) -> Volume:
        """Return probabilities on the grid of the image they belong to, the exact inverse of the way in.

        Values are interpolated linearly where the spacings differ and are untouched where they agree.
        """
        everything = slice(0, native.shape[0])
        return native.with_array(self.rows_from_grid(probabilities, native, everything))

    def rows_from_grid(
        self, probabilities: Float[Tensor, "k *s"], native: Volume, rows: slice
    ) -> Float[np.ndarray, "k *t"]:
        """Return the part of `from_grid` that lies at `rows` of the image's first axis, by itself.

        So that the probabilities of a large volume never have to lie in memory on its own grid.
        """
        # Not by the turned affine: of slices tilted by 45 degrees it may name the axes differently.
        transform = np.array([[0, 1], [1, 1]])
        if native.dimension == 3:
            transform = ornt_transform(axcodes2ornt(self.axes), io_orientation(native.affine))
        order, flipped = transform[:, 0].astype(int), transform[:, 1] < 0
        shape = [native.shape[axis] for axis in order]
        first = int(np.flatnonzero(order == 0)[0])
        wanted = np.arange(native.shape[0])[rows]
        if flipped[first]:
            wanted = native.shape[0] - 1 - wanted
        array = probabilities.float().movedim(1 + first, 1)
        others = [axis for axis in range(len(shape)) if axis != first]
        array = _interpolate_rows(array, shape[first], wanted)
        size = [shape[axis] for axis in others]
        if list(array.shape[2:]) != size:
            mode = "linear" if len(size) == 1 else "bilinear"
            planes = array.flatten(0, 1)[:, None]
            array = F.interpolate(planes, size=size, mode=mode, align_corners=False).view(
                *array.shape[:2], *size
            )
        turned = [2 + position for position, axis in enumerate(others) if flipped[axis]]
        # `others` have to come in the order that the image's axes have.
        places = [0, 1, *(2 + others.index(axis) for axis in np.argsort(order)[1:])]
        return np.ascontiguousarray(array.flip(turned).permute(places).cpu().numpy())

    def as_probabilities(self, logits: Float[Tensor, "*b"], channel: int = 1) -> Float[Tensor, "*b"]:
        """Return softmax over classes, or sigmoid for overlapping regions, along the `channel` axis."""
        return torch.sigmoid(logits) if self.regions else torch.softmax(logits, dim=channel)

    def decide(self, probabilities: Float[np.ndarray, "k *s"]) -> Integer[np.ndarray, "*s"]:
        """Return the class index of every voxel: the largest class, or regions painted in order."""
        if not self.regions:
            return probabilities.argmax(axis=0).astype(np.int32)
        label = np.zeros(probabilities.shape[1:], np.int32)
        for probability, index in zip(probabilities, self.region_classes, strict=True):
            label[probability > 0.5] = index
        return label

    def as_maps(self, label: Integer[np.ndarray, "*s"]) -> Bool[np.ndarray, "k *s"]:
        """Return for every class or region whether each voxel of a label map of class indices is of it."""
        groups = self.regions or [(index,) for index in range(len(self.classes))]
        return np.stack([np.isin(label, group) for group in groups])


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
        shapes = [np.median([p.shape for p in own], axis=0) for own in by_task.values()]
        anisotropic, slice_axis, why = _find_slice_axis(spacing, np.median(shapes, axis=0))
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
    normalisation = _choose_normalisation(settings, prints, reasons)
    variants = ()
    if len(by_task) > 1:
        variants = tuple(
            _learn_variant(settings, task, own, order).model_copy(
                update={"classes": dataset.tasks[task].classes}
            )
            for task, own in by_task.items()
        )
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


def _find_slice_axis(spacing: np.ndarray, shape: np.ndarray) -> tuple[bool, int, str]:
    """Return (whether the grid is anisotropic, the slice axis, why)."""
    if spacing.max() / spacing.min() >= ANISOTROPY_LIMIT:
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
        chosen = "2.5d" if anisotropic and settings.context_slices else "2d" if anisotropic else "3d"
        reasons.append(f"{chosen}: {'thick slices' if anisotropic else 'nearly isotropic volumes'}")
    else:
        chosen = settings.dimension
        reasons.append(f"{chosen} as set")
    return (3, 0) if chosen == "3d" else (2, settings.context_slices if chosen == "2.5d" else 0)


def _learn_variant(
    settings: PlanSettings, task: str, prints: list[_Fingerprint], order: list[int]
) -> Variant:
    spacing = settings.spacing or np.median([p.spacing for p in prints], axis=0)[order]
    try:
        normalisation = _choose_normalisation(settings, prints, [])
    except DataError as error:
        raise DataError(f"{task}: {error}") from None
    return Variant(task=task, spacing=tuple(float(s) for s in spacing), normalisation=normalisation)


def _choose_normalisation(
    settings: PlanSettings, prints: list[_Fingerprint], reasons: list[str]
) -> tuple[Normalisation, ...]:
    foreground = np.concatenate([p.foreground for p in prints], axis=1)
    if foreground.shape[1] == 0:
        raise DataError("no training case has any foreground", fix="check the labels with anysite check")
    result: list[Normalisation] = []
    for channel in range(prints[0].channels):
        kind = settings.normalisation
        # Hounsfield units are the one common intensity scale with meaning.
        hounsfield = float(np.median([p.minimum[channel] for p in prints])) <= HOUNSFIELD_BELOW
        if kind == "auto":
            kind = "dataset" if hounsfield else "case"
            why = (
                "values below -500 look like Hounsfield units" if hounsfield else "no common intensity scale"
            )
            reasons.append(f"channel {channel} normalised by {kind}: {why}")
        values = foreground[channel]
        low, high = (float(v) for v in np.percentile(values, CLIP_PERCENTILES))
        clipped = np.clip(values, low, high)
        result.append(
            Normalisation(
                kind=kind, mean=float(clipped.mean()), std=float(max(clipped.std(), 1e-6)), low=low, high=high
            )
        )
    return tuple(result)


def _interpolate_rows(
    array: Float[Tensor, "k n *s"], size: int, wanted: Integer[np.ndarray, "r"]
) -> Float[Tensor, "k r *s"]:
    """Return rows `wanted` of the second axis, if it had `size` of them over the same extent."""
    if array.shape[1] == size:
        return array[:, torch.from_numpy(wanted)]
    weights = interpolation_matrix(array.shape[1], size, order=1)[wanted]
    needed = np.flatnonzero(weights.any(axis=0))
    near = slice(int(needed[0]), int(needed[-1]) + 1)
    matrix = torch.from_numpy(weights[:, near])
    return torch.einsum("rn,kn...->kr...", matrix, array[:, near])


def _normalise(channel: np.ndarray, normalisation: Normalisation) -> np.ndarray:
    if normalisation.kind == "none":
        return channel
    if normalisation.kind == "dataset":
        return (
            np.clip(channel, normalisation.low, normalisation.high) - normalisation.mean
        ) / normalisation.std
    low, high = np.percentile(channel, CLIP_PERCENTILES)
    # Where nearly every voxel has one value, clipping would leave nothing of the rest.
    clipped = np.clip(channel, low, high) if low < high else channel
    # The mean over voxels in float64: float32 sums lose digits on large volumes.
    mean, std = clipped.mean(dtype=np.float64), clipped.std(dtype=np.float64)
    return ((clipped - mean) / max(std, 1e-6)).astype(np.float32)


def _listed(numbers: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{n:g}" for n in np.round(np.asarray(numbers, float), 3))
