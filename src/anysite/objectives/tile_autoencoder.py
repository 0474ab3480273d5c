"""Tile-wise autoencoder (T-AE), a pretraining: Chen et al., 2022, https://arxiv.org/abs/2108.03823.

The abstracts name the parts, not the numbers; docs/methods/tile_autoencoder.md says what is reconstruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from anysite.networks import Network, require_counts, require_fractions
from anysite.networks.restoration import RestorationDecoder, scale_to_unit
from anysite.objectives import Objective, Step
from anysite.plan import Plan


class TileAutoencoder(Objective):
    """One encoder sees tiles and the whole image; a decoder each, without skips, draws them again.

    From a tile it learns what is local, from the whole image, some tiles of which are blanked, what is global.

    Args:
        tiles_per_axis: The image is cut into at most so many tiles along each axis, fewer where the network's
            stride asks for larger ones.
        tile_dropout: Share of tiles blanked in the whole image; 0 is a plain autoencoder.
        local_weight: Of the error of tiles.
        global_weight: Of the error of the whole image.
        loss: Squared ("mse") or absolute ("l1") error; the image is scaled to -1..1.

    Raises:
        ConfigError: a count below one, or a share out of range.
    """

    needs_label = False

    def __init__(
        self,
        *,
        weight: float = 1.0,
        tiles_per_axis: int = 4,
        tile_dropout: float = 0.3,
        local_weight: float = 1.0,
        global_weight: float = 1.0,
        loss: Literal["mse", "l1"] = "mse",
    ) -> None:
        super().__init__(weight=weight)
        where = "objectives.tile_autoencoder"
        require_counts(where, tiles_per_axis=tiles_per_axis)
        require_fractions(where, tile_dropout=tile_dropout)
        self.tiles_per_axis, self.tile_dropout = tiles_per_axis, tile_dropout
        self.local_weight, self.global_weight = local_weight, global_weight
        self.error = F.mse_loss if loss == "mse" else F.l1_loss

    def attach(self, network: Network, plan: Plan, domains: tuple[str, ...]) -> None:
        """Choose the grid of tiles, and build both decoders on the network's bottleneck.

        Where the network takes one size only, or no tile would keep two voxels at the bottleneck, the image is
        halved along each axis and the tiles are enlarged to its size.
        """
        self.grid = choose_grid(plan.patch_size, network.stride, self.tiles_per_axis)
        self.enlarge = network.fixed_size or max(self.grid) == 1
        if self.enlarge:
            self.grid = tuple(2 if n % 2 == 0 else 1 for n in plan.patch_size)
        arguments = network.widths[-1], network.stride, plan.network_channels
        self.local_decoder, self.global_decoder = (
            RestorationDecoder(*arguments),
            RestorationDecoder(*arguments),
        )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the weighted errors of the tiles and of the whole image."""
        target = scale_to_unit(step.image)
        _, local, whole = self._draw_both(step)
        return {
            "local": self.local_weight * self.error(local, cut_tiles(target, self.grid)),
            "global": self.global_weight * self.error(whole, target),
        }

    def preview(self, step: Step) -> dict[str, Tensor]:
        """Return the image, its tiles drawn one by one, the image with tiles blanked, and the whole drawn from it."""
        kept, local, whole = self._draw_both(step)
        image = scale_to_unit(step.image)
        blanked = join_tiles(cut_tiles(image, self.grid) * kept, self.grid)
        return {
            "image": image,
            "tiles drawn": join_tiles(local, self.grid),
            "blanked": blanked,
            "whole drawn": whole,
        }

    def _draw_both(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Return which tiles were kept, the tiles drawn, and the whole drawn."""
        tiles = cut_tiles(step.image, self.grid)
        kept = torch.rand(len(tiles), device=tiles.device) >= self.tile_dropout
        kept = kept.view(-1, *[1] * (tiles.ndim - 1))
        blanked = join_tiles(tiles * kept, self.grid)
        local = self._draw(self.local_decoder, tiles, step)
        return kept, local, self._draw(self.global_decoder, blanked, step)

    def _draw(self, decoder: RestorationDecoder, image: Tensor, step: Step) -> Tensor:
        size, mode = image.shape[2:], "bilinear" if image.ndim == 4 else "trilinear"
        enlarge = self.enlarge and tuple(size) != step.network.patch_size
        if enlarge:
            image = F.interpolate(image, step.network.patch_size, mode=mode)
        features = step.network.encode(image.contiguous(memory_format=step.network.memory_format))
        drawn = decoder(features[-1], step.domain.new_zeros(len(image)))
        return F.interpolate(drawn, size, mode=mode) if enlarge else drawn


def choose_grid(patch_size: Sequence[int], stride: Sequence[int], tiles_per_axis: int) -> tuple[int, ...]:
    """Return how many tiles lie along each axis: equal ones, of at least two voxels at the bottleneck."""

    def fits(size: int, step: int, count: int) -> bool:
        tile, rest = divmod(size, count)
        return not rest and not tile % step and (count == 1 or tile >= 2 * step)

    return tuple(
        max(count for count in range(1, tiles_per_axis + 1) if count == 1 or fits(size, step, count))
        for size, step in zip(patch_size, stride, strict=True)
    )


def cut_tiles(image: Float[Tensor, "b c *s"], grid: Sequence[int]) -> Float[Tensor, "n c *t"]:
    """Return the tiles of every image, one after the other, as a batch."""
    if len(grid) == 2:
        return rearrange(image, "b c (m h) (n w) -> (b m n) c h w", m=grid[0], n=grid[1])
    return rearrange(image, "b c (l d) (m h) (n w) -> (b l m n) c d h w", l=grid[0], m=grid[1], n=grid[2])


def join_tiles(tiles: Float[Tensor, "n c *t"], grid: Sequence[int]) -> Float[Tensor, "b c *s"]:
    """Return the images that `cut_tiles` cut."""
    if len(grid) == 2:
        return rearrange(tiles, "(b m n) c h w -> b c (m h) (n w)", m=grid[0], n=grid[1])
    return rearrange(tiles, "(b l m n) c d h w -> b c (l d) (m h) (n w)", l=grid[0], m=grid[1], n=grid[2])
