"""FID, KID, precision and recall, and the Inception score, as torch-fidelity computes them with its defaults.

KID, precision and recall are of at most `MAX_COMPARED` images a side.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax, xlogy

from e2h.evaluation.frechet import FeatureStatistics, frechet_distance
from e2h.evaluation.inception import FEATURE_WIDTH, NUM_LOGITS, InceptionV3, inception_features
from e2h.evaluation.neighbours import precision_recall

NUM_SPLITS = 10  # of the Inception score
NUM_SUBSETS, SUBSET_SIZE = 100, 1000  # of KID
# Images behind KID, precision and recall: so many of each side, since cost grows with the square.
MAX_COMPARED = 10_000
# torch-fidelity's own: the same subsets and splits are drawn, so up to MAX_COMPARED images give the same numbers.
SEED = 2020

Floats = NDArray[np.floating]


class FeatureSums:
    """Statistics of all features of `count` images, and those of `MAX_COMPARED` themselves.

    Of more images these lie at random, for a set may be sorted by class.
    """

    def __init__(self, count: int) -> None:
        self.statistics = FeatureStatistics.of(np.empty((0, FEATURE_WIDTH)))
        self._compared = np.random.RandomState(SEED).permutation(count) < MAX_COMPARED
        self._kept: list[Floats] = []

    def add(self, features: Floats) -> None:
        """Adds the next images' `features` [M, 2048]."""
        start = self.statistics.count
        self.statistics += FeatureStatistics.of(features)
        self._kept.append(features[self._compared[start : start + len(features)]])

    @property
    def kept(self) -> Floats:
        """[min(N, MAX_COMPARED), 2048]"""
        return np.concatenate(self._kept)


class InceptionScore:
    """exp of the mean divergence of an image's classes from those of its split (Salimans et al. 2016, section 4).

    Images go at random to `NUM_SPLITS` equal splits; kept are sums, since mean_i KL(p_i | q) is the mean of
    sum p_i log p_i less sum q log q.
    """

    def __init__(self, count: int) -> None:
        order, self._num_splits = np.random.RandomState(SEED).permutation(count), min(NUM_SPLITS, count)
        bounds = [i * count // self._num_splits for i in range(1, self._num_splits)]
        self._split = np.empty(count, np.int64)  # of each image
        for index, members in enumerate(np.split(order, bounds)):
            self._split[members] = index
        self._added = 0
        self._total = np.zeros((self._num_splits, NUM_LOGITS))
        self._negative_entropy = np.zeros(self._num_splits)

    def add(self, logits: Floats) -> None:
        """Adds the next images' `logits` [M, 1008]."""
        shares = softmax(logits.astype(np.float64), axis=1)
        member = np.eye(self._num_splits)[self._split[self._added : self._added + len(logits)]]
        self._total += member.T @ shares
        self._negative_entropy += member.T @ xlogy(shares, shares).sum(axis=1)
        self._added += len(logits)

    @property
    def scores(self) -> NDArray[np.float64]:
        """Of each split, once all images are added."""
        sizes = np.bincount(self._split)
        mean = self._total / sizes[:, None]
        return np.exp(self._negative_entropy / sizes - xlogy(mean, mean).sum(axis=1))


def kernel_distances(synthetic: Floats, real: Floats) -> NDArray[np.float64]:
    """Unbiased squared MMD between random subsets of `synthetic` [M, D] and `real` [N, D]: float64 [NUM_SUBSETS].

    Their mean is KID (Binkowski et al. 2018, section 4), with the kernel (x.y / D + 1)^3; it may be negative.
    """
    rng, size = np.random.RandomState(SEED), min(SUBSET_SIZE, len(synthetic), len(real))

    def draw(side: Floats) -> Floats:
        return side[rng.choice(len(side), size, replace=False)]

    return np.array([_squared_mmd(draw(synthetic), draw(real)) for _ in range(NUM_SUBSETS)])


def _squared_mmd(a: Floats, b: Floats) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    size, width = a.shape
    first, second, cross = ((x @ y.T / width + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = first.sum() - np.trace(first) + second.sum() - np.trace(second)
    return float(within / (size * (size - 1)) - 2 * cross.mean())


def inception_metrics(model: InceptionV3, synthetic: NDArray[np.uint8], real: NDArray[np.uint8]) -> dict[str, float]:
    """All measures of `synthetic` against `real`, both uint8 [N, H, W, 1 or 3] of at least 4 images.

    In memory beside the two sets: features of at most `MAX_COMPARED` images a side.

    Returns:
      {"fid", "kid", "kid_std", "precision", "recall", "inception_score", "inception_score_std"}; deviations are those
      over subsets and splits. Precision and recall are on these features, not on the paper's VGG-16.
    """
    fake, true, score = FeatureSums(len(synthetic)), FeatureSums(len(real)), InceptionScore(len(synthetic))
    for features, logits in inception_features(model, synthetic):
        fake.add(features)
        score.add(logits)
    for features, _ in inception_features(model, real):
        true.add(features)
    kid, (precision, recall) = kernel_distances(fake.kept, true.kept), precision_recall(fake.kept, true.kept)
    return {
        "fid": frechet_distance(fake.statistics, true.statistics),
        "kid": float(kid.mean()),
        "kid_std": float(kid.std()),
        "precision": precision,
        "recall": recall,
        "inception_score": float(score.scores.mean()),
        "inception_score_std": float(score.scores.std()),
    }
