"""Bounding what one record contributes to a sum."""

from __future__ import annotations

import numpy as np


def clip_to_grid(vectors: np.ndarray, max_norm: float, grid_bits: int) -> np.ndarray:
    """Rows scaled to L2 norm at most `max_norm`, then truncated to multiples of max_norm * 2**-grid_bits.

    Sensitivity: truncation moves each coordinate towards zero, so a returned row has L2 norm at most 2**grid_bits
    (that is `max_norm`) exactly, and a sum of rows changes by at most that when one row is removed. A row with a
    non-finite entry contributes zero.

    Args:
      vectors: float64 [B, D].

    Returns:
      float64 [B, D] of whole numbers. Sums of up to 2**(53 - grid_bits) rows are exact in any order.
    """
    finite = np.isfinite(vectors).all(axis=1, keepdims=True)
    vectors = np.where(finite, vectors, 0.0)
    # The largest entry is divided out first, so that squaring can't overflow.
    largest = np.maximum(np.abs(vectors).max(axis=1, keepdims=True, initial=0.0), np.finfo(np.float64).tiny)
    with np.errstate(over="ignore"):  # an infinite norm scales its row to zero
        norms = largest * np.linalg.norm(vectors / largest, axis=1, keepdims=True)
    # One part in 2^30 below the bound absorbs the rounding of the product and of the norm, whatever the order in which
    # it is summed: that is off by less than D 2^-52, so D may be 2^21 (a 512x512 image in colour has 2^19.6).
    bound = max_norm * (1 - 2.0**-30)
    return np.trunc(vectors * (bound / np.maximum(norms, bound)) * (2.0**grid_bits / max_norm))
