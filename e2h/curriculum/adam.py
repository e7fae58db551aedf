"""Adam for noisy gradients of a known noise (DP-AdamBC, Tang, Shpilevskiy and Lecuyer 2024), and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from e2h.config import FinetuneConfig

BETAS, TINY = (0.9, 0.999), 1e-8
LEAST = 0.1  # of the noise's variance: below, a second moment without it is itself noise


class NoiseCorrectedAdam(torch.optim.Adam):
    """Adam whose second moment is that of the gradient alone: the variance that the noise adds to it is taken out.

    Args:
      network: its parameters are trained.
      learning_rate: above 0.
      noise_deviation: of every coordinate of the gradient: noise_multiplier * max_grad_norm / expected_batch_size.
    """

    def __init__(self, network: nn.Module, learning_rate: float, noise_deviation: float) -> None:
        super().__init__(network.parameters(), lr=learning_rate, betas=BETAS)
        self.noise_variance = noise_deviation**2

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the parameters' gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"])

    def _update(self, parameter: torch.Tensor, learning_rate: float) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - BETAS[0])
        state["exp_avg_sq"].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        done = float(state["step"])
        second = state["exp_avg_sq"] / (1 - BETAS[1] ** done) - self.noise_variance
        scale = second.clamp_(min=LEAST * self.noise_variance).sqrt_().add_(TINY)
        parameter.addcdiv_(state["exp_avg"], scale, value=-learning_rate / (1 - BETAS[0] ** done))


def learning_rate(settings: FinetuneConfig, step: int, num_steps: int) -> float:
    """Of a step from 0 on: constant, or falling to 0 after `num_steps` along a cosine or a line."""
    left = 1 - step / num_steps
    share = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[settings.schedule]
    return settings.learning_rate * share
