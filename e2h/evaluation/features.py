"""Features for a Frechet distance on machines without Inception weights.

The extractor is trained on real images, so it and everything computed with it is sensitive. Its distance is comparable
between runs on the same data and with the same extractor name only, and is never called FID.
"""

from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np
import torch
from numpy.typing import NDArray

from e2h.evaluation.frechet import FeatureStatistics
from e2h.evaluation.networks import SmallCNN, as_tensor, batches, new_cnn, train_cnn

# Fixed, so that distances of different runs on the same data are comparable.
EXTRACTOR_SEED = 20_240_601
EXTRACTOR_EPOCHS = 5


def train_extractor(images: NDArray[np.uint8], labels: NDArray[np.integer], num_classes: int) -> tuple[str, SmallCNN]:
    """A named feature extractor from real training images (uint8 [N, H, W, C], labels [N]).

    Returns:
      ("small_cnn_v1", the CNN trained to tell the classes apart), or ("small_cnn_random_v1", its untrained self)
      where there are no two classes to tell apart.
    """
    if len(np.unique(labels)) < 2:
        return "small_cnn_random_v1", new_cnn(images, num_classes, EXTRACTOR_SEED).eval()
    return "small_cnn_v1", train_cnn(images, labels, num_classes, EXTRACTOR_EPOCHS, EXTRACTOR_SEED)


@torch.no_grad()
def feature_statistics(model: SmallCNN, images: NDArray[np.uint8]) -> FeatureStatistics:
    """Statistics of the penultimate features [128] of `images` uint8 [N, H, W, C], N at least 1, batch by batch."""
    parts = (FeatureStatistics.of(model.features(as_tensor(part)).numpy()) for part in batches(images))
    return reduce(add, parts)
