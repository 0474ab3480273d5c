"""Spatial axes of a patch that augmentation may mirror, and those along which it may mix voxels."""

from __future__ import annotations

from collections.abc import Sequence

from anysite.errors import ConfigError
from anysite.settings import AugmentSettings


def choose_flip_axes(settings: AugmentSettings, dimension: int) -> tuple[int, ...]:
    """Return the spatial axes that are mirrored.

    Raises:
        ConfigError: `settings.flip_axes` names an axis that the patch does not have.
    """
    axes = tuple(range(dimension)) if settings.flip_axes is None else settings.flip_axes
    for axis in axes:
        if not 0 <= axis < dimension:
            raise ConfigError(
                f"axis {axis}", where="augment.flip_axes", expected=f"spatial axes 0 to {dimension - 1}"
            )
    return axes


def mixed_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the spatial axes that may be mixed: all, or the last two of a patch with thick slices."""
    thick = len(shape) == 3 and 2 * shape[0] < max(shape)
    return tuple(range(1 if thick else 0, len(shape)))
