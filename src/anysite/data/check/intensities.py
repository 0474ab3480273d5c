"""Rules on intensities: of an image by itself, and beside the others of its site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np
from scipy import optimize

from anysite.data.check.geometry import ENOUGH, USUAL
from anysite.data.check.problems import Problem, of_case, of_dataset
from anysite.data.check.reading import Reading
from anysite.data.limits import HOUNSFIELD_BELOW

NEARLY_ALL = 0.999  # of the voxels with one value
EXTREME = 1e-3  # what the usual values span of all
SATURATED = 0.1, 0.02  # share at the largest value: of the case, and of its site's median at most
SCALE_FACTOR = 10.0
EIGHT_BIT_FACTOR = 3.0
SPREAD = 5.0  # robust standard deviations
OFFSETS = 1000.0, 1024.0
OFFSET_TOLERANCE = 200.0
OPPOSITE = 0.5  # correlation with the mean of the site, and with the opposite sign
CHANNEL_RATIO = 0.5  # how much better another order of channels must fit

Group = Sequence[Reading]


def check_intensities(readings: Sequence[Reading]) -> Iterator[Problem]:
    """Yield images whose values are unusual by themselves, or beside their site's."""
    known = [reading for reading in readings if reading.intensities and not reading.constant]
    sites: dict[str, list[Reading]] = defaultdict(list)
    for reading in known:
        yield from _check_contrast(reading)
        sites[reading.case.domain].append(reading)
    for domain, site in sites.items():
        usual = median(len(reading.intensities) for reading in site)
        alike = [reading for reading in site if len(reading.intensities) == usual]
        if len(alike) >= ENOUGH:
            yield from _check_saturation(domain, alike)
            offset = list(_check_hounsfield(domain, alike))
            yield from offset
            yield from _check_scale(domain, alike, {problem.case for problem in offset})
            yield from _check_sign(domain, alike)
            yield from _check_channel_order(domain, alike)
    yield from _check_hounsfield_of_sites(sites)


def _check_contrast(reading: Reading) -> Iterator[Problem]:
    for channel in reading.intensities:
        if channel.minimum == channel.maximum:  # an error of its own
            continue
        file = reading.case.image_paths[0]
        if channel.share_of_median > NEARLY_ALL:
            yield of_case(
                "nearly constant image", reading.case, file,
                f"{100 * channel.share_of_median:.2f} % of the voxels have one value",
                f"at most {100 * NEARLY_ALL:g} %", "look at it, and exclude it if nothing is to be seen",
            )  # fmt: skip
            return
        if channel.extent < EXTREME * (channel.maximum - channel.minimum):
            yield of_case(
                "extreme voxels", reading.case, file,
                f"99 % of the voxels from {channel.quantiles[0]:.4g} to {channel.quantiles[-1]:.4g}, "
                f"but extremes of {channel.minimum:.4g} and {channel.maximum:.4g}",
                "extremes of the same order", "replace what a padding or a defect left there",
            )  # fmt: skip
            return


def _check_saturation(domain: str, site: Group) -> Iterator[Problem]:
    for channel in range(len(site[0].intensities)):
        shares = [reading.intensities[channel].share_of_maximum for reading in site]
        share, usual = SATURATED
        if median(shares) > usual:
            continue
        for reading, found in zip(site, shares, strict=True):
            measured = reading.intensities[channel]
            if found > share and measured.share_of_median <= NEARLY_ALL and _is_graded(measured.quantiles):
                yield of_case(
                    "saturated image", reading.case, reading.case.image_paths[0],
                    f"{100 * found:.0f} % of the voxels have the largest value, {measured.maximum:.4g}"
                    + (f", in channel {channel}" if len(site[0].intensities) > 1 else ""),
                    f"about {100 * median(shares):.2g} % as usual at site {domain}",
                    "export it again with a wider window, or exclude it",
                )  # fmt: skip


def _is_graded(quantiles: np.ndarray) -> bool:
    """Tell whether there are shades between, as a mask has none."""
    return len(np.unique(quantiles)) > 4


def _check_scale(domain: str, site: Group, known: set[str]) -> Iterator[Problem]:
    for channel in range(len(site[0].intensities)):
        extents = np.array([max(reading.intensities[channel].extent, 1e-30) for reading in site])
        steps = np.log(extents)
        middle = float(np.median(steps))
        spread = 1.4826 * float(np.median(np.abs(steps - middle)))
        for reading, step in zip(site, steps, strict=True):
            own, factor = reading.intensities[channel], float(np.exp(abs(step - middle)))
            eight_bit = own.minimum == 0 and own.maximum == 255 and step < middle
            least = EIGHT_BIT_FACTOR if eight_bit else SCALE_FACTOR
            odd = factor > least and abs(step - middle) > SPREAD * spread
            if odd and own.share_of_median <= NEARLY_ALL and reading.case.id not in known:
                known.add(reading.case.id)
                yield of_case(
                    "intensity scale", reading.case, reading.case.image_paths[0],
                    f"values from {own.quantiles[0]:.4g} to {own.quantiles[-1]:.4g}"
                    + (", as an 8-bit picture has" if eight_bit else ""),
                    f"a range of about {np.exp(middle):.4g} as usual at site {domain}",
                    "export it again in the units of the others",
                )  # fmt: skip


def _check_hounsfield(domain: str, site: Group) -> Iterator[Problem]:
    reach = [reading.intensities[0].minimum <= HOUNSFIELD_BELOW for reading in site]
    if sum(reach) < USUAL * len(site):
        return
    for reading in site:
        own = reading.intensities[0]
        if own.minimum >= 0:
            yield of_case(
                "missing Hounsfield offset", reading.case, reading.case.image_paths[0],
                f"values from {own.minimum:.4g} to {own.maximum:.4g}",
                f"air near -1000 as in {sum(reach)} of {len(site)} cases of site {domain}",
                "apply the rescale intercept and slope of its DICOM header",
            )  # fmt: skip


def _check_hounsfield_of_sites(sites: dict[str, list[Reading]]) -> Iterator[Problem]:
    """Yield sites that would fit the others, all in Hounsfield units, but for the intercept."""
    for domain, site in sites.items():
        others = [reading for name, group in sites.items() if name != domain for reading in group]
        if len(site) < 2 or len({reading.case.domain for reading in others}) < 2:
            continue
        if any(reading.intensities[0].minimum > HOUNSFIELD_BELOW for reading in others):
            continue
        smallest = min(reading.intensities[0].minimum for reading in site)
        moved = _middle(site) - _middle(others)
        if smallest >= 0 and min(abs(moved - offset) for offset in OFFSETS) < OFFSET_TOLERANCE:
            yield of_dataset(
                "missing Hounsfield offset",
                f"site {domain}: no values below {smallest:.4g}, and {moved:.0f} more than elsewhere",
                "air near -1000 as at every other site",
                "apply the rescale intercept and slope of the DICOM headers",
            )


def _middle(group: Group) -> float:
    return float(np.median([np.median(reading.intensities[0].quantiles) for reading in group]))


def _check_sign(domain: str, site: Group) -> Iterator[Problem]:
    """Yield images that are dark where the others are bright, at sites whose images are alike."""
    known = [(r, r.likeness.average) for r in site if r.likeness is not None]
    pictures = [picture for _, picture in known]
    if len(known) < ENOUGH or len({picture.shape for picture in pictures}) > 1:
        return
    mean = np.median(pictures, axis=0)
    mean = (mean - mean.mean()) / max(float(np.linalg.norm(mean - mean.mean())), 1e-12)
    alike = [float(np.vdot(picture, mean)) for picture in pictures]
    if np.quantile(alike, 1 - USUAL) < OPPOSITE:
        return
    for (reading, _), correlation in zip(known, alike, strict=True):
        if correlation < -OPPOSITE:
            yield of_case(
                "inverted intensities", reading.case, reading.case.image_paths[0],
                "dark where the others are bright, and bright where they are dark",
                f"light and shade as usual at site {domain}",
                "invert its values (in DICOM, MONOCHROME1 means so)",
            )  # fmt: skip


def _check_channel_order(domain: str, site: Group) -> Iterator[Problem]:
    """Yield images whose channels would be much more like the others' in another order."""
    if len(site[0].intensities) < 2:
        return
    curves = np.stack([_relative_curves(reading) for reading in site])
    usual = np.median(curves, axis=0)
    costs = np.abs(curves[:, :, None] - usual[None, None]).mean(axis=-1)  # cases, own channel, usual channel
    as_is = np.trace(costs, axis1=1, axis2=2)
    typical = float(np.quantile(as_is, USUAL))
    for reading, cost, kept in zip(site, costs, as_is, strict=True):
        rows, columns = optimize.linear_sum_assignment(cost)
        best = float(cost[rows, columns].sum())
        if list(columns) != list(rows) and best < CHANNEL_RATIO * kept and best < 2 * typical < kept:
            order = ", ".join(str(column) for column in columns)
            yield of_case(
                "channel order", reading.case, reading.case.image_paths[0],
                f"channels that look like the channels {order} of others",
                f"the order 0 to {len(columns) - 1} as usual at site {domain}",
                "put the channels in the others' order (OpenCV writes blue first)",
            )  # fmt: skip


def _relative_curves(reading: Reading) -> np.ndarray:
    """Return the quantiles of every channel, relative to the brightest."""
    curves = np.stack([channel.quantiles for channel in reading.intensities])
    return curves / max(float(np.abs(curves).max()), 1e-12)
