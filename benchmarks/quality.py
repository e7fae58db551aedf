"""What the synthetic images are worth: runs an experiment with several seeds and writes one row for each.

    python benchmarks/quality.py mnist_cpu --set data.path=FOLDER privacy.epsilon=1 --seeds 3
    python benchmarks/quality.py mnist_cpu --set data.path=FOLDER privacy.epsilon=1 'curriculum=[]' --seeds 3    # DPDM
    python benchmarks/quality.py --table        # the rows of docs/quality.jsonl as Markdown
    python benchmarks/quality.py --quick        # the digits, one seed, a short schedule; keeps no row

EXPERIMENT is a name in e2h/conf/experiment, or `demo` for the defaults. A call that was stopped goes on where it was:
runs lie in --storage, and a seed whose row is there is not run again. `--alone` runs in this process, without Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lib.experiments import configured

from e2h.config import Config, run_name
from e2h.data.filesystem import write_bytes

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "docs" / "quality.jsonl"
QUICK = ["finetune.num_steps=6", "warmup.num_steps=40", "sampling.num_images=200", "evaluation.cnn_epochs=2"]
CLASSIFIERS = ("logistic_regression", "mlp", "cnn")
# Where a run lies and on what it runs: two rows that differ in nothing else are of one experiment.
ELSEWHERE = ("data.path", "scaling", "run", "seed", "privacy.secret")


class Stopped(Exception):  # noqa: N818 - no error
    """A run has come to the stage before which it was to stop."""


def measure(
    experiment: str, overrides: Sequence[str], seed: int, storage: Path, alone: bool, before: str | None = None
) -> dict[str, Any]:
    """Runs one seed, or what is left of it, and returns its row.

    Raises:
      Stopped: when the run comes to the stage `before`.
    """
    config = configured(experiment, [*overrides, f"seed={seed}", f"run.storage={storage}"])
    with stopwatch(storage / f"{run_name(config)}.minutes", hardware(config, alone)) as minutes:
        if alone:
            from e2h.api import run

            run(config, _stop(before) if before else None)
        else:
            words = [*([] if experiment == "demo" else [f"experiment={experiment}"]), *overrides]
            program = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), *words]
            subprocess.run([*program, f"seed={seed}", f"run.storage={storage}"], check=True)
        found = row(experiment, overrides, config, storage)
        spent = {where: round(one, 1) for where, one in minutes().items()}
        return {**found, "minutes": round(sum(spent.values()), 1), "hardware": " + ".join(spent), "minutes_on": spent}


def _stop(before: str) -> Callable[[str, int, int], None]:
    def tell(stage: str, done: int, total: int) -> None:
        if stage == before:
            raise Stopped

    return tell


@contextmanager
def stopwatch(path: Path, hardware: str, every_s: float = 10.0) -> Iterator[Callable[[], dict[str, float]]]:
    """Minutes by hardware, of this call and of those before it, which may have been killed: `path` keeps them."""
    before: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    begun, ended = time.monotonic(), threading.Event()

    def minutes() -> dict[str, float]:
        return {**before, hardware: before.get(hardware, 0.0) + (time.monotonic() - begun) / 60}

    def keep() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not ended.wait(every_s):
            write_bytes(path, json.dumps(minutes()).encode())
        write_bytes(path, json.dumps(minutes()).encode())

    writer = threading.Thread(target=keep, daemon=True)
    writer.start()
    try:
        yield minutes
    finally:
        ended.set()
        writer.join()


def row(experiment: str, overrides: Sequence[str], config: Config, storage: Path) -> dict[str, Any]:
    """What a finished run says of itself; the data are public, and so may its accuracies be."""
    root = storage / run_name(config)
    found, plan = (json.loads((root / name).read_text()) for name in ("evaluation.json", "plan.json"))
    return {
        "experiment": experiment,
        "overrides": [one for one in overrides if not one.startswith(ELSEWHERE)],
        "seed": config.seed,
        "data": config.data.name,
        "curriculum": config.curriculum,
        "epsilon": config.privacy.epsilon,
        "epsilon_spent": plan["epsilon"],
        "delta": plan["delta"],
        "accuracy": {name: one["accuracy"] for name, one in found["downstream"].items()},
        "worst_class": {name: min(one["per_class"].values()) for name, one in found["downstream"].items()},
        "frechet": found["frechet"]["distance"],
        "fid": (found["inception"] or {}).get("fid"),
        "num_synthetic": found["num_synthetic"],
        "num_real_test": found["num_real_test"],
        "torch": torch.__version__,
    }


def hardware(config: Config, alone: bool) -> str:
    workers, there = 1 if alone else config.scaling.num_workers, torch.cuda.is_available()
    if there if alone else config.scaling.use_gpu:
        return f"{workers} x {torch.cuda.get_device_name() if there else 'GPU'}"
    cores = min(workers, os.cpu_count() or 1)
    return f"{cores} CPU core{'s' * (cores > 1)}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(one: Mapping[str, Any]) -> tuple[Any, ...]:
    """Rows of one experiment differ in their seeds alone; where each ran is in the last column."""
    return one["experiment"], tuple(one["overrides"])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each experiment, mean and sample deviation over its seeds."""
    lines = ["| experiment | easy stages | epsilon | LR | MLP | CNN | Frechet | seeds | minutes a run, hardware |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|---|")
    for name in dict.fromkeys(map(key, rows)):
        same = [one for one in rows if key(one) == name]
        first = same[0]
        figures = [_spread([one["accuracy"][kind] for one in same]) for kind in CLASSIFIERS]
        figures.append(_spread([one["frechet"] for one in same], 0))
        settings = " ".join(["`" + first["experiment"], *first["overrides"]]) + "`"
        stages, epsilon = ", ".join(first["curriculum"]) or "none", f"{first['epsilon']:g}"
        cells = [settings, stages, epsilon, *figures, str(len(same)), _minutes(same)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _minutes(rows: Sequence[Mapping[str, Any]]) -> str:
    """The mean on each kind of hardware."""
    kinds = dict.fromkeys(one["hardware"] for one in rows)
    means = {kind: statistics.mean(one["minutes"] for one in rows if one["hardware"] == kind) for kind in kinds}
    return "; ".join(f"{mean:.0f}, {kind}" for kind, mean in means.items())


def _spread(values: Sequence[float], digits: int = 3) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default="demo", help="in e2h/conf/experiment, or demo")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings, as for jobs/pipeline.py")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    parser.add_argument("--storage", type=Path, default=Path("runs") / "quality", help="where the runs lie")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where the rows go")
    parser.add_argument("--alone", action="store_true", help="in this process, without Ray")
    parser.add_argument("--before", choices=("train", "evaluate"), help="with --alone: stop before this stage")
    parser.add_argument("--table", action="store_true", help="print the rows as a table, and run nothing")
    parser.add_argument("--quick", action="store_true", help="a short schedule on the digits; keeps no row")
    given = parser.parse_args()
    if given.before and not given.alone:
        parser.error("--before needs --alone")
    if given.table:
        print(table(read_rows(given.rows)))
    elif given.quick:
        with tempfile.TemporaryDirectory() as folder:
            print(table([measure("demo", QUICK, 0, Path(folder), given.alone)]))
    else:
        run_seeds(given)


def run_seeds(given: argparse.Namespace) -> None:
    """Runs the seeds that have no row yet, and prints the table of all of them."""
    wanted = [one for one in given.set if not one.startswith(ELSEWHERE)]
    for seed in range(given.seeds):
        known = [one for one in read_rows(given.rows) if one["overrides"] == wanted and one["seed"] == seed]
        if any(one["experiment"] == given.experiment for one in known):
            continue
        try:
            found = measure(given.experiment, given.set, seed, given.storage, given.alone, given.before)
        except Stopped:
            print(f"{given.experiment}, seed {seed}: stopped before {given.before}; without --before it goes on")
            continue
        with open(given.rows, "a") as file:
            file.write(json.dumps(found) + "\n")
    print(table([one for one in read_rows(given.rows) if one["experiment"] == given.experiment]))


if __name__ == "__main__":
    main()
