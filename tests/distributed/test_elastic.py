"""Workers come and go in mid-run, and the run is the one that was left in peace: same weights, same charges."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_runs import prepare, small_config

from clusters import Cluster, cluster, wait_until
from e2h.curriculum.run import open_run
from e2h.curriculum.train import train
from e2h.curriculum.workers import Workers

pytestmark = pytest.mark.ray
HERE = Path(__file__).parent
NOTICE_S = 8


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("E2H_TEST_SECRET", bytes(range(32)).hex())


def in_peace(storage: Path) -> tuple[bytes, tuple, dict[str, set[int]]]:
    """What one worker, without Ray and without a fault, makes of the run, and its charges."""
    with open_run(small_config(storage)) as run:
        train(run, prepare(run), Workers.current(), lambda *_: None, lambda *_: None)
    return outcome(storage)


def outcome(storage: Path) -> tuple[bytes, tuple, dict[str, set[int]]]:
    with open_run(small_config(storage)) as run:
        return run.weights.read_bytes(), run.ledger.charged(), run.ledger.state().domains("finetune")


@contextmanager
def training(
    made: Cluster, storage: Path, workers: tuple[int | None, int], gates: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """The driver, on a prepared run."""
    with open_run(small_config(storage)) as run:
        prepare(run)
    environment = {**made.environment, "RAY_ADDRESS": made.address, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
    environment["PYTHONPATH"] = f"{HERE.parent / 'curriculum'}:{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, str(HERE / "gated_training.py"), str(storage), json.dumps(workers), json.dumps(gates)]
    with open(storage / "driver.log", "w") as log:
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def steps(storage: Path) -> list[tuple[int, int, int]]:
    """(size of the group, step, process of rank 0), in the order in which the steps were made."""
    path = storage / "steps"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(size), int(step), int(pid)) for size, step, pid in (line.split() for line in lines)]


def await_step(storage: Path, driver: subprocess.Popen[bytes], size: int, step: int) -> int:
    """The process of rank 0 that made the step; fails with the driver's words if it ended before."""

    def found() -> int | None:
        made = [pid for *what, pid in steps(storage) if what == [size, step]]
        assert made or driver.poll() is None, (storage / "driver.log").read_text()[-4000:]
        return made[0] if made else None

    start = time.monotonic()
    pid = wait_until(found, f"step {step} by {size} workers (so far {steps(storage)})", timeout_s=300)
    print(f"step {step} by {size} workers after {time.monotonic() - start:.1f} s")
    return pid


@pytest.mark.chaos
def test_a_group_that_grows_and_shrinks_makes_the_bits_of_a_fixed_one(tmp_path):
    storage, gates = tmp_path / "elastic", {"1-2": "killed", "2-4": "killed"}
    with cluster(num_nodes=1) as made, training(made, storage, (1, 2), gates) as driver:
        await_step(storage, driver, 1, 2)
        made.add_node()
        writer = await_step(storage, driver, 2, 4)
        made.kill_node_of(writer)
        await_step(storage, driver, 1, 6)
        assert driver.wait(60) == 0, (storage / "driver.log").read_text()[-4000:]
    assert [one[:2] for one in steps(storage)] == [(1, 1), (1, 2), (2, 3), (2, 4), (1, 5), (1, 6)]
    assert outcome(storage) == in_peace(tmp_path / "fixed")


@pytest.mark.chaos
def test_a_worker_that_is_given_notice_leaves_a_checkpoint_of_its_last_step(tmp_path):
    storage = tmp_path / "drained"
    # Without a notice the fifth step would have no checkpoint: they are two steps apart.
    gates = {"1-4": "notice", "1-5": "killed"}
    with cluster(num_nodes=2) as made, training(made, storage, (1, 1), gates) as driver:
        made.give_notice(await_step(storage, driver, 1, 4), NOTICE_S)
        await_step(storage, driver, 1, 6)
        assert driver.wait(60) == 0, (storage / "driver.log").read_text()[-4000:]
    assert [one[:2] for one in steps(storage)] == [(1, step) for step in range(1, 7)]
    assert len({pid for *_, pid in steps(storage)}) == 2
    assert outcome(storage) == in_peace(tmp_path / "fixed")


@pytest.mark.chaos
def test_workers_for_whom_there_is_never_room_are_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    with cluster() as made:
        for name, workers in {"fixed": (None, 2), "elastic": (1, 2)}.items():
            with training(made, tmp_path / name, workers, {}) as driver:
                assert driver.wait(120) == 1
            last = (tmp_path / name / "driver.log").read_text().splitlines()[-1]
            asked = f"scaling.{'num' if name == 'fixed' else 'min'}_workers={workers[0] or workers[1]}"
            assert f"InputError: {asked}: expected room for so many workers within 5 s" in last
            assert steps(tmp_path / name) == []
