"""Public randomness of training, addressed by (seed, step, record): the same on any worker, in any micro-batch.

That noise levels and noises belong to a *record* and not to its place in a batch is what makes clipping bound a
record's influence: removing a record must not change the random numbers of the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from e2h.diffusion.losses import draw_noise_levels

_MASK = (1 << 64) - 1


def addressed_seeds(seed: int, stage: str, step: int, records: np.ndarray) -> list[int]:
    """One 63-bit seed a record: SplitMix64 (Steele et al. 2014) of seed, stage, step and record.

    Args:
      records: int64 [B] ids.
    """
    with np.errstate(over="ignore"):
        state = np.full(len(records), np.uint64(seed & _MASK))
        for part in (
            np.uint64(int.from_bytes(stage.encode()[:8], "little")),
            np.uint64(step),
            records.astype(np.uint64),
        ):
            state = _mix(state + np.uint64(0x9E3779B97F4A7C15) ^ part)
    return (state >> np.uint64(1)).tolist()


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def make_batch(
    images: np.ndarray, labels: np.ndarray, seeds: list[int], num_draws: int, label_dropout: float, no_label: int
) -> dict[str, Tensor]:
    """A micro-batch with everything that its loss needs.

    Args:
      images: uint8 [B, H, W, C].
      labels: int [B]; -1 means no label.
      seeds: one a record.
      num_draws: noise multiplicity K.
      label_dropout: probability that a record loses its label, shared by its K draws.
      no_label: index of "no label".

    Returns:
      images float32 [B, C, H, W] in [-1, 1], labels int64 [B], sigma [B, K], noise [B, K, C, H, W].
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()
    sigma, noise, dropped = [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        dropped.append(torch.rand((), generator=generator) < label_dropout)
        sigma.append(draw_noise_levels((num_draws,), generator))
        noise.append(torch.randn((num_draws, *pixels.shape[1:]), generator=generator))
    kept = torch.from_numpy(labels.astype(np.int64))
    missing = torch.stack(dropped) | (kept < 0)
    kept = torch.where(missing, torch.tensor(no_label), kept)
    return {"images": pixels, "labels": kept, "sigma": torch.stack(sigma), "noise": torch.stack(noise)}


def work_units(num_items: int, size: int, rank: int, num_workers: int) -> Iterator[slice]:
    """This worker's slices of `num_items`, cut into units of `size`: unit j belongs to worker j mod num_workers.

    The units are the same for any number of workers, so per-example arithmetic is too.
    """
    for unit, start in enumerate(range(0, num_items, size)):
        if unit % num_workers == rank:
            yield slice(start, min(start + size, num_items))
