"""Ray Data jobs: one row a shard of work, which a task or actor does whole and answers with a few bytes.

Tasks write their own files under names that follow from the shard, atomically: a task that runs twice leaves the same
file once. What a task must refuse comes back as a value, so that the user reads one line and no traceback.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray.data
from ray.data import ActorPoolStrategy

from e2h.config import DataConfig
from e2h.curriculum.central import CentralQuery
from e2h.curriculum.run import Run
from e2h.curriculum.synthesis import Synthesizer
from e2h.data.prepare import ShardStats, prepare_shard
from e2h.data.records import Source
from e2h.data.storage import Prepared, iter_batches
from e2h.distributed.failures import refusal
from e2h.errors import InputError
from e2h.privacy.keys import derive_key

Row = dict[str, Any]
BLOCK_RECORDS = 2048


def prepare_shards(source: Source, data: DataConfig, folder: str) -> list[ShardStats]:
    """Writes every shard of a source below `folder`.

    Raises:
      InputError: what the first refusing task said.
    """

    def prepare(row: Row) -> Row:
        index = int(row["index"])
        return _answer(lambda: prepare_shard(source.shards[index], data, folder, index))

    return list(_values(_shards(len(source.shards)).map(prepare)))


def central_sums(run: Run, prepared: Prepared, query: CentralQuery, domain: str) -> np.ndarray:
    """Exact sums of the central query over the training split, without noise: int64, sensitive.

    One pass over the data for all rounds; the sums of files add up in any order.
    """
    paths = prepared.paths("train")

    def partial_sums(row: Row) -> Row:
        # The secret is resolved where it is used: it never enters the object store.
        key = derive_key(run.secret(), "central/sampling", domain)
        return _answer(lambda: _file_sums(paths[int(row["index"])], query, key))

    total = np.zeros((query.central.num_rounds, query.num_groups, query.dimension), np.int64)
    for part in _values(_shards(len(paths)).map(partial_sums)):
        total += part
    return total


def _file_sums(path: str, query: CentralQuery, key: bytes) -> np.ndarray:
    blocks = iter_batches([path], BLOCK_RECORDS)
    parts = [query.partial_sums(block.images, block.labels, block.ids, key) for block in blocks]
    return np.sum(parts, axis=0)


def synthesize(run: Run, num_shards: int) -> int:
    """Makes the missing shards of synthetic images with a pool of actors; returns the number of images made."""
    scaling = run.config.scaling
    device = "cuda" if scaling.use_gpu else "cpu"

    class Sampler:
        def __init__(self) -> None:
            import torch

            torch.set_num_threads(1)
            self.synthesizer = Synthesizer(run, device)

        def __call__(self, row: Row) -> Row:
            return _answer(lambda: self.synthesizer.write_shard(int(row["index"])))

    made = _shards(num_shards).map(
        Sampler,  # type: ignore[arg-type]
        compute=ActorPoolStrategy(size=min(scaling.num_workers, num_shards)),
        num_cpus=scaling.cpus_per_worker,
        num_gpus=1 if scaling.use_gpu else None,
    )
    return sum(_values(made))


def _shards(count: int) -> ray.data.Dataset:
    return ray.data.from_items([{"index": index} for index in range(count)], override_num_blocks=count)


def _answer(work: Callable[[], object]) -> Row:
    try:
        return {"value": pickle.dumps(work()), "refused": ""}
    except Exception as error:
        message = refusal(error)
        if message is None:
            raise
        return {"value": b"", "refused": message}


def _values(dataset: ray.data.Dataset) -> Iterator[Any]:
    # The bytes come from our own tasks of this very job, not from a file.
    for row in dataset.iter_rows():
        if row["refused"]:
            raise InputError(row["refused"])
        yield pickle.loads(row["value"])
