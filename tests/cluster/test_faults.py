"""A private run on several nodes loses workers, nodes and its driver, or they stand still: same bits, same charges."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_runs import SECRET_VARIABLES, finish, outcome, recovery_s, start, step, wait_for_step
from disturbances import standing_still

from clusters import Cluster, cluster, parent, tree, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

# On two quiet cores; a test that shares them with others must not fail for that.
SLACK = float(os.environ.get("E2H_TEST_SLACK", "3"))
STILL_S = 15.0
SILENT_S = 70.0  # what a worker has to answer, then to leave its group, and what Ray waits until it kills it: 60, 5, 5


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(num_nodes=3, **SECRET_VARIABLES) as made:
        yield made


def test_a_lost_worker_and_a_lost_node_cost_seconds(
    nodes: Cluster, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    process = start(tmp_path, nodes)
    wait_for_step(process, tmp_path, 15)
    worker_s = recovery_s(nodes, process, tmp_path, lambda: os.kill(nodes.training_workers()[0], signal.SIGKILL))
    wait_for_step(process, tmp_path, 50)
    node_s = recovery_s(nodes, process, tmp_path, lambda: nodes.kill_node_of(nodes.training_workers()[0]))
    printed = finish(process, tmp_path)
    print(f"from the kill to the next step: worker {worker_s:.1f} s, node {node_s:.1f} s")
    assert "Traceback" not in printed
    assert outcome(tmp_path) == undisturbed
    assert worker_s < 20 * SLACK
    assert node_s < 40 * SLACK


def test_a_killed_driver_resumes_and_a_notice_is_no_failure(
    nodes: Cluster, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    nodes.add_node()
    first = start(tmp_path, nodes)
    wait_for_step(first, tmp_path, 15)
    first.kill()
    first.wait()
    wait_until(lambda: not nodes.training_workers(), "end of the workers of a killed driver")
    process = start(tmp_path, nodes, "scaling.max_failures=0")
    wait_for_step(process, tmp_path, 50)
    leaving = nodes.training_workers()[0]
    notice_s = recovery_s(nodes, process, tmp_path, lambda: nodes.give_notice(leaving, 5.0))
    finish(process, tmp_path)
    print(f"from a notice of 5 s to the next step elsewhere: {notice_s:.1f} s")
    assert outcome(tmp_path) == undisturbed


def test_who_stands_still_is_waited_for_and_then_replaced(
    nodes: Cluster, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    nodes.add_node()
    process = start(tmp_path, nodes)
    wait_for_step(process, tmp_path, 15)
    workers = nodes.training_workers()
    with standing_still(workers[:1]):
        time.sleep(1.0)
        held = step(tmp_path)
        time.sleep(STILL_S)
        assert step(tmp_path) == held
    wait_for_step(process, tmp_path, held + 10)
    assert nodes.training_workers() == workers
    worker_s = recovery_s(nodes, process, tmp_path, lambda: os.kill(workers[0], signal.SIGSTOP))
    wait_for_step(process, tmp_path, 80)
    node = tree(parent(nodes.training_workers()[0]))
    with standing_still(node):  # it wakes up when others have taken its place, and must not get in their way
        node_s = recovery_s(nodes, process, tmp_path, lambda: None)
    finish(process, tmp_path)
    print(f"from standing still for good to the next step: worker {worker_s:.1f} s, node {node_s:.1f} s")
    assert outcome(tmp_path) == undisturbed
    assert worker_s < SILENT_S + 20 * SLACK
    assert node_s < 40 * SLACK
