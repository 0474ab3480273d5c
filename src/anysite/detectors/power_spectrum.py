"""Power spectrum of the image: Durall, Keuper, Keuper, 2020, https://arxiv.org/abs/2003.01826."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Integer
from scipy import ndimage

from anysite.detectors import Detector, Output, Vector, Vectors, scale_apart
from anysite.detectors.mahalanobis import learn_components, measure
from anysite.networks import require_counts, require_fractions

SLICES = 16  # of each orientation, evenly spaced: enough for a mean, and little work in large volumes
NEIGHBOURHOOD = 5  # frequencies along each axis that power is compared with
SILENCE = 1e-9  # power that counts as none


class PowerSpectrum(Detector):
    """How unlike training images the sharpness, the noise and the artefacts of an image are: no network needed.

    Published is the mean power at every distance from frequency zero. Here it is that of bands, and with them how
    uneven power is among neighbouring frequencies, and among neighbouring lines of either axis, where motion, ghosts
    and corrupt points of k-space leave their traces. The distance is Mahalanobis' in principal components of entries
    in units of their spread.

    Args:
        bands: Of frequency, from zero to Nyquist's.
        variance: Share of the variance that the principal components kept must hold.

    Raises:
        ConfigError: a setting out of range.
    """

    reason = "its sharpness, noise or artefacts are unlike those of the training images"

    def __init__(self, *, bands: int = 10, variance: float = 0.99) -> None:
        super().__init__()
        require_counts("detectors.power_spectrum", bands=bands)
        require_fractions("detectors.power_spectrum", variance=variance)
        self.bands, self.variance = bands, variance

    def describe(self, output: Output) -> Vector:
        """Return logarithms of every channel's power by band, and of its unevenness, for each orientation of slices."""
        parts = [
            part
            for channel in output.compared
            for slices in _cut(channel, output.slice_wise)
            for part in _measure(slices, self.bands)
        ]
        return np.concatenate(parts)

    def fit(self, vectors: Vectors) -> None:
        """Learn the scale of every entry, and the principal components."""
        scale = scale_apart(vectors)
        scaled = (vectors - scale["mean"]) / scale["deviation"]
        self.memory = {"entry_mean": scale["mean"], "entry_deviation": scale["deviation"]} | learn_components(
            scaled, self.variance
        )

    def distance(self, vector: Vector) -> float:
        """Return the distance over the components and beyond them."""
        return measure((vector - self.memory["entry_mean"]) / self.memory["entry_deviation"], self.memory)


def _cut(channel: Float[np.ndarray, "*s"], slice_wise: bool) -> Iterator[Float[np.ndarray, "n h w"]]:
    """Yield slices of a channel, of a volume that is segmented as one in each of three orientations."""
    if channel.ndim == 2:
        yield channel[None]
        return
    for axis in range(1 if slice_wise else 3):
        chosen = np.unique(np.linspace(0, channel.shape[axis] - 1, SLICES).round().astype(int))
        yield np.moveaxis(channel, axis, 0)[chosen]


def _measure(slices: Float[np.ndarray, "n h w"], bands: int) -> tuple[Vector, Vector]:
    """Return the logarithms of the mean power in bands, as shares of all, and six of how uneven it is."""
    height, width = slices.shape[1:]
    # A window, since an image's left and right borders differ; ends that are not zero leave something of two voxels.
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1]).astype(np.float32)
    power = np.square(np.abs(np.fft.rfft2(slices * window)))
    logarithms = np.log(power + SILENCE)
    usual, smooth = (_unfold(half.mean(0, dtype=np.float64), width) for half in (power, logarithms))
    band, counts = _share_out(height, width, bands)
    sums = np.bincount(band, usual.ravel(), bands + 1)[:bands]
    held = np.flatnonzero(counts)  # of a short side not all bands hold a frequency
    means = np.log(sums[held] / counts[held] + SILENCE) - np.log(usual.mean() + SILENCE)
    uneven = smooth - ndimage.uniform_filter(smooth, NEIGHBOURHOOD, mode="wrap")
    lines = [uneven.mean(axis) for axis in (0, 1)]
    # Which axis is which says less than how they differ: the smaller of the two first.
    spread = sorted(line.std() for line in lines) + sorted(np.abs(line).max() for line in lines)
    unevenness = np.log(np.array([*spread, uneven.std(), uneven.max()]) + SILENCE)
    return np.interp(np.arange(bands), held, means), unevenness


@lru_cache(maxsize=8)
def _share_out(
    height: int, width: int, bands: int
) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " k"]]:
    """Return the band of every frequency, `bands` beyond Nyquist's, and how many frequencies each band holds."""
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    band = np.minimum((2 * bands * radius).astype(int), bands).ravel()
    return band, np.bincount(band, minlength=bands + 1)[:bands]


def _unfold(half: Float[np.ndarray, "h _"], width: int) -> Float[np.ndarray, "h w"]:
    """Return all frequencies of a real image's power, which at opposite ones is the same."""
    opposite = np.roll(half[::-1], 1, axis=0)[:, (width - 1) // 2 : 0 : -1]
    return np.concatenate([half, opposite], axis=1)
