"""What test-time reflection needs, learned beside a network: Huang et al., 2022, https://arxiv.org/abs/2207.00476.

A synthesiser draws the image from the true mask, and a denoising autoencoder mends masks. Neither
touches the network: at test time they tell how well a predicted mask explains its image.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from anysite.errors import ConfigError
from anysite.networks import Network, require_counts
from anysite.networks.restoration import scale_to_unit
from anysite.networks.synthesiser import Synthesiser
from anysite.networks.unet import UNet
from anysite.objectives import Objective, Step
from anysite.objectives.supervised import region_maps
from anysite.plan import Plan
from anysite.similarity import compare, grow, mean_over

OUTSIDE = 0.1  # weight of what lies beyond the region, of which the mask says little


class Reflection(Objective):
    """A synthesiser from masks to images, and an autoencoder that mends masks; the network does not feel them.

    The synthesiser is given true masks, at most blurred, so that a wrong shape draws a wrong image.

    Args:
        weight: Small, so that it does not share in the clipping of the network's gradient.
        width: Channels of the synthesiser's finest scale.
        prior_width: Channels of the autoencoder's.
        margin_voxels: Of the region that counts, around what the mask holds.
        patches: Pieces of a mask overwritten by others of it, which the autoencoder has to mend.

    Raises:
        ConfigError: a setting out of range.
    """

    teaches_network: ClassVar[bool] = False

    def __init__(
        self,
        *,
        weight: float = 0.1,
        width: int = 16,
        prior_width: int = 8,
        margin_voxels: int = 15,
        patches: int = 8,
    ) -> None:
        super().__init__(weight=weight)
        require_counts(
            "objectives.reflection", width=width, prior_width=prior_width, margin_voxels=margin_voxels,
            patches=patches,
        )  # fmt: skip
        if weight <= 0:
            raise ConfigError(f"{weight}", where="objectives.reflection.weight", expected="above 0")
        self.width, self.prior_width, self.margin_voxels, self.patches = (
            width,
            prior_width,
            margin_voxels,
            patches,
        )

    def attach(self, network: Network, plan: Plan, domains: tuple[str, ...]) -> None:
        """Build synthesiser and autoencoder for the plan's masks and patches."""
        self.regions, self.outputs, self.channels = plan.regions, plan.outputs, plan.channels
        self.first = plan.context_slices * plan.channels  # of the slice itself among its neighbours
        self.synthesiser = Synthesiser(plan.outputs, plan.channels, plan.patch_size, self.width)
        self.prior = UNet(plan.outputs, plan.outputs, plan.patch_size, width=self.prior_width)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the terms `synthesis` and `prior`, of the samples that have a label."""
        rows = slice(None) if step.known is None else step.known.any(1)
        image, mask = self.target(step.image[rows]), self.as_maps(step.label[rows])
        if not len(image):
            nothing = step.image.new_zeros(()).float()
            return {"synthesis": nothing, "prior": nothing}
        region = self.region(mask)
        drawn = self.synthesiser(blur_mask(mask))
        weight = torch.where(region, 1.0, OUTSIDE)
        error = ((drawn - image).abs().mean(1, keepdim=True) * weight).sum() / weight.sum()
        likeness = mean_over(compare("ssim", drawn, image), region).mean()
        mended = self.prior(spoil_mask(mask, self.patches))
        if self.regions:
            cost = F.binary_cross_entropy_with_logits(mended.float(), mask)
        else:
            cost = F.cross_entropy(mended.float(), mask.argmax(1))
        return {"synthesis": error + 0.5 * (1 - likeness), "prior": cost}

    @torch.no_grad()
    def preview(self, step: Step) -> dict[str, Tensor]:
        """Return the image, and what is drawn from its mask."""
        return {"image": self.target(step.image), "drawn": self.synthesiser(self.as_maps(step.label))}

    def target(self, image: Float[Tensor, "b n *s"]) -> Float[Tensor, "b c *s"]:
        """Return what shall be drawn: the image, of a slice with neighbours the slice itself, from -1 to 1."""
        return scale_to_unit(image[:, self.first : self.first + self.channels])

    def as_maps(self, label: Int[Tensor, "b *s"]) -> Float[Tensor, "b k *s"]:
        """Return a label map as the probabilities of a network that is sure."""
        if self.regions:
            return region_maps(label, self.regions)
        return F.one_hot(label.long(), self.outputs).movedim(-1, 1).float()

    def region(self, maps: Float[Tensor, "b k *s"], margin_voxels: int | None = None) -> torch.Tensor:
        """Return what lies within a margin, that of learning by default, of anything but background."""
        found = (maps > 0.5).any(1, keepdim=True) if self.regions else maps.argmax(1, keepdim=True) > 0
        return grow(found, self.margin_voxels if margin_voxels is None else margin_voxels)

    def mend(self, maps: Float[Tensor, "b k *s"]) -> Float[Tensor, "b k *s"]:
        """Return probabilities of the nearest plausible mask."""
        logits = self.prior(maps).float()
        return logits.sigmoid() if self.regions else logits.softmax(1)


def blur_mask(mask: Float[Tensor, "b k *s"]) -> Float[Tensor, "b k *s"]:
    """Return half of the samples softened at their edges, as probabilities are."""
    pool = F.avg_pool2d if mask.ndim == 4 else F.avg_pool3d
    soft = pool(F.pad(mask, [1] * (2 * (mask.ndim - 2)), mode="replicate"), 3, 1)
    chosen = torch.rand(len(mask)).to(mask.device) < 0.5
    return torch.where(chosen.view(-1, *[1] * (mask.ndim - 1)), soft, mask)


def spoil_mask(mask: Float[Tensor, "b k *s"], patches: int) -> Float[Tensor, "b k *s"]:
    """Return masks in which boxes are overwritten by others of the same mask.

    After Karani et al., 2021, https://arxiv.org/abs/2004.04668.
    """
    spoiled = mask.clone()
    size = mask.shape[2:]
    for sample in range(len(mask)):
        for _ in range(int(torch.randint(patches + 1, ()))):
            box = [int(torch.randint(1, max(2, n // 5), ())) for n in size]
            source, place = (
                tuple(slice(at, at + side) for at, side in zip(corner, box, strict=True))
                for corner in (
                    [int(torch.randint(n - side + 1, ())) for n, side in zip(size, box, strict=True)]
                    for _ in range(2)
                )
            )
            spoiled[(sample, slice(None), *place)] = mask[(sample, slice(None), *source)]
    return spoiled
