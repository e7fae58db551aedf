"""Does the generator hand out training images? Distances to nearest neighbours, beside those of unseen real images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from e2h.evaluation.downstream import Images, Labels, pixels
from e2h.evaluation.neighbours import nearest

QUANTILES = (0.01, 0.1, 0.5)
DECIMALS = 5  # of a distance: grey levels are 0.004 apart, and what is smaller is rounding


class Sample:
    """A random sample of a stream of images, the same for blocks of any size."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.images: Images = np.empty((0, 0, 0, 0), np.uint8)  # [at most size, H, W, C], of what was watched so far
        self._rng = np.random.default_rng(seed)
        self._keys = np.empty(0)  # kept are the images with the smallest keys

    def watch(self, blocks: Iterable[tuple[Images, Labels]]) -> Iterator[tuple[Images, Labels]]:
        """Hands the blocks on."""
        for images, labels in blocks:
            self._add(images)
            yield images, labels

    def _add(self, images: Images) -> None:
        keys = np.concatenate([self._keys, self._rng.random(len(images))])
        known = np.concatenate([self.images, images]) if len(self.images) else images
        kept = np.argsort(keys)[: self.size]
        self._keys, self.images = keys[kept], known[kept]


def memorisation(synthetic: Images, test: Images, train: Iterable[Images]) -> dict[str, Any]:
    """How near `synthetic` images come to training images, and how near real images that no one trained on come.

    A generator that copies gives images far nearer to training images than those of the test set are: a small ratio, a
    large share. One that has learnt the distribution and no more gives a ratio of about 1 and a share of about 0.01.

    A smoke alarm, and no evidence of privacy. It finds copies in pixels: one that is moved or recoloured passes, and so
    does one among images that weren't looked at; nor can it say what else may be inferred of a record. The guarantee
    covers all of that. It also gives false alarms: smooth or simple images are near to everything, so a large share is
    a reason to look at the pairs, not a proof.

    Args:
      synthetic: uint8 [M, H, W, C], M at least 1.
      test: uint8 [N, H, W, C] of the same distribution as the training images; N at least 1, best about M.
      train: all training images, uint8 [any, H, W, C] in blocks; gone through once, one block in memory.

    Returns:
      {"num_images": M,
       "nearest_train": quantiles 0.01, 0.1, 0.5 over the synthetic images of the Euclidean distance to the nearest
         training image; pixels are in [0, 1] and averaged down to at most 32 a side,
       "nearest_train_of_test": the same of the test images,
       "ratio": of the two medians; None if that of the test images is 0,
       "share_below_first_percentile": of the synthetic images, at or below the test images' quantile 0.01,
       "share_by_chance": what that share would be on average, were they further test images: above 0.01 with few}.
    """
    queries = pixels(np.concatenate([synthetic, test]))
    found = nearest(queries, (pixels(block) for block in train)).round(DECIMALS)
    ours, theirs = found[: len(synthetic)], found[len(synthetic) :]
    quantiles = [np.quantile(side, QUANTILES).tolist() for side in (ours, theirs)]
    return {
        "num_images": len(synthetic),
        "nearest_train": quantiles[0],
        "nearest_train_of_test": quantiles[1],
        "ratio": quantiles[0][-1] / quantiles[1][-1] if quantiles[1][-1] else None,
        "share_below_first_percentile": float((ours <= quantiles[1][0]).mean()),
        # The quantile lies between order statistics, the k-th of n test images above k / (n + 1) of further ones.
        "share_by_chance": (QUANTILES[0] * (len(theirs) - 1) + 1) / (len(theirs) + 1),
    }
