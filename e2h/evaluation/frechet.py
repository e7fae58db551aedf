"""Frechet distance between two sets of features, from sums that add up over shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, sum [D] and sum of outer products [D, D] of feature vectors, in float64.

    Statistics of parts add up (`a + b`) to the statistics of the whole, so that workers can share the work.
    """

    count: int
    total: NDArray[np.float64]
    outer: NDArray[np.float64]

    @staticmethod
    def of(features: NDArray[np.floating]) -> FeatureStatistics:
        """Statistics of `features` [N, D]; N may be 0."""
        rows = np.asarray(features, dtype=np.float64)
        return FeatureStatistics(len(rows), rows.sum(axis=0), rows.T @ rows)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        return FeatureStatistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean [D]."""
        return self.total / self.count

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Unbiased covariance [D, D].

        Raises:
          ValueError: for fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"count={self.count}: expected at least 2 feature vectors for a covariance")
        return (self.outer - self.count * np.outer(self.mean, self.mean)) / (self.count - 1)


def _square_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared 2-Wasserstein distance between the Gaussians fitted to `a` and `b` (Heusel et al. 2017, section 3).

    |mean_a - mean_b|^2 + Tr(A + B - 2 (A B)^(1/2)). The trace of the root is taken from A^(1/2) B A^(1/2), which has
    the eigenvalues of A B and is symmetric, so that they are real in floating point too.

    Raises:
      ValueError: if either side has fewer than two vectors.
    """
    root = _square_root(a.covariance)
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return float(max(0.0, np.sum((a.mean - b.mean) ** 2) + trace))
