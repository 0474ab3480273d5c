"""VPTTA, a prompt on low-frequency amplitudes: Chen, Ye, Pan, Xia, 2024, https://arxiv.org/abs/2311.18363."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from anysite.adapters import Adapter, descend, entropy, require_rate
from anysite.errors import ConfigError
from anysite.networks import require_counts


class FourierPrompt(Adapter):
    """Multiplies the image's lowest frequencies by factors that make the prediction surer; the weights stay.

    The published method aligns statistics of batch normalisation and remembers prompts of earlier images; here the
    entropy decides, and every image stands alone.

    Args:
        window: Half the side of the window of frequencies, as a share of the patch.
        learning_rate: Of Adam.
        steps: Of it.
        spread: Factors stay within 1 plus or minus this.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self, *, window: float = 0.02, learning_rate: float = 0.05, steps: int = 5, spread: float = 0.5
    ) -> None:
        require_counts("adapter fourier_prompt", steps=steps)
        require_rate("fourier_prompt", learning_rate)
        if not 0 < window <= 0.5:
            raise ConfigError(f"{window}", where="adapter fourier_prompt.window", expected="above 0, to 0.5")
        self.window, self.learning_rate, self.steps, self.spread = window, learning_rate, steps, spread
        self.prompt: Tensor | None = None

    def adapt(self, windows: Float[Tensor, "b c *p"]) -> dict[str, float]:
        """Return the entropy before and after."""
        size = windows.shape[2:]
        self.radii = [max(1, int(self.window * n)) for n in size]
        # Half of the frequencies of the last axis, as a real image has them; one prompt for all windows.
        shape = [*(2 * radius + 1 for radius in self.radii[:-1]), self.radii[-1] + 1]
        prompt = torch.zeros(windows.shape[1], *shape, device=windows.device, requires_grad=True)
        self.prompt = prompt

        def doubt() -> Tensor:
            chances = self.probabilities(self.predict(windows))
            return entropy(chances, bool(self.plan.regions)).mean()

        values = descend(doubt, [prompt], self.learning_rate, self.steps)
        return {"entropy_before": values[0], "entropy_after": values[-1], "kept": 1.0}

    def predict(self, windows: Float[Tensor, "b c *p"]) -> Float[Tensor, "b k *p"]:
        """Return the logits of windows behind the prompt."""
        return self.network(windows if self.prompt is None else self.place(windows, self.prompt))

    def reset(self) -> None:
        """Forget the prompt."""
        super().reset()
        self.prompt = None

    def place(self, windows: Float[Tensor, "b c *p"], prompt: Tensor) -> Float[Tensor, "b c *p"]:
        """Return the windows with their lowest frequencies multiplied."""
        size = windows.shape[2:]
        axes = list(range(2, windows.ndim))
        with torch.autocast(windows.device.type, enabled=False):
            spectrum = torch.fft.rfftn(windows.float(), dim=axes)
            factor = torch.ones(windows.shape[1], *spectrum.shape[2:], device=windows.device)
            centred = 1 + self.spread * torch.tanh(prompt)
            places = [
                torch.arange(-radius, radius + 1, device=windows.device) % n
                for radius, n in zip(self.radii[:-1], size[:-1], strict=True)
            ]
            places.append(torch.arange(self.radii[-1] + 1, device=windows.device))
            channel = torch.arange(len(factor), device=windows.device).view(-1, *[1] * len(places))
            factor = factor.index_put((channel, *torch.meshgrid(*places, indexing="ij")), centred)
            return torch.fft.irfftn(spectrum * factor, size, dim=axes).to(windows.dtype)
