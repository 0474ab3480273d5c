"""Swin UNETR: Hatamizadeh, Nath, Tang et al., 2022, https://arxiv.org/abs/2201.01266 (MONAI's)."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from monai.networks import nets
from torch import Tensor, nn

from anysite.networks import Network, require_counts, require_fractions, require_multiples

HEADS = (3, 6, 12, 24)


class SwinUNETR(Network):
    """MONAI's Swin UNETR: a shifted-window transformer and a convolutional decoder.

    Args:
        width: Channels of the first level, a multiple of 12; doubled a level. The paper's is 48.
        blocks_per_stage: Transformer blocks of each of the four stages.
        window_size: Side of an attention window in tokens.
        dropout: Probability of dropping a value within the transformer.
        drop_path: Probability of dropping a residual branch, rising from 0 to this in the last block.

    Raises:
        ConfigError: a setting out of range, or a patch size that is no multiple of 32.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        patch_size: Sequence[int],
        *,
        width: int = 12,
        blocks_per_stage: int = 2,
        window_size: int = 7,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(channels, classes, patch_size)
        require_counts(width=width, blocks_per_stage=blocks_per_stage, window_size=window_size)
        require_multiples(12, width=width)
        require_fractions(dropout=dropout, drop_path=drop_path)
        self.widths = (width, width, 2 * width, 4 * width, 8 * width, 16 * width)
        self.stride, self.token_voxels = (32,) * self.dimension, (2,) * self.dimension
        self.token_width = width
        self._require_patch_size(self.stride)
        self.network = nets.SwinUNETR(
            channels,
            classes,
            depths=(blocks_per_stage,) * len(HEADS),
            num_heads=HEADS,
            window_size=window_size,
            feature_size=width,
            drop_rate=dropout,
            attn_drop_rate=dropout,
            dropout_path_rate=drop_path,
            spatial_dims=self.dimension,
        )

    @property
    def embedding(self) -> nn.Module:
        """The transformer's patches; their positions enter later, as biases of attention."""
        return self.network.swinViT.patch_embed

    def encode(self, image: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Return the five skips, from full resolution down, and the bottleneck."""
        hidden = self.network.swinViT(image, self.network.normalize)
        return [
            self.network.encoder1(image),
            self.network.encoder2(hidden[0]),
            self.network.encoder3(hidden[1]),
            self.network.encoder4(hidden[2]),
            hidden[3],
            self.network.encoder10(hidden[4]),
        ]

    def decode(self, features: list[Tensor]) -> Float[Tensor, "b k *s"]:
        """Return the logits at full resolution."""
        *skips, image = features
        network = self.network
        ups = (network.decoder5, network.decoder4, network.decoder3, network.decoder2, network.decoder1)
        for up, skip in zip(ups, reversed(skips), strict=True):
            image = up(image, skip)
        return network.out(image)
