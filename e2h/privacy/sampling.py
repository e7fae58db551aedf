"""Poisson sampling addressed by (key, step, record id)."""

from __future__ import annotations

import numpy as np

from e2h.privacy.keys import permute_blocks

COINS = 2**14  # tossed at a time: what stays in the processor's cache is six times as fast


def poisson_mask(key: bytes, step: int, record_ids: np.ndarray, sampling_prob: float) -> np.ndarray:
    """Which records join `step`: independent coins of probability `sampling_prob`.

    A record's coin depends on the key, the step and its own id alone: not on the other records, their order, or the
    number of workers. Equal ids would share a coin, so ids must be unique (the prepared set's manifest asserts it).

    Args:
      key: 32 secret bytes for this purpose.
      step: step or round, at least 0.
      record_ids: int64 [N].
      sampling_prob: in (0, 1].

    Returns:
      bool [N].
    """
    if sampling_prob >= 1:
        return np.ones(len(record_ids), bool)
    # Rounded down: the real probability is below the accounted one by less than 2^-64.
    bound = np.uint64(int(sampling_prob * 2.0**64))
    joins = np.empty(len(record_ids), bool)
    for start in range(0, len(joins), COINS):
        part = slice(start, start + COINS)
        joins[part] = _coins(key, step, record_ids[part]) < bound
    return joins


def _coins(key: bytes, step: int, record_ids: np.ndarray) -> np.ndarray:
    blocks = np.empty((len(record_ids), 2), "<u8")
    blocks[:, 0] = step
    blocks[:, 1] = record_ids.astype(np.int64).view(np.uint64)
    return np.frombuffer(permute_blocks(key, blocks.tobytes()), "<u8")[::2]
