"""SegResNet: Myronenko, 2018, https://arxiv.org/abs/1810.11654 (MONAI's, without the autoencoder)."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from monai.networks import nets
from torch import Tensor

from anysite.networks import Network, require_counts, require_fractions, require_multiples


class SegResNet(Network):
    """MONAI's SegResNet, a residual encoder and a light decoder that adds its skips.

    Args:
        width: Channels of the first level, a multiple of 8; doubled a level. The paper's is 32.
        blocks_down: Residual blocks of each level of the encoder, full resolution first.
        blocks_up: Residual blocks of each level of the decoder.
        dropout: Probability of dropping a channel after the first convolution.

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
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        blocks_up: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(channels, classes, patch_size)
        levels = len(blocks_down)
        require_counts(width=width, blocks_up=blocks_up, blocks_down=min(blocks_down, default=0))
        require_multiples(8, width=width)  # the groups of MONAI's group normalisation
        require_fractions(dropout=dropout)
        self.widths = tuple(width * 2**level for level in range(levels))
        self.stride = (2 ** (levels - 1),) * self.dimension
        self._require_patch_size(self.stride)
        self.network = nets.SegResNet(
            self.dimension,
            init_filters=width,
            in_channels=channels,
            out_channels=classes,
            dropout_prob=dropout or None,
            blocks_down=tuple(blocks_down),
            blocks_up=(blocks_up,) * (levels - 1),
        )

    def encode(self, image: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Return one feature a level, from full resolution to the bottleneck."""
        return self.network.encode(image)[1]

    def decode(self, features: list[Tensor]) -> Float[Tensor, "b k *s"]:
        """Return the logits at full resolution."""
        return self.network.decode(features[-1], features[::-1])
