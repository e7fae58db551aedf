"""What e2h costs and gives on a GPU, in one command of at most 25 minutes.

    python benchmarks/gpu.py --mnist FOLDER --out OUT                      # on a machine with a GPU; needs no Ray
    python benchmarks/gpu.py --mnist FOLDER --out OUT --minutes 10         # less time for each part
    python benchmarks/gpu.py --quick                                       # anywhere: the runs made small, on the CPU

It runs MNIST (and what else is given) at epsilon 1 and 10 and the tests that need a GPU, all at once, then times a
private gradient and sampling with the GPU to themselves. OUT/done.json notes what is done: the same command goes on
where it was stopped, in the middle of a training too. Minutes on a GPU are dear, and the first and the last stages of a
run need none. With OUT carried from one machine to the other, and FOLDER at the same path on both:

    python benchmarks/gpu.py --mnist FOLDER --out OUT --before train       # without a GPU: the easy stages
    python benchmarks/gpu.py --mnist FOLDER --out OUT --before evaluate    # with one: training and images
    python benchmarks/gpu.py --mnist FOLDER --out OUT                      # without: what the images are worth
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a machine with a GPU may not have e2h installed

from e2h.data.filesystem import write_bytes  # noqa: E402

EPSILONS = (1, 10)
SMALL = ["finetune.num_steps=4", "finetune.expected_batch_size=64", "finetune.noise_multiplicity=1"]
SMALL += ["finetune.compile=false", "sampling.compile=false", "finetune.dtype=float32", "sampling.dtype=float32"]
SMALL += ["warmup.num_steps=10", "sampling.num_images=100", "sampling.num_steps=3", "evaluation.cnn_epochs=1"]
TESTS = ["tests/privacy/test_gpu.py", "tests/curriculum/test_slots.py", "tests/evaluation/test_inception.py"]
EXPERIMENTS = {("mnist", 1): "mnist_eps1_gpu", ("mnist", 10): "mnist_eps10_gpu"}  # others: `gpu`


@dataclass(frozen=True)
class Part:
    """A process and the minutes that it may take of 25; a run beside others, everything else alone."""

    name: str
    command: list[str]
    minutes: float
    beside: bool = False


def parts(given: argparse.Namespace) -> list[Part]:
    """In the order of their worth: what is cut off at the end is missed least."""
    sets = {"mnist": given.mnist, "fashion_mnist": given.fashion_mnist, "cifar10": given.cifar10}
    runs = [_quality(data, path, epsilon, given) for data, path in sets.items() if path for epsilon in EPSILONS]
    if given.quick:
        return runs or [_quality("digits", None, 10, given)]
    if not torch.cuda.is_available():
        return runs
    # Without the project's conftest and other tests, which need packages that a machine with a GPU may lack.
    tests = ["-m", "pytest", "--tb=short", "--noconftest", "--override-ini=addopts=", "-q", "-m", "gpu", *TESTS]
    on_gpu = ["--device", "cuda", "--dtype", "bfloat16", "--compile", "--json"]
    compared = ["--image-sizes", "28", "--noise-multiplicities", "1", "4", "--approaches", "folded", "--rounds", "5"]
    return [
        *runs,
        Part("tests", tests, 6.0, beside=True),
        Part("engine", ["benchmarks/engine.py", *on_gpu, *compared], 6.0),
        Part("sampling", ["benchmarks/sampling.py", "--device", "cuda", "--compile", "--json"], 3.0),
    ]


def _quality(data: str, path: Path | None, epsilon: float, given: argparse.Namespace) -> Part:
    experiment = "gpu" if given.quick else EXPERIMENTS.get((data, epsilon), "gpu")
    settings = [
        *([f"data.path={path.resolve()}"] if path else []),
        f"privacy.epsilon={epsilon}",
        "scaling.num_workers=1",
    ]
    settings += [f"data={data}"] if experiment == "gpu" else []
    settings += SMALL if given.quick else ["scaling.use_gpu=true"]
    files = ["--storage", str(given.out / "runs"), "--rows", str(given.out / "quality.jsonl")]
    stop = ["--before", given.before] if given.before else []
    program = ["benchmarks/quality.py", experiment, "--alone", *stop, *files, "--set", *settings]
    return Part(f"{data}-epsilon{epsilon}", program, 15.0, beside=True)


def run_part(part: Part, out: Path, limit_s: float) -> str:
    """`done`, `stopped`, `failed` or `cut off`; what it prints goes to a file of its name."""
    with open(out / f"{part.name}.log", "ab") as log:
        try:
            called = subprocess.run(
                [sys.executable, *part.command],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                timeout=limit_s,
                check=False,
                env=environment(),
            )
        except subprocess.TimeoutExpired:
            return "cut off"
    if called.returncode:
        return "failed"
    return "stopped" if "--before" in part.command else "done"


def environment() -> dict[str, str]:
    """In which e2h and what its tests share can be imported without being installed."""
    folders = [str(ROOT), str(ROOT / "tests" / "privacy"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def run_all(given: argparse.Namespace) -> dict[str, str]:
    """Runs what is not done yet, within the time."""
    note = given.out / "done.json"
    states: dict[str, str] = json.loads(note.read_text()) if note.exists() else {}
    begun, seconds, one_writer = time.monotonic(), 60 * given.minutes, threading.Lock()

    def take(part: Part) -> None:
        start = time.monotonic()
        left = seconds - (start - begun)
        if states.get(part.name) == "done":
            return
        if left < 10:
            states[part.name] = "no time"
            return
        state = run_part(part, given.out, min(left, part.minutes / 25 * seconds))
        print(f"{part.name:<22} {state}, {time.monotonic() - start:.0f} s", flush=True)
        with one_writer:
            states[part.name] = state
            write_bytes(note, json.dumps(states).encode())

    wanted = parts(given)
    with ThreadPoolExecutor(max(1, sum(part.beside for part in wanted))) as pool:
        list(pool.map(take, [part for part in wanted if part.beside]))
    for part in wanted:
        if not part.beside:
            take(part)
    return {part.name: states[part.name] for part in wanted}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="folder with the four IDX files")
    parser.add_argument("--fashion-mnist", type=Path, help="likewise")
    parser.add_argument("--cifar10", type=Path, help="folder with its batches")
    parser.add_argument("--out", type=Path, help="where logs, rows and runs go")
    parser.add_argument("--before", choices=("train", "evaluate"), help="stop the runs before this stage")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--quick", action="store_true", help="on the CPU, on a few images")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given.out = (given.out or Path(folder)).resolve()
        given.out.mkdir(parents=True, exist_ok=True)
        states = run_all(given)
        rows = given.out / "quality.jsonl"
        if rows.exists():
            command = [sys.executable, "benchmarks/quality.py", "--table", "--rows", str(rows)]
            subprocess.run(command, cwd=ROOT, check=True, env=environment())
    return 0 if all(state in ("done", "stopped") for state in states.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
