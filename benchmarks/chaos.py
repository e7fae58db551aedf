"""Kills a two-worker private run at random instants, resumes it, and checks what the guarantee needs.

    python benchmarks/chaos.py              # 50 kills of real processes with gloo between them, some five minutes
    python benchmarks/chaos.py --quick      # 5 kills
    python benchmarks/chaos.py --ray        # the kills hit jobs/train.py with Ray, its workers or its driver

Each run goes through central images, warm-up and DP-SGD. A kill is SIGKILL to one worker or to the driver with all its
workers; then the same command goes on. A run that ends begins anew under the same secret, until all kills are spent.
Checked: every release was paid when it was made; a step made again has the same bits; no step is charged twice; epsilon
is at most the target; the weights are those of a run that nobody disturbed. Exit code 1 if one of these fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
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
from e2h.privacy.accounting import epsilon
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
    domain = run.domain(event.to_json(), facts.digest, "chaos")
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
        step = int(optimizer._totals[-2]) // NUM_WORKERS - 1
        note(run, f"finetune {step}", optimizer._totals.numpy().tobytes(), [step], None)
        write(optimizer, *args)

    SecureDPOptimizer._write_gradients = noted


def note(run: Run, name: str, content: bytes, steps: Any, domain: str | None) -> None:
    domains = run.ledger.state().domains(name.split()[0])
    paid = any(set(steps) <= found for key, found in domains.items() if domain in (None, key))
    line = json.dumps({"name": name, "sha256": hashlib.sha256(content).hexdigest(), "paid": paid}) + "\n"
    with open(run.root / RELEASED, "ab", buffering=0) as file:
        file.write(line.encode())


@dataclass
class Outcome:
    """What all runs together show."""

    kills: int = 0
    runs: int = 0
    releases: int = 0
    releases_made_again: int = 0
    problems: list[str] = field(default_factory=list)


def command(folder: Path, with_ray: bool) -> list[str]:
    if not with_ray:
        return [sys.executable, __file__, "--drive", str(folder)]
    job = Path(__file__).resolve().parents[1] / "jobs" / "train.py"
    chosen = settings(folder)
    values = {
        "run.storage": folder,
        "run.name": "run",
        "privacy.secret": chosen.privacy.secret,
        "privacy.epsilon": chosen.privacy.epsilon,
        "scaling.num_workers": NUM_WORKERS,
        **{f"warmup.{key}": getattr(chosen.warmup, key) for key in ("num_steps", "batch_size")},
        **{
            f"finetune.{key}": getattr(chosen.finetune, key)
            for key in ("num_steps", "expected_batch_size", "noise_multiplicity", "ledger_block", "checkpoint_every")
        },
    }
    return [sys.executable, str(job), *(f"{key}={value}" for key, value in values.items())]


def start(folder: Path, with_ray: bool, secret: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "E2H_CHAOS_SECRET": secret, "OMP_NUM_THREADS": "1"}
    line = command(folder, with_ray)
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(line, env=environment, stdout=log, stderr=log, start_new_session=True)


def workers_of(driver: int) -> list[int]:
    """Training processes below the driver."""
    table = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()[1:]]
    below = {driver}
    while more := {int(row[0]) for row in rows if int(row[1]) in below} - below:
        below |= more
    marks = ("--drive", "TrainWorker")
    return [int(pid) for pid, _, args in rows if int(pid) in below - {driver} and any(mark in args for mark in marks)]


def kill(process: subprocess.Popen[bytes], chance: random.Random) -> None:
    """One worker, where there is one, or the driver and everything below it."""
    found = workers_of(process.pid)
    if found and chance.random() < 0.5:
        os.kill(chance.choice(found), signal.SIGKILL)
        return
    for pid in [process.pid, *found]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def disturbed_run(
    folder: Path, with_ray: bool, secret: str, chance: random.Random, kills: int, longest_wait_s: float
) -> int:
    """One run to its end, with up to so many kills; returns their number."""
    done = 0
    while True:
        process = start(folder, with_ray, secret)
        while done < kills:
            try:
                process.wait(chance.uniform(0, longest_wait_s))
                break
            except subprocess.TimeoutExpired:
                kill(process, chance)
                done += 1
                # Ray replaces a worker by itself; without it, and without its driver, the command is given again.
                if not with_ray or process.poll() is not None:
                    break
        if process.wait(600) == 0:
            return done


def inspect(folder: Path, reference: Path, outcome: Outcome) -> None:
    """Adds what is wrong with a finished run."""
    root, whole = folder / "run", reference / "run"
    run = Run(root, settings(folder))
    budget, charged = run.ledger.budget(), run.ledger.charged()
    if budget is None or epsilon(charged, budget.delta).epsilon > budget.epsilon:
        outcome.problems.append(f"{folder.name}: epsilon above the target: {charged}")
    elif set(charged) != set(budget.planned):
        outcome.problems.append(f"{folder.name}: charged {charged}, planned {budget.planned}")
    if (root / "checkpoints/model.safetensors").read_bytes() != (whole / "checkpoints/model.safetensors").read_bytes():
        outcome.problems.append(f"{folder.name}: weights differ from those of the undisturbed run")
    expected = dict(releases(whole))
    for name, found in releases(root):
        outcome.releases += 1
        if found != expected.get(name):
            outcome.problems.append(f"{folder.name}: {name} was released with other bits, or unpaid")
    outcome.releases_made_again += len(list(releases(root))) - len(dict(releases(root)))


def releases(root: Path) -> list[tuple[str, tuple[str, bool]]]:
    """(name, (hash, whether it was paid)) of each release in order; a line that a kill tore is left out."""
    found = []
    for line in (root / RELEASED).read_text().splitlines() if (root / RELEASED).exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found.append((row["name"], (row["sha256"], row["paid"])))
    return found


def chaos(folder: Path, kills: int, with_ray: bool, seed: int) -> Outcome:
    secret, chance, outcome = os.urandom(32).hex(), random.Random(seed), Outcome()
    reference, begun = folder / "undisturbed", time.monotonic()
    if start(reference, with_ray, secret).wait(600) != 0:
        raise RuntimeError(f"the undisturbed run failed:\n{(reference / 'log.txt').read_text()[-2000:]}")
    if not all(paid for _, (_, paid) in releases(reference / "run")):
        outcome.problems.append("undisturbed: a release was not paid when it was made")
    whole_s = time.monotonic() - begun
    while outcome.kills < kills:
        place, begun = folder / f"disturbed-{outcome.runs}", time.monotonic()
        found = disturbed_run(place, with_ray, secret, chance, kills - outcome.kills, whole_s)
        if found == 0:  # it ended before its kill
            whole_s = min(whole_s, time.monotonic() - begun)
        outcome.kills, outcome.runs = outcome.kills + found, outcome.runs + 1
        inspect(place, reference, outcome)
        print(f"{outcome.kills} kills, {outcome.runs} runs, {len(outcome.problems)} problems")
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="5 kills")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        drive(options.drive)
        return
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = chaos(Path(folder), 5 if options.quick else options.kills, options.ray, options.seed)
    for problem in outcome.problems:
        print(problem)
    verdict = "nothing unpaid, nothing released twice" if not outcome.problems else "FAILED"
    print(f"{outcome.kills} kills in {time.monotonic() - begun:.0f} s: {verdict}")
    if options.json:
        print(json.dumps({**vars(outcome), "seconds": round(time.monotonic() - begun)}))
    sys.exit(1 if outcome.problems else 0)


if __name__ == "__main__":
    main()
