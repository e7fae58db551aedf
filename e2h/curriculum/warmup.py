"""Warm-up: ordinary training on the images of an easy stage. Post-processing, so it costs no privacy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from e2h.binding import digest
from e2h.config import WarmupConfig
from e2h.curriculum.batches import addressed_seeds, make_batch, one_ahead, shift, work_units
from e2h.curriculum.checkpoint import Checkpoints
from e2h.curriculum.workers import Workers, on_grid
from e2h.diffusion.losses import micro_batch_loss
from e2h.diffusion.networks import UNet
from e2h.privacy.compiling import compiled
from e2h.privacy.dpsgd import in_type

# Units of a step: enough for several workers to share it.
UNITS_PER_STEP = 4
CHECKPOINT_EVERY = 500
REPORT_EVERY = 50

Report = Callable[[str, float, int], None]


def warm_up(
    network: UNet,
    images: np.ndarray,
    labels: np.ndarray,
    warmup: WarmupConfig,
    seed: int,
    workers: Workers,
    checkpoints: Checkpoints,
    report: Report,
    progress: Callable[[int], None],
    name: str = "warmup",
) -> None:
    """Trains `network` in place by Adam on the EDM loss (K = 1) with small random shifts.

    Args:
      network: starts from its present weights, or from the newest checkpoint of this stage.
      images: of the easy stage, uint8 [M, H, W, C].
      labels: int64 [M]; -1 is "no label".
      seed: public.
      report: called on rank 0 as report(metric, value, step).
      progress: called with the number of finished steps, on every worker, after each step.
      name: in checkpoints and metrics; each easy stage of a curriculum has its own.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=warmup.learning_rate)
    first = 0
    if saved := checkpoints.latest(name):
        first, state = saved
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    workers.agree(digest(first), "checkpoints")
    parameters = list(network.parameters())
    network.to(workers.device).train()
    losses_of = partial(in_type(micro_batch_loss, warmup.dtype), network)
    if warmup.compile:
        losses_of = compiled(losses_of)
    batches = partial(_units, network, images, labels, warmup, seed, workers, name)
    for step, units in one_ahead(lambda step: (step, batches(step)), range(first, warmup.num_steps)):
        loss, gradients = _step(losses_of, parameters, units, warmup.batch_size)
        workers.sum_gradients(parameters, gradients)
        optimizer.step()
        done = step + 1
        if workers.rank == 0 and (done % REPORT_EVERY == 0 or done == warmup.num_steps):
            report(f"{name}/loss", float(loss), done)
        if checkpoints.due(done, CHECKPOINT_EVERY, warmup.num_steps) and workers.rank == 0:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save(name, done, state)
        progress(done)
    checkpoints.wait()


def _units(
    network: UNet,
    images: np.ndarray,
    labels: np.ndarray,
    warmup: WarmupConfig,
    seed: int,
    workers: Workers,
    name: str,
    step: int,
) -> list[dict[str, Tensor]]:
    """This worker's units of a step's batch, on its device."""
    places = np.arange(warmup.batch_size)
    seeds = addressed_seeds(seed, name, step, places)
    generator = np.random.default_rng((seed, step))
    chosen = generator.integers(0, len(images), warmup.batch_size)
    shifts = generator.integers(-warmup.max_shift, warmup.max_shift + 1, (warmup.batch_size, 2))
    units = []
    size = -(-warmup.batch_size // UNITS_PER_STEP)
    for unit in work_units(warmup.batch_size, size, workers.rank, workers.size):
        shifted = np.stack([shift(images[i], *offset) for i, offset in zip(chosen[unit], shifts[unit], strict=True)])
        batch = make_batch(
            shifted, labels[chosen[unit]], seeds[unit], 1, warmup.label_dropout, network.num_classes, network.log_sigma
        )
        units.append({name: value.to(workers.device) for name, value in batch.items()})
    return units


def _step(
    losses_of: Callable[[dict[str, Tensor]], Tensor],
    parameters: list[nn.Parameter],
    units: list[dict[str, Tensor]],
    batch_size: int,
) -> tuple[Tensor, list[Tensor]]:
    """The units' mean loss, and gradients that add up to the batch's over all workers."""
    gradients, means = [], []
    for unit in units:
        losses = losses_of(unit)
        gradients.append(on_grid(torch.autograd.grad(losses.sum() / batch_size, parameters)))
        means.append(losses.detach().mean())
    return torch.stack(means).mean() if means else torch.zeros(()), gradients
