"""Masked autoencoder, a pretraining: He, Chen, Xie, Li, Dollár, Girshick, 2022, https://arxiv.org/abs/2111.06377."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from anysite.masking import draw_blocks
from anysite.networks import Network, require_counts, require_fractions
from anysite.networks.restoration import RestorationDecoder, scale_to_unit
from anysite.objectives import Objective, Step
from anysite.plan import Plan


class MaskedAutoencoder(Objective):
    """Blocks of the image are blanked, and a decoder without skips draws them from the bottleneck.

    Args:
        block_voxels: Largest side of a block along each axis; at least four blocks lie along the patch's longest.
        ratio: Share of blocks blanked.

    Raises:
        ConfigError: a count below one, or a share out of range.
    """

    needs_label = False

    def __init__(self, *, weight: float = 1.0, block_voxels: int = 16, ratio: float = 0.6) -> None:
        super().__init__(weight=weight)
        require_counts("objectives.masked_autoencoder", block_voxels=block_voxels)
        require_fractions("objectives.masked_autoencoder", ratio=ratio)
        self.block_voxels, self.ratio = block_voxels, ratio

    def attach(self, network: Network, plan: Plan, domains: tuple[str, ...]) -> None:
        """Build the decoder on the network's bottleneck, and fit the blocks to the patch."""
        self.block_voxels = min(self.block_voxels, max(1, max(plan.patch_size) // 4))
        self.decoder = RestorationDecoder(network.widths[-1], network.stride, plan.network_channels)

    def forward(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean squared error over the blanked voxels, the image scaled to -1..1."""
        masked, drawn = self._draw(step)
        error = (drawn - scale_to_unit(step.image)).square()
        weight = masked.expand_as(error).float()
        return (error * weight).sum() / weight.sum().clamp(min=1)

    def preview(self, step: Step) -> dict[str, Tensor]:
        """Return the image, what was left of it, and what was drawn."""
        masked, drawn = self._draw(step)
        image = scale_to_unit(step.image)
        return {"image": image, "blanked": image.masked_fill(masked, 0.0), "drawn": drawn}

    def _draw(self, step: Step) -> tuple[Bool[Tensor, "b 1 *s"], Float[Tensor, "b c *s"]]:
        masked = draw_blocks(len(step.image), step.image.shape[2:], self.block_voxels, self.ratio)
        masked = masked[:, None].to(step.image.device)
        # Images are normalised, so that zero is their mean.
        features = step.network.encode(step.image.masked_fill(masked, 0.0))
        return masked, self.decoder(features[-1], step.domain)
