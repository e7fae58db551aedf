"""Exponential moving average of a network's parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Average with a warm-up: after update n (from 1) the decay is min(decay, (1 + n) / (10 + n)).

    Args:
      network: its present parameters are the start of the average.
      decay: in [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.parameters = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Moves the average towards the network's present parameters."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        current: list[Tensor] = [p for _, p in network.named_parameters()]
        torch._foreach_lerp_(list(self.parameters.values()), current, 1 - decay)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Overwrites the network's parameters with the average."""
        for name, parameter in network.named_parameters():
            parameter.copy_(self.parameters[name])

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and the averaged parameters by name (not copied)."""
        return {"num_updates": self.num_updates, "parameters": self.parameters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved average.

        Raises:
          ValueError: if the names or the shapes are not this network's.
        """
        saved: dict[str, Tensor] = state["parameters"]
        shapes = {name: tensor.shape for name, tensor in saved.items()}
        if shapes != {name: tensor.shape for name, tensor in self.parameters.items()}:
            raise ValueError("the saved average belongs to another network: names or shapes of parameters differ")
        self.num_updates = int(state["num_updates"])
        for name, average in self.parameters.items():
            average.copy_(saved[name])
