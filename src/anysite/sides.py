"""Classes that differ by their side of the body, which mirrored training images would mix up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from anysite.settings import AugmentSettings

OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l", "lh": "rh", "rh": "lh"}
SIDE = re.compile(rf"(?<![a-z])({'|'.join(OTHER_SIDE)})(?![a-z])")
WORD_IN_CAMEL_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])")


class MirroredSides(NamedTuple):
    """Two classes that differ by their side, and the spatial axis along which mirroring swaps them."""

    axis: int
    one: str
    other: str


def find_mirrored_sides(settings: AugmentSettings, axes: str, classes: Sequence[str]) -> MirroredSides | None:
    """Return two classes called alike but for left and right, where mirroring swaps these; none otherwise.

    Args:
        axes: Orientation of the patch's axes, such as "SAR"; empty for pictures, whose rows run from side to side.
    """
    axis = next((n for n, letter in enumerate(axes) if letter in "LR"), None) if axes else 1
    if not settings.enabled or not settings.flip or axis is None:
        return None
    if settings.flip_axes is not None and axis not in settings.flip_axes:
        return None
    names = {WORD_IN_CAMEL_CASE.sub(" ", name).lower(): name for name in classes}
    for words, name in names.items():
        other = SIDE.sub(lambda found: OTHER_SIDE[found[0]], words)
        if other != words and other in names:
            return MirroredSides(axis, name, names[other])
    return None
