"""What e2h costs and gives on a GPU, in one command of at most 25 minutes.

    python benchmarks/gpu.py --mnist FOLDER --out OUT                 # on a machine with a GPU; needs no Ray
    python benchmarks/gpu.py --mnist FOLDER --out OUT --minutes 10    # less time for each part
    python benchmarks/gpu.py --quick                                  # anywhere: the runs made small, on the CPU

It runs the tests that need a GPU, the cost of a private gradient, the speed of sampling, and MNIST (and what else is
given) at epsilon 1 and 10, each as a process of its own with its share of the time. OUT/done.json notes what is done:
the same command goes on where it was stopped, in the middle of a training too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EPSILONS = (1, 10)
SMALL = ["finetune.num_steps=4", "finetune.expected_batch_size=64", "finetune.noise_multiplicity=1"]
SMALL += ["finetune.compile=false", "sampling.compile=false", "finetune.dtype=float32", "sampling.dtype=float32"]
SMALL += ["warmup.num_steps=10", "sampling.num_images=100", "sampling.num_steps=3", "evaluation.cnn_epochs=1"]


@dataclass(frozen=True)
class Part:
    """A process and the minutes that it may take of 25."""

    name: str
    command: list[str]
    minutes: float


def parts(given: argparse.Namespace) -> list[Part]:
    """In the order of their worth: what is cut off at the end is missed least."""
    sets = {"mnist": given.mnist, "fashion_mnist": given.fashion_mnist, "cifar10": given.cifar10}
    runs = [_quality(data, path, epsilon, given) for data, path in sets.items() if path for epsilon in EPSILONS]
    if given.quick:
        return runs or [_quality("digits", None, 10, given)]
    found = [Part("tests", ["-m", "pytest", "-q", "-m", "gpu", "tests"], 2.0), *runs]
    on_gpu = ["--device", "cuda", "--dtype", "bfloat16", "--compile", "--json"]
    found.append(Part("engine", ["benchmarks/engine.py", *on_gpu, "--image-sizes", "28", "--rounds", "5"], 4.0))
    found.append(Part("sampling", ["benchmarks/sampling.py", "--device", "cuda", "--compile", "--json"], 2.0))
    return found


def _quality(data: str, path: Path | None, epsilon: float, given: argparse.Namespace) -> Part:
    where = [f"data.path={path.resolve()}"] if path else []
    settings = [f"data={data}", *where, f"privacy.epsilon={epsilon}", "scaling.num_workers=1"]
    settings += SMALL if given.quick else ["scaling.use_gpu=true"]
    files = ["--storage", str(given.out / "runs"), "--rows", str(given.out / "quality.jsonl")]
    program = ["benchmarks/quality.py", "gpu", "--alone", *files, "--set", *settings]
    return Part(f"{data}-epsilon{epsilon}", program, 8.5)


def run_part(part: Part, out: Path, limit_s: float) -> str:
    """`done`, `failed` or `cut off`; what it prints goes to a file of its name."""
    with open(out / f"{part.name}.log", "ab") as log:
        try:
            called = subprocess.run(
                [sys.executable, *part.command], cwd=ROOT, stdout=log, stderr=log, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            return "cut off"
    return "done" if called.returncode == 0 else "failed"


def run_all(given: argparse.Namespace) -> dict[str, str]:
    """Runs what is not done yet, within the time."""
    note = given.out / "done.json"
    states: dict[str, str] = json.loads(note.read_text()) if note.exists() else {}
    begun, seconds = time.monotonic(), 60 * given.minutes
    for part in parts(given):
        left = seconds - (time.monotonic() - begun)
        if states.get(part.name) == "done" or left < 10:
            continue
        start = time.monotonic()
        states[part.name] = run_part(part, given.out, min(left, part.minutes / 25 * seconds))
        print(f"{part.name:<22} {states[part.name]}, {time.monotonic() - start:.0f} s", flush=True)
        note.write_text(json.dumps(states))
    return states


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="folder with the four IDX files")
    parser.add_argument("--fashion-mnist", type=Path, help="likewise")
    parser.add_argument("--cifar10", type=Path, help="folder with its batches")
    parser.add_argument("--out", type=Path, help="where logs, rows and runs go")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--quick", action="store_true", help="on the CPU, on a few images")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given.out = given.out or Path(folder)
        given.out.mkdir(parents=True, exist_ok=True)
        states = run_all(given)
        rows = given.out / "quality.jsonl"
        if rows.exists():
            command = [sys.executable, "benchmarks/quality.py", "--table", "--rows", str(rows)]
            subprocess.run(command, cwd=ROOT, check=True)
    return 0 if all(state == "done" for state in states.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
