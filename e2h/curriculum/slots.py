"""Whether a record's contribution hangs on its place in a work unit: tried on the machine that is about to compute it.

Without a record, all that were drawn after it move up by a place. Their contributions must not: the sensitivity counts
the record alone. Some kernels end a matrix with other instructions than they began it with, and so give the last places
of a unit other last bits. What the clip leaves free must cover the moves of a whole draw, or nothing is computed.
"""

from __future__ import annotations

import numpy as np
import torch

from e2h.config import FinetuneConfig, expect
from e2h.curriculum.batches import make_batch
from e2h.diffusion.networks import UNet
from e2h.privacy.clipped_sum import GRID_BITS, MARGIN
from e2h.privacy.dpsgd import Engine

LARGEST_DRAW = 2.0  # over the expected batch


def check_places(
    engine: Engine, network: UNet, settings: FinetuneConfig, size: int, shape: tuple[int, ...], device: torch.device
) -> None:
    """Call it before the first private step, with the weights and the engine of that step.

    Args:
      size: images of a work unit.
      shape: of an image, [H, W, C].

    Raises:
      InputError: if the places of a unit differ by more than the clip leaves free.
    """
    furthest = largest_move(engine, network, settings, size, shape, device)
    moved = LARGEST_DRAW * settings.expected_batch_size * furthest
    reason = f"a record's gradient moves by {furthest:.1e} of the clip norm with its place in a unit (guarantee.md, 10)"
    advice = f"{reason}; take another size, model.embedding_width a multiple of 64, or finetune.dtype=float32"
    expect(moved <= MARGIN, "scaling.physical_batch_size", size, "a size with the same bits in every place", advice)


def largest_move(
    engine: Engine, network: UNet, settings: FinetuneConfig, size: int, shape: tuple[int, ...], device: torch.device
) -> float:
    """Largest distance, over C, between contributions of one made-up record from several places among others."""
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
        found.append(engine.accumulate(batch, weights.to(device)).vector)
    moves = [float((one - found[0]).double().norm()) for one in found]
    return 2 * max(moves) * 2.0**-GRID_BITS  # any two are at most twice as far apart as both from the first
