"""Kills a two-worker private run at random instants, resumes it, and checks what the guarantee needs.

    python benchmarks/chaos.py              # 50 kills of real processes with gloo between them, some five minutes
    python benchmarks/chaos.py --quick      # 5 kills
    python benchmarks/chaos.py --ray        # the kills hit jobs/train.py with Ray, its workers or its driver

Each run goes through central images, warm-up and DP-SGD. A kill is SIGKILL to one worker or to the driver with all its
workers; then the same command goes on. A run that ends begins anew under the same secret, until all kills are spent.
Checked: every release was paid when it was made; a step made again has the same bits; no step is charged twice; epsilon
is at most the target; the weights are those of a run that nobody disturbed. Exit code 1 if one of these fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.private_run import NUM_WORKERS, RELEASED, drive, settings

from e2h.binding import differences
from e2h.config import Config
from e2h.curriculum.run import Run
from e2h.privacy.accounting import epsilon

POLL_S = 0.1


@dataclass
class Outcome:
    """What all runs together show; the seconds are from a kill in mid-training to the next finished step."""

    kills: int = 0
    runs: int = 0
    releases: int = 0
    releases_made_again: int = 0
    unpaid_releases: int = 0
    steps_paid_twice: int = 0
    bit_identical: bool = True
    max_recovery_seconds: float | None = None  # none: no kill hit a run between two steps
    epsilon: float = 0.0
    target_epsilon: float = 0.0
    problems: list[str] = field(default_factory=list)


def command(folder: Path, with_ray: bool) -> list[str]:
    if not with_ray:
        return [sys.executable, __file__, "--drive", str(folder)]
    job = Path(__file__).resolve().parents[1] / "jobs" / "train.py"
    chosen = {name: new for name, _, new in differences(asdict(Config()), asdict(settings(folder)))}
    chosen |= {"scaling.num_workers": NUM_WORKERS}
    return [sys.executable, str(job), *(f"{key}={json.dumps(value)}" for key, value in chosen.items())]


def start(folder: Path, with_ray: bool, secret: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "E2H_CHAOS_SECRET": secret, "OMP_NUM_THREADS": "1"}
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            command(folder, with_ray), env=environment, stdout=log, stderr=log, start_new_session=True
        )


def below(driver: int) -> dict[int, str]:
    """Processes that the driver started, directly or not: id -> command line."""
    table = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()[1:]]
    found = {driver}
    while more := {int(row[0]) for row in rows if int(row[1]) in found} - found:
        found |= more
    return {int(pid): args for pid, _, args in rows if int(pid) in found - {driver}}


def kill(process: subprocess.Popen[bytes], chance: random.Random) -> None:
    """One training process, where there is one, or the driver and everything below it."""
    everything = below(process.pid)
    workers = [pid for pid, args in everything.items() if "--drive" in args or "TrainWorker" in args]
    victims = [chance.choice(workers)] if workers and chance.random() < 0.5 else [process.pid, *everything]
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Watch:
    """Looks at a run while it goes on: when did it finish a step, and was that paid?"""

    def __init__(self, folder: Path, outcome: Outcome) -> None:
        self.folder, self.outcome = folder, outcome
        self.killed: float | None = None
        self.seen = 0

    def wait(self, process: subprocess.Popen[bytes], seconds: float) -> bool:
        """Whether the process ended within so many seconds."""
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self.look()
        return process.poll() is not None

    def look(self) -> None:
        step, when = last_step(self.folder / "run")
        if step > self.seen:
            self.seen = step
            # Without Ray each release looks for itself; this holds for every run.
            if not all(charges(self.folder / "run")["finetune", one] for one in range(step)):
                self.outcome.unpaid_releases += 1
                self.outcome.problems.append(f"{self.folder.name}: step {step} was finished before it was paid")
        if self.killed is not None and step and when > self.killed + 2 * POLL_S:
            longest = max(self.outcome.max_recovery_seconds or 0.0, when - self.killed)
            self.outcome.max_recovery_seconds = round(longest, 1)
            self.killed = None

    def after_kill(self) -> None:
        """From now on a step is awaited, if there was one before."""
        self.killed = time.time() if last_step(self.folder / "run")[0] else None


def last_step(root: Path) -> tuple[int, float]:
    """The last DP-SGD step that is seen to be finished, from 1 (0: none), and when."""
    for name in (RELEASED, "progress.json"):
        with suppress(OSError, ValueError, IndexError):
            last = json.loads((root / name).read_text().splitlines()[-1])
            step = int(last["name"].split()[1]) + 1 if name == RELEASED else last["step"]
            return step * (last.get("stage") != "warmup"), (root / name).stat().st_mtime
    return 0, 0.0


def disturbed_run(
    folder: Path,
    with_ray: bool,
    secret: str,
    chance: random.Random,
    kills: int,
    longest_wait_s: float,
    outcome: Outcome,
) -> int:
    """One run to its end, with up to so many kills; returns their number."""
    done, watch = 0, Watch(folder, outcome)
    while True:
        process = start(folder, with_ray, secret)
        while done < kills and not watch.wait(process, chance.uniform(0, longest_wait_s)):
            kill(process, chance)
            watch.after_kill()
            done += 1
            # Ray replaces a worker by itself; without it, and without its driver, the command is given again.
            if not with_ray or watch.wait(process, 1.0):
                break
        watch.wait(process, 600)
        if process.wait(1) == 0:
            return done


def inspect(folder: Path, reference: Path, outcome: Outcome) -> None:
    """Adds what is wrong with a finished run."""
    root, whole = folder / "run", reference / "run"
    run = Run(root, settings(folder))
    budget, charged = run.ledger.budget(), run.ledger.charged()
    outcome.steps_paid_twice += sum(count - 1 for count in charges(root).values())
    if budget is not None:
        outcome.epsilon = max(outcome.epsilon, epsilon(charged, budget.delta).epsilon)
        outcome.target_epsilon = budget.epsilon
    if budget is None or outcome.epsilon > budget.epsilon:
        outcome.problems.append(f"{folder.name}: epsilon above the target: {charged}")
    elif set(charged) != set(budget.planned):
        outcome.problems.append(f"{folder.name}: charged {charged}, planned {budget.planned}")
    if (root / "checkpoints/model.safetensors").read_bytes() != (whole / "checkpoints/model.safetensors").read_bytes():
        outcome.bit_identical = False
        outcome.problems.append(f"{folder.name}: weights differ from those of the undisturbed run")
    compare_releases(folder.name, releases(root), dict(releases(whole)), outcome)


def compare_releases(name: str, found: list[Any], expected: dict[str, Any], outcome: Outcome) -> None:
    outcome.releases += len(found)
    outcome.releases_made_again += len(found) - len(dict(found))
    for release, (digest, paid) in found:
        if not paid:
            outcome.unpaid_releases += 1
            outcome.problems.append(f"{name}: {release} was not paid when it was made")
        if digest != expected.get(release, ("", False))[0]:
            outcome.bit_identical = False
            outcome.problems.append(f"{name}: {release} was released with other bits")


def charges(root: Path) -> Counter[tuple[str, int]]:
    """In how many domains the ledger's own records charge each (release, step): in one, a step is paid once."""
    paid: set[tuple[str, int, str]] = set()
    for line in (root / "ledger.jsonl").read_text().splitlines():
        with suppress(ValueError):  # a line that is being written
            row = json.loads(line)
            if row["kind"] == "SPEND":
                paid |= {(row["release"], step, row["domain"]) for step in range(*row["steps"])}
    return Counter((release, step) for release, step, _ in paid)


def releases(root: Path) -> list[tuple[str, tuple[str, bool]]]:
    """(name, (hash, whether it was paid)) of each release in order; a line that a kill tore is left out."""
    found = []
    for line in (root / RELEASED).read_text().splitlines() if (root / RELEASED).exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found.append((row["name"], (row["sha256"], row["paid"])))
    return found


def chaos(folder: Path, kills: int, with_ray: bool, seed: int) -> Outcome:
    secret, chance, outcome = os.urandom(32).hex(), random.Random(seed), Outcome()
    reference, begun = folder / "undisturbed", time.monotonic()
    if start(reference, with_ray, secret).wait(600) != 0:
        raise RuntimeError(f"the undisturbed run failed:\n{(reference / 'log.txt').read_text()[-2000:]}")
    inspect(reference, reference, outcome)
    whole_s = time.monotonic() - begun
    while outcome.kills < kills:
        place, begun = folder / f"disturbed-{outcome.runs}", time.monotonic()
        found = disturbed_run(place, with_ray, secret, chance, kills - outcome.kills, whole_s, outcome)
        if found == 0:  # it ended before its kill
            whole_s = min(whole_s, time.monotonic() - begun)
        outcome.kills, outcome.runs = outcome.kills + found, outcome.runs + 1
        inspect(place, reference, outcome)
        print(f"{outcome.kills} kills, {outcome.runs} runs, {len(outcome.problems)} problems", flush=True)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="5 kills")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        drive(options.drive)
        return
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = chaos(Path(folder), 5 if options.quick else options.kills, options.ray, options.seed)
    if outcome.steps_paid_twice:
        outcome.problems.append(f"{outcome.steps_paid_twice} steps were charged twice")
    for problem in outcome.problems:
        print(problem)
    verdict = "nothing unpaid, nothing released twice" if not outcome.problems else "FAILED"
    print(f"{outcome.kills} kills in {time.monotonic() - begun:.0f} s: {verdict}")
    if options.json:
        print(json.dumps({**asdict(outcome), "seconds": round(time.monotonic() - begun)}))
    sys.exit(1 if outcome.problems else 0)


if __name__ == "__main__":
    main()
