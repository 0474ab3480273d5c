"""A denoising autoencoder of masks as the teacher: Karani et al., 2021, https://arxiv.org/abs/2004.04668."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from anysite.adapters import Adapter, Subset, choose_parameters, descend, require_rate
from anysite.adapters.refseg import soft_disagreement
from anysite.networks import require_counts


class DenoisingPrior(Adapter):
    """Moves the prediction towards the plausible mask that the autoencoder makes of it.

    The published method adapts a normaliser of its own in front of the network; here it is the chosen subset.

    Args:
        subset: The parameters that change.
        learning_rate: Of Adam.
        steps: Of it.
    """

    needs_reflection: ClassVar[bool] = True

    def __init__(self, *, subset: Subset = "norm", learning_rate: float = 1e-3, steps: int = 10) -> None:
        require_counts("adapter denoising_prior", steps=steps)
        require_rate("denoising_prior", learning_rate)
        self.subset: Subset = subset
        self.learning_rate, self.steps = learning_rate, steps

    def adapt(self, windows: Float[Tensor, "b c *p"]) -> dict[str, float]:
        """Return the disagreement with the mended mask before and after."""
        assert self.reflection is not None
        reflection = self.reflection

        def loss_of() -> Tensor:
            chances = self.probabilities(self.network(windows))
            with torch.no_grad():
                mended = reflection.mend(chances)
            return soft_disagreement(chances, mended, bool(self.plan.regions))

        values = descend(
            loss_of, choose_parameters(self.network, self.subset), self.learning_rate, self.steps
        )
        return {"disagreement_before": values[0], "disagreement_after": values[-1], "kept": 1.0}
