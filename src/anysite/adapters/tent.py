"""TENT, less entropy on the image at hand: Wang et al., 2021, https://arxiv.org/abs/2006.10726."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from anysite.adapters import Adapter, Subset, choose_parameters, descend, entropy, require_rate
from anysite.networks import require_counts


class Tent(Adapter):
    """Lowers the mean entropy of the prediction by the scales and shifts of normalisation.

    Args:
        subset: The parameters that change.
        learning_rate: Of Adam.
        steps: Of it.
    """

    def __init__(self, *, subset: Subset = "norm", learning_rate: float = 1e-3, steps: int = 5) -> None:
        require_counts("adapter tent", steps=steps)
        require_rate("tent", learning_rate)
        self.subset: Subset = subset
        self.learning_rate, self.steps = learning_rate, steps

    def adapt(self, windows: Float[Tensor, "b c *p"]) -> dict[str, float]:
        """Return the entropy before and after."""

        def doubt() -> Tensor:
            chances = self.probabilities(self.network(windows))
            return entropy(chances, bool(self.plan.regions)).mean()

        values = descend(doubt, choose_parameters(self.network, self.subset), self.learning_rate, self.steps)
        return {"entropy_before": values[0], "entropy_after": values[-1], "kept": 1.0}
