"""Gaussian noise from a secure, addressed generator, on an integer grid.

Sums of clipped contributions are integers (multiples of a public grid step). Adding Gaussian noise and rounding to the
grid equals adding rounded noise, so the release is post-processing of the Gaussian mechanism, and the low-order bits of
floating-point sums (Mironov 2012) have nothing to tell.
"""

from __future__ import annotations

import numpy as np

from e2h.privacy.keys import keystream


def gaussian_noise(key: bytes, start: int, stop: int, standard_deviation: float) -> np.ndarray:
    """Coordinates [start, stop) of a Gaussian vector, rounded to integers.

    Coordinate i depends on the key and i alone: any owner of a slice makes exactly its slice. Box and Muller (1958) in
    float64 with a 63-bit radius: the tail reaches 9.3 standard deviations.

    Args:
      key: 32 secret bytes, used for this one vector.
      start, stop: 0 <= start <= stop.
      standard_deviation: in grid steps.

    Returns:
      int64 [stop - start].
    """
    first, last = start // 2, (stop + 1) // 2
    words = np.frombuffer(keystream(key, first, last - first), "<u8").reshape(-1, 2)
    uniform = ((words[:, 0] >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-63
    radius = np.sqrt(-2.0 * np.log(np.minimum(uniform, 1.0)))
    angle = (words[:, 1] >> np.uint64(11)).astype(np.float64) * (2.0 * np.pi * 2.0**-53)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return np.rint(pairs.reshape(-1)[start - 2 * first : stop - 2 * first] * standard_deviation).astype(np.int64)
