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
        shard = pickle.loads(row["shard"])
        return _answer(lambda: prepare_shard(shard, data, folder, int(row["index"])))

    rows = [{"index": index, "shard": pickle.dumps(shard)} for index, shard in enumerate(source.shards)]
    return list(_values(_tasks(rows).map(prepare)))


def central_sums(run: Run, prepared: Prepared, query: CentralQuery, domain: str) -> np.ndarray:
    """Exact sums of the central query over the training split, without noise: int64, sensitive.

    One pass over the data for all rounds; the sums of files add up in any order.
    """
    paths = prepared.paths("train")

    def partial_sums(row: Row) -> Row:
        # The secret is resolved where it is used: it never enters the object store.
        key = derive_key(run.secret(), "central/sampling", domain)
        return _answer(lambda: _file_sums(row["path"], query, key))

    total, num_records = np.zeros((query.event.count, query.num_groups, query.dimension), np.int64), 0
    for part, count in _values(_tasks([{"path": path} for path in paths]).map(partial_sums)):
        total, num_records = total + part, num_records + count
    if num_records != prepared.manifest.num_train:
        raise RuntimeError(f"the pass saw {num_records} records of {prepared.manifest.num_train}; nothing was released")
    return total


def _file_sums(path: str, query: CentralQuery, key: bytes) -> tuple[np.ndarray, int]:
    """Sums over one file, and how many records it has."""
    total, count = np.zeros((query.event.count, query.num_groups, query.dimension), np.int64), 0
    for block in iter_batches([path], BLOCK_RECORDS):
        total, count = total + query.partial_sums(block.images, block.labels, block.ids, key), count + len(block)
    return total, count


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

    made = _tasks([{"index": index} for index in range(num_shards)]).map(
        Sampler,  # type: ignore[arg-type]
        compute=ActorPoolStrategy(size=min(scaling.num_workers, num_shards)),
        num_cpus=scaling.cpus_per_worker,
        num_gpus=1 if scaling.use_gpu else None,
    )
    return sum(_values(made))


def _tasks(rows: list[Row]) -> ray.data.Dataset:
    """One block, and so one task, a row."""
    return ray.data.from_items(rows, override_num_blocks=len(rows))


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
