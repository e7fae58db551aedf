"""scikit-learn's 8x8 digits: 1797 real images that need no download."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from e2h.config import DataConfig
from e2h.data.records import RawRecord, Shard, Source, check_array_size, choose_class_names, cut, make_source


def open_digits(data: DataConfig) -> Source:
    """Lists the digits; no split of its own, ten classes."""
    images, _ = _load()
    check_array_size(images.shape[1], images.shape[2], data)
    names = choose_class_names([str(digit) for digit in range(10)], data)
    ranges = cut(len(images), data.records_per_shard)
    return make_source([Shard("all", names, "", "digits", *part) for part in ranges], names, data)


def read_digits(shard: Shard, data: DataConfig) -> Iterator[RawRecord]:
    """Yields uint8 [8, 8, 1] images."""
    images, labels = _load()
    for index in range(shard.start, shard.stop):
        yield RawRecord(f"{shard.name}:{index}", images[index], int(labels[index]))


def _load() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # a heavy import that the other sources don't need

    bunch = load_digits()
    # Pixels are counts from 0 to 16.
    images = np.round(bunch.images * 255 / 16).astype(np.uint8)[..., None]
    return images, bunch.target
