"""The easy stage: noisy central images, released once (Li et al. 2025, with a sensitivity that holds).

Round t sums v_i over the records it samples, for each class; v_i has L2 norm at most the query's sensitivity, and a
record is in one class, so a round over all classes is one Gaussian mechanism. The divisor is public (the expected class
count) or itself a noisy sum; never the realised count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from e2h.config import CentralConfig
from e2h.privacy.clipping import clip_to_grid
from e2h.privacy.events import PoissonSampledGaussian
from e2h.privacy.noise import gaussian_noise
from e2h.privacy.sampling import poisson_mask

GRID_BITS = 20


@dataclass(frozen=True)
class CentralQuery:
    """A query over records (image, label); everything in it is public. Sampling, rounds and noise are the event's.

    Sums have shape [num_rounds, num_groups, dimension]: a group is a class, or all records where the query is not
    class-conditional.
    """

    central: CentralConfig
    event: PoissonSampledGaussian
    image_size: int
    channels: int
    num_classes: int
    num_records: int

    @property
    def num_groups(self) -> int:
        return self.num_classes if self.central.class_conditional else 1

    @property
    def num_pixels(self) -> int:
        return self.channels * (self.image_size // self.central.pool_factor) ** 2

    @property
    def dimension(self) -> int:
        return self.num_pixels + 1 if self.central.query == "mean" else self.num_pixels * self.central.num_bins

    @property
    def sensitivity(self) -> float:
        """Largest L2 norm that one record adds to a round's sums.

        mean: sqrt(C^2 + (w C)^2) of clipped pixels and the count coordinate. mode: one count in each of d histograms,
        sqrt(d).
        """
        if self.central.query == "mode":
            return float(np.sqrt(self.num_pixels))
        return float(self.central.max_norm * np.sqrt(1 + self.central.count_weight**2))

    @property
    def expected_count(self) -> float:
        """Public expectation of the records a group gets in a round, classes taken as equally frequent."""
        return self.event.sampling_prob * self.num_records / self.num_groups

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Each record's contribution on the integer grid.

        Args:
          images: uint8 [B, H, W, C].

        Returns:
          float64 [B, dimension] of whole numbers; rows of norm at most 2**GRID_BITS grid steps (the sensitivity).
        """
        pooled = pool(images, self.central.pool_factor).reshape(len(images), -1)
        vectors = self._mean_vectors(pooled) if self.central.query == "mean" else self._mode_vectors(pooled)
        return clip_to_grid(vectors, self.sensitivity, GRID_BITS)

    def _mean_vectors(self, pooled: np.ndarray) -> np.ndarray:
        max_norm = self.central.max_norm
        centred = pooled - self.central.centre
        norms = np.linalg.norm(centred, axis=1, keepdims=True)
        clipped = centred * np.minimum(1.0, max_norm / np.maximum(norms, 1e-300))
        count = np.full((len(pooled), 1), self.central.count_weight * max_norm)
        return np.concatenate([clipped, count], axis=1)

    def _mode_vectors(self, pooled: np.ndarray) -> np.ndarray:
        num_bins = self.central.num_bins
        bins = np.minimum((pooled * num_bins).astype(np.int64), num_bins - 1)
        return (bins[:, :, None] == np.arange(num_bins)).reshape(len(pooled), -1).astype(np.float64)

    def partial_sums(self, images: np.ndarray, labels: np.ndarray, record_ids: np.ndarray, key: bytes) -> np.ndarray:
        """Sums of all rounds over one block of records: exact integers, so blocks add up in any order.

        Args:
          images: uint8 [B, H, W, C].
          labels: int [B].
          record_ids: int64 [B], unique over the whole set.
          key: secret key of the masks.

        Returns:
          int64 [num_rounds, num_groups, dimension].
        """
        rounds = range(self.event.count)
        masks = np.stack([poisson_mask(key, t, record_ids, self.event.sampling_prob) for t in rounds])
        groups = labels if self.central.class_conditional else np.zeros_like(labels)
        encoded = self.encode(images)
        sums = np.zeros((len(rounds), self.num_groups, self.dimension), np.int64)
        for group in np.unique(groups):
            member = groups == group
            # float64 holds these whole numbers exactly (below 2^53), and BLAS is fast.
            sums[:, group] = (masks[:, member].astype(np.float64) @ encoded[member]).astype(np.int64)
        return sums

    def release(self, sums: np.ndarray, key: bytes) -> np.ndarray:
        """Adds the noise, once: int64 as `sums`. Call it after the ledger has charged all rounds."""
        noise = gaussian_noise(key, 0, sums.size, self.event.noise_multiplier * 2.0**GRID_BITS)
        return sums + noise.reshape(sums.shape)

    def decode(self, released: np.ndarray) -> np.ndarray:
        """Central images from the released sums: post-processing.

        Returns:
          uint8 [num_rounds, num_groups, H, W, C] at full size.
        """
        values = released * (self.sensitivity * 2.0**-GRID_BITS)
        pooled = self._decode_mean(values) if self.central.query == "mean" else self._decode_mode(values)
        side = self.image_size // self.central.pool_factor
        small = np.clip(pooled, 0, 1).reshape(-1, side, side, self.channels)
        full = np.stack([self._enlarge(np.rint(image * 255).astype(np.uint8)) for image in small])
        return full.reshape(*released.shape[:2], self.image_size, self.image_size, self.channels)

    def _decode_mean(self, values: np.ndarray) -> np.ndarray:
        pixels, counts = values[..., :-1], np.full((1, values.shape[1], 1), self.expected_count)
        weight = self.central.count_weight * self.central.max_norm
        if weight > 0:
            # The rounds share one count; below two standard deviations of its noise it says nothing.
            floor = 2 * self.event.noise_multiplier * self.sensitivity / (weight * np.sqrt(self.event.count))
            counts = np.maximum(values[..., -1:].mean(axis=0, keepdims=True) / weight, max(floor, 1.0))
        return self.central.centre + pixels / counts

    def _decode_mode(self, values: np.ndarray) -> np.ndarray:
        num_bins = self.central.num_bins
        return values.reshape(*values.shape[:2], self.num_pixels, num_bins).argmax(axis=-1) / (num_bins - 1)

    def _enlarge(self, image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(image[:, :, 0] if self.channels == 1 else image)
        picture = picture.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        if self.central.median_filter:
            picture = picture.filter(ImageFilter.MedianFilter(3))
        if self.central.sharpen:
            picture = picture.filter(ImageFilter.Kernel((3, 3), (0, -1, 0, -1, 5, -1, 0, -1, 0), scale=1))
        return np.asarray(picture).reshape(self.image_size, self.image_size, self.channels)


def pool(images: np.ndarray, factor: int) -> np.ndarray:
    """Area pooling of uint8 [B, H, W, C] to float64 [B, H/factor, W/factor, C] in [0, 1]."""
    count, height, width, channels = images.shape
    blocks = images.reshape(count, height // factor, factor, width // factor, factor, channels)
    return blocks.mean(axis=(2, 4)) / 255.0
