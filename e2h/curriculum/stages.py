"""A whole run in this one process, without Ray: for a notebook, a test, or a single GPU. The same files and rules.

Each function does what the stage of the same name does in `e2h.distributed.stages`, skips what is done, and can be
called again after a kill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from e2h.config import DataConfig
from e2h.curriculum.easy import Query, file_sums, mask_key, release_easy_stage
from e2h.curriculum.run import Run
from e2h.curriculum.synthesis import Synthesizer, choose_average, num_shards, synthesized, write_synthetic_grid
from e2h.curriculum.train import train as train_network
from e2h.curriculum.warmup import Report
from e2h.curriculum.workers import Workers
from e2h.data.filesystem import remove, write_bytes
from e2h.data.prepare import ShardStats, finish_prepared, prepare_shard
from e2h.data.records import Source
from e2h.data.sources import open_source
from e2h.data.storage import Prepared, open_prepared
from e2h.errors import InputError
from e2h.privacy.plan import PrivacyPlan, make_plan, read_plan

Progress = Callable[[str, int], None]


def prepare_shards(source: Source, data: DataConfig, folder: str) -> list[ShardStats]:
    """Writes every shard of a source below `folder`, one after the other."""
    return [prepare_shard(shard, data, folder, index) for index, shard in enumerate(source.shards)]


def prepare(run: Run, write: Callable[[Source, DataConfig, str], list[ShardStats]] = prepare_shards) -> Prepared:
    """Private images in any supported layout -> canonical shards (sensitive); a refusal leaves none of them.

    Args:
      write: as `prepare_shards`.
    """
    if not run.done("prepare"):
        data, folder = run.config.data, str(run.prepared)
        source = open_source(data)
        remove(run.prepared)
        try:
            stats = write(source, data, folder)
            # Writes `meta.json`, without which nobody takes the folder for a prepared set.
            finish_prepared(folder, source, data, stats)
            for left in run.prepared.glob(".*.tmp"):  # images, of tasks that were killed
                left.unlink(missing_ok=True)
        except BaseException:
            remove(run.prepared)
            raise
        run.bind()
        run.mark_done("prepare")
    return open_prepared(run.prepared)


def calibrate(run: Run, prepared: Prepared) -> PrivacyPlan:
    """Solves every noise multiplier for the target and opens the budget; spends nothing.

    Raises:
      InputError: if the plan is of other data or another configuration.
    """
    plan = read_plan(read_or_make_plan(run, prepared))
    run.open_budget(plan.budget)
    return plan


def read_or_make_plan(run: Run, prepared: Prepared) -> dict[str, Any]:
    """plan.json, made before the ledger is opened and only read afterwards.

    Raises:
      InputError: if it can't be read, or is that of other data. Of a search whose trials are charged it is not made
        anew here: it would be a single run's.
    """
    path, facts = run.root / "plan.json", prepared.manifest
    searched = run.config.search.privacy in ("selection", "compose")
    again = "; jobs/search.py with the same settings makes it again" if searched else ""
    if run.ledger.budget() is None or not (searched or path.exists()):
        made = run.shared_plan(make_plan(run.config, facts.num_listed_train, facts.class_names))
        write_bytes(path, json.dumps(made.to_json(), indent=2).encode())
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        plan = read_plan(content)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the plan that e2h wrote; it can't be read, remove it{again}") from error
    public = (plan.num_records, plan.class_names, plan.not_private)
    if public != (facts.num_listed_train, facts.class_names, run.config.privacy.test_mode):
        raise InputError(f"{path}: expected the plan of this data and configuration; it was altered, remove it{again}")
    return content


def release_easy_stages(run: Run, prepared: Prepared, plan: PrivacyPlan) -> None:
    """What the curriculum begins with, each an event of its own."""
    for stage in run.config.curriculum:
        if not run.done(stage):
            release_easy_stage(run, prepared, plan, stage, partial(_sums, run, prepared, stage))


def _sums(run: Run, prepared: Prepared, stage: str, query: Query, domain: str) -> np.ndarray:
    total, count = file_sums(prepared.files("train"), query, mask_key(run, stage, domain))
    if count != prepared.manifest.num_train:
        raise RuntimeError(f"the pass saw {count} records of {prepared.manifest.num_train}; nothing was released")
    return total


def train(
    run: Run,
    plan: PrivacyPlan,
    device: str = "cpu",
    progress: Progress = lambda stage, step: None,
    report: Report = lambda *point: None,
) -> None:
    """Warm-up, then DP-SGD.

    Args:
      device: "cpu" or "cuda".
      progress: called as progress(stage, finished steps).
      report: called as report(metric, value, step).
    """
    if not run.done("train"):
        run.ledger.take_over()
        train_network(run, plan.release("finetune"), Workers.current(device), report, progress)
        run.mark_done("train")


def sample(run: Run, device: str = "cpu") -> None:
    """Synthetic images from the released weights."""
    if synthesized(run):
        return
    choose_average(run)
    forget_images_of_other_weights(run)
    synthesizer = Synthesizer(run, torch.device(device))
    for index in range(num_shards(run.config.sampling)):
        synthesizer.write_shard(index)
    write_synthetic_grid(run, len(synthesizer.manifest.class_names))
    run.mark_done("sample")


def forget_images_of_other_weights(run: Run) -> None:
    """Keeps images that a stopped call left only if they came from these very weights."""
    path, weights = run.synthetic / "weights.sha256", hashlib.sha256(run.weights.read_bytes()).hexdigest()
    if not path.exists() or path.read_text() != weights:
        remove(run.synthetic)
        run.synthetic.mkdir(mode=0o700)
        write_bytes(path, weights.encode())
