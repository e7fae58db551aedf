"""The size of a work unit, found by measurement, so that nobody has to know what fits their memory.

A unit's results depend on its size to the last bit, so the size is part of the domain of a private release
(docs/guarantee.md, section 7). It is therefore measured once, before anything is charged, by rank 0, written to the
run's folder, and read from there for every worker and after every restart. Measured are made-up images: the size tells
nothing about the records.

Out of memory while measuring: the sizes below are what is chosen from. Out of memory later, in a paid step: the run
stops. Going on with another size would be another domain, whose steps the budget doesn't pay for.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from e2h.config import FinetuneConfig
from e2h.curriculum.batches import make_batch
from e2h.curriculum.finetune import private_engine
from e2h.curriculum.workers import Workers
from e2h.data.filesystem import write_bytes
from e2h.diffusion.losses import micro_batch_loss
from e2h.diffusion.networks import UNet
from e2h.errors import InputError
from e2h.privacy.dpsgd import Engine

LARGEST = 1024
GAIN = 0.03  # a size that is not this much faster an image than half of it ends the search
MEMORY_SHARE = 0.5  # of what is free now; the other half is for everything that comes later
CONTROL_GROUPS = (  # versions 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)

Measured = list[dict[str, Any]]


def unit_size(path: Path, workers: Workers, measure: Callable[[], Measured], expected_batch_size: int) -> int:
    """The size that was measured for this run, the same on every worker; rank 0 measures where none was.

    Args:
      path: JSON file of the run that keeps it.
      measure: called on rank 0, at most once in the life of a run.

    Raises:
      RuntimeError: on the other workers, if rank 0 failed; there, what it raised.
    """
    size = torch.zeros(1, dtype=torch.int64, device=workers.device)
    failure: Exception | None = None
    if workers.rank == 0:
        try:
            if not path.exists():
                found = measure()
                chosen = fastest(found, expected_batch_size, workers.size)
                content = {"physical_batch_size": chosen, "measured": found}
                write_bytes(path, json.dumps(content, indent=2).encode())
            size[0] = json.loads(path.read_text())["physical_batch_size"]
        except Exception as error:
            failure = error
    workers.sum_integers(size)
    if failure is not None:
        raise failure
    if int(size) < 1:
        raise RuntimeError("the size of a work unit was not measured; rank 0 says why")
    return int(size)


def fastest(measured: Measured, expected_batch_size: int, num_workers: int) -> int:
    """The size with the shortest logical step: units of the busiest worker, padding included, times a unit's time."""

    def step_seconds(row: dict[str, Any]) -> float:
        num_units = math.ceil(expected_batch_size / row["size"])
        return math.ceil(num_units / num_workers) * row["seconds"]

    return min(measured, key=step_seconds)["size"]


def measure_units(
    network: UNet, settings: FinetuneConfig, image_size: int, channels: int, workers: Workers
) -> Measured:
    """Times private micro-batches of 1, 2, 4, ... made-up images, as far as memory and speed go.

    Args:
      network: on the workers' device; left as it is.

    Returns:
      A row a size: size, seconds, peak_mib.

    Raises:
      InputError: if not even one image fits.
    """
    # Not compiled: that would be a compilation for each size, and needs no more memory.
    engine = private_engine(network, micro_batch_loss, replace(settings, compile=False))
    limit = MEMORY_SHARE * free_bytes(workers.device) / (1 if workers.device.type == "cuda" else workers.size)
    largest = min(LARGEST, math.ceil(settings.expected_batch_size / workers.size))
    start, rows, size = peak_bytes(workers.device), [], 1
    while size <= largest:
        try:
            seconds = _seconds(engine, network, settings, (size, image_size, image_size, channels), workers.device)
        except torch.OutOfMemoryError:
            break
        used = peak_bytes(workers.device) - start
        rows.append({"size": size, "seconds": round(seconds, 6), "peak_mib": round(used / 2**20, 1)})
        slower = len(rows) > 1 and seconds > (1 - GAIN) * 2 * rows[-2]["seconds"]
        if slower or 2 * used > limit:
            break
        size *= 2
    if not rows:
        raise InputError(
            f"model.base_width={network.base_width}: expected one image with finetune.noise_multiplicity="
            f"{settings.noise_multiplicity} to fit the memory; lower one of the two, or use a larger machine"
        )
    return rows


def _seconds(
    engine: Engine, network: UNet, settings: FinetuneConfig, shape: tuple[int, ...], device: torch.device
) -> float:
    """The shorter of two runs after one that warms up."""
    images, labels = np.zeros(shape, dtype=np.uint8), np.zeros(shape[0], dtype=np.int64)
    batch = make_batch(images, labels, list(range(shape[0])), settings.noise_multiplicity, 0.0, network.num_classes)
    batch = {name: value.to(device) for name, value in batch.items()}
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        engine.accumulate(batch, torch.ones(shape[0], device=device)).vector[0].item()  # waits for the device
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has used so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_bytes(device: torch.device) -> int:
    """What the device, or this machine within its control group, has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    amounts = []
    memory = Path("/proc/meminfo")
    if memory.exists():
        lines = memory.read_text().splitlines()
        amounts += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    for limit, used in CONTROL_GROUPS:
        with suppress(OSError, ValueError):  # not this version, or without a limit ("max")
            amounts.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, min(amounts)) if amounts else 2**31
