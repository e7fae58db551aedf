"""What DP-SGD trains and how one private step changes it: the network, its optimiser and averages of its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from e2h.config import FinetuneConfig
from e2h.curriculum.adam import NoiseCorrectedAdam, learning_rate
from e2h.curriculum.averages import PowerAverages, snapshot_steps
from e2h.curriculum.workers import Workers
from e2h.diffusion.ema import EMA
from e2h.diffusion.networks import UNet
from e2h.privacy.events import Release
from e2h.privacy.keys import derive_key
from e2h.privacy.ledger import Ledger
from e2h.privacy.optimizer import SecureDPOptimizer

STAGE = "finetune"


@dataclass(frozen=True)
class PrivateRun:
    """What binds the stage to its secret and its ledger.

    Attributes:
      release: the accounted event: q, sigma and T come from here and from nowhere else.
      domain: digest of all that determines the output; keys are derived from it.
      start: digest of the weights that the stage starts from; part of the domain.
      noise_shares: in how many parts the noise of a step enters (`SecureDPOptimizer`).
    """

    release: Release
    ledger: Ledger
    secret: bytes = field(repr=False)
    domain: str
    start: str = ""
    noise_shares: int = 1

    def key(self, purpose: str, *address: object) -> bytes:
        return derive_key(self.secret, f"{STAGE}/{purpose}", self.domain, *address)


def private_optimizer(
    optimizer: torch.optim.Optimizer, settings: FinetuneConfig, private: PrivateRun, workers: Workers
) -> SecureDPOptimizer:
    """`optimizer` behind the accounted mechanism."""
    return SecureDPOptimizer(
        optimizer,
        noise_multiplier=private.release.event.noise_multiplier,
        max_grad_norm=settings.max_grad_norm,
        expected_batch_size=settings.expected_batch_size,  # q * N, by construction of the plan
        noise_key=lambda step: private.key("noise", step),
        sum_integers=workers.sum_integers,
        rank=workers.rank,
        num_workers=workers.size,
        num_shares=private.noise_shares,
    )


class Learner:
    """The state of the stage: what a checkpoint holds.

    Attributes:
      optimizer: behind the accounted mechanism.
      ema: average of `ema_decay`.
      averages: of the lengths that are chosen afterwards, and `snapshot_steps` at which they are kept; of the whole
        release, wherever training stops.
    """

    def __init__(self, network: UNet, settings: FinetuneConfig, private: PrivateRun, workers: Workers) -> None:
        self.network, self.settings, self.private = network, settings, private
        self.num_steps = private.release.event.count
        self.ema = EMA(network, settings.ema_decay)
        self.snapshot_steps = snapshot_steps(self.num_steps, settings.ema_snapshots)
        self.averages = PowerAverages(network) if self.snapshot_steps else None
        self.optimizer = private_optimizer(self._adam(), settings, private, workers)

    def _adam(self) -> torch.optim.Optimizer:
        settings = self.settings
        if not settings.correct_noise_bias:
            return torch.optim.Adam(self.network.parameters(), lr=settings.learning_rate)
        deviation = self.private.release.event.noise_multiplier * settings.max_grad_norm / settings.expected_batch_size
        return NoiseCorrectedAdam(self.network, settings.learning_rate, deviation)

    def step(self, step: int, num_examples: int) -> None:
        """One private step on what was accumulated (`SecureDPOptimizer.step_private`)."""
        for group in self.optimizer.original_optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step, self.num_steps)
        self.optimizer.step_private(step, num_examples)
        self.ema.update(self.network)
        if self.averages is not None:
            self.averages.update(self.network)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on; nothing is copied."""
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "averages": self.averages.state_dict() if self.averages is not None else None,
            "optimizer": self.optimizer.original_optimizer.state_dict(),
            "start": self.private.start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        if self.averages is not None:
            self.averages.load_state_dict(state["averages"])
        self.optimizer.original_optimizer.load_state_dict(state["optimizer"])
