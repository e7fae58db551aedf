"""Opacus' `DPOptimizer` with secure global clipping: one noise draw a step, whatever the number of workers.

Workers add clipped sums as integers on a common grid; the addressed noise enters *before* the reduction, so a total
without noise exists on no machine of several. Integer addition is associative: the step is bit-identical for any
number of workers. Counters travel in the same reduction, and a mismatch stops the step before anything is released.

It also serves in an ordinary Opacus script, in place of `DPOptimizer`: see docs/opacus_example.py. There every logical
step begins with `begin_step`, which forgets what an interrupted one left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor

from e2h.privacy.clipped_sum import GRID_BITS, ClippedSum, check_clipping, clip_and_sum
from e2h.privacy.noise import gaussian_noise

Noise = dict[int, tuple[int, Tensor]]


class SecureDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """Wraps an ordinary optimiser over parameters whose clipped gradient sums an engine, or Opacus, provides.

    Whose noise. With one share (the default) each worker makes the noise of its own part of the coordinates; every
    coordinate is a function of its address, so the parts fit together for any number of workers. Making it can begin
    with the step (`prepare_noise`), beside the gradients.

    Noise shares. With S > 1 shares, each is rounded noise of variance sigma^2 C^2 / S, and worker r of W adds shares r,
    r + W, ...: where S >= W every worker's own sum is noisy before it leaves the machine, though with a part of the
    noise only. The shares are as good as one draw: a Gaussian whose standard deviation is above 2^20 steps, rounded
    to whole numbers, has the characteristic function of that Gaussian plus a uniform number on [-1/2, 1/2], up to less
    than exp(-2^40) (Poisson summation). The sum of S rounded shares is therefore distributed as the whole Gaussian plus
    S - 1 independent uniforms, rounded: post-processing of the Gaussian mechanism.

    Args:
      optimizer: e.g. Adam over the network's parameters.
      noise_multiplier, max_grad_norm: as in the accounted release.
      expected_batch_size: sampling_prob * N, the public denominator.
      noise_key: secret 32-byte key of a step. A key must never serve two steps or two data sets.
      sum_integers: sums an int64 tensor over all workers in place (one collective).
      rank, num_workers: of this worker.
      num_shares: S >= 1, independent of the number of workers.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        noise_key: Callable[[int], bytes],
        sum_integers: Callable[[Tensor], None] = lambda values: None,
        rank: int = 0,
        num_workers: int = 1,
        num_shares: int = 1,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        check_clipping("flat", max_grad_norm, 1.0)
        if not 0 < noise_multiplier < float("inf"):
            raise ValueError(f"noise_multiplier={noise_multiplier}: expected a finite number above 0")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() != num_workers:
            # Each would release its own sum under the same noise.
            raise ValueError(f"num_workers={num_workers}: expected the {dist.get_world_size()} of this process group")
        if num_shares != 1 and not (num_shares > 1 and noise_multiplier * 2.0**GRID_BITS > 2.0**20 * num_shares**0.5):
            raise ValueError(f"num_shares={num_shares}: expected 1, or as many as leave 2^20 grid steps to a share")
        self._noise_key, self._sum_integers = noise_key, sum_integers
        self._rank, self._num_workers, self._num_shares = rank, num_workers, num_shares
        self._num_parts = num_workers if num_shares == 1 else num_shares
        self._num_coordinates = sum(p.numel() for p in self.params)
        self._steps_done = 0
        self._expected_examples: int | None = None
        self._thread = ThreadPoolExecutor(1, "noise")
        self._prepared: tuple[int, Future[Noise]] | None = None
        self._forget()

    def accumulate(self, clipped: ClippedSum) -> None:
        """Adds one micro-batch of this worker."""
        self._totals[: self._num_coordinates] += clipped.vector
        self._totals[self._num_coordinates] += clipped.count

    def prepare_noise(self, step: int) -> None:
        """Begins to make this worker's part of a step's noise, in a thread of its own; nothing else depends on it."""
        self._prepared = step, self._thread.submit(self._own_noise, step)

    def step_private(self, step: int, num_examples: int) -> None:
        """One accounted step: reduce, noise once, divide by the expected batch, update.

        Args:
          step: address of the step's noise; charged beforehand.
          num_examples: how many records the global draw selected; checked, then forgotten.

        Raises:
          RuntimeError: if the step was made before, examples were lost or doubled, noise did not enter exactly once, or
            workers disagree on the step. Nothing is updated then.
        """
        self._expected_examples = num_examples
        self._reduce(step)
        self._write_gradients()
        self.original_optimizer.step()
        self.zero_grad()

    def begin_step(self, num_examples: int) -> None:
        """Opens a logical step of an Opacus script: nothing that an interrupted one accumulated gets into it.

        Args:
          num_examples: how many records the step's draw selected, over all workers and physical batches; checked before
            the release, then forgotten.
        """
        self._step_skip_queue.clear()
        self._is_last_step_skipped = False
        self.zero_grad()
        self._expected_examples = num_examples

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets gradients, and what was accumulated unless Opacus' last `step` only accumulated."""
        super().zero_grad(set_to_none)
        if not self._is_last_step_skipped:
            self._forget()

    def clip_and_accumulate(self) -> None:
        """Opacus' first part of `step`: the `grad_sample` of every parameter, clipped and summed by our rule."""
        for parameter in self.params:
            _check_processed_flag(parameter.grad_sample)
        rows = [sample.flatten(1).clone() for sample in self.grad_samples]
        weights = torch.ones(len(rows[0]), device=rows[0].device)
        self.accumulate(clip_and_sum(rows, weights, weights, self.max_grad_norm))
        for parameter in self.params:
            _mark_as_processed(parameter.grad_sample)

    def add_noise(self) -> None:
        """Opacus' second part: the reduction over workers with noise, once. Steps are numbered from the first on."""
        self._reduce(self._steps_done)

    def scale_grad(self) -> None:
        """Opacus' last part: gradients over the expected batch, and over backward passes that were accumulated."""
        self._write_gradients(self.accumulated_iterations)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimiser's state and the number of steps done, which addresses the next noise."""
        return {**super().state_dict(), "steps_done": self._steps_done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with the step after those done; draw its records by the number of that step, too.

        Raises:
          KeyError: if the number of steps is missing: beginning at 0 again would draw the same noise twice.
        """
        content = dict(state_dict)
        self._steps_done = content.pop("steps_done")
        super().load_state_dict(content)

    def _forget(self) -> None:
        # Layout: clipped sum | examples | step number + 1 | its square | how often each part of the noise entered.
        length = self._num_coordinates + 3 + self._num_parts
        self._totals = torch.zeros(length, dtype=torch.int64, device=self.params[0].device)

    def _reduce(self, step: int) -> None:
        """Sums over workers with noise; raises, and forgets, if the counters don't add up."""
        size, examples = self._num_coordinates, self._expected_examples
        if examples is None:
            raise RuntimeError(f"step {step}: expected begin_step(num_examples) before it; nothing was released")
        if step < self._steps_done:
            raise RuntimeError(
                f"step {step}: was made before, and its noise must not serve twice; nothing was released"
            )
        for part, (first, noise) in self._take_noise(step).items():
            self._totals[first : first + len(noise)] += noise.to(self._totals.device)
            self._totals[size + 3 + part] += 1
        self._totals[size + 1] = step + 1
        self._totals[size + 2] = (step + 1) ** 2
        self._sum_integers(self._totals)
        counters = self._totals[size:].tolist()
        # A sum of numbers and that of their squares agree with one number only if all are that number.
        workers = self._num_workers
        expected = [examples, workers * (step + 1), workers * (step + 1) ** 2, *[1] * self._num_parts]
        if counters != expected:
            self._is_last_step_skipped = False
            self.zero_grad()
            raise RuntimeError(f"step {step}: counters {counters}, expected {expected}; nothing was released")
        self._steps_done, self._expected_examples = step + 1, None

    def _take_noise(self, step: int) -> Noise:
        prepared, self._prepared = self._prepared, None
        return prepared[1].result() if prepared is not None and prepared[0] == step else self._own_noise(step)

    def _own_noise(self, step: int) -> Noise:
        """This worker's parts of the noise: the part's number, its first coordinate, and int64 values on the CPU."""
        # In grid steps the sensitivity is 2^GRID_BITS, so all shares make noise_multiplier * max_grad_norm.
        standard_deviation = self.noise_multiplier * 2.0**GRID_BITS / self._num_shares**0.5
        key, found = self._noise_key(step), {}
        for part in range(self._rank, self._num_parts, self._num_workers):
            share, first, stop = self._addresses(part)
            start = share * self._num_coordinates
            noise = gaussian_noise(key, start + first, start + stop, standard_deviation)
            found[part] = first, torch.from_numpy(noise)
        return found

    def _addresses(self, part: int) -> tuple[int, int, int]:
        """Share and coordinates of a part: a whole share, or with one share the worker's own coordinates."""
        size = self._num_coordinates
        if self._num_shares > 1:
            return part, 0, size
        return 0, size * part // self._num_parts, size * (part + 1) // self._num_parts

    def _write_gradients(self, num_batches: int = 1) -> None:
        scale = self.max_grad_norm * 2.0**-GRID_BITS / (self.expected_batch_size * num_batches)
        gradients = (self._totals[: self._num_coordinates].double() * scale).float()
        for parameter, gradient in zip(self.params, gradients.split([p.numel() for p in self.params]), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
