"""Storage fails in mid-training on a cluster: a bucket out of reach, full disks. A run goes on or says so in a line."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cluster_runs import SECRET_VARIABLES, finish, outcome, start, wait_for_step
from disturbances import gate

from clusters import Cluster, cluster

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

AWAY_S = 20.0
ADVICE = "run the same command again"


def one_line(printed: str, *said: str) -> None:
    """Nothing but stages' lines, and one that refuses."""
    [line] = [line for line in printed.splitlines() if line.startswith("e2h: ")]
    assert all(part in line for part in said), line
    assert "Traceback" not in printed, printed


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir(mode=0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False).returncode:
        pytest.skip("a file system can't be mounted here: that takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """A file that takes all room of a small disk but so many bytes."""
    filler = folder / "filler"
    free = os.statvfs(folder)
    with open(filler, "wb", buffering=0) as file, suppress(OSError):
        for _ in range((free.f_bavail * free.f_bsize - leave) // 4096):
            file.write(bytes(4096))
    return filler


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(num_nodes=2, **SECRET_VARIABLES) as made:
        yield made


def test_a_bucket_out_of_reach_is_waited_for_some_time_and_then_a_line(
    bucket: str, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"{bucket}/runs"
    with gate(os.environ["AWS_ENDPOINT_URL"]) as door:
        monkeypatch.setenv("AWS_ENDPOINT_URL", door.url)
        with cluster(num_nodes=2, **SECRET_VARIABLES) as nodes:
            process = start(tmp_path, nodes, storage=storage)
            wait_for_step(process, tmp_path, 15, storage=storage)
            door.shut()
            one_line(finish(process, tmp_path, code=2, timeout_s=400), ADVICE)
            door.open()
            process = start(tmp_path, nodes, storage=storage)
            wait_for_step(process, tmp_path, 60, storage=storage)
            door.shut()
            time.sleep(AWAY_S)
            door.open()
            finish(process, tmp_path)
        assert outcome(storage) == undisturbed


def test_a_full_disk_in_mid_training_is_a_line_and_the_same_command_goes_on(
    nodes: Cluster, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "64m") as disk:
        process = start(tmp_path, nodes, storage=disk)
        wait_for_step(process, tmp_path, 15, storage=disk)
        filler = fill(disk)
        one_line(finish(process, tmp_path, code=2), "the disk is full; make room", ADVICE)
        filler.unlink()
        finish(start(tmp_path, nodes, storage=disk), tmp_path)
        assert outcome(disk) == undisturbed


def test_a_worker_without_room_for_its_images_is_a_line_and_the_same_command_goes_on(
    bucket: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    storage = f"{bucket}/runs"
    with small_disk(tmp_path / "disk", "1m") as disk, cluster(num_nodes=1, **SECRET_VARIABLES) as nodes:
        nodes.add_node(TMPDIR=str(disk))
        filler = fill(disk, leave=2**16)
        process = start(tmp_path, nodes, storage=storage)
        one_line(finish(process, tmp_path, code=2), str(disk), "bytes of free disk", "make room", ADVICE)
        filler.unlink()
        finish(start(tmp_path, nodes, storage=storage), tmp_path)
        assert not list(disk.rglob("*.npy"))  # of private images nothing stays on a node
    assert outcome(storage) == undisturbed
