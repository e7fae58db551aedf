"""Opacus' `DPOptimizer` with secure global clipping: one noise draw a step, whatever the number of workers.

Workers add clipped sums as integers on a common grid, one of them adds the addressed noise *before* the reduction, so a
total without noise exists on no machine of several. Integer addition is associative: the step is bit-identical for any
number of workers. Counters travel in the same reduction, and a mismatch stops the step before anything is released.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from e2h.privacy.dpsgd import GRID_BITS, ClippedSum
from e2h.privacy.noise import gaussian_noise


class SecureDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """Wraps an ordinary optimiser over parameters whose clipped gradient sums an engine provides.

    Args:
      optimizer: e.g. Adam over the network's parameters.
      noise_multiplier, max_grad_norm: as in the accounted release.
      expected_batch_size: sampling_prob * N, the public denominator.
      noise_key: secret 32-byte key of a step.
      sum_integers: sums an int64 tensor over all workers in place (one collective).
      rank, num_workers: of this worker.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        noise_key: Callable[[int], bytes],
        sum_integers: Callable[[Tensor], None],
        rank: int,
        num_workers: int,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self._noise_key, self._sum_integers = noise_key, sum_integers
        self._rank, self._num_workers = rank, num_workers
        self._num_coordinates = sum(p.numel() for p in self.params)
        self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets everything accumulated, sums and counters together."""
        # Layout: clipped sum | examples | noise draws | step number + 1.
        device = self.params[0].device
        self._totals = torch.zeros(self._num_coordinates + 3, dtype=torch.int64, device=device)
        self.original_optimizer.zero_grad(set_to_none)

    def accumulate(self, clipped: ClippedSum) -> None:
        """Adds one micro-batch of this worker."""
        self._totals[: self._num_coordinates] += clipped.vector
        self._totals[self._num_coordinates] += clipped.count

    def step_private(self, step: int, num_examples: int) -> None:
        """One accounted step: reduce, noise once, divide by the expected batch, update.

        Args:
          step: address of the step's noise; charged beforehand.
          num_examples: how many records the global draw selected; checked, then forgotten.

        Raises:
          RuntimeError: if examples were lost or doubled, noise did not enter exactly once, or workers disagree on the
            step. Nothing is updated then.
        """
        size = self._num_coordinates
        if self._rank == 0:
            self._totals[:size] += self._noise(step)
            self._totals[size + 1] += 1
        self._totals[size + 2] = step + 1
        self._sum_integers(self._totals)
        counters = self._totals[size:].tolist()
        expected = [num_examples, 1, self._num_workers * (step + 1)]
        if counters != expected:
            self.zero_grad()
            raise RuntimeError(f"step {step}: counters {counters}, expected {expected}; nothing was released")
        self._write_gradients()
        self.original_optimizer.step()
        self.zero_grad()

    def _noise(self, step: int) -> Tensor:
        # In grid steps the sensitivity is 2^GRID_BITS, so this is noise_multiplier * max_grad_norm.
        noise = gaussian_noise(self._noise_key(step), 0, self._num_coordinates, self.noise_multiplier * 2.0**GRID_BITS)
        return torch.from_numpy(noise).to(self._totals.device)

    def _write_gradients(self) -> None:
        scale = self.max_grad_norm * 2.0**-GRID_BITS / self.expected_batch_size
        gradients = (self._totals[: self._num_coordinates].double() * scale).float()
        for parameter, gradient in zip(self.params, gradients.split([p.numel() for p in self.params]), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
