"""How private training scales: with workers, and with micro-batch, network and image size.

    python benchmarks/scaling.py            # tables; some minutes
    python benchmarks/scaling.py --quick    # small, under two minutes

Workers are real processes with one thread each, joined by gloo as in a run: every one computes its units of a logical
step, one of them adds the noise, one collective ends the step. The batch of a step is the same for any number of
workers, so speed-ups are strong scaling. Each group takes the same steps; a step counts with its shortest time, since
other programs on the machine can only make it longer. `speedup` is of elapsed time. `processor_speedup` is of the
processor time of the busiest worker: what is left of `speedup` on a machine with fewer free cores than workers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from e2h.config import ModelConfig
from e2h.curriculum.batches import make_batch, work_units
from e2h.curriculum.workers import Workers
from e2h.diffusion.losses import micro_batch_loss
from e2h.diffusion.networks import UNet
from e2h.privacy.dpsgd import Engine, make_engine
from e2h.privacy.optimizer import SecureDPOptimizer

PRESETS = Path(__file__).resolve().parents[1] / "e2h" / "conf" / "model"
NUM_DRAWS = 4
SIZES = {"px8": 8, "px28_small": 28, "px28": 28, "px32": 32, "px64": 64}
HEAD = ("table", "model", "image_size", "batch", "num_workers", "images_per_second", "speedup", "processor_speedup")
Seconds = tuple[float, float]  # elapsed, processor


def network_of(preset: str) -> UNet:
    model = ModelConfig(**yaml.safe_load((PRESETS / f"{preset}.yaml").read_text()))
    return UNet.from_config(model, SIZES[preset], 3 if SIZES[preset] in (32, 64) else 1, 10, seed=0)


def batch_of(preset: str, num_images: int) -> dict[str, Tensor]:
    channels = 3 if SIZES[preset] in (32, 64) else 1
    images = np.full((num_images, SIZES[preset], SIZES[preset], channels), 128, dtype=np.uint8)
    return make_batch(images, np.zeros(num_images, dtype=np.int64), list(range(num_images)), NUM_DRAWS, 0.1, 10)


def engine_of(network: UNet) -> Engine:
    return make_engine("folded", network, micro_batch_loss, 1.0, NUM_DRAWS)


def shortest(step: Callable[[], object], repetitions: int) -> Seconds:
    """After one step that warms up."""
    step()
    elapsed, processor = [], []
    for _ in range(repetitions):
        start, start_processor = time.perf_counter(), time.process_time()
        step()
        elapsed.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)
    return min(elapsed), min(processor)


def logical_step(preset: str, num_images: int, unit: int, workers: Workers) -> Callable[[], None]:
    """A step as in a run: units dealt out, noise once, one collective, one update."""
    network = network_of(preset).train()
    optimizer = SecureDPOptimizer(
        torch.optim.Adam(network.parameters()),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=num_images,
        noise_key=lambda step: step.to_bytes(32, "big"),
        sum_integers=workers.sum_integers,
        rank=workers.rank,
        num_workers=workers.size,
    )
    engine, weights, numbers = engine_of(network), torch.ones(unit), iter(range(1_000_000))

    def step() -> None:
        for _ in work_units(num_images, unit, workers.rank, workers.size):
            optimizer.accumulate(engine.accumulate(batch_of(preset, unit), weights))
        optimizer.step_private(next(numbers), num_images)

    return step


def worker(rank: int, size: int, store: str, preset: str, num_images: int, unit: int, repetitions: int) -> None:
    """One of the processes; it leaves the seconds of a step beside the store."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    seconds = shortest(logical_step(preset, num_images, unit, Workers.current()), repetitions)
    Path(f"{store}.{rank}").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def group_seconds(size: int, *arguments: Any) -> Seconds:
    """Of the slowest worker, and of the busiest."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        group = [context.Process(target=worker, args=(rank, size, store, *arguments)) for rank in range(size)]
        for process in group:
            process.start()
        for process in group:
            process.join()
        if any(process.exitcode != 0 for process in group):
            raise RuntimeError(f"a worker of {size} failed; its message is above")
        found = [json.loads(Path(f"{store}.{rank}").read_text()) for rank in range(size)]
    return max(elapsed for elapsed, _ in found), max(processor for _, processor in found)


def row(table: str, preset: str, batch: int, num_workers: int, seconds: Seconds, base: Seconds) -> dict[str, Any]:
    """`base`: seconds an image of the case that has speed-up 1."""
    speeds = [batch / one for one in seconds]
    gains = [round(speed * one, 3) for speed, one in zip(speeds, base, strict=True)]
    shown = (table, preset, SIZES[preset], batch, num_workers, round(speeds[0], 2), *gains)
    return dict(zip(HEAD, shown, strict=True))


def rows_of(table: str, cases: list[tuple[str, int, int]], seconds: list[Seconds]) -> list[dict[str, Any]]:
    """Cases are (preset, images, workers); the first is the base."""
    base = (seconds[0][0] / cases[0][1], seconds[0][1] / cases[0][1])
    return [row(table, *case, one, base) for case, one in zip(cases, seconds, strict=True)]


def scale_workers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same logical step by 1, 2, ... workers; groups take turns, each counts with its fastest."""
    preset, num_images, unit = options.model, 32, 4
    taken: dict[int, list[Seconds]] = {size: [] for size in options.workers}
    for _ in range(options.rounds):
        for size in options.workers:
            taken[size].append(group_seconds(size, preset, num_images, unit, options.repetitions))
    best = [(min(elapsed for elapsed, _ in one), min(processor for _, processor in one)) for one in taken.values()]
    return rows_of("workers", [(preset, num_images, size) for size in taken], best)


def one_worker(table: str, cases: list[tuple[str, int]], repetitions: int) -> list[dict[str, Any]]:
    """Single micro-batches (preset, images)."""
    seconds = []
    for preset, num_images in cases:
        engine, batch, weights = engine_of(network_of(preset)), batch_of(preset, num_images), torch.ones(num_images)
        seconds.append(shortest(lambda e=engine, b=batch, w=weights: e.accumulate(b, w), repetitions))
    return rows_of(table, [(*case, 1) for case in cases], seconds)


def print_rows(rows: list[dict[str, Any]]) -> None:
    print("  ".join(f"{name:>17}" for name in HEAD))
    for one in rows:
        print("  ".join(f"{one[name]!s:>17}" for name in HEAD), flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="How private training scales.")
    parser.add_argument("--quick", action="store_true", help="the small 28 px network, fewer repetitions")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args(arguments)
    options.model = "px28_small" if options.quick else "px28"
    options.rounds, options.repetitions = (2, 3) if options.quick else (3, 4)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sizes = [1, 4, 16] if options.quick else [1, 2, 4, 8, 16, 32]
    models = ["px28_small", "px28"] if options.quick else ["px8", "px28_small", "px28"]
    images = ["px28"] if options.quick else ["px28", "px32", "px64"]
    rows = []
    for table in (
        lambda: scale_workers(options),
        lambda: one_worker("batch", [(options.model, size) for size in sizes], options.repetitions),
        lambda: one_worker("model", [(model, 4) for model in models], options.repetitions),
        lambda: one_worker("image_size", [(model, 4) for model in images], options.repetitions),
    ):
        found = table()
        print_rows(found)
        rows += found
    if options.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
