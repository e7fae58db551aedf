"""Gaussian noise from a secure, addressed generator, on an integer grid.

Sums of clipped contributions are integers (multiples of a public grid step). Adding Gaussian noise and rounding to the
grid equals adding rounded noise, so the release is post-processing of the Gaussian mechanism: sums carry no low-order
bits for Mironov's (2012) attack. What is assumed is that float64 Box-Muller values are Gaussian to within their
rounding, which is far finer than the grid.
"""

from __future__ import annotations

import numpy as np

from e2h.privacy.keys import keystream

# The tail reaches 13 standard deviations: then a noise is below 2^53, where float64 still holds every whole number.
LARGEST_DEVIATION = 2.0**49


def gaussian_noise(key: bytes, start: int, stop: int, standard_deviation: float) -> np.ndarray:
    """Coordinates [start, stop) of a Gaussian vector, rounded to integers.

    Coordinate i depends on the key and i alone: any owner of a slice makes exactly its slice. Box and Muller (1958) in
    float64. The uniform behind the radius has 128 bits: with 64, its largest values would be spaced wider than the
    grid, and a point of the tail would show which sum it was added to.

    Args:
      key: 32 secret bytes, used for this one vector.
      start, stop: 0 <= start <= stop.
      standard_deviation: in grid steps, at most LARGEST_DEVIATION: larger noise comes in wider steps than the grid's,
        which leave low bits of a sum bare, and at last outgrows int64.

    Raises:
      ValueError: if it is larger.

    Returns:
      int64 [stop - start].
    """
    if not 0 <= standard_deviation <= LARGEST_DEVIATION:
        raise ValueError(f"standard_deviation={standard_deviation}: expected at most {LARGEST_DEVIATION:g} grid steps")
    first, last = start // 2, (stop + 1) // 2
    words = np.frombuffer(keystream(key, 2 * first, 2 * (last - first)), "<u8").reshape(-1, 4)
    uniform = words[:, 0] * 2.0**-64 + (words[:, 1] + 0.5) * 2.0**-128
    radius = np.sqrt(-2.0 * np.log(np.minimum(uniform, 1.0)))
    angle = (words[:, 2] >> np.uint64(11)) * (2.0 * np.pi * 2.0**-53)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return np.rint(pairs.reshape(-1)[start - 2 * first : stop - 2 * first] * standard_deviation).astype(np.int64)
