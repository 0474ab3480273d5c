"""UNETR: Hatamizadeh, Tang, Nath et al., 2022, https://arxiv.org/abs/2103.10504 (MONAI's)."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from monai.networks import nets
from torch import Tensor, nn

from anysite.errors import ConfigError, GeometryError
from anysite.networks import Network, require_counts, require_fractions


class UNETR(Network):
    """MONAI's UNETR: a vision transformer over tokens of 16 voxels an axis, and a convolutional decoder.

    Its positions are learned, so every image must have the patch size.

    Args:
        width: Channels of the first level of the decoder, doubled a level; the paper's is 16.
        hidden_size: Channels of a token, a multiple of `heads`; the paper's is 768.
        mlp_size: Hidden channels of the transformer's perceptrons; the paper's is 3072.
        heads: Attention heads; the paper's is 12.
        dropout: Probability of dropping a value within the transformer.

    Raises:
        ConfigError: a setting out of range, or a patch size that is no multiple of 16.
    """

    fixed_size = True

    def __init__(
        self,
        channels: int,
        classes: int,
        patch_size: Sequence[int],
        *,
        width: int = 16,
        hidden_size: int = 192,
        mlp_size: int = 768,
        heads: int = 6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(channels, classes, patch_size)
        require_counts(width=width, hidden_size=hidden_size, mlp_size=mlp_size, heads=heads)
        require_fractions(dropout=dropout)
        if hidden_size % heads:
            raise ConfigError(
                f"{hidden_size}", where="network.hidden_size", expected=f"a multiple of network.heads={heads}"
            )
        self.widths = (width, 2 * width, 4 * width, 8 * width, hidden_size)
        self.stride = self.token_voxels = (16,) * self.dimension
        self.token_width = hidden_size
        self._require_patch_size(self.stride)
        self.network = nets.UNETR(
            channels,
            classes,
            img_size=self.patch_size,
            feature_size=width,
            hidden_size=hidden_size,
            mlp_dim=mlp_size,
            num_heads=heads,
            dropout_rate=dropout,
            spatial_dims=self.dimension,
        )
        # MONAI builds these for cross-attention, which UNETR has none of; no gradient would reach them.
        for block in self.network.vit.blocks:
            del block.norm_cross_attn

    @property
    def embedding(self) -> nn.Module:
        """The transformer's patches with their positions added."""
        return self.network.vit.patch_embedding

    def encode(self, image: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Return the four skips, and the transformer's tokens as the bottleneck.

        Raises:
            GeometryError: the image does not have the patch size.
        """
        if image.shape[2:] != self.patch_size:
            raise GeometryError(f"an image of {tuple(image.shape[2:])} voxels", expected=f"{self.patch_size}")
        tokens, hidden = self.network.vit(image)
        as_map = self.network.proj_feat
        return [
            self.network.encoder1(image),
            self.network.encoder2(as_map(hidden[3])),
            self.network.encoder3(as_map(hidden[6])),
            self.network.encoder4(as_map(hidden[9])),
            as_map(tokens),
        ]

    def decode(self, features: list[Tensor]) -> Float[Tensor, "b k *s"]:
        """Return the logits at full resolution."""
        *skips, image = features
        ups = (self.network.decoder5, self.network.decoder4, self.network.decoder3, self.network.decoder2)
        for up, skip in zip(ups, reversed(skips), strict=True):
            image = up(image, skip)
        return self.network.out(image)
