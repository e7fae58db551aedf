"""The run that `chaos.py` kills: the private part of a pipeline, on two processes with gloo between them, no Ray."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import torch.multiprocessing as mp

from e2h.config import CentralConfig, Config, FinetuneConfig, ModelConfig, PrivacyConfig, RunConfig, WarmupConfig
from e2h.curriculum.central import CentralQuery
from e2h.curriculum.run import Run, open_run
from e2h.curriculum.train import train
from e2h.curriculum.workers import Workers
from e2h.data.exports import write_hf_parquet
from e2h.data.filesystem import write_bytes
from e2h.data.prepare import finish_prepared, prepare_shard
from e2h.data.sources import open_source
from e2h.data.storage import load_split, open_prepared
from e2h.privacy.events import Release
from e2h.privacy.keys import derive_key
from e2h.privacy.optimizer import SecureDPOptimizer
from e2h.privacy.plan import PrivacyPlan, make_plan, read_plan

NUM_WORKERS = 2
RELEASED = "released.jsonl"  # one line for each release that a process made: what, hash, was it paid


def settings(folder: Path) -> Config:
    config = Config(
        model=ModelConfig(base_width=8, width_multipliers=[1, 1], attention_resolutions=[4], blocks_per_level=1),
        privacy=PrivacyConfig(epsilon=1.0, secret="env:E2H_CHAOS_SECRET"),
        central=CentralConfig(num_rounds=3),
        warmup=WarmupConfig(num_steps=8, batch_size=16),
        finetune=FinetuneConfig(
            num_steps=60, expected_batch_size=48, noise_multiplicity=2, ledger_block=7, checkpoint_every=10
        ),
        run=RunConfig(storage=str(folder), name="run"),
    )
    config.scaling.physical_batch_size = 16
    return config


def drive(folder: Path) -> None:
    """The whole private part of a run: what `jobs/train.py` does, without Ray."""
    with open_run(settings(folder)) as run:
        if not run.done("prepare"):
            shutil.rmtree(run.prepared, ignore_errors=True)
            source = open_source(run.config.data)
            stats = [prepare_shard(shard, run.config.data, run.prepared, i) for i, shard in enumerate(source.shards)]
            finish_prepared(run.prepared, source, run.config.data, stats)
            run.bind()
            run.mark_done("prepare")
        plan = plan_of(run)
        run.open_budget(plan.budget)
        release_central(run, plan)
        # Forked: what takes long is to import torch, and that is not what is tested.
        arguments = (run, plan.release("finetune"), tempfile.mktemp(dir=folder))
        mp.start_processes(worker, arguments, NUM_WORKERS, start_method="fork")


def plan_of(run: Run) -> PrivacyPlan:
    path, facts = run.root / "plan.json", open_prepared(run.prepared).manifest
    if not path.exists():
        made = make_plan(run.config, facts.num_listed_train, facts.class_names)
        write_bytes(path, json.dumps(made.to_json()).encode())
    return read_plan(json.loads(path.read_text()))


def release_central(run: Run, plan: PrivacyPlan) -> None:
    if run.done("central"):
        return
    prepared, event = open_prepared(run.prepared), plan.release("central").event
    facts, records = prepared.manifest, load_split(prepared, "train")
    query = CentralQuery(run.config.central, event, facts.image_size, facts.channels, 10, plan.num_records)
    domain = run.domain("finetune", event.to_json(), facts.digest, "chaos")
    run.ledger.spend("central", event, domain, 0, event.count)
    sums = query.partial_sums(records.images, records.labels, records.ids, derive_key(run.secret(), "masks", domain))
    released = query.release(sums, derive_key(run.secret(), "central/noise", domain))
    note(run, "central", released.tobytes(), range(event.count), domain)
    images = query.decode(released)
    run.central.mkdir(exist_ok=True)
    labels = np.tile(np.arange(10), len(images))
    write_hf_parquet(run.central / "images.parquet", images.reshape(-1, *images.shape[2:]), labels, facts.class_names)
    run.mark_done("central")


def worker(rank: int, run: Run, release: Release, meeting: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", timedelta(seconds=60), NUM_WORKERS, rank)
    if rank == 0:
        watch_releases(run)
    train(run, release, Workers.current(), lambda name, value, step: None, lambda stage, step: None)
    dist.destroy_process_group()


def watch_releases(run: Run) -> None:
    """Notes every noisy sum that the group makes before it is used."""
    write = SecureDPOptimizer._write_gradients

    def noted(optimizer: SecureDPOptimizer, *args: Any) -> None:
        step = int(optimizer._totals[optimizer._num_coordinates + 1]) // NUM_WORKERS - 1
        note(run, f"finetune {step}", optimizer._totals.numpy().tobytes(), [step], None)
        write(optimizer, *args)

    SecureDPOptimizer._write_gradients = noted


def note(run: Run, name: str, content: bytes, steps: Any, domain: str | None) -> None:
    domains = run.ledger.state().domains(name.split()[0])
    paid = any(set(steps) <= found for key, found in domains.items() if domain in (None, key))
    line = json.dumps({"name": name, "sha256": hashlib.sha256(content).hexdigest(), "paid": paid}) + "\n"
    with open(run.root / RELEASED, "ab", buffering=0) as file:
        file.write(line.encode())
