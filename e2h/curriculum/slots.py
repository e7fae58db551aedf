"""Whether a record's contribution hangs on its place in a work unit: tried on the machine that is about to compute it.

Without a record, all that were drawn after it move up by a place. Their contributions must not: the sensitivity counts
the record alone. Some kernels end a matrix with other instructions than they began it with, and so give the last places
of a unit other last bits. What the clip leaves free must cover the moves of a whole draw, or nothing is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from e2h.config import FinetuneConfig, expect
from e2h.curriculum.batches import make_batch
from e2h.diffusion.networks import UNet
from e2h.privacy.clipped_sum import MARGIN
from e2h.privacy.dpsgd import Engine

SPREAD = 0.02  # of the weights it is tried with: fresh ones have layers of zeros, through which no bit comes


def check_places(engine: Engine, network: UNet, settings: FinetuneConfig, size: int, shape: tuple[int, ...]) -> None:
    """Call it before the first step of DP-SGD; the verdict is the same at every start on one kind of machine.

    Args:
      engine: of the network, with clipping=flat; the very one that will train it, as it may be compiled.
      network: on its device; left as it is.
      settings: of the training, whose own clipping counts.
      size: images of a work unit.
      shape: of an image, [H, W, C].

    Raises:
      InputError: if the places of a unit differ by more than the clip leaves free.
    """
    with _spread(network):
        furthest = largest_move(engine, network, settings, size, shape)
    largest_draw = 2 * settings.expected_batch_size + 20  # more has no chance to speak of
    # clipping=global: a norm that crosses Z by a last bit takes the whole contribution with it, which nothing covers.
    free = 0.0 if settings.clipping == "global" else MARGIN
    reason = f"a record's gradient moves by {furthest:.1e} of its length with its place in a unit (guarantee.md, 10)"
    advice = f"{reason}; take another size, or in a new run model.embedding_width a multiple of 64"
    ok = largest_draw * furthest <= free
    expect(ok, "scaling.physical_batch_size", size, "a size with the same bits in every place", advice)


@contextmanager
def _spread(network: UNet) -> Iterator[None]:
    """Other weights while the block runs, nowhere zero."""
    own = [parameter.detach().clone() for parameter in network.parameters()]
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(SPREAD * torch.randn(parameter.shape, generator=random).to(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(network.parameters(), own, strict=True):
                parameter.copy_(before)


def largest_move(engine: Engine, network: UNet, settings: FinetuneConfig, size: int, shape: tuple[int, ...]) -> float:
    """Largest distance, over its length, between contributions of a made-up record from several places of a unit."""
    device = next(network.parameters()).device
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (size, *shape), dtype=np.uint8)
    labels = random.integers(0, network.num_classes, size)
    found = []
    for place in sorted({0, 1 % size, size // 2, size - 1}):
        order = np.roll(np.arange(size), place)
        draws, levels = settings.noise_multiplicity, network.log_sigma
        batch = make_batch(images[order], labels[order], order.tolist(), draws, 0.0, network.num_classes, levels)
        weights = torch.from_numpy(order == 0).float()
        batch = {name: value.to(device) for name, value in batch.items()}
        found.append(engine.accumulate(batch, weights).vector)
    moves = [float((one - found[0]).double().norm()) for one in found]
    length = float(found[0].double().norm())
    return 2 * max(moves) / length if length else math.inf  # any two are twice as far apart as from the first, at most
