"""MedNeXt: Roy, Koehler, Ulrich et al., 2023, https://arxiv.org/abs/2303.09975 (MONAI's)."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from monai.networks import nets
from torch import Tensor

from anysite.errors import ConfigError
from anysite.networks import Network, require_counts


class MedNeXt(Network):
    """MONAI's MedNeXt, a U-Net of residual ConvNeXt blocks, without deep supervision.

    Args:
        width: Channels of the first level, doubled a level; the paper's is 32.
        levels: Levels including the bottleneck; the paper's is 5.
        blocks_per_level: Blocks of every level; 2 in the paper's S and B.
        expansion: Widening inside a block; 2 in the paper's S.
        kernel_size: Size of the depth-wise convolutions in voxels, odd; the paper's are 3 and 5.

    Raises:
        ConfigError: a setting out of range, or a patch size that is no multiple of the stride.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        patch_size: Sequence[int],
        *,
        width: int = 16,
        levels: int = 5,
        blocks_per_level: int = 2,
        expansion: int = 2,
        kernel_size: int = 3,
    ) -> None:
        super().__init__(channels, classes, patch_size)
        require_counts(
            width=width,
            levels=levels,
            blocks_per_level=blocks_per_level,
            expansion=expansion,
            kernel_size=kernel_size,
        )
        if kernel_size % 2 == 0:
            raise ConfigError(f"{kernel_size}", where="network.kernel_size", expected="an odd number")
        self.widths = tuple(width * 2**level for level in range(levels))
        self.stride = (2 ** (levels - 1),) * self.dimension
        self._require_patch_size(self.stride)
        self.network = nets.MedNeXt(
            self.dimension,
            init_filters=width,
            in_channels=channels,
            out_channels=classes,
            encoder_expansion_ratio=expansion,
            decoder_expansion_ratio=expansion,
            bottleneck_expansion_ratio=expansion,
            kernel_size=kernel_size,
            use_residual_connection=True,
            blocks_down=(blocks_per_level,) * (levels - 1),
            blocks_bottleneck=blocks_per_level,
            blocks_up=(blocks_per_level,) * (levels - 1),
        )

    def encode(self, image: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Return one feature a level, from full resolution to the bottleneck."""
        image = self.network.stem(image)
        features = []
        for stage, down in zip(self.network.enc_stages, self.network.down_blocks, strict=True):
            features.append(stage(image))
            image = down(features[-1])
        return [*features, self.network.bottleneck(image)]

    def decode(self, features: list[Tensor]) -> Float[Tensor, "b k *s"]:
        """Return the logits at full resolution."""
        *skips, image = features
        stages = zip(self.network.up_blocks, self.network.dec_stages, reversed(skips), strict=True)
        for up, stage, skip in stages:
            image = stage(up(image) + skip)
        return self.network.out_0(image)
