"""Soft Dice confidence: Borges, Machado Pacheco, Silva, 2024, https://arxiv.org/abs/2402.10665."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from anysite.detectors import Detector, Output, Vector, Vectors


class SoftDice(Detector):
    """How far the network's own probabilities put its mask below a Dice of 1.

    Were they true and voxels independent, it would be close to the Dice to expect, and the best there is to sort masks
    by. The paper has one structure; here it is the mean over those that were found, so that a small one counts as much
    as a large one, which it does not in the mean entropy.
    """

    reason = "the network's own probabilities speak for a lower Dice than on images it knows"
    of_shift = False
    in_dice = True

    def describe(self, output: Output) -> Vector:
        """Return 1 minus the mean soft Dice of the structures found; 0 where nothing was."""
        chances = output.probabilities if output.overlapping else output.probabilities[1:]
        (box,) = ndimage.find_objects(output.foreground.astype(np.uint8)) or [None]
        lost = []
        for index, chance in enumerate(chances, start=1) if box else ():
            inside = chance[box]
            found = inside[inside > 0.5 if output.overlapping else output.label[box] == index]
            if found.size:
                lost.append(1 - 2 * float(found.sum()) / (float(chance.sum()) + found.size))
        return np.array([np.mean(lost) if lost else 0.0])

    def fit(self, vectors: Vectors) -> None:
        """Learn nothing: the network's own doubt needs no reference."""

    def distance(self, vector: Vector) -> float:
        """Return what is lost."""
        return float(vector[0])
