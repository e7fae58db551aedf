"""Distances to nearest neighbours between large sets of vectors, a block at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

BLOCK = 500  # rows of a matrix of distances
NUM_NEIGHBOURS = 3  # k of Kynkaanniemi et al. 2019

Vectors = NDArray[np.floating]


def distances(a: Vectors, b: Vectors) -> NDArray[np.float64]:
    """Euclidean distances [M, N] between the rows of `a` [M, D] and `b` [N, D]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    # In float64 the cancellation costs a millionth of the vectors' length: a copy's distance is 0 for all purposes.
    squares = np.einsum("md,md->m", a, a)[:, None] + np.einsum("nd,nd->n", b, b) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


def nearest(queries: Vectors, blocks: Iterable[Vectors]) -> NDArray[np.float64]:
    """Distance [M] of each of `queries` [M, D] to the nearest row of all `blocks` [any, D], in one pass over them."""
    found = np.full(len(queries), np.inf)
    for block in blocks:
        for part in _parts(block):
            np.minimum(found, distances(queries, part).min(axis=1), out=found)
    return found


def precision_recall(synthetic: Vectors, real: Vectors, k: int = NUM_NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    A set's support is the union of the balls around its vectors that reach to each one's k-th nearest other vector.
    Precision is the share of `synthetic` [M, D] in the support of `real` [N, D], recall the reverse; M and N exceed k.
    """
    return _share_within(synthetic, real, k), _share_within(real, synthetic, k)


def _share_within(points: Vectors, centres: Vectors, k: int) -> float:
    radii = np.concatenate([np.partition(distances(part, centres), k)[:, k] for part in _parts(centres)])
    inside = [(distances(part, centres) <= radii).any(axis=1) for part in _parts(points)]
    return float(np.concatenate(inside).mean())


def _parts(vectors: Vectors) -> Iterator[Vectors]:
    return (vectors[start : start + BLOCK] for start in range(0, len(vectors), BLOCK))
