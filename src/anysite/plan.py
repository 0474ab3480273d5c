"""What the training cases taught: grid, intensities, patch size; the way onto the grid and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from anysite.calibration import find_likeliest
from anysite.data.limits import HOUNSFIELD_BELOW
from anysite.data.volume import Volume, interpolation_matrix
from anysite.errors import ConfigError, DataError, GeometryError
from anysite.normalisation import Normalisation, compare_to_surroundings, normalise_as_a_whole

HIDDEN = -1e4  # a logit of no probability


@dataclass(frozen=True, eq=False)
class GridImage:
    """An image on a plan's grid.

    Attributes:
        seen: Normalised, as the network sees it.
        whole: As it was before surroundings had a say; none where they have none.
        nothing: What no signal became, channel by channel, in `whole` or else `seen`; none where unknown.
    """

    seen: Float[Tensor, "c *s"]
    whole: Float[Tensor, "c *s"] | None = None
    nothing: tuple[float, ...] | None = None


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
        unknown: Where `for_task` left one variant: whether what the network makes of the classes that its dataset
            does not label counts as background, or is left out of the softmax, as it was learned.
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
    unknown: Literal["background", "left_out"] = "background"
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
        return self.to_grids(image).seen

    def to_grids(self, image: Volume) -> GridImage:
        """Return the same as `to_grid`, with what else is to be known of it.

        Raises:
            DataError: intensities that overflow.
        """
        normalisation = self.variant_of(image).normalisation
        with np.errstate(over="ignore", invalid="ignore"):
            array = self.on_grid(image).array.astype(np.float32)
            normalised = [normalise_as_a_whole(a, n) for a, n in zip(array, normalisation, strict=True)]
            whole, nothing = zip(*normalised, strict=True)
            grid = [compare_to_surroundings(a, n) for a, n in zip(whole, normalisation, strict=True)]
        if not all(np.isfinite(channel).all() for channel in grid):
            raise DataError(
                "intensities too large to compute with, such as those that stand for no data",
                expected="values below 1e18",
                fix="write another value where the image has none",
            )
        local = any(n.kind == "local" for n in normalisation)
        before = torch.from_numpy(np.stack(whole)) if local else None
        return GridImage(torch.from_numpy(np.stack(grid)), before, tuple(map(float, nothing)))

    def for_task(self, name: str, unknown: Literal["background", "left_out"] = "background") -> Plan:
        """Return the plan for images that are known to be like those of one of several datasets.

        Args:
            name: Of the dataset.
            unknown: What becomes of classes that it does not label: as the network has learned it.

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
        return self.model_copy(update={"variants": chosen, "unknown": unknown})

    def label_to_grid(self, label: Volume, image: Volume) -> Integer[Tensor, "*s"]:
        """Return a label map of class indices on the plan's grid for its image; for training only."""
        if label.same_grid(image):  # of a place that is rounded otherwise the grid might have another size
            label = image.with_array(label.array)
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
        """Return softmax over classes, or sigmoid for overlapping regions, along the `channel` axis.

        Of a plan for one of several datasets the classes of the others have no probability.
        """
        if self.regions:
            return torch.sigmoid(logits)
        known = self.variants[0].classes if len(self.variants) == 1 else range(self.outputs)
        hidden = torch.tensor([i for i in range(self.outputs) if i not in known], device=logits.device)
        if not len(hidden):
            return torch.softmax(logits, dim=channel)
        if self.unknown == "left_out":
            return torch.softmax(logits.index_fill(channel, hidden, HIDDEN), dim=channel)
        probabilities = torch.softmax(logits, dim=channel)
        background = probabilities.narrow(channel, 0, 1) + probabilities.index_select(channel, hidden).sum(
            channel, keepdim=True
        )
        shown = probabilities.narrow(channel, 1, self.outputs - 1).index_fill(channel, hidden - 1, 0.0)
        return torch.cat([background, shown], channel)

    def decide(self, probabilities: Float[np.ndarray, "k *s"]) -> Integer[np.ndarray, "*s"]:
        """Return the class index of every voxel: the largest class, or regions painted in order.

        Of several datasets a class has to be likelier than all that its dataset does not label, taken together, for
        with that as its background it was learned.
        """
        if not self.regions and (len(self.variants) < 2 or self.unknown == "left_out"):
            return find_likeliest(probabilities)
        if not self.regions:
            return self._decide_jointly(probabilities)
        label = np.zeros(probabilities.shape[1:], np.int32)
        for probability, index in zip(probabilities, self.region_classes, strict=True):
            label[probability > 0.5] = index
        return label

    def _decide_jointly(self, probabilities: Float[np.ndarray, "k *s"]) -> Integer[np.ndarray, "*s"]:
        label = np.zeros(probabilities.shape[1:], np.int32)
        highest = np.zeros_like(probabilities[0])
        total = probabilities.sum(0)
        for variant in self.variants:
            own = [index for index in variant.classes if index > 0]
            chances = probabilities[own]
            best = chances.max(0)
            wins = (best > total - chances.sum(0)) & (best > highest)
            label[wins] = np.array(own, np.int32)[chances.argmax(0)[wins]]
            highest[wins] = best[wins]
        return label

    def as_maps(self, label: Integer[np.ndarray, "*s"]) -> Bool[np.ndarray, "k *s"]:
        """Return for every class or region whether each voxel of a label map of class indices is of it."""
        groups = self.regions or [(index,) for index in range(len(self.classes))]
        return np.stack([np.isin(label, group) for group in groups])


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
