"""The size of a work unit, chosen by measured memory, so that nobody has to know what fits his machine.

A unit's results depend on its size to the last bit, so the size is part of the domain of a private release
(docs/guarantee.md, section 7). It is therefore chosen once, before anything is charged, by rank 0, written to the run's
folder, and read from there for every worker and after every restart, however many workers there are by then. Two runs
with equally many workers choose the same size wherever memory is not short: time, which varies, does not count.
Measured are made-up images: the size tells nothing about the records.

Out of memory while measuring: a smaller size is taken. Out of memory later, in a paid step: the run stops. Going on
with another size would be another domain, whose steps the budget doesn't pay for.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from e2h.config import FinetuneConfig
from e2h.curriculum.batches import make_batch
from e2h.curriculum.finetune import private_engine
from e2h.curriculum.workers import Workers, is_out_of_memory
from e2h.data.filesystem import write_bytes
from e2h.data.remote import Place
from e2h.diffusion.losses import micro_batch_loss
from e2h.diffusion.networks import UNet
from e2h.errors import InputError

LARGEST = {"cpu": 64, "cuda": 1024}  # images; beyond, neither gets faster by much
UNITS_PER_WORKER = 4  # of a step: whole units are dealt out, so with fewer some workers wait for others
SIZES = tuple(2**i for i in range(11))  # up to the largest of these
MEMORY_SHARE = 0.5  # of what is free now; the other half is for everything that comes later
CONTROL_GROUPS = (  # versions 2 and 1: folder, limit, what is used, and what of it is files that give way when asked
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def unit_size(path: Place, workers: Workers, choose: Callable[[], int]) -> int:
    """The size of this run's units, the same on every worker; rank 0 chooses where none was chosen.

    Args:
      path: JSON file of the run that keeps it.
      choose: called on rank 0, at most once in the life of a run.

    Raises:
      InputError: on rank 0, if the file does not hold such a size.
      RuntimeError: on the other workers, if rank 0 failed; there, what it raised.
    """
    size = torch.zeros(1, dtype=torch.int64, device=workers.device)
    failure: Exception | None = None
    if workers.rank == 0:
        try:
            if not path.exists():
                write_bytes(path, json.dumps({"physical_batch_size": choose()}).encode())
            size[0] = _kept(path)
        except Exception as error:
            failure = error
    workers.sum_integers(size)
    if failure is not None:
        raise failure
    if int(size) < 1:
        raise RuntimeError("the size of a work unit was not chosen; rank 0 says why")
    return int(size)


def _kept(path: Place) -> int:
    """The size in the file. Another valid size than the one chosen is another domain, which the ledger refuses."""
    try:
        size = json.loads(path.read_text())["physical_batch_size"]
    except (OSError, ValueError, KeyError, TypeError):
        size = None
    if type(size) is not int or size not in SIZES:
        raise InputError(
            f'{path}: expected {{"physical_batch_size": n}} with n a power of two from 1 to {SIZES[-1]}, as e2h wrote '
            "it; remove the file, and the size is chosen anew"
        )
    return size


def largest_that_fits(network: UNet, settings: FinetuneConfig, image_size: int, channels: int, workers: Workers) -> int:
    """The largest power of two of images whose private micro-batch fits the memory of one worker.

    Not so large that workers would wait for each other: each has about `UNITS_PER_WORKER` units of an expected batch.
    Doubles the size while twice the memory that was used last is within `MEMORY_SHARE` of what was free.

    Args:
      network: on the workers' device; left as it is.
      workers: as many as will share a batch.

    Raises:
      InputError: if not even one image fits.
    """
    limit = MEMORY_SHARE * free_bytes(workers.device) / (1 if workers.device.type == "cuda" else workers.size)
    share = settings.expected_batch_size // (UNITS_PER_WORKER * workers.size)
    largest, size, fits = min(LARGEST[workers.device.type], max(1, share)), 1, 0
    before = in_use(workers.device)  # once: the heap keeps what a smaller size has freed, and uses it again
    while size <= largest:
        try:
            work = partial(private_micro_batch, network, settings, size, image_size, channels)
            used = height_of(work, workers.device) - before
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        fits = size
        if 2 * used > limit:
            break
        size *= 2
    if fits == 0:
        raise InputError(
            f"finetune.noise_multiplicity={settings.noise_multiplicity}: expected one image with so many noise draws "
            "to fit the memory; lower it, choose a smaller model=, or use a larger machine"
        )
    return fits


def private_micro_batch(network: UNet, settings: FinetuneConfig, size: int, image_size: int, channels: int) -> None:
    """One private micro-batch of black images."""
    # Not compiled: that would be a compilation for each size, and needs no more memory.
    engine = private_engine(network, micro_batch_loss, replace(settings, compile=False))
    device = next(network.parameters()).device
    images, labels = np.zeros((size, image_size, image_size, channels), np.uint8), np.zeros(size, np.int64)
    batch = make_batch(images, labels, list(range(size)), settings.noise_multiplicity, 0.0, network.num_classes)
    engine.accumulate({name: value.to(device) for name, value in batch.items()}, torch.ones(size))


def in_use(device: torch.device) -> int:
    """Bytes that this process uses of the device's memory, or of the machine's."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident("VmRSS")


def height_of(work: Callable[[], object], device: torch.device) -> int:
    """Bytes in use at the height of `work`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the height is counted anew
    work()
    return _resident("VmHWM")


def _resident(name: str) -> int:
    """Bytes that this process has in memory (VmRSS) or had at most (VmHWM); without Linux always the latter."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))


def free_bytes(device: torch.device) -> int:
    """What the device, or this machine within its control group, has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    amounts = []
    memory = Path("/proc/meminfo")
    if memory.exists():
        lines = memory.read_text().splitlines()
        amounts += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    for folder, limit, used, files in CONTROL_GROUPS:
        with suppress(OSError, ValueError, KeyError):  # not this version, or without a limit ("max")
            most, now = (int((Path(folder) / name).read_text()) for name in (limit, used))
            kinds = dict(line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines())
            amounts.append(most - now + int(kinds[files]))
    return max(0, min(amounts)) if amounts else 2**31
