"""The easy stage: noisy central images, released once (Li et al. 2025, with a sensitivity that holds).

Round t sums v_i over the records it samples, for each class; v_i has L2 norm at most the query's sensitivity, and a
record is in one class, so a round over all classes is one Gaussian mechanism. The divisor is public (the expected class
count) or itself a noisy sum; never the realised count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from e2h.config import CentralConfig, Config
from e2h.privacy.clipping import clip_to_grid
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.noise import gaussian_noise
from e2h.privacy.plan import PrivacyPlan
from e2h.privacy.sampling import poisson_mask

GRID_BITS = 20
DENSE = 0.05  # from this sampling probability on, a matrix product is faster than looking records up
MOST_RECORDS = 1024  # encoded at a time: sums below 2^31
ENCODED_NUMBERS = 2**25  # at most, of 4 bytes, unless one record has more
CACHED_NUMBERS = 2**16  # of 8 bytes: a processor's own cache
STRIP = 1024  # columns of a product


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

    @property
    def pixel_noise(self) -> float:
        """Of the mean query: the noise's standard deviation in a pixel of the mean of a group's rounds; white is 1."""
        noise = self.event.noise_multiplier * self.sensitivity / np.sqrt(self.event.count)
        return float(noise / self.expected_count)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Each record's contribution on the integer grid; the same bits on every machine (see `clip_to_grid`).

        Args:
          images: uint8 [B, H, W, C].

        Returns:
          float64 [B, dimension] of whole numbers; rows of norm at most 2**GRID_BITS grid steps (the sensitivity).
        """
        pooled = pool(images, self.central.pool_factor).reshape(len(images), -1)
        return self._encode_mode(pooled) if self.central.query == "mode" else self._encode_mean(pooled)

    def _encode_mean(self, pooled: np.ndarray) -> np.ndarray:
        """Pixels clipped to their share of the sensitivity, and the count coordinate, which has the rest."""
        weight = self.central.count_weight
        share = 2.0**GRID_BITS / np.sqrt(1 + weight**2)
        # Whole numbers, so that their norm is exact.
        centred = 2.0 * pooled - self._half_steps(self.central.centre)
        pixels = clip_to_grid(centred, self.central.max_norm * 2 * self._white, share)
        # The count's part of the bound is given up as the pixels' is.
        count = np.full((len(pooled), 1), np.floor(weight * share * (1 - 2.0**-30)))
        return np.concatenate([pixels, count], axis=1)

    def _encode_mode(self, pooled: np.ndarray) -> np.ndarray:
        num_bins = self.central.num_bins
        bins = np.minimum(pooled.astype(np.int64) * num_bins // self._white, num_bins - 1)
        one_hot = (bins[:, :, None] == np.arange(num_bins)).reshape(len(pooled), -1).astype(np.float64)
        return clip_to_grid(one_hot, self.sensitivity, 2.0**GRID_BITS)

    @property
    def _white(self) -> int:
        """A white pixel after pooling."""
        return 255 * self.central.pool_factor**2

    def _half_steps(self, grey: float) -> float:
        """A grey value in [0, 1] as a whole number of half steps of a pooled pixel."""
        return float(np.rint(2 * self._white * grey))

    def partial_sums(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        record_ids: np.ndarray,
        key: bytes,
        total: np.ndarray | None = None,
    ) -> np.ndarray:
        """Sums of all rounds over one block of records: exact integers, so blocks add up in any order.

        Beside the sums, it needs the memory of at most MOST_RECORDS encoded records and of the block's masks.

        Args:
          images: uint8 [B, H, W, C].
          labels: int [B].
          record_ids: int64 [B], unique over the whole set.
          key: secret key of the masks.
          total: int64 [num_rounds, num_groups, dimension]; the sums are added to it. None: zeros.

        Returns:
          `total`.
        """
        if total is None:
            total = self.zero_sums()
        rounds = range(self.event.count)
        masks = np.stack([poisson_mask(key, t, record_ids, self.event.sampling_prob) for t in rounds])
        groups = labels if self.central.class_conditional else np.zeros_like(labels)
        for group in np.unique(groups):
            member = np.flatnonzero((groups == group) & masks.any(axis=0))
            for start in range(0, len(member), self._part_records):
                part = member[start : start + self._part_records]
                self._add(total[:, group], masks[:, part], images[part])
        return total

    def zero_sums(self) -> np.ndarray:
        """The sums over no records: int64 [num_rounds, num_groups, dimension]."""
        return np.zeros((self.event.count, self.num_groups, self.dimension), np.int64)

    @property
    def _part_records(self) -> int:
        """Records that are encoded at a time; their sums fit int32."""
        return max(1, min(MOST_RECORDS, ENCODED_NUMBERS // self.dimension))

    def _add(self, total: np.ndarray, masks: np.ndarray, images: np.ndarray) -> None:
        """Adds the sums of one group, int64 [num_rounds, dimension]; images[i] joins the rounds masks[:, i]."""
        if self.event.sampling_prob < DENSE:
            add_selected(total, masks, self._encode_as(np.int32, images))
            return
        rows = self._encode_as(np.float32, images)
        # A count is as large as all the pixels of a record: by itself, so that theirs stay small (see `add_product`).
        add_product(total[:, :-1], masks, rows[:, :-1])
        total[:, -1] += masks @ rows[:, -1].astype(np.int64)

    def _encode_as(self, dtype: type[np.generic], images: np.ndarray) -> np.ndarray:
        """`encode` in slices that stay in the processor's cache; exact, for entries are at most 2^GRID_BITS."""
        rows: np.ndarray = np.empty((len(images), self.dimension), dtype)
        size = max(1, CACHED_NUMBERS // self.dimension)
        for start in range(0, len(images), size):
            rows[start : start + size] = self.encode(images[start : start + size])
        return rows

    def release(self, sums: np.ndarray, key: bytes) -> np.ndarray:
        """Adds the noise, once: int64 as `sums`. Call it after the ledger has charged all rounds."""
        released, size = np.empty_like(sums), sums[0].size
        for t in range(len(sums)):  # the coordinates that belong to it, whatever the block
            noise = gaussian_noise(key, t * size, (t + 1) * size, self.event.noise_multiplier * 2.0**GRID_BITS)
            released[t] = sums[t] + noise.reshape(sums[t].shape)
        return released

    def decode(self, released: np.ndarray) -> np.ndarray:
        """Central images from the released sums: post-processing.

        Returns:
          uint8 [num_rounds, num_groups, H, W, C] at full size.
        """
        pooled = self.means(released) if self.central.query == "mean" else self._decode_mode(self._values(released))
        side = self.image_size // self.central.pool_factor
        small = np.clip(pooled, 0, 1).reshape(-1, side, side, self.channels)
        full = np.stack([self._enlarge(np.rint(image * 255).astype(np.uint8)) for image in small])
        return full.reshape(*released.shape[:2], self.image_size, self.image_size, self.channels)

    def means(self, released: np.ndarray) -> np.ndarray:
        """Of the mean query: grey values float64 [num_rounds, num_groups, num_pixels], not cut to [0, 1]."""
        values = self._values(released)
        pixels, counts = values[..., :-1], np.full((1, values.shape[1], 1), self.expected_count)
        weight = self.central.count_weight * self.central.max_norm
        if weight > 0:
            # The rounds share one count; below two standard deviations of its noise it says nothing.
            floor = 2 * self.event.noise_multiplier * self.sensitivity / (weight * np.sqrt(self.event.count))
            counts = np.maximum(values[..., -1:].mean(axis=0, keepdims=True) / weight, max(floor, 1.0))
        centre = self._half_steps(self.central.centre) / (2 * self._white)
        return centre + pixels / counts

    def _values(self, released: np.ndarray) -> np.ndarray:
        return released * (self.sensitivity * 2.0**-GRID_BITS)

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


def planned_pixel_noise(config: Config, plan: PrivacyPlan) -> float | None:
    """`CentralQuery.pixel_noise` of a plan; None where it releases no mean images, or trials of a search do."""
    found = [one for one in plan.releases if one.name == "central" and isinstance(one, Release)]
    of_a_run = len(found) == 1 and found[0].event.count == config.central.num_rounds
    if not of_a_run or config.central.query != "mean":
        return None
    shape = config.data.image_size, config.data.channels, len(plan.class_names)
    return CentralQuery(config.central, found[0].event, *shape, plan.num_records).pixel_noise


def add_product(total: np.ndarray, masks: np.ndarray, rows: np.ndarray) -> None:
    """total += masks @ rows, exactly, at the speed of float32.

    float32 holds whole numbers up to 2^24. So records go together only while their largest entries add up to no more:
    then each partial sum is exact, in whatever order BLAS takes it.

    Args:
      total: int64 [T, D], added to.
      masks: bool [T, B], B at most MOST_RECORDS.
      rows: float32 [B, D], whole numbers of magnitude at most 2^GRID_BITS.
    """
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float64)
    # Records whose running sums lie in one interval of this length: their own sum exceeds it by one record at most.
    interval = 2.0**24 - largest.max()
    starts = np.flatnonzero(np.diff(np.cumsum(largest) // interval)) + 1
    weights = masks.astype(np.float32)
    for left in range(0, rows.shape[1], STRIP):
        columns = slice(left, left + STRIP)  # few enough for the products to stay in the cache
        parts = zip(np.split(weights, starts, axis=1), np.split(rows[:, columns], starts), strict=True)
        total[:, columns] += sum((weight @ part).astype(np.int32) for weight, part in parts)


def add_selected(total: np.ndarray, masks: np.ndarray, rows: np.ndarray) -> None:
    """`add_product` for rows int32 [B, D] by looking up the few of each round."""
    for one, mask in zip(total, masks, strict=True):
        one += rows[mask].sum(axis=0, dtype=np.int32)


def pool(images: np.ndarray, factor: int) -> np.ndarray:
    """Sums over areas: uint8 [B, H, W, C] to whole float64 [B, H/factor, W/factor, C], white is 255 factor^2."""
    if factor == 1:
        return images.astype(np.float64)
    rows = sum(images[:, offset::factor].astype(np.float64) for offset in range(1, factor)) + images[:, ::factor]
    return np.asarray(sum(rows[:, :, offset::factor] for offset in range(factor)))
