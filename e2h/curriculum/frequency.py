"""An easy stage: noisy mean embeddings of each class, released once (FETA-Pro, arXiv 2601.06368).

The mean over a class of random Fourier features (Rahimi and Recht 2007) is its kernel mean embedding, which tells a
distribution from others (DP-MERF, Harder et al. 2021). What is made of it afterwards is post-processing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from e2h.config import FrequencyConfig, expect
from e2h.curriculum.central import GRID_BITS
from e2h.privacy.clipping import clip_to_grid
from e2h.privacy.events import PoissonSampledGaussian
from e2h.privacy.noise import gaussian_noise

TURN_BITS = 32  # a phase is a whole number of 2^-32 turns
ANGLE_BITS = 16  # of which waves are looked up at 2^-16: far finer than any noise
SLICE_NUMBERS = 2**20  # pixels or features, whichever a record has more of, in memory at a time: of 8 bytes


@dataclass(frozen=True)
class FrequencyQuery:
    """A query over records (image, label), all of them at once; everything in it is public.

    Features of an image x in [0, 1]^d, d = H W C: phi(x) = [cos(w_j x), sin(w_j x)]_j sqrt(2 / num_features) with
    public frequencies w_j ~ N(0, I / (d bandwidth^2)); phi(x) phi(y) is about exp(-|x - y|^2 / (2 d bandwidth^2)).

    Event: `event` is one Gaussian mechanism without sampling. Neighbours differ by one record, which is there or
    replaced by nothing (the rest of e2h's relation); published code for this query has the noise of replacing one
    record by another, twice as much.

    Sensitivity: a record adds its row of `encode` to the sums of its own class alone. The row is made of pairs, each
    of norm at most 2^GRID_BITS / sqrt(num_features / 2) (`waves`), so its norm is at most 2^GRID_BITS grid steps
    whatever the image, that is 1.

    Raises:
      ValueError: if the event is anything but one round over all records.
    """

    frequency: FrequencyConfig
    event: PoissonSampledGaussian
    image_size: int
    channels: int
    num_classes: int
    num_records: int
    seed: int  # public; of the frequencies

    def __post_init__(self) -> None:
        if self.event.sampling_prob != 1 or self.event.count != 1:
            raise ValueError(f"expected one round over all records, not {self.event}")

    @property
    def num_pixels(self) -> int:
        return self.channels * self.image_size**2

    @property
    def dimension(self) -> int:
        return self.frequency.num_features

    @property
    def sensitivity(self) -> float:
        """Largest L2 norm that one record adds to the sums."""
        return 1.0

    @property
    def expected_count(self) -> float:
        """Public expectation of a class' records, classes taken as equally frequent."""
        return self.num_records / self.num_classes

    def frequencies(self) -> np.ndarray:
        """Whole numbers float64 [num_features / 2, d]: 2^-TURN_BITS turns per step of a uint8 pixel."""
        return draw_frequencies(self.seed, self.dimension // 2, self.num_pixels, self.frequency.bandwidth)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Each record's features on the integer grid; the same bits on any machine, in any block.

        A phase is a sum of whole numbers below 2^53, exact in whatever order BLAS takes it; its wave is looked up.

        Args:
          images: uint8 [B, H, W, C].

        Returns:
          int32 [B, num_features], cosines before sines; rows of norm at most 2**GRID_BITS.
        """
        phases = images.reshape(len(images), -1).astype(np.float64) @ self.frequencies().T
        angles = (phases.astype(np.int64) >> (TURN_BITS - ANGLE_BITS)) & (2**ANGLE_BITS - 1)
        cosines, sines = waves(self.dimension // 2)
        return np.concatenate([cosines[angles], sines[angles]], axis=1)

    def zero_sums(self) -> np.ndarray:
        """The sums over no records: int64 [num_classes, num_features]."""
        return np.zeros((self.num_classes, self.dimension), np.int64)

    def partial_sums(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        record_ids: np.ndarray,
        key: bytes,
        total: np.ndarray | None = None,
    ) -> np.ndarray:
        """Each class' sum over one block of records: exact integers, so blocks add up in any order.

        Beside the sums, it needs the memory of the frequencies and of some SLICE_NUMBERS.

        Args:
          images: uint8 [B, H, W, C].
          labels: int [B] in [0, num_classes).
          record_ids, key: for queries that sample; all records are in this one.
          total: int64 [num_classes, num_features]; the sums are added to it. None: zeros.

        Returns:
          `total`.
        """
        if total is None:
            total = self.zero_sums()
        size = max(1, SLICE_NUMBERS // max(self.dimension, self.num_pixels))
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            rows = self.encode(images[part])
            for label in np.unique(labels[part]):
                total[label] += rows[labels[part] == label].sum(axis=0, dtype=np.int64)
        return total

    def release(self, sums: np.ndarray, key: bytes) -> np.ndarray:
        """Adds the noise, once: int64 as `sums`. Call it after the ledger has charged the event."""
        noise = gaussian_noise(key, 0, sums.size, self.event.noise_multiplier * 2.0**GRID_BITS)
        return sums + noise.reshape(sums.shape)

    def embeddings(self, released: np.ndarray) -> np.ndarray:
        """Mean embeddings from the released sums, by the expected count: post-processing.

        Returns:
          float64 [num_classes, num_features]; of a class as frequent as expected, with noise `noise_deviation` on each
          coordinate.
        """
        return released * (2.0**-GRID_BITS / self.expected_count)

    @property
    def noise_deviation(self) -> float:
        """Standard deviation of the noise on each coordinate of `embeddings`."""
        return self.event.noise_multiplier * self.sensitivity / self.expected_count


@functools.lru_cache(maxsize=1)
def draw_frequencies(seed: int, count: int, num_pixels: int, bandwidth: float) -> np.ndarray:
    """`FrequencyQuery.frequencies`.

    Raises:
      InputError: if a phase could reach 2^53, where sums of whole numbers are no longer exact.
    """
    drawn = np.random.default_rng((seed, count, num_pixels)).standard_normal((count, num_pixels))
    frequencies = np.rint(drawn * (2.0**TURN_BITS / (2 * np.pi * 255 * bandwidth * np.sqrt(num_pixels))))
    exact = 255 * np.abs(frequencies).sum(axis=1).max() < 2.0**53
    expect(exact, "frequency.bandwidth", bandwidth, f"more, for images of {num_pixels} numbers", "try 0.25")
    frequencies.flags.writeable = False  # one array for all callers
    return frequencies


@functools.lru_cache(maxsize=1)
def waves(num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of every angle, int32 [2^ANGLE_BITS] each, on the integer grid.

    A pair's norm is at most 2^GRID_BITS / sqrt(num_pairs), by `clip_to_grid`.
    """
    angles = (np.arange(2**ANGLE_BITS) + 0.5) * (2 * np.pi * 2.0**-ANGLE_BITS)
    pairs = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    cosines, sines = clip_to_grid(pairs, 1.0, 2.0**GRID_BITS / np.sqrt(num_pairs)).astype(np.int32).T
    return np.ascontiguousarray(cosines), np.ascontiguousarray(sines)
