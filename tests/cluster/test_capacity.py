"""What can never come is refused at once and what may come is waited for, with an autoscaler and without."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters import Cluster, cluster

pytestmark = [pytest.mark.ray, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
# A driver of three lines: what every job does before its first stage, and training before its first worker.
DRIVER = """
import os, sys
from pathlib import Path
from e2h.config import ScalingConfig
from e2h.distributed.session import session
from e2h.errors import InputError
try:
    with session(ScalingConfig(num_workers=int(sys.argv[1])), Path(sys.argv[2]) / "ray.log"):
        from e2h.distributed import capacity
        capacity.SILENT_S = float(os.environ.get("SILENT", capacity.SILENT_S))
        from e2h.distributed.nodes import check_shared
        if os.environ.get("TAKEN"):
            from ray.util import placement_group
            assert placement_group([{"CPU": 1}]).wait(60)
        capacity.await_workers(ScalingConfig(num_workers=int(sys.argv[1])))
        check_shared(Path(sys.argv[2]))
        print("ready")
except InputError as error:
    print("refused:", error)
"""


def drive(nodes: Cluster, folder: Path, num_workers: int, cwd: Path = ROOT, **variables: str) -> str:
    environment = {**nodes.environment, "RAY_ADDRESS": nodes.address, "PYTHONPATH": str(ROOT), **variables}
    call = [sys.executable, "-c", DRIVER, str(num_workers), str(folder)]
    done = subprocess.run(call, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def autoscaled() -> Iterator[Cluster]:
    kinds = {"small": {"resources": {"CPU": 1}, "max_workers": 3}, "large": {"resources": {"CPU": 4}, "max_workers": 1}}
    with cluster(node_types=kinds, max_workers=2, PYTHONPATH=str(ROOT)) as made:
        yield made


def test_node_types_that_can_never_suffice_are_named(autoscaled: Cluster, tmp_path: Path) -> None:
    begun = time.monotonic()
    printed = drive(autoscaled, tmp_path, 6)
    assert printed.splitlines()[0] == f"ray        {autoscaled.dashboard}, 1 node of 0 CPU"
    assert "refused: scaling.num_workers=6: expected at most 5, as this cluster has 1 node of 0 CPU" in printed
    assert "up to 3 small of 1 CPU, 1 large of 4 CPU; 2 in all" in printed
    assert time.monotonic() - begun < 60


def test_nodes_that_may_come_are_waited_for(autoscaled: Cluster, tmp_path: Path) -> None:
    printed = drive(autoscaled, tmp_path, 2, SILENT="0")  # nodes that come within seconds are not spoken of
    assert "wait       room for 2 workers of 1 CPU; there are" in printed
    assert "on their way: " in printed
    assert printed.splitlines()[-1] == "ready"


def test_without_an_autoscaler_nothing_is_waited_for(tmp_path: Path) -> None:
    with cluster(num_nodes=1, PYTHONPATH=str(ROOT)) as nodes:
        assert drive(nodes, tmp_path, 1).splitlines()[-1] == "ready"
        refused = "at most 1, as this cluster has 1 node of 0 CPU, 1 node of 1 CPU (a worker takes 1 CPU)"
        assert f"refused: scaling.num_workers=2: expected {refused}" in drive(nodes, tmp_path, 2)
        # Busy with something else: that may end, or not.
        printed = drive(nodes, tmp_path, 1, TAKEN="1", RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="2")
        assert "wait       room for 1 workers of 1 CPU; there are" in printed
        assert "refused: scaling.num_workers=1: expected room for them within 2 s" in printed
        # The same path, and another folder in every process: like a disk of each machine's own.
        printed = drive(nodes, Path("/proc/self/cwd"), 1, cwd=tmp_path)
        assert "refused: run.storage=/proc/self/cwd: expected a folder that all nodes of the cluster share" in printed
