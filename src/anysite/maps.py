"""Probabilities on the grids of plans, their way to an image's own grid, and the prediction they make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from torch import Tensor

from anysite.calibration import Temperature
from anysite.data.volume import Volume
from anysite.guard import Adaptation
from anysite.judge import Verdict
from anysite.plan import Plan

BLOCK_VALUES = 2**22  # probabilities on an image's own grid at a time: few enough for a cache


@dataclass(frozen=True, eq=False)
class GridMaps:
    """The probabilities of one or several networks on their plans' grids, and the way to an image's own.

    Attributes:
        native: The image's own grid; its voxels are not kept.
        parts: A plan and the probabilities `(K, *S)` on its grid for each network.
    """

    native: Volume
    parts: tuple[tuple[Plan, Tensor], ...]

    def rows(self, rows: slice) -> list[Float[np.ndarray, "k *t"]]:
        """Return every network's probabilities at some rows of the image's first axis."""
        return [plan.rows_from_grid(maps, self.native, rows) for plan, maps in self.parts]

    @property
    def values(self) -> int:
        """The probabilities of all networks on the image's own grid."""
        return math.prod(self.native.shape) * sum(len(maps) for _, maps in self.parts)

    def blocks(self) -> Iterator[slice]:
        """Yield rows that together are the image, as many at a time as leave memory to others."""
        voxels = self.values // self.native.shape[0]
        step = max(1, BLOCK_VALUES // voxels)
        for start in range(0, self.native.shape[0], step):
            yield slice(start, min(start + step, self.native.shape[0]))

    def mean(self) -> Volume:
        """Return the probabilities of all networks together on the image's own grid, `(K, *S)` in memory."""
        return self.native.with_array(np.concatenate([average(self.rows(r)) for r in self.blocks()], axis=1))


@dataclass(frozen=True, eq=False)
class Prediction:
    """A segmented image.

    Attributes:
        label: Class indices `(1, *S)` on the image's own grid.
        maps: What the networks say, on their plans' grids.
        temperature: That calibrates it; it changes no voxel of the label.
        overlapping: Whether the maps are of regions.
        verdict: What to do with the label; none where no run has a judge.
        adaptations: What became of adapting each run's network to the image; empty where none was asked for.
        unadapted: The label without adaptation, where that differs.
        drawings: An image's part, and what is drawn from its mask before and after adapting, `(1, C, *P)` from -1 to
            1, by what they show; empty where the method draws nothing.
    """

    label: Volume
    maps: GridMaps
    temperature: Temperature
    overlapping: bool
    verdict: Verdict | None
    adaptations: tuple[Adaptation, ...] = ()
    unadapted: Volume | None = None
    drawings: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def raw(self) -> Volume:
        """The probabilities as the networks say them, one map a class or region `(K, *S)`, on the image's own grid.

        Computed anew each time, because few want them and they take memory.
        """
        return self.maps.mean()

    @property
    def probabilities(self) -> Volume:
        """The calibrated probabilities, like `raw` computed anew each time."""
        raw = self.raw
        return raw.with_array(self.temperature.apply(raw.array, self.overlapping))


def average(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of maps of one shape."""
    total = maps[0]
    for one in maps[1:]:
        total = total + one
    return total / len(maps) if len(maps) > 1 else total
