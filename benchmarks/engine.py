"""What a private gradient costs beside an ordinary one, in time and memory.

    python benchmarks/engine.py            # a table; some twenty minutes on one core
    python benchmarks/engine.py --quick    # 28 px only, under two minutes
    python benchmarks/engine.py --device cuda --dtype bfloat16 --compile

One step is forward, backward and, where private, clipping and summing: B images, K noise draws each, on one thread. All
approaches take the same images in turn in one process, round after round; a ratio is the median over the rounds of
"this approach over plain in the same round". The noise and the optimiser's update come once a logical batch of many
such steps, cost the same everywhere, and are left out. CPU times are the process' processor time, so a busy machine
disturbs them little. Peak memory is that of a step in a process of its own, beyond what the imports need.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from approaches import APPROACHES, BATCHES, Step, make_step, num_images


def seconds(step: Step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    step()
    return time.process_time() - start


def times(image_size: int, num_draws: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every approach in every round; each round starts with another approach."""
    steps = {name: make_step(name, image_size, num_draws, options) for name in options.approaches}
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    stop = time.monotonic() + options.seconds
    for turn in range(options.rounds):
        if turn >= 2 and time.monotonic() > stop:
            break
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken[name].append(seconds(steps[name], options.device))
    return taken


def _peak_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak_memory(approach: str, image_size: int, num_draws: int, options: argparse.Namespace) -> float:
    """MiB that a step needs at its peak, with all that it keeps for the next; call it in a fresh process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.device == "cuda":
        make_step(approach, image_size, num_draws, options)()
        return torch.cuda.max_memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is forgotten
    before = _peak_kilobytes()
    make_step(approach, image_size, num_draws, options)()
    return (_peak_kilobytes() - before) / 1024


def memories(image_size: int, num_draws: int, options: argparse.Namespace) -> dict[str, float]:
    context = multiprocessing.get_context("forkserver")
    found = {}
    for approach in options.approaches:
        with context.Pool(1) as pool:
            found[approach] = pool.apply(peak_memory, (approach, image_size, num_draws, options))
    return found


def floor_seconds(image_size: int, num_draws: int, options: argparse.Namespace) -> float:
    """The arithmetic of a plain step at the speed of one big matrix product of the same type."""
    from torch.utils.flop_counter import FlopCounterMode

    side = 8192 if options.device == "cuda" else 1024
    a = torch.randn(side, side, device=options.device, dtype=getattr(torch, options.dtype))
    torch.mm(a, a)
    best = min(seconds(lambda: torch.mm(a, a), options.device) for _ in range(10))
    eager = argparse.Namespace(**{**vars(options), "compile": False})
    with FlopCounterMode(display=False) as counter:
        make_step("plain", image_size, num_draws, eager)()
    return counter.get_total_flops() / (2 * side**3 / best)


def measure(image_size: int, num_draws: int, options: argparse.Namespace) -> list[dict[str, object]]:
    memory, taken = memories(image_size, num_draws, options), times(image_size, num_draws, options)
    rows = []
    for name in options.approaches:
        ratios = [ours / theirs for ours, theirs in zip(taken[name], taken["plain"], strict=True)]
        rows.append(
            {
                "image_size": image_size,
                "batch": num_images(num_draws, options),
                "noise_multiplicity": num_draws,
                "approach": name,
                "ratio_to_plain": round(statistics.median(ratios), 3),
                "memory_ratio_to_plain": round(memory[name] / memory["plain"], 3),
                "seconds": round(statistics.median(taken[name]), 4),
                "memory_mib": round(memory[name], 1),
            }
        )
    return rows


def print_table(rows: list[dict[str, object]], floor: float) -> None:
    first = rows[0]
    print(
        f"\n{first['image_size']} px, {first['batch']} images x {first['noise_multiplicity']} draws: "
        f"plain {first['seconds']:.3g} s, of which arithmetic {floor:.3g} s; {first['memory_mib']:.0f} MiB"
    )
    print(f"{'':14}{'time':>8}{'memory':>8}   (1 = plain)")
    for row in rows:
        print(f"{row['approach']:14}{row['ratio_to_plain']:8.2f}{row['memory_ratio_to_plain']:8.2f}", flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of a private gradient beside an ordinary one.")
    parser.add_argument("--quick", action="store_true", help="28 px, half the rows, fewer rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=None, choices=(28, 32, 64))
    parser.add_argument("--noise-multiplicities", type=int, nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--approaches", nargs="+", default=list(APPROACHES), choices=APPROACHES)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the network, where it is possible")
    options = parser.parse_args(arguments)
    options.approaches = ["plain", *(name for name in APPROACHES[1:] if name in options.approaches)]
    options.image_sizes = options.image_sizes or ([28] if options.quick else [28, 32, 64])
    options.rounds = options.rounds or (5 if options.quick else 9)
    options.seconds = 10.0 if options.quick else 180.0  # for one setting, beyond two rounds
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Freed tensors go back to the system at once, so that a process' peak is what its tensors need.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    rows = []
    for image_size in options.image_sizes:
        for num_draws in options.noise_multiplicities:
            found = measure(image_size, num_draws, options)
            print_table(found, floor_seconds(image_size, num_draws, options))
            rows += found
    if options.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
