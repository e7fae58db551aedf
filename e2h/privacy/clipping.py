"""Bounding what one record contributes to a sum."""

from __future__ import annotations

import numpy as np


def clip_to_grid(vectors: np.ndarray, max_norm: float, num_steps: float) -> np.ndarray:
    """Rows scaled to L2 norm at most `max_norm`, then truncated to multiples of max_norm / num_steps.

    Sensitivity: truncation moves each coordinate towards zero, so a returned row has L2 norm at most
    num_steps (1 - 2^-31) (that is, less than `max_norm`) exactly, and a sum of rows changes by at most that when one
    row is removed. A row with a non-finite entry contributes zero.

    Machines: where a row's entries are whole multiples of one power of two, and their squares sum to less than 2^53 in
    its units, the norm is the rounded root of an exact number. All else is one IEEE operation after another, each
    rounded in the one way there is, so that the result is the same on every processor. Elsewhere last bits follow the
    order in which the processor sums.

    Args:
      vectors: float64 [B, D].
      max_norm: positive.
      num_steps: grid steps of `max_norm`.

    Returns:
      float64 [B, D] of whole numbers. Sums of up to 2^53 / num_steps rows are exact in any order.
    """
    # NaN and infinity pass through both extremes.
    largest = np.maximum(
        vectors.max(axis=1, keepdims=True, initial=0.0), -vectors.min(axis=1, keepdims=True, initial=0.0)
    )
    finite = np.isfinite(largest)
    if not finite.all():
        vectors, largest = np.where(finite, vectors, 0.0), np.where(finite, largest, 0.0)
    # A power of two is divided out first, exactly, so that squaring can't overflow.
    exponents = np.frexp(np.maximum(largest, np.finfo(np.float64).tiny))[1] - 1
    scaled = vectors * np.ldexp(1.0, -exponents)
    norms = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))[:, None]
    # One part in 2^30 below the bound absorbs the rounding of the product and of the norm, whatever the order in which
    # it is summed: that is off by less than D 2^-52, so D may be 2^21 (a 512x512 image in colour has 2^19.6).
    slack = 1 - 2.0**-30
    with np.errstate(over="ignore"):  # an infinite bound: the row is smaller than any step
        scaled *= num_steps * slack / np.maximum(norms, np.ldexp(max_norm * slack, -exponents))
    return np.trunc(scaled, out=scaled)
