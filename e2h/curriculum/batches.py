"""Public randomness of training, addressed by (seed, step, record): the same on any worker, in any micro-batch.

That noise levels and noises belong to a *record* and not to its place in a batch is what makes clipping bound a
record's influence: removing a record must not change the random numbers of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from e2h.diffusion.losses import LOG_SIGMA, noise_levels

Item = TypeVar("Item")
Made = TypeVar("Made")

_MASK = (1 << 64) - 1


def addressed_seeds(seed: int, stage: str, step: int, records: np.ndarray) -> list[int]:
    """One 63-bit seed a record: SplitMix64 (Steele et al. 2014) of seed, stage, step and record.

    torch's generator on the CPU reads 32 bits of it, so that of 93,000 records a pair may draw alike.

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
    images: np.ndarray,
    labels: np.ndarray,
    seeds: list[int],
    num_draws: int,
    label_dropout: float,
    no_label: int,
    log_sigma: tuple[float, float] = LOG_SIGMA,
    max_shift: int = 0,
    flip: bool = False,
) -> dict[str, Tensor]:
    """A micro-batch with everything that its loss needs.

    With `max_shift` or `flip` each draw sees an augmentation of its own (augmentation multiplicity, De et al. 2022):
    inside a record's gradient, so that it is clipped, and paid for, once.

    Args:
      images: uint8 [B, H, W, C].
      labels: int [B]; -1 means no label.
      seeds: one a record.
      num_draws: noise multiplicity K.
      label_dropout: probability that a record loses its label, shared by its K draws.
      no_label: index of "no label".
      log_sigma: mean and standard deviation of ln(sigma).
      max_shift: pixels that an image is moved by at most, its border repeated.
      flip: mirrors left and right with probability 1/2.

    Returns:
      images float32 in [-1, 1], [B, C, H, W] or, where draws are augmented, [B, K, C, H, W]; labels int64 [B]; sigma
      [B, K]; noise [B, K, C, H, W].
    """
    shape, generator, augmented = (images.shape[3], *images.shape[1:3]), torch.Generator(), []
    chances, inside = torch.empty(len(seeds)), torch.empty(len(seeds), num_draws, dtype=torch.float64)
    noise = torch.empty(len(seeds), num_draws, *shape)
    for image, seed, *drawn in zip(images, seeds, chances, inside, noise, strict=True):
        generator.manual_seed(seed)
        drawn[0].uniform_(generator=generator)
        drawn[1].uniform_(generator=generator)
        drawn[2].normal_(generator=generator)
        if max_shift or flip:
            augmented.append(augment(image, num_draws, max_shift, flip, generator))
    kept = torch.from_numpy(labels.astype(np.int64))
    missing = (chances < label_dropout) | (kept < 0)
    kept = torch.where(missing, torch.tensor(no_label), kept)
    seen = torch.from_numpy(np.stack(augmented) if augmented else images)
    pixels = seen.movedim(-1, -3).float().div_(127.5).sub_(1.0).contiguous()
    return {"images": pixels, "labels": kept, "sigma": noise_levels(inside, log_sigma), "noise": noise}


def augment(image: np.ndarray, num_draws: int, max_shift: int, flip: bool, generator: torch.Generator) -> np.ndarray:
    """[K, H, W, C]: copies of `image` [H, W, C], each shifted and mirrored by chance."""
    offsets = torch.randint(-max_shift, max_shift + 1, (num_draws, 2), generator=generator).tolist()
    mirrored = (torch.rand(num_draws, generator=generator) < 0.5).tolist() if flip else [False] * num_draws
    copies = (shift(image, *offset) for offset in offsets)
    return np.stack([copy[:, ::-1] if mirror else copy for copy, mirror in zip(copies, mirrored, strict=True)])


def shift(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """The image [H, W, C] moved by whole pixels, its border repeated."""
    if down == 0 and right == 0:
        return image
    height, width = image.shape[:2]
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return image[rows][:, columns]


def one_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """make(item) of each item in turn; a thread makes each one while the one before is used."""
    with ThreadPoolExecutor(1, "ahead") as thread:
        before: Future[Made] | None = None
        for item in items:
            after = thread.submit(make, item)
            if before is not None:
                yield before.result()
            before = after
        if before is not None:
            yield before.result()


def work_units(num_items: int, size: int, rank: int, num_workers: int) -> Iterator[slice]:
    """This worker's slices of `num_items`, cut into units of `size`: unit j belongs to worker j mod num_workers.

    The units are the same for any number of workers, so per-example arithmetic is too.
    """
    for unit, start in enumerate(range(0, num_items, size)):
        if unit % num_workers == rank:
            yield slice(start, min(start + size, num_items))
