"""The whole promise at once: a job for a cluster whose nodes come from nothing and vanish, with its run in a bucket."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cluster_runs import ALONE, ROOT, SECRET_VARIABLES, command, finish, outcome, start, step

from clusters import RAY, Cluster, cluster, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.long]

FEWER_STEPS = "finetune.num_steps=60"  # enough for a kill in their middle
KINDS = {"spot": {"resources": {"CPU": 1}, "max_workers": 3}}


def submit(nodes: Cluster, log: Path, *call: str) -> subprocess.Popen[bytes]:
    line = [RAY, "job", "submit", "--address", nodes.dashboard, "--", "python", *call]
    with open(log, "ab") as out:
        return subprocess.Popen(line, env=nodes.environment, stdout=out, stderr=out)


def test_a_submitted_job_on_spot_nodes_with_a_bucket_makes_the_undisturbed_release(bucket: str, tmp_path: Path) -> None:
    storage, log = f"{bucket}/runs", tmp_path / "submitted.txt"
    with cluster(node_types=KINDS, max_workers=3, **SECRET_VARIABLES) as nodes:
        script, *settings = command(storage, FEWER_STEPS)
        job = submit(nodes, log, str(ROOT / script), *settings)

        def at_work() -> bool:
            assert job.poll() is None, log.read_text()
            return step(storage) >= 20

        wait_until(at_work, "step 20", 300, 1.0)
        nodes.kill_node_of(nodes.training_workers()[0])
        assert job.wait(400) == 0, log.read_text()
    printed = log.read_text()
    assert "1 node of 0 CPU" in printed  # there was nothing else when it began
    assert "Traceback" not in printed
    finish(start(tmp_path, None, *ALONE, FEWER_STEPS), tmp_path)
    assert outcome(storage) == outcome(tmp_path)
