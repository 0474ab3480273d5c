"""The contract of networks: encode an image into features, decode features into logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anysite.errors import ConfigError


class Network(nn.Module, ABC):
    """A segmentation network; keyword-only constructor arguments are the user's settings.

    `decode` depends on `features` alone, so that features of several images may wait side by side and
    other decoders may be attached to the bottleneck. Nothing is kept on the network between calls.

    Attributes:
        widths: The channels of every feature that `encode` returns, bottleneck last.
        stride: The total down-sampling of the bottleneck along each spatial axis.
        channels: The channels of the image.
        patch_size: The spatial shape in voxels for which the network was built.
        fixed_size: Whether it takes images of `patch_size` alone, and not of other multiples of `stride`.
        channels_last: Whether it computes faster with the channels innermost in memory, as measured.
        token_voxels: The sides of one token of a transformer in voxels; ones where there are no tokens.
        token_width: The channels of a token.

    Raises:
        ConfigError: neither two nor three spatial axes, or a count below one.
    """

    widths: tuple[int, ...]
    stride: tuple[int, ...]
    fixed_size: ClassVar[bool] = False
    channels_last: ClassVar[bool] = False
    token_width: int = 0

    def __init__(self, channels: int, classes: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        if len(patch_size) not in (2, 3):
            raise ConfigError(
                f"{list(patch_size)}", where="plan.patch_size", expected="2 or 3 numbers of voxels"
            )
        require_counts(channels=channels, classes=classes)
        self.channels, self.patch_size = channels, tuple(patch_size)
        self.token_voxels = (1,) * self.dimension

    @property
    def dimension(self) -> int:
        """The number of spatial axes, 2 or 3."""
        return len(self.patch_size)

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout in which images should come and weights should lie."""
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last if self.dimension == 2 else torch.channels_last_3d

    @property
    def embedding(self) -> nn.Module | None:
        """The module that makes tokens `(b, n, w)` or `(b, w, *t)` of an image; none where there are no tokens."""
        return None

    @abstractmethod
    def encode(self, image: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Return the features of every scale, `(b, widths[i], *s_i)`, bottleneck last."""

    @abstractmethod
    def decode(self, features: list[Tensor]) -> Float[Tensor, "b k *s"]:
        """Return the logits for the features of one `encode`."""

    def decode_scales(self, features: list[Tensor]) -> list[Tensor]:
        """Return the logits and, with deep supervision, those of coarser scales; training alone asks for them."""
        return [self.decode(features)]

    def forward(self, image: Float[Tensor, "b c *s"]) -> Float[Tensor, "b k *s"]:
        """Return the logits `(b, classes, *s)` of an image `(b, channels, *s)`."""
        return self.decode(self.encode(image))

    def _require_patch_size(self, stride: Sequence[int]) -> None:
        """Raise ConfigError unless `stride` divides the patch size and leaves at least two voxels."""
        axes = list(zip(self.patch_size, stride, strict=True))
        fitting = [step * max(1, round(size / step)) for size, step in axes]
        if fitting == list(stride):
            fitting[-1] *= 2
        for axis, (size, step) in enumerate(axes):
            if size % step:
                raise ConfigError(
                    f"{size} voxels on axis {axis}",
                    where="plan.patch_size",
                    expected=f"a multiple of {step}",
                    fix=f"set plan.patch_size={fitting}",
                )
        if self.patch_size == tuple(stride):
            raise ConfigError(
                f"{list(self.patch_size)}, of which the deepest level keeps one voxel",
                where="plan.patch_size",
                expected="at least two",
                fix=f"set plan.patch_size={fitting}",
            )


def encoder_tensors(network: Network) -> set[str]:
    """Return the names, in the network's state, of the parameters and buffers that `encode` depends on."""
    parameters = dict(network.named_parameters())
    training = network.training
    network.eval()
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    first = next(iter(parameters.values()))
    features = network.encode(first.new_zeros(1, network.channels, *network.patch_size))
    total = torch.stack([feature.float().sum() for feature in features]).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    for parameter in frozen:
        parameter.requires_grad_(False)
    network.train(training)
    names = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    modules = {name.rpartition(".")[0] for name in names}
    return names | {name for name, _ in network.named_buffers() if name.rpartition(".")[0] in modules}


def require_counts(where: str = "network", /, **settings: object) -> None:
    """Raise ConfigError naming the first setting of `where` that is not a whole number of at least 1."""
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{value!r}", where=f"{where}.{name}", expected="a whole number of at least 1")


def require_fractions(where: str = "network", /, **settings: object) -> None:
    """Raise ConfigError naming the first setting of `where` that is not a number from 0 to below 1."""
    for name, value in settings.items():
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ConfigError(f"{value!r}", where=f"{where}.{name}", expected="a number from 0 to below 1")


def require_multiples(step: int, **settings: int) -> None:
    """Raise ConfigError naming the first setting that `step` does not divide."""
    for name, value in settings.items():
        if value % step:
            raise ConfigError(f"{value!r}", where=f"network.{name}", expected=f"a multiple of {step}")
