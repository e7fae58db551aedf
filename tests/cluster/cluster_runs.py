"""Runs of the pipeline on a cluster: started, watched step by step, and compared with a run that nobody disturbed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from clusters import Cluster, wait_until
from e2h.curriculum.run import witness_path
from e2h.data.remote import Place, place
from e2h.privacy.ledger import Ledger
from e2h.privacy.logs import open_log

ROOT = Path(__file__).resolve().parents[2]
SECRET_VARIABLES = {"E2H_TEST_SECRET": hashlib.sha256(b"a secret of these tests").hexdigest(), "PYTHONPATH": str(ROOT)}
# Half a minute of training, with a checkpoint every two seconds or so.
SETTINGS = [
    "run.name=run",
    "privacy.epsilon=1",  # the smaller, the faster PLD
    "privacy.secret=env:E2H_TEST_SECRET",
    "central.num_rounds=3",
    "warmup.num_steps=10",
    "finetune.num_steps=150",
    "finetune.expected_batch_size=64",
    "finetune.noise_multiplicity=2",
    "finetune.checkpoint_every=10",
    "finetune.ledger_block=10",
    "sampling.num_images=40",
    "sampling.images_per_shard=40",
    "sampling.num_steps=4",
    "evaluation.enabled=false",
]
ALONE = ["scaling.num_workers=1", "scaling.physical_batch_size=8"]  # the unit that two workers choose


def command(storage: object, *overrides: str) -> list[str]:
    return ["jobs/pipeline.py", f"run.storage={storage}", *SETTINGS, *overrides]


def start(folder: Path, nodes: Cluster | None, *overrides: str, storage: object = None) -> subprocess.Popen[str]:
    """The pipeline as a process of its own; on this machine's own Ray without a cluster.

    Args:
      folder: for what it prints, and for the run, unless `storage` is given.
    """
    base = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    place = {**nodes.environment, "RAY_ADDRESS": nodes.address} if nodes else {**base, **SECRET_VARIABLES}
    folder.mkdir(exist_ok=True)
    call = [sys.executable, *command(storage or folder, *overrides)]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(call, cwd=ROOT, env=place, stdout=log, stderr=log, text=True)


def finish(process: subprocess.Popen[str], folder: Path, code: int = 0, timeout_s: float = 240) -> str:
    """Waits for the end; returns what was printed."""
    found = process.wait(timeout_s)
    log = (folder / "log.txt").read_text()
    assert found == code, log
    return log


def step(storage: str | Path) -> int:
    """The DP-SGD step that the run says it has finished; 0 before the first."""
    with suppress(OSError, ValueError):
        now = json.loads((place(str(storage)) / "run" / "progress.json").read_text())
        return now["step"] if now["stage"] == "finetune" else 0
    return 0


def wait_for_step(
    process: subprocess.Popen[str], folder: Path, least: int, timeout_s: float = 180, storage: str | Path | None = None
) -> None:
    def reached() -> bool:
        assert process.poll() is None, (folder / "log.txt").read_text()
        return step(storage or folder) >= least

    wait_until(reached, f"step {least}", timeout_s)


def recovery_s(nodes: Cluster, process: subprocess.Popen[str], storage: Path, disturb: Callable[[], Any]) -> float:
    """Calls `disturb` and returns the seconds until a new group of workers has finished a step that is new.

    Until it is, the file of progress names a step of the group that was lost; so does the new group's, when it begins.
    """
    before, begun = nodes.training_workers(), time.monotonic()
    disturb()
    last = step(storage)

    def went_on() -> bool:
        assert process.poll() is None, (storage / "log.txt").read_text()
        return len(set(nodes.training_workers()) - set(before)) == len(before) and step(storage) > last

    wait_until(went_on, "next step", 240)
    return time.monotonic() - begun


def outcome(storage: str | Path) -> dict[str, Any]:
    """What must be equal, whatever happened: weights, images, and what the ledger charged, step by step."""
    root = place(str(storage)) / "run"
    images = [path.read_bytes() for path in sorted((root / "release" / "data").glob("*.parquet"))]
    return {
        "weights": hashlib.sha256((root / "release" / "model.safetensors").read_bytes()).hexdigest(),
        "images": hashlib.sha256(b"".join(images)).hexdigest(),
        "charges": charges(root),
        "charged": Ledger(open_log(root / "ledger.jsonl"), None, witness_path(root)).charged(),
        "epsilon": json.loads((root / "release" / "ledger.json").read_text())["epsilon"],
    }


def charges(root: Place) -> set[tuple[str, str, int]]:
    """(release, domain, step) of all that is paid; the chain and its witness are checked.

    A set, as for the ledger: a block that begins at an early checkpoint names steps again that are paid already.
    """
    log = open_log(root / "ledger.jsonl")
    Ledger(log, None, witness_path(root)).charged()
    spent = [row for record in log.read() if (row := json.loads(record))["kind"] == "SPEND"]
    return {(row["release"], row["domain"], one) for row in spent for one in range(*row["steps"])}
