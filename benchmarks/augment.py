"""Milliseconds a batch of every transform, beside MONAI's dictionary transform for the same thing.

Run as `python benchmarks/augment.py [--threads 2] [--repeats 10]`. The two sides alternate in one process.
A single transform changes every sample, and its fastest repeat counts (other load only adds); the whole
augmentation draws with the default probabilities, and the mean counts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable

import monai.transforms as mt
import torch
from torch import Tensor

from anysite.augment import CELLS, augment
from anysite.settings import AugmentSettings

KEYS = ["image", "label"]
BATCHES = ((8, 1, 192, 192), (2, 1, 64, 64, 64), (2, 1, 20, 160, 160))
OFF = AugmentSettings(
    affine=0, elastic=0, flip=0, bias_field=0, noise=0, blur=0, brightness=0, contrast=0, low_resolution=0,
    gamma=0,
)  # fmt: skip


def monai_transforms(shape: tuple[int, ...], s: AugmentSettings) -> dict[str, tuple[float, Callable]]:
    """Return each transform's probability and MONAI's counterpart, which always draws it."""
    dimension = len(shape)
    angle = math.radians(s.rotation_degrees)
    shrink = (1 / s.scale[1] - 1, 1 / s.scale[0] - 1)
    reflect = {"mode": ("bilinear", "nearest"), "padding_mode": "reflection"}
    spacing = max(shape) / CELLS
    low, high = (strength * spacing for strength in s.elastic_strength)
    if dimension == 2:
        elastic = mt.Rand2DElasticd(KEYS, (spacing, spacing), (low, high), prob=1, **reflect)
    else:
        elastic = mt.Rand3DElasticd(KEYS, (spacing / 2, spacing / 2), (low, high), prob=1, **reflect)
    contrast = (s.contrast_factor[0] - 1, s.contrast_factor[1] - 1)
    brightness = (s.brightness_factor[0] - 1, s.brightness_factor[1] - 1)
    sigma = s.blur_sigma_voxels
    upsample = "bilinear" if dimension == 2 else "trilinear"
    return {
        "affine": (
            s.affine,
            mt.RandAffined(
                KEYS,
                prob=1,
                rotate_range=[angle] * (1 if dimension == 2 else 3),
                scale_range=[shrink] * dimension,
                **reflect,
            ),
        ),
        "elastic": (s.elastic, elastic),
        "flip": (
            s.flip,
            mt.Compose([mt.RandFlipd(KEYS, prob=1, spatial_axis=axis) for axis in range(dimension)]),
        ),
        "bias_field": (s.bias_field, mt.RandBiasFieldd(["image"], coeff_range=(0.0, 0.3), prob=1)),
        "noise": (s.noise, mt.RandGaussianNoised(["image"], prob=1, std=s.noise_sigma[1])),
        "blur": (s.blur, mt.RandGaussianSmoothd(["image"], sigma, sigma, sigma, prob=1)),
        "brightness": (s.brightness, mt.RandScaleIntensityd(["image"], brightness, prob=1)),
        "contrast": (
            s.contrast,
            mt.RandScaleIntensityFixedMeand(["image"], contrast, preserve_range=True, prob=1),
        ),
        "low_resolution": (
            s.low_resolution,
            mt.RandSimulateLowResolutiond(
                ["image"], prob=1, upsample_mode=upsample, zoom_range=s.low_resolution_factor
            ),
        ),
        "gamma": (
            s.gamma,
            mt.RandAdjustContrastd(["image"], prob=1, gamma=s.gamma_exponent, retain_stats=True),
        ),
    }


def apply_monai(steps: list[tuple[float, Callable]], image: Tensor, label: Tensor) -> None:
    results = []
    for sample, classes in zip(image, label, strict=True):
        data = {"image": sample, "label": classes[None].float()}
        for probability, step in steps:
            if torch.rand(()) < probability:
                data = step(data)
        results.append(data)
    torch.stack([torch.as_tensor(data["image"]) for data in results])
    torch.stack([torch.as_tensor(data["label"]) for data in results])


def milliseconds(ours: Callable, theirs: Callable, repeats: int) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = [], []
    for turn in range(repeats + 1):
        for function, record in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            function()
            if turn:  # the first turn warms up
                record.append(1000 * (time.perf_counter() - start))
    return times


def compare(shape: tuple[int, ...], threads: int, repeats: int) -> None:
    defaults = AugmentSettings()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(shape, generator=generator)
    label = torch.randint(0, 4, (shape[0], *shape[2:]), generator=generator)
    steps = monai_transforms(shape[2:], defaults)
    print(f"\nbatch {'x'.join(map(str, shape))}, {threads} threads, milliseconds a batch")
    print(f"{'transform':<16}{'anysite':>9}{'MONAI':>9}{'ratio':>8}")

    def show(name: str, settings: AugmentSettings, draws: list[tuple[float, Callable]], count: int) -> None:
        ours, theirs = milliseconds(
            lambda: augment(image, label, settings, generator),
            lambda: apply_monai(draws, image, label),
            count,
        )
        summary = min if len(draws) == 1 else statistics.mean
        a, b = summary(ours), summary(theirs)
        print(f"{name:<16}{a:9.2f}{b:9.2f}{b / a:8.1f}")

    for name, (_, step) in steps.items():
        show(name, OFF.model_copy(update={name: 1.0}), [(1.0, step)], repeats)
    show("all, as default", defaults, list(steps.values()), 4 * repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # MONAI's deprecations
    for shape in BATCHES:
        compare(shape, arguments.threads, arguments.repeats)


if __name__ == "__main__":
    main()
