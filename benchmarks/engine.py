"""What a private gradient costs beside an ordinary one, in time and memory.

    python benchmarks/engine.py            # a table; some twenty minutes on one core
    python benchmarks/engine.py --quick    # 28 px only, under two minutes
    python benchmarks/engine.py --device cuda --dtype bfloat16 --compile

One step is forward, backward and, where private, clipping and summing: B images, K noise draws each, on one thread.
Each approach has a process of its own, as its users have, where it and the plain step take the same images in turn; a
ratio is the median over the rounds of "this approach over plain in the same round". (With all approaches in one
process, one leaves the allocator in a state that makes another faster than it is for its users.) The noise and the
optimiser's update come once a logical batch of many such steps, cost the same everywhere, and are left out. CPU times
are the process' processor time, so a busy machine disturbs them little. Peak memory is that of the first step of a
fresh process, beyond what the imports need.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from approaches import APPROACHES, BATCHES, Step, make_step, num_images

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


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


def times(approach: str, image_size: int, num_draws: int, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds (of the approach, of plain) in every round; call it in a fresh process."""
    _prepare_process()
    if options.quick and approach == "plain":
        step = make_step(approach, image_size, num_draws, options)
        step()
        return [(taken := seconds(step, options.device), taken)]
    return in_turn(*(make_step(name, image_size, num_draws, options) for name in (approach, "plain")), options)


def on_gpu(
    approach: str, image_size: int, num_draws: int, options: argparse.Namespace
) -> tuple[float, list[tuple[float, float]]]:
    """Memory and times from one process, as the first step may be a minute of compiling."""
    _prepare_process()
    step = make_step(approach, image_size, num_draws, options)
    step()
    memory = torch.cuda.max_memory_allocated() / 2**20
    return memory, in_turn(step, make_step("plain", image_size, num_draws, options), options)


def in_turn(step: Step, plain: Step, options: argparse.Namespace) -> list[tuple[float, float]]:
    first = seconds(step, options.device)
    if not (options.quick and first > 1):  # a long step is warm after a part of itself
        plain()
    taken: list[tuple[float, float]] = []
    stop = time.monotonic() + options.seconds
    for turn in range(options.rounds):
        if turn >= (1 if options.quick else 2) and time.monotonic() > stop:
            break
        if turn % 2:
            last = seconds(plain, options.device)
            taken.append((seconds(step, options.device), last))
        else:
            taken.append((seconds(step, options.device), seconds(plain, options.device)))
    return taken


def _prepare_process() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def _peak_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak_memory(approach: str, image_size: int, num_draws: int, options: argparse.Namespace) -> float:
    """MiB that a step needs at its peak, with all that it keeps for the next; call it in a fresh process."""
    _prepare_process()
    with suppress(AttributeError, OSError):
        # Freed tensors go back to the system at once, so that a peak is what tensors need.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is forgotten
    before = _peak_kilobytes()
    make_step(approach, image_size, num_draws, options)()
    return (_peak_kilobytes() - before) / 1024


def in_fresh_process(function: Callable[..., Any], *arguments: object) -> Any:
    context = multiprocessing.get_context("forkserver")
    # By names that are installed: the server has not got this folder in its path, and would skip it without a word.
    context.set_forkserver_preload(["opacus", "e2h.privacy.dpsgd", "e2h.diffusion.networks"])
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


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
    rows, plain_memory = [], 0.0
    for name in options.approaches:
        setting = (name, image_size, num_draws, options)
        if options.device == "cuda":
            memory, taken = in_fresh_process(on_gpu, *setting)
        else:
            memory, taken = in_fresh_process(peak_memory, *setting), in_fresh_process(times, *setting)
        plain_memory = plain_memory or memory  # plain comes first
        rows.append(
            {
                "image_size": image_size,
                "batch": num_images(num_draws, options),
                "noise_multiplicity": num_draws,
                "approach": name,
                "ratio_to_plain": round(statistics.median(own / plain for own, plain in taken), 3),
                "memory_ratio_to_plain": round(memory / plain_memory, 3),
                "seconds": round(statistics.median(own for own, _ in taken), 4),
                "memory_mib": round(memory, 1),
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
    parser.add_argument("--quick", action="store_true", help="28 px, a quarter of the images, fewer rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=None, choices=(28, 32, 64))
    parser.add_argument(
        "--noise-multiplicities", type=int, nargs="+", default=list(BATCHES["cpu"]), choices=list(BATCHES["cpu"])
    )
    parser.add_argument("--approaches", nargs="+", default=list(APPROACHES), choices=APPROACHES)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the network, where it is possible")
    options = parser.parse_args(arguments)
    options.approaches = ["plain", *(name for name in APPROACHES[1:] if name in options.approaches)]
    options.image_sizes = options.image_sizes or ([28] if options.quick else [28, 32, 64])
    options.rounds = options.rounds or (5 if options.quick else 9)
    options.seconds = 0.5 if options.quick else 40.0  # for one approach and setting, beyond the first rounds
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
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
