"""Trains a prepared run on the cluster of RAY_ADDRESS, stopping at gates until the test has changed the cluster.

python gated_training.py STORAGE [FEWEST,MOST] GATES: a gate is a key SIZE-STEP of the JSON object GATES. A group of
SIZE workers that has made STEP waits there: for good ("killed"), until Ray ends it, or until a machine was given notice
("notice").
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray
from small_runs import small_config

from e2h.curriculum.run import open_run
from e2h.distributed import training


def gated_worker(folder: Path, gates: dict[str, str], config: dict[str, Any]) -> None:
    """A worker of `train_on_workers`; rank 0 writes a line for each private step: size of the group, step, process."""
    from e2h.distributed import training  # of the worker's process, where nothing is replaced yet

    original = training.train

    def gated(run, release, workers, report, progress, leaving, until):
        def step_made(stage: str, step: int) -> None:
            if stage != "finetune":
                return
            if workers.rank == 0:
                with open(folder / "steps", "a") as file:
                    file.write(f"{workers.size} {step} {os.getpid()}\n")
            gate = gates.get(f"{workers.size}-{step}")
            # Asked about step 0 it asks Ray each time; about later ones now and then.
            while gate == "killed" or (gate == "notice" and not leaving(0)):
                time.sleep(0.05)

        original(run, release, workers, report, step_made, leaving, until)

    training.train = gated
    try:
        training._worker(config)
    finally:
        training.train = original


def main(storage: Path, workers: list[int], gates: dict[str, str]) -> None:
    training.RESIZE_EVERY_S = 2.0
    training._worker = partial(gated_worker, storage, gates)
    config = small_config(storage)
    config.scaling.min_workers, config.scaling.num_workers = workers
    with open_run(config) as run:
        ray.init(log_to_driver=False)
        training.train_on_workers(run, run.ledger.budget().planned[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(json.loads, sys.argv[2:]))
