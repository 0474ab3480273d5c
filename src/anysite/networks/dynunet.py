"""DynUNet, MONAI's nnU-Net network: Isensee et al., 2021, https://doi.org/10.1038/s41592-020-01008-z."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from monai.networks import nets
from monai.networks.blocks.dynunet_block import UnetOutBlock
from torch import Tensor, nn

from anysite.errors import ConfigError
from anysite.networks import Network, require_counts, require_fractions
from anysite.networks.unet import plan_levels


class DynUNet(Network):
    """MONAI's DynUNet with strides and kernels from the patch size.

    Args:
        width: Channels of the first level, doubled a level up to `max_width`; nnU-Net has 32 and 320.
        residual: Use residual blocks.
        dropout: Probability of dropping a value after each convolution.
        depth: Number of levels, 3 to 6; none: as many as the patch size allows.
        deep_supervision: Segment at every scale of the decoder while training.

    Raises:
        ConfigError: a setting out of range, or a patch size too small for three levels.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        patch_size: Sequence[int],
        *,
        width: int = 16,
        max_width: int = 256,
        residual: bool = False,
        dropout: float = 0.0,
        depth: int | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(channels, classes, patch_size)
        require_counts(width=width, max_width=max_width)
        require_fractions(dropout=dropout)
        strides, kernels = zip(*plan_levels(self.patch_size, depth), strict=True)
        if len(strides) < 3:
            raise ConfigError(
                f"{len(strides)} levels for patches of {list(self.patch_size)}",
                where="network dynunet",
                expected="at least 3",
                fix="leave network.depth out"
                if depth
                else f"set plan.patch_size={[max(16, -(-n // 4) * 4) for n in self.patch_size]} or larger",
            )
        self.widths = tuple(min(width * 2**level, max_width) for level in range(len(strides)))
        self.stride = tuple(math.prod(steps) for steps in zip(*strides, strict=True))
        self.network = nets.DynUNet(
            self.dimension,
            channels,
            classes,
            kernel_size=kernels,
            strides=strides,
            upsample_kernel_size=strides[1:],
            filters=self.widths,
            dropout=dropout or None,
            res_block=residual,
        )
        # MONAI registers every layer a second time here, which would save each weight twice.
        del self.network.skip_layers
        # MONAI's own deep supervision joins all scales in one tensor at full resolution.
        deep_widths = self.widths[1:-1] if deep_supervision else ()
        self.deep_heads = nn.ModuleList(UnetOutBlock(self.dimension, width, classes) for width in deep_widths)

    def encode(self, image: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Return one feature a level, from full resolution to the bottleneck."""
        features = [self.network.input_block(image)]
        for down in (*self.network.downsamples, self.network.bottleneck):
            features.append(down(features[-1]))
        return features

    def decode(self, features: list[Tensor]) -> Float[Tensor, "b k *s"]:
        """Return the logits at full resolution."""
        return self.network.output_block(self._decode_levels(features)[0])

    def decode_scales(self, features: list[Tensor]) -> list[Tensor]:
        """Return the logits at full resolution and, with deep supervision, of every coarser level."""
        finest, *coarser = self._decode_levels(features)
        deep = zip(self.deep_heads, coarser, strict=bool(self.deep_heads))
        return [self.network.output_block(finest), *(head(image) for head, image in deep)]

    def _decode_levels(self, features: list[Tensor]) -> list[Tensor]:
        *skips, image = features
        levels = []
        for up, skip in zip(self.network.upsamples, reversed(skips), strict=True):
            image = up(image, skip)
            levels.append(image)
        return levels[::-1]
