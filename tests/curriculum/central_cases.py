"""Small central queries and records for them."""

from __future__ import annotations

import numpy as np

from e2h.config import CentralConfig
from e2h.curriculum.central import CentralQuery
from e2h.privacy.events import PoissonSampledGaussian
from e2h.privacy.keys import derive_key

KEY, NOISE_KEY = derive_key(bytes(32), "masks"), derive_key(bytes(32), "noise")
SIDE, CLASSES = 8, 3


def query(rounds=4, q=0.5, sigma=5.0, num_records=300, channels=1, **settings) -> CentralQuery:
    event = PoissonSampledGaussian(q, sigma, rounds)
    return CentralQuery(CentralConfig(**settings), event, SIDE, channels, CLASSES, num_records)


def records(count: int, channels: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random images uint8 [N, 8, 8, C], labels and ids."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, SIDE, SIDE, channels), dtype=np.uint8)
    return images, rng.integers(0, CLASSES, count), rng.choice(2**62, count, replace=False)


def hostile(channels: int = 1) -> np.ndarray:
    """Images at the ends of what a record can be: uint8 [B, 8, 8, C]."""
    shape = (SIDE, SIDE, channels)
    checkers = np.indices((SIDE, SIDE)).sum(axis=0)[..., None] % 2 * 255
    one_pixel, ramp = np.zeros(shape), np.linspace(0, 255, SIDE * SIDE * channels).reshape(shape)
    one_pixel[3, 4] = 255
    images = [np.zeros(shape), np.full(shape, 255), np.full(shape, 127), np.broadcast_to(checkers, shape)]
    return np.stack([*images, 255 - images[3], one_pixel, ramp]).astype(np.uint8)


QUERIES = {
    "mean": {"max_norm": 2.0},
    "mean, nothing clipped": {"max_norm": 50.0},
    "mean with count": {"max_norm": 2.0, "count_weight": 0.7},
    "mean around grey": {"max_norm": 1.0, "centre": 0.5, "count_weight": 2.0},
    "mean of all": {"max_norm": 2.0, "count_weight": 1.0, "class_conditional": False},
    "mean, half size": {"max_norm": 1.5, "pool_factor": 2},
    "mean in colour": {"max_norm": 3.0, "channels": 3},
    "mode": {"query": "mode", "num_bins": 16},
    "mode of all": {"query": "mode", "num_bins": 2, "class_conditional": False},
    "mode, half size": {"query": "mode", "num_bins": 5, "pool_factor": 2},
    "mode in colour": {"query": "mode", "num_bins": 3, "channels": 3},
}
