"""Rules on grids: channels, axes, spacing, orientation, size."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import median

from anysite.data.check.problems import Problem, of_case, of_dataset
from anysite.data.check.reading import Reading, numbers
from anysite.data.volume import Volume

SPACING_FACTOR = 3.0
EXTENT_FACTOR = 5.0
ANISOTROPIC = 1.5  # the slice axis is the one with the largest spacing where it is this much larger
SAME_SPACING = 1.1
TINY = 8  # voxels along the axes other than a volume's shortest
PLAUSIBLE_MM = 0.002, 50.0
USUAL = 0.8  # share of a site's cases that makes the others unusual
ENOUGH = 4  # cases of a site, to tell what is usual

Physical = list[tuple[Reading, Volume]]


def check_geometry(readings: Sequence[Reading]) -> Iterator[Problem]:
    """Yield what is wrong with grids, by themselves and beside the others of the site."""
    yield from check_counts(readings)
    sites: dict[str, Physical] = defaultdict(list)
    for reading in readings:
        if reading.grid is not None:
            yield from _check_size(reading, reading.grid)
            if reading.grid.unit == "mm":
                sites[reading.case.domain].append((reading, reading.grid))
    for domain, site in sites.items():
        yield from _check_orientation(domain, site)
        for dimension in sorted({grid.dimension for _, grid in site}):
            alike = [(reading, grid.oriented()) for reading, grid in site if grid.dimension == dimension]
            yield from _check_spacing(domain, alike)
            yield from _check_extent(domain, alike)


def check_counts(readings: Sequence[Reading]) -> Iterator[Problem]:
    """Yield cases, or whole sites, with other channels or spatial axes than most cases have."""
    read = [reading for reading in readings if reading.digest and reading.grid is not None]
    rules: tuple[tuple[str, str, Callable[[Reading], int]], ...] = (
        ("channel count", "channels", lambda reading: reading.channels),
        ("2-D and 3-D mixed", "spatial axes", lambda reading: reading.grid.dimension if reading.grid else 0),
    )
    for rule, unit, count in rules:
        usual = Counter(map(count, read)).most_common(1)
        for domain in dict.fromkeys(reading.case.domain for reading in read):
            site = [reading for reading in read if reading.case.domain == domain]
            odd = [reading for reading in site if count(reading) != usual[0][0]]
            expected = f"{usual[0][0]} {unit} as {usual[0][1]} of {len(read)} cases have"
            if len(odd) == len(site) > 1 and len({count(reading) for reading in odd}) == 1:
                yield of_dataset(
                    rule, f"site {domain}: {count(odd[0])} {unit} in all {len(site)} cases", expected,
                    "convert the site's images, or make two datasets",
                )  # fmt: skip
                continue
            for reading in odd:
                yield of_case(
                    rule, reading.case, reading.case.image_paths[0], f"{count(reading)} {unit}", expected,
                    "convert the case or exclude it",
                )  # fmt: skip


def _check_size(reading: Reading, grid: Volume) -> Iterator[Problem]:
    file = reading.case.image_paths[0]
    if sorted(grid.shape)[-2] < TINY:
        yield of_case(
            "tiny image", reading.case, file, f"{' x '.join(map(str, grid.shape))} voxels",
            f"{TINY} or more along at least two axes",
            "check that the image is whole, and how its axes are stored",
        )  # fmt: skip
    least, most = PLAUSIBLE_MM
    if grid.unit == "mm" and (min(grid.spacing) < least or max(grid.spacing) > most):
        yield of_case(
            "implausible spacing", reading.case, file, f"{numbers(grid.spacing)} mm",
            f"between {least:g} and {most:g} mm",
            "check the header: its unit may be metres or micrometres",
        )  # fmt: skip


def _check_orientation(domain: str, site: Physical) -> Iterator[Problem]:
    usual, count = Counter(grid.axes for _, grid in site).most_common(1)[0]
    if len(site) < ENOUGH or count < USUAL * len(site):
        return
    for reading, grid in site:
        if grid.axes != usual:
            yield of_case(
                "orientation", reading.case, reading.case.image_paths[0], f"axes {grid.axes}",
                f"{usual} as {count} of {len(site)} cases of site {domain}",
                "look whether the patient lies as the header says; if so, nothing is to be done",
            )  # fmt: skip


def _check_spacing(domain: str, site: Physical) -> Iterator[Problem]:
    usual = [median(axis) for axis in zip(*(grid.spacing for _, grid in site), strict=True)]
    for reading, grid in site:
        factors = [s / m for s, m in zip(grid.spacing, usual, strict=True)]
        ordered = zip(sorted(grid.spacing), sorted(usual), strict=True)
        permuted = len(site) >= ENOUGH and all(1 / SAME_SPACING < s / m < SAME_SPACING for s, m in ordered)
        if permuted and _slice_axis(grid.spacing) not in (None, _slice_axis(usual)):
            yield of_case(
                "slice axis", reading.case, reading.case.image_paths[0], f"{numbers(grid.spacing)} mm",
                f"{numbers(usual)} mm along the same anatomical axes, as usual at site {domain}",
                "check whether the axes are swapped in the header",
            )  # fmt: skip
        elif max(factors) > SPACING_FACTOR or min(factors) < 1 / SPACING_FACTOR:
            yield of_case(
                "spacing outlier", reading.case, reading.case.image_paths[0], f"{numbers(grid.spacing)} mm",
                f"about {numbers(usual)} mm, the median of site {domain}",
                "check the header",
            )  # fmt: skip


def _slice_axis(spacing: Sequence[float]) -> int | None:
    largest = max(spacing)
    second = sorted(spacing)[-2]
    return list(spacing).index(largest) if largest > ANISOTROPIC * second else None


def _check_extent(domain: str, site: Physical) -> Iterator[Problem]:
    if len(site) < ENOUGH:
        return
    extents = [[n * s for n, s in zip(grid.shape, grid.spacing, strict=True)] for _, grid in site]
    usual = [median(axis) for axis in zip(*extents, strict=True)]
    middle = [median(axis) for axis in zip(*(grid.spacing for _, grid in site), strict=True)]
    for (reading, grid), extent in zip(site, extents, strict=True):
        factors = [e / u for e, u in zip(extent, usual, strict=True)]
        if min(factors) >= 1 / EXTENT_FACTOR and max(factors) <= EXTENT_FACTOR:
            continue
        if all(
            1 / SPACING_FACTOR <= s / m <= SPACING_FACTOR for s, m in zip(grid.spacing, middle, strict=True)
        ):
            yield of_case(
                "extent outlier", reading.case, reading.case.image_paths[0],
                f"{numbers(extent)} mm from end to end",
                f"about {numbers(usual)} mm, the median of site {domain}",
                "check that no slices are missing and that it is the same part of the body",
            )  # fmt: skip
