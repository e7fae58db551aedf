"""The same words behind `ray job submit`: a real head node with a token, our working directory, one small run."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_calls import ROOT, SMALL

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(dashboard address, environment) of a head node of two cores that asks for a token."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        **os.environ,
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-of-this-test",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    dashboard = free_port()
    ports = {"port": free_port(), "dashboard-port": dashboard, "ray-client-server-port": free_port()}
    # Sockets live below the temporary folder, and their paths have a length limit.
    temporary = Path("/tmp") / f"ray-{os.getpid()}"
    settings = {**ports, "num-cpus": 2, "object-store-memory": 200_000_000, "dashboard-agent-listen-port": 0}
    options = [f"--{name}={value}" for name, value in {**settings, "temp-dir": temporary}.items()]
    node = subprocess.Popen(
        [RAY, "start", "--head", "--block", *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_listening(dashboard)
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        node.terminate()
        node.wait(timeout=30)
        shutil.rmtree(temporary, ignore_errors=True)


def _wait_until_listening(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the head node did not come up in a minute")


def submit(head: tuple[str, dict[str, str]], working_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    address, environment = head
    call = [RAY, "job", "submit", "--address", address, "--working-dir", str(working_dir), "--", "python", *arguments]
    return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=400, check=False)


def test_pipeline_runs_under_ray_job_submit(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    working_dir = tmp_path / "checkout"
    for name in ("e2h", "jobs"):
        shutil.copytree(ROOT / name, working_dir / name, ignore=shutil.ignore_patterns("__pycache__"))
    storage = tmp_path / "runs"
    done = submit(head, working_dir, "jobs/pipeline.py", f"run.storage={storage}", "run.name=r", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    ledger = json.loads((storage / "r" / "release" / "ledger.json").read_text())
    assert f"epsilon {ledger['epsilon']:.4f} of 1 spent" in done.stdout
    assert not re.search("Traceback|Warning", done.stdout)
    refused = submit(head, working_dir, "jobs/pipeline.py", f"run.storage={storage}", "privacy.epsilon=0")
    assert refused.returncode != 0
    assert "e2h: privacy.epsilon=0.0: expected a finite number above 0" in refused.stdout
