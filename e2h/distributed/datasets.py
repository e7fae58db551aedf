"""Work on Ray, a shard or some at a time, which a task or actor does whole and answers once.

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
from e2h.curriculum.easy import Query, file_sums, mask_key
from e2h.curriculum.run import Run
from e2h.curriculum.synthesis import Synthesizer
from e2h.data.prepare import ShardStats, prepare_shard
from e2h.data.records import Source
from e2h.data.storage import Prepared, PreparedFile
from e2h.distributed.console import Tell
from e2h.distributed.failures import refusal
from e2h.errors import InputError

Row = dict[str, Any]
TASK_RECORDS = 65536  # of an easy stage's pass, where the processors alone would ask for larger ones
TASKS_PER_CPU = 4
TASK_RETRIES = 10  # machines that vanish are ordinary; a crash that comes back each time is not


def untold(done: int, total: int) -> None:
    """Where nobody watches."""


def prepare_shards(source: Source, data: DataConfig, folder: str, tell: Tell = untold) -> list[ShardStats]:
    """Writes every shard of a source below `folder`.

    Raises:
      InputError: what the first refusing task said.
    """

    def prepare(row: Row) -> Row:
        shard = pickle.loads(row["shard"])
        return _answer(lambda: prepare_shard(shard, data, folder, int(row["index"])))

    rows = [{"index": index, "shard": pickle.dumps(shard)} for index, shard in enumerate(source.shards)]
    return list(_values(_tasks(rows).map(prepare), len(rows), tell))


def query_sums(run: Run, prepared: Prepared, query: Query, stage: str, domain: str, tell: Tell = untold) -> np.ndarray:
    """Exact sums of an easy stage's query over the training split, without noise: int64, sensitive.

    One pass over the data for all rounds, in few large tasks. Each adds up its files and answers once; answers are
    whole numbers and are merged as they come. A task that is lost runs again: its answer is the same, and counts once.
    Which machine a task runs on doesn't matter: a record's whole numbers are the same on all (`CentralQuery.encode`).
    """

    # By default on any node, although the caller may be a trial of Tune, whose own resources have no processor.
    @ray.remote(num_cpus=1, max_retries=TASK_RETRIES, scheduling_strategy="DEFAULT")
    def partial_sums(files: list[PreparedFile]) -> Row:
        # The secret is resolved where it is used: it never enters the object store.
        return _refusing(lambda: file_sums(files, query, mask_key(run, stage, domain)))

    total, num_records, shares = query.zero_sums(), 0, _shares(prepared)
    for done, (part, count) in enumerate(_answers(partial_sums, shares), 1):
        num_records += count
        total += part
        tell(done, len(shares))
    if num_records != prepared.manifest.num_train:
        raise RuntimeError(f"the pass saw {num_records} records of {prepared.manifest.num_train}; nothing was released")
    return total


def _shares(prepared: Prepared) -> list[list[PreparedFile]]:
    """The training files, in shares small enough for all processors and for a lost task to cost seconds."""
    files = prepared.files("train")
    num_shares = max(TASKS_PER_CPU * _num_cpus(), prepared.manifest.num_train // TASK_RECORDS)
    return [list(share) for share in np.array_split(np.array(files, dtype=object), min(num_shares, len(files)))]


def _answers(task: Any, arguments: list[Any]) -> Iterator[Any]:
    """What the tasks answer, in the order in which they finish; few wait, so few answers do.

    Raises:
      InputError: what the first refusing task said; the others are cancelled.
    """
    waiting, running = list(arguments), list[ray.ObjectRef]()
    try:
        while waiting or running:
            # Some more than there are processors now: an autoscaler sees the demand.
            while waiting and len(running) < 2 * max(_num_cpus(), 4):
                running.append(task.remote(waiting.pop(0)))
            done, running = ray.wait(running, num_returns=1)
            row = ray.get(done.pop())
            if row["refused"]:
                raise InputError(row["refused"])
            yield row["value"]
            del row  # its memory in the object store is free again
    finally:
        for one in running:
            ray.cancel(one)


def _num_cpus() -> int:
    """Now, in the whole cluster; at least 1, for an autoscaler may begin with none."""
    return max(1, int(ray.cluster_resources().get("CPU", 0)))


def synthesize(run: Run, num_shards: int, tell: Tell = untold) -> int:
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
    return sum(_values(made, num_shards, tell))


def _tasks(rows: list[Row]) -> ray.data.Dataset:
    """One block, and so one task, a row."""
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _answer(work: Callable[[], object]) -> Row:
    row = _refusing(work)
    return {**row, "value": pickle.dumps(row["value"])}


def _refusing(work: Callable[[], object]) -> Row:
    """`value` is what the work returns; or `refused` is what the user must mend."""
    try:
        return {"value": work(), "refused": ""}
    except Exception as error:
        message = refusal(error)
        if message is None:
            raise
        return {"value": None, "refused": message}


def _values(dataset: ray.data.Dataset, total: int, tell: Tell) -> Iterator[Any]:
    # The bytes come from our own tasks of this very job, not from a file.
    for done, row in enumerate(dataset.iter_rows(), 1):
        if row["refused"]:
            raise InputError(row["refused"])
        tell(done, total)
        yield pickle.loads(row["value"])
