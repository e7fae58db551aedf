"""How far central images are from the true class means, at equal privacy: the published query, and clipped ones.

    python benchmarks/central.py FOLDER    # the folder with MNIST's four IDX files
    python benchmarks/central.py           # scikit-learn's digits, too few for this event: the order of queries alone
    python benchmarks/central.py --quick   # one draw instead of five

The event is that of the published runs (DP-FETA, Li et al. 2025): 5 rounds, sampling probability 0.1, noise multiplier
5. The published query takes every second pixel and bounds a record by the worst case, the root of the number of pixels
(14); the others average areas and clip to a part of that, and one coordinate may count records. The error is that of
the mean over rounds, in grey values from 0 to 1, before pixels are cut to that range; its own pooling of the private
mean is the truth.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np

from e2h.config import CentralConfig, DataConfig
from e2h.curriculum.central import CentralQuery, pool
from e2h.data.sources import open_source, read_shard
from e2h.privacy.events import PoissonSampledGaussian

EVENT = PoissonSampledGaussian(sampling_prob=0.1, noise_multiplier=5.0, count=5)
CLIP_PARTS, COUNT_WEIGHTS = (5 / 14, 6 / 14, 7 / 14), (0.0, 0.2)
BEST = CLIP_PARTS[0], COUNT_WEIGHTS[1]


@dataclass(frozen=True)
class Row:
    query: str
    max_norm: float
    count_weight: float
    rmse: float


def load(folder: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Training images uint8 [N, H, W, 1] and labels [N]."""
    size, source = (28, "idx") if folder else (8, "digits")
    data = DataConfig(source=source, path=folder, image_size=size)
    shards = [one for one in open_source(data).shards if one.split != "test"]
    records = [one for shard in shards for one in read_shard(shard, data)]
    images = [one.content for one in records if isinstance(one.content, np.ndarray)]
    return np.stack(images).reshape(len(images), size, size, 1), np.array([one.label for one in records])


def error(images: np.ndarray, labels: np.ndarray, central: CentralConfig, draws: int) -> float:
    """Root mean square over classes, pixels and draws."""
    query = CentralQuery(central, EVENT, images.shape[1], 1, int(labels.max()) + 1, len(images))
    white = 255 * central.pool_factor**2
    means = [pool(images[labels == label], central.pool_factor).mean(axis=0) for label in range(query.num_classes)]
    truth = np.stack([mean.reshape(-1) / white for mean in means])
    squares = []
    for _ in range(draws):
        sums = query.partial_sums(images, labels, np.arange(len(images)), os.urandom(32))
        found = query.means(query.release(sums, os.urandom(32))).mean(axis=0)
        squares.append(np.mean((found - truth) ** 2))
    return float(np.sqrt(np.mean(squares)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="with MNIST's four IDX files, gzipped or not")
    parser.add_argument("--quick", action="store_true", help="one draw of noise and records")
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")
    given = parser.parse_args()
    images, labels = load(given.folder)
    draws, worst = 1 if given.quick else 5, images.shape[1] / 2
    published = error(images[:, ::2, ::2], labels, CentralConfig(max_norm=worst, pool_factor=1), draws)
    rows, errors = [Row("published", worst, 0.0, published)], {}
    for part, weight in product(CLIP_PARTS, COUNT_WEIGHTS):
        central = CentralConfig(max_norm=part * worst, pool_factor=2, count_weight=weight)
        errors[part, weight] = error(images, labels, central, draws)
        rows.append(Row("clipped", central.max_norm, weight, errors[part, weight]))
    print(f"{'query':<11}{'clip norm':>10}{'count':>7}{'RMSE':>9}")
    for row in rows:
        print(f"{row.query:<11}{row.max_norm:>10.3g}{row.count_weight:>7g}{row.rmse:>9.4f}")
    if given.json:
        event = {"sampling_prob": EVENT.sampling_prob, "noise_multiplier": EVENT.noise_multiplier}
        found = {"rmse_published": published, "rmse": errors[BEST], **event, "num_rounds": EVENT.count}
        print(json.dumps({**found, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
