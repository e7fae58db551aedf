"""Whether a record's contribution hangs on its place in a work unit: tried on the machines that are to compute it.

Without a record, all that were drawn after it move up by a place, and some to another worker. Their contributions must
not move with them: the sensitivity counts the record alone. Some kernels end a matrix with other instructions than they
began it with, and so give the last places of a unit other last bits. What the clip leaves free must cover the moves of
a whole draw, or nothing is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from e2h.config import FinetuneConfig, expect
from e2h.curriculum.batches import make_batch
from e2h.curriculum.workers import Workers
from e2h.diffusion.networks import UNet
from e2h.privacy.clipped_sum import MARGIN
from e2h.privacy.dpsgd import Engine

SPREAD = 0.02  # of the weights it is tried with: fresh ones have layers of zeros, through which no bit comes


def check_places(
    engine: Engine, network: UNet, settings: FinetuneConfig, size: int, shape: tuple[int, ...], workers: Workers
) -> None:
    """Call it on every worker before the first step of DP-SGD; on one kind of machine the verdict is always the same.

    Args:
      engine: the very one that will train the network, as it may be compiled.
      network: on its device; left as it is.
      size: images of a work unit.
      shape: of an image, [H, W, C].

    Raises:
      InputError: on a worker whose places, or which from the others, differs by more than the clip leaves free.
      RuntimeError: on the other workers then.
    """
    flat = replace(engine, clipping="flat")
    with _spread(network):
        found = workers.all_or_none(lambda: contributions(flat, network, settings, size, shape))
    total = found[0].clone()
    workers.sum_integers(total)
    furthest = largest_move(found, total, workers.size)
    largest_draw = 2 * settings.expected_batch_size + 20  # more has no chance to speak of
    # clipping=global: a norm that crosses Z by a last bit takes the whole contribution with it, which nothing covers.
    free = 0.0 if settings.clipping == "global" else MARGIN
    reason = f"a record's gradient moves by {furthest:.1e} of its length with its place or worker (guarantee.md, 10)"
    advice = f"{reason}; take another size and workers of one kind, or in a new run model.embedding_width 64, 128, ..."
    good, name = largest_draw * furthest <= free, "scaling.physical_batch_size"
    workers.all_or_none(lambda: expect(good, name, size, "a size with the same bits in every place", advice))


def largest_move(found: Sequence[Tensor], total: Tensor, num_workers: int) -> float:
    """Bound on the distance, over its length, between a record's contributions from any two places and workers.

    Args:
      found: of this worker, from several places, int64 [P] each.
      total: the first of each worker, summed over all.
    """
    length = float(found[0].double().norm())
    if not length:
        return math.inf
    places = max(float((one - found[0]).double().norm()) for one in found)
    from_mean = float((num_workers * found[0] - total).double().norm()) / num_workers
    return 2 * (places + from_mean) / length  # two are twice as far apart as each from the first, or the mean, at most


def contributions(
    engine: Engine, network: UNet, settings: FinetuneConfig, size: int, shape: tuple[int, ...]
) -> list[Tensor]:
    """What a made-up record adds to the sum of a unit from several places in it."""
    device = next(network.parameters()).device
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (size, *shape), dtype=np.uint8)
    labels = random.integers(0, network.num_classes, size)
    found = []
    for place in sorted({0, 1 % size, size // 2, size - 1}):
        order = np.roll(np.arange(size), place)
        draws, levels = settings.noise_multiplicity, network.log_sigma
        batch = make_batch(images[order], labels[order], order.tolist(), draws, 0.0, network.num_classes, levels)
        batch = {name: value.to(device) for name, value in batch.items()}
        found.append(engine.accumulate(batch, torch.from_numpy(order == 0).float()).vector)
    return found


@contextmanager
def _spread(network: UNet) -> Iterator[None]:
    """Other weights while the block runs, nowhere zero."""
    own = [parameter.detach().clone() for parameter in network.parameters()]
    random = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(SPREAD * torch.randn(parameter.shape, generator=random).to(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(network.parameters(), own, strict=True):
                parameter.copy_(before)
