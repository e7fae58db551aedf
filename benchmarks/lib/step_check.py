"""The cost model against `finetune` itself, on 1 and 2 processes with gloo between them and a ledger in a file.

Every step is paid for by itself. Draws differ, so a step counts with the shortest time among those in which the busiest
worker had as many units, weighed by how often that was. On a machine where others run, too, compare processor seconds:
of rank 0, which has most units, waiting left out.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scaling import NUM_DRAWS, SIZES, network_of

from e2h.config import FinetuneConfig
from e2h.curriculum.checkpoint import Checkpoints
from e2h.curriculum.finetune import finetune
from e2h.curriculum.learner import PrivateRun
from e2h.curriculum.workers import Workers
from e2h.data.storage import ImageSet
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.keys import derive_key
from e2h.privacy.ledger import Budget, Ledger
from e2h.privacy.logs import FileLog
from e2h.privacy.sampling import poisson_mask

from .constants import KEY, forward_flops
from .cost_model import Hardware, Host, Work, dealt, step_terms

RECORDS, BATCH, UNIT = 20_000, 24, 4
DOMAIN = "ab" * 32
Step = tuple[int, float, float]  # units of the busiest worker, seconds elapsed, processor seconds of rank 0


def check_release(steps: int) -> Release:
    return Release("finetune", PoissonSampledGaussian(BATCH / RECORDS, 1.0, steps))


def check_private(steps: int, folder: Path, owner: str) -> PrivateRun:
    ledger = Ledger(FileLog(folder / "ledger.jsonl"), owner, folder / "head")
    return PrivateRun(check_release(steps), ledger, KEY, DOMAIN)


def check_worker(rank: int, size: int, preset: str, steps: int, place: str) -> None:
    """One of the processes; rank 0 leaves the seconds of each step."""
    folder = Path(place)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(minutes=5), size, rank)
    images = np.load(folder / "images.npy", mmap_mode="r")
    records = ImageSet(np.arange(RECORDS), np.zeros(RECORDS, np.int64), images)
    settings = FinetuneConfig(num_steps=steps, expected_batch_size=BATCH, noise_multiplicity=NUM_DRAWS, ledger_block=1)
    settings.checkpoint_every = steps
    ends: list[tuple[float, float]] = []
    finetune(
        network_of(preset), records, settings, check_private(steps, folder, "check"), 0, UNIT, Workers.current(),
        Checkpoints(folder / "checkpoints", "check"), lambda *_: None,
        lambda step: ends.append((time.perf_counter(), time.process_time())),
    )  # fmt: skip
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps(np.diff(ends, axis=0).tolist()))
    dist.barrier()
    dist.destroy_process_group()


def check_steps(size: int, preset: str, steps: int, images: Path) -> list[Step]:
    """Each step but the first and the last, which saves."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "images.npy").symlink_to(images)
        private = check_private(steps, folder, "check")
        private.ledger.open(Budget(1.0, 1e-5, "ADD_OR_REMOVE_ONE", (check_release(steps),)), lambda *_: 1.0)
        private.ledger.take_over()
        mp.start_processes(check_worker, (size, preset, steps, place), size, start_method="spawn")
        seconds = json.loads((folder / "seconds.json").read_text())[:-1]
    key, prob = derive_key(KEY, "finetune/sampling", DOMAIN), private.release.event.sampling_prob
    drawn = [int(poisson_mask(key, step, np.arange(RECORDS), prob).sum()) for step in range(1, steps - 1)]
    units = dealt(np.array(drawn), UNIT, size).astype(int).tolist()
    return [(count, *taken) for count, taken in zip(units, seconds, strict=True)]


def check(preset: str, host: Host, machine: Hardware, rounds: int, num_steps: int) -> list[dict[str, Any]]:
    """Predicted and measured seconds of a step, for 1 and 2 workers, in turn."""
    found: dict[int, list[Step]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as place:
        images = Path(place) / "images.npy"
        np.save(images, np.full((RECORDS, SIZES[preset], SIZES[preset], 1), 128, np.uint8))
        for _ in range(rounds):
            for size, steps in found.items():
                steps += check_steps(size, preset, num_steps, images)
    network = network_of(preset)
    work = Work(
        "check", RECORDS, BATCH, NUM_DRAWS, num_steps, SIZES[preset] ** 2,
        sum(p.numel() for p in network.parameters()), forward_flops(network, SIZES[preset], 1), ledger_block=1,
        checkpoint_every=10**9,
    )  # fmt: skip
    # Without Ray nobody asks whether a machine leaves; checkpoints are at the end.
    alone = replace(host, barrier=0.0, barrier_worker=0.0, save=0.0)
    return [compared(work, alone, machine, size, steps) for size, steps in found.items()]


def compared(work: Work, host: Host, machine: Hardware, size: int, steps: list[Step]) -> dict[str, Any]:
    often = Counter(units for units, *_ in steps)
    spare = replace(machine, spare_core=size < (os.cpu_count() or 1))

    def measured(clock: int) -> float:
        return mean({units: min(step[clock] for step in steps if step[0] == units) for units in often})

    def mean(seconds: dict[int, float]) -> float:
        return sum(often[units] * seconds[units] for units in often) / len(steps)

    def predicted(hardware: Hardware, left_out: tuple[str, ...] = ()) -> float:
        terms = {units: step_terms(work, host, hardware, size, UNIT, units) for units in often}
        return mean({units: sum(v for k, v in one.items() if k not in left_out) for units, one in terms.items()})

    return {
        "workers": size,
        "steps": len(steps),
        "predicted_step_s": predicted(spare),
        "measured_step_s": measured(1),
        "predicted_over_measured": predicted(spare) / measured(1),
        "predicted_processor_s": predicted(machine, ("collective",)),
        "measured_processor_s": measured(2),
        "predicted_over_measured_processor": predicted(machine, ("collective",)) / measured(2),
    }
