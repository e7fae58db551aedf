"""docs/cluster.md's cluster on one machine, line by line as printed, on ports and in folders of this test's own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cluster_checks import ROOT
from doc_commands import fenced

from clusters import Cluster, free_port

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Cluster]:
    """No cluster yet: where one will lie. All its processes are gone in the end, and no other Ray is touched."""
    # Sockets live below this folder, and their paths have a length limit.
    folder = Path(tempfile.mkdtemp(prefix="raye-", dir="/tmp"))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "HOME": str(tmp_path),
        "RAY_TMPDIR": str(folder / "head"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    made = Cluster(folder, f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}", environment)
    yield made
    while left := made.processes():
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder)


def block() -> str:
    """The commands of the section, from the token to the job."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    [found] = [one for one in fenced(text, "sh") if "ray start --head" in one]
    return found


def moved(commands: str, nodes: Cluster) -> str:
    """The same commands with other ports and folders, so that other clusters on this machine are not met."""
    for old, new in {
        "6379": nodes.address.rpartition(":")[2],
        "8265": nodes.dashboard.rpartition(":")[2],
        "/tmp/ray-": f"{nodes.folder}/",
        "--head ": f"--head --ray-client-server-port={free_port()} --dashboard-agent-listen-port=0 ",
    }.items():
        assert old in commands, f"{old}: no longer in the guide"
        commands = commands.replace(old, new)
    return commands


def test_a_job_on_three_nodes_of_one_machine_prints_what_the_readme_says(ours: Cluster, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("e2h", "jobs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    done = subprocess.run(
        ["bash", "-e", "-c", moved(block(), ours)],
        cwd=checkout,
        env=ours.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    [promised] = [one for one in fenced((ROOT / "README.md").read_text(), "text") if one.startswith("prepare ")]
    # The README leaves out what varies, and its folder of runs has another name here.
    for line in promised.replace("/runs/", "").splitlines():
        assert re.search(r"\S.*".join(map(re.escape, line.split("..."))), done.stdout), (line, done.stdout)
    assert (tmp_path / "e2h-runs" / "digits-eps10-seed0" / "release" / "README.md").is_file()
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    for own in ("head/ray", "worker-1", "worker-2"):
        assert (ours.folder / own / "session_latest").exists()
