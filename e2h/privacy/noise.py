"""Gaussian noise from a secure, addressed generator, on an integer grid.

Sums of clipped contributions are integers (multiples of a public grid step). Adding Gaussian noise and rounding to the
grid equals adding rounded noise, so the release is post-processing of the Gaussian mechanism: sums carry no low-order
bits for Mironov's (2012) attack. What is assumed is that float64 Box-Muller values are Gaussian to within their
rounding, which is far finer than the grid.
"""

from __future__ import annotations

import numpy as np

from e2h.privacy.keys import keystream

# The tail reaches 13 standard deviations. There the 2^53 angles lie a grid step apart, and nearer the centre closer.
LARGEST_DEVIATION = 2.0**47
# Below this, float64's spacing of uniforms is finer in the radius than any grid; above it (1 pair in 64), too coarse.
NEAR_ONE = np.uint64(2**64 - 2**58)


def gaussian_noise(key: bytes, start: int, stop: int, standard_deviation: float) -> np.ndarray:
    """Coordinates [start, stop) of a Gaussian vector, rounded to integers.

    Coordinate i depends on the key and i alone: any owner of a slice makes exactly its slice. Box and Muller (1958) in
    float64. Where values are spaced wider than the grid, a released point would show which sum it was added to. So the
    uniform behind the radius has 128 bits, for the tail, and near the centre the logarithm is taken of its distance
    from 1: float64 itself is too coarse there, and its radii would be rings, 16 grid steps of every standard deviation
    of 2^30 apart.

    Args:
      key: 32 secret bytes, used for this one vector.
      start, stop: 0 <= start <= stop.
      standard_deviation: in grid steps, at most LARGEST_DEVIATION: larger noise comes in wider steps than the grid's,
        and at last outgrows int64.

    Raises:
      ValueError: if it is larger.

    Returns:
      int64 [stop - start].
    """
    if not 0 <= standard_deviation <= LARGEST_DEVIATION:
        raise ValueError(f"standard_deviation={standard_deviation}: expected at most {LARGEST_DEVIATION:g} grid steps")
    first, last = start // 2, (stop + 1) // 2
    words = np.frombuffer(keystream(key, 2 * first, 2 * (last - first)), "<u8").reshape(-1, 4)
    radius = np.sqrt(-2.0 * _log_uniform(words[:, 0], words[:, 1]))
    angle = (words[:, 2] >> np.uint64(11)) * (2.0 * np.pi * 2.0**-53)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return np.rint(pairs.reshape(-1)[start - 2 * first : stop - 2 * first] * standard_deviation).astype(np.int64)


def _log_uniform(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """ln of the uniform of (0, 1) with these 128 bits, to float64's relative precision at both ends."""
    logarithm = np.log(_fraction(high, low))
    near_one = high > NEAR_ONE
    logarithm[near_one] = np.log1p(-_fraction(~high[near_one], ~low[near_one]))
    return logarithm


def _fraction(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The middle of the cell of width 2^-128; that of the inverted bits is its distance from 1."""
    return high * 2.0**-64 + (low + 0.5) * 2.0**-128
