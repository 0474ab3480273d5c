"""Images that are there more than once: bit by bit, or saved anew, resized, turned, padded, cropped."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import ndimage

from anysite.data.case import Case
from anysite.data.check.likeness import (
    Likeness,
    details_of,
    find_landmarks,
    pooled,
    standardised,
    turned,
)
from anysite.data.check.problems import Problem, of_case
from anysite.data.check.reading import Reading

ALIKE = 0.9, 0.985  # correlation of details that copies have: at least, and where all images look alike
ALIKE_COARSE = 0.97  # at least, in images of so few voxels that little is left to compare
NEARER = 0.5  # what a copy may lack of 1, as a share of what the image's fourth nearest lacks
FEW = 0.9  # how like others an image is taken to be where there are too few others to tell
PARTNERS = 4  # the most similar images, which are compared closely
BLOCK = 32  # images compared at a time, for the sake of memory
LANDMARK = 0.85  # correlation of what surrounds two landmarks that may be the same
VOTES = 4  # landmarks that agree on how far an image is shifted against another
OVERLAP = 0.5  # of the smaller image, and at least
CELLS = 400

_MEND = "remove one, or give both the same patient"
_MEND_JOINTLY = "remove one, or list the very same file in both datasets"

Pairs = dict[tuple[int, int], float]


def find_copies(readings: Sequence[Reading]) -> Iterator[Problem]:
    """Yield images with the voxels of another, and such of two patients that are one but for their form."""
    first: dict[str, Case] = {}
    for reading in readings:
        if not reading.digest or reading.constant:
            continue
        case, other = reading.case, first.setdefault(reading.digest, reading.case)
        if other is case or (case.task != other.task and case.patient == other.patient):
            continue  # the latter: one image with the labels of two datasets
        crossing = case.patient != other.patient
        yield of_case(
            "identical images", case, case.image_paths[0],
            f"the same voxels as case {other.id}" + (f" of patient {other.patient}" if crossing else ""),
            "every image once",
            _MEND if case.task == other.task else _MEND_JOINTLY,
            "error" if crossing else "warning",
        )  # fmt: skip


def find_near_copies(readings: Sequence[Reading]) -> Iterator[Problem]:
    """Yield images that show the same as an image of another patient, though not voxel by voxel."""
    for dimension in (2, 3):
        known = [
            (reading, reading.likeness)
            for reading in readings
            if reading.likeness is not None and reading.likeness.whole.ndim == dimension
        ]
        if len(known) > 1:
            own = [reading for reading, _ in known]
            for (i, j), alike in compare([likeness for _, likeness in known], _kin(own)).items():
                one, other = own[i].case, own[j].case
                yield of_case(
                    "nearly identical images", other, other.image_paths[0],
                    f"shows what case {one.id} of patient {one.patient} shows, saved anew, resized, turned, padded "
                    f"or cropped (correlation of details {alike:.3f})",
                    "other images for other patients",
                    f"look at both; {_MEND if one.task == other.task else _MEND_JOINTLY}",
                )  # fmt: skip


def _kin(readings: Sequence[Reading]) -> np.ndarray:
    """Return which pairs `(n, n)` need no comparison: of one patient, or with the same voxels."""
    patients = np.unique([reading.case.patient for reading in readings], return_inverse=True)[1]
    digests = np.unique([reading.digest for reading in readings], return_inverse=True)[1]
    return (patients[:, None] == patients) | (digests[:, None] == digests)


def compare(likenesses: Sequence[Likeness], kin: np.ndarray) -> Pairs:
    """Return pairs of images of equally many axes that are copies, with the correlation of their details.

    Args:
        likenesses: Of the images.
        kin: Which pairs `(n, n)` are left out.
    """
    found, usual = _as_a_whole(likenesses, kin)
    for pair, alike in _shifted(likenesses, kin).items():
        found[pair] = max(alike, found.get(pair, 0.0))
    coarse = np.array([likeness.cells.size * likeness.cell**likeness.cells.ndim for likeness in likenesses])
    least = np.where(coarse < likenesses[0].whole.size / 2, ALIKE_COARSE, ALIKE[0])
    limits = np.clip(1 - NEARER * (1 - usual), least, ALIKE[1])
    return {(i, j): alike for (i, j), alike in sorted(found.items()) if alike >= max(limits[i], limits[j])}


def _as_a_whole(likenesses: Sequence[Likeness], kin: np.ndarray) -> tuple[Pairs, np.ndarray]:
    """Compare images resized to one shape, in every attitude; return also how like others each is anyway."""
    found: Pairs = {}
    usual = np.zeros(len(likenesses))
    kinds = [[likeness.whole for likeness in likenesses], [likeness.inner for likeness in likenesses]]
    if all(a is b for a, b in zip(*kinds, strict=True)):
        kinds.pop()
    for pictures in kinds:
        pairs, fourth = _partners(pictures, kin)
        np.maximum(usual, fourth, out=usual)
        for i, j in pairs:
            alike = max(abs(float(np.vdot(attitude, pictures[j]))) for attitude in turned(pictures[i][None]))
            found[i, j] = max(alike, found.get((i, j), 0.0))
    return found, usual


def _partners(pictures: Sequence[np.ndarray], kin: np.ndarray) -> tuple[set[tuple[int, int]], np.ndarray]:
    """Return the pairs of every picture with those most like it at half the size, and how like the last of these is."""
    halved = np.stack([standardised(pooled(picture, 2)) for picture in pictures])
    everyone = halved.reshape(len(halved), -1)
    pairs, usual = set(), np.full(len(halved), FEW)
    most = min(PARTNERS, len(halved) - 1)
    for start in range(0, len(halved), BLOCK):
        block = halved[start : start + BLOCK]
        best = np.zeros((len(block), len(halved)), np.float32)
        for attitude in turned(block):
            np.maximum(best, np.abs(attitude.reshape(len(block), -1) @ everyone.T), out=best)
        best[kin[start : start + BLOCK]] = -1
        for row, near in enumerate(np.argpartition(-best, most - 1, axis=1)[:, :most]):
            i, likest = start + row, best[row, near]
            pairs.update((min(i, int(j)), max(i, int(j))) for j in near if best[row, j] > 0)
            if most == PARTNERS:
                usual[i] = likest.min()
    return pairs, usual


def _shifted(likenesses: Sequence[Likeness], kin: np.ndarray) -> Pairs:
    """Compare images in their own pixels, moved to where most landmarks agree."""
    found: Pairs = {}
    for cell in sorted({likeness.cell for likeness in likenesses}):
        # An image of larger cells is larger; against it also smaller ones are held, which may be cut from it.
        members = [i for i, likeness in enumerate(likenesses) if cell / 4 <= likeness.cell <= cell]
        maps = [details_of(pooled(likenesses[i].cells, cell // likenesses[i].cell)) for i in members]
        own = np.array([likenesses[i].cell == cell for i in members])
        skip = kin[np.ix_(members, members)] | ~(own[:, None] | own)
        agreeing = _agreeing(maps, skip)
        closest: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for pair in sorted(agreeing, key=lambda pair: -agreeing[pair][0]):
            for index in pair:
                closest[index].append(pair)
        for a, b in {pair for pairs in closest.values() for pair in pairs[:PARTNERS]}:
            found[members[a], members[b]] = _overlapping(maps[a], maps[b], agreeing[a, b][1])
    return found


def _agreeing(maps: Sequence[np.ndarray], skip: np.ndarray) -> dict[tuple[int, int], tuple[int, np.ndarray]]:
    """Return how many landmarks agree, where enough do, on by how many cells images are shifted, and that shift."""
    marked = [find_landmarks(cells) for cells in maps]
    owner = np.repeat(np.arange(len(maps)), [len(places) for places, _ in marked])
    places, patches = (np.concatenate(parts) for parts in zip(*marked, strict=True))
    votes: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
    for start in range(0, len(maps), BLOCK):
        rows = np.flatnonzero((owner >= start) & (owner < start + BLOCK))
        if not len(rows):
            continue
        later = np.arange(rows[0], len(owner))
        mine, other = np.nonzero(patches[rows] @ patches[later].T > LANDMARK)
        mine, other = rows[mine], later[other]
        wanted = (owner[mine] < owner[other]) & ~skip[owner[mine], owner[other]]
        mine, other = mine[wanted], other[wanted]
        pair = owner[mine] * len(maps) + owner[other]
        order = np.argsort(pair, kind="stable")
        numbers, begins, counts = np.unique(pair[order], return_index=True, return_counts=True)
        for number, begin, count in zip(numbers, begins, counts, strict=True):
            if count >= VOTES:
                chosen = order[begin : begin + count]
                moved = places[mine[chosen]] - places[other[chosen]]
                favourite, supporters = Counter(map(tuple, moved.tolist())).most_common(1)[0]
                near = np.abs(moved - favourite).max(axis=1) <= 1
                if supporters > 1 and near.sum() >= VOTES:
                    votes[divmod(int(number), len(maps))] = int(near.sum()), np.array(favourite)
    return votes


def _overlapping(one: np.ndarray, other: np.ndarray, moved: np.ndarray) -> float:
    """Return the correlation of what two maps share if the other lies about `moved` cells further on."""
    units = np.eye(one.ndim, dtype=int)
    steps = [0 * units[0], *units, *-units]
    near = [_correlation(one, other, moved + step) for step in steps]
    if max(near) < ALIKE[0] - 0.35:
        return max(near)
    moved = moved + steps[int(np.argmax(near))]  # the landmarks may be off by a cell
    near = [_correlation(one, other, moved + step) for step in steps]
    # A crop's cells rarely lie on those of the original: move by the fraction at which the correlation peaks.
    sides = zip(near[1 + one.ndim :], near[1 : 1 + one.ndim], strict=True)
    fraction = [_peak(before, near[0], after) for before, after in sides]
    finer = ndimage.shift(other, fraction, order=3, mode="nearest")
    return max(*near, _correlation(one, finer, moved))


def _correlation(one: np.ndarray, other: np.ndarray, moved: np.ndarray) -> float:
    begin, end = np.maximum(moved, 0), np.minimum(one.shape, np.array(other.shape) + moved)
    size = float(np.prod(np.maximum(end - begin, 0)))
    if size < max(CELLS, OVERLAP * min(one.size, other.size)):
        return 0.0
    a = one[tuple(map(slice, begin, end))]
    b = other[tuple(map(slice, begin - moved, end - moved))]
    return float(np.vdot(standardised(a), standardised(b)))


def _peak(before: float, at: float, after: float) -> float:
    """Return where between -1/2 and 1/2 a parabola through three values peaks."""
    curvature = before - 2 * at + after
    return float(np.clip((before - after) / (2 * curvature), -0.5, 0.5)) if curvature < 0 else 0.0
