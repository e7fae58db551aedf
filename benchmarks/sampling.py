"""Synthetic images a second beside the bare passes of the network that they need.

    python benchmarks/sampling.py            # by image size, dtype and batch; some ten minutes on one core
    python benchmarks/sampling.py --quick    # 8 and 28 px, under two minutes
    python benchmarks/sampling.py --device cuda --compile --image-sizes 32 64 --batches 64 256 512

The floor of a batch is the same number of passes of the same network in the same dtype (and compiled, where the sampler
is) over a batch that lies ready. Sampler and floor take turns in one process, on one thread; `ratio` is the median over
the rounds of "sampler over floor in the same round", and of each setting the fastest batch tells what the device can
do; a run's own choice of batch is among them. CPU times are the process' processor time, so a busy machine
disturbs them little. A batch that does not fit the memory is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import yaml
from approaches import PRESETS

from e2h.config import Config, ModelConfig, SamplingConfig
from e2h.curriculum.synthesis import batch_size
from e2h.diffusion.networks import UNet
from e2h.diffusion.samplers import sample

CLASSES = 10
PASSES = {"heun": lambda steps: 2 * steps - 1, "ddim": lambda steps: steps}


def seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def config_of(image_size: int, dtype: str, options: argparse.Namespace) -> Config:
    sampling = SamplingConfig(
        num_images=60000, num_steps=options.steps, sampler=options.sampler, guidance=options.guidance, dtype=dtype
    )
    config = Config(sampling=sampling)
    config.model = ModelConfig(**yaml.safe_load((PRESETS / f"px{image_size}.yaml").read_text()))
    config.data.image_size, config.data.channels = image_size, 1 if image_size <= 28 else 3
    return config


def network_of(config: Config, device: str) -> UNet:
    """With weights that are nowhere zero, as after some training."""
    network = UNet.from_config(config.model, config.data.image_size, config.data.channels, CLASSES, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network.to(device).eval()


def sampler_and_floor(network: UNet, config: Config, batch: int, device: str) -> tuple[Callable[[], object], ...]:
    """A batch of images, and the bare passes of the network that it takes."""
    sampling, shape = config.sampling, (config.data.channels, config.data.image_size, config.data.image_size)
    labels = torch.arange(batch, device=device) % CLASSES
    rows = labels.repeat(2 if sampling.guidance > 0 else 1)
    x, levels = torch.randn(len(rows), *shape, device=device), torch.zeros(len(rows), device=device)

    @torch.no_grad()
    def floor() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=sampling.dtype == "bfloat16"):
            for _ in range(PASSES[sampling.sampler](sampling.num_steps)):
                network(x, levels, rows)

    return lambda: sample(network, labels, range(batch), sampling, shape), floor


def measure(image_size: int, dtype: str, compiled: bool, options: argparse.Namespace) -> list[dict[str, Any]]:
    config = config_of(image_size, dtype, options)
    network = network_of(config, options.device)
    run: Any = torch.compile(network, fullgraph=True, dynamic=False) if compiled else network
    chosen, pairs = batch_size(config, torch.device(options.device)), {}
    for batch in sorted({*options.batches, chosen}):
        try:
            pairs[batch] = sampler_and_floor(run, config, batch, options.device)
            for work in pairs[batch]:
                work()  # warm, and compiled
        except torch.OutOfMemoryError:
            del pairs[batch]
            break
    taken: dict[int, list[tuple[float, float]]] = {batch: [] for batch in pairs}
    for turn in range(options.rounds):
        for batch, pair in pairs.items():
            first, second = (seconds(work, options.device) for work in (pair if turn % 2 else pair[::-1]))
            taken[batch].append((first, second) if turn % 2 else (second, first))
    setting = {"image_size": image_size, "dtype": dtype, "compile": compiled, "device": options.device}
    return [{**setting, "batch": batch, **_row(batch, rounds, chosen)} for batch, rounds in taken.items()]


def _row(batch: int, rounds: list[tuple[float, float]], chosen: int) -> dict[str, Any]:
    return {
        "images_per_second": round(batch / statistics.median(own for own, _ in rounds), 3),
        "floor_images_per_second": round(batch / statistics.median(floor for _, floor in rounds), 3),
        "ratio": round(statistics.median(own / floor for own, floor in rounds), 3),
        "chosen_batch": chosen,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    how = ", compiled" if first["compile"] else ""
    print(f"\n{first['image_size']} px, {first['dtype']}{how}; a run takes batches of {first['chosen_batch']}")
    print(f"{'batch':>8}{'images/s':>12}{'passes alone':>14}{'ratio':>8}")
    for row in rows:
        speed, floor = row["images_per_second"], row["floor_images_per_second"]
        print(f"{row['batch']:>8}{speed:12.2f}{floor:14.2f}{row['ratio']:8.3f}", flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of sampling beside the network's bare passes.")
    parser.add_argument("--quick", action="store_true", help="8 and 28 px, fewer batches, steps and rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=None, choices=(8, 28, 32, 64, 128))
    parser.add_argument("--batches", type=int, nargs="+", default=None)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="compiled too; on a CPU that takes minutes a batch size")
    parser.add_argument("--sampler", default="heun", choices=sorted(PASSES))
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)
    options.image_sizes = options.image_sizes or ([8, 28] if options.quick else [8, 28, 32, 64])
    options.batches = options.batches or ([64] if options.quick else [16, 32, 64, 128, 256, 512])
    options.steps = options.steps or 2
    options.rounds = options.rounds or (2 if options.quick else 3)
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    rows = []
    settings = itertools.product(options.image_sizes, options.dtypes, (False, True) if options.compile else (False,))
    for image_size, dtype, compiled in settings:
        found = measure(image_size, dtype, compiled, options)
        print_table(found)
        rows += found
    if options.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
