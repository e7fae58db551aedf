"""Real Ray clusters of several nodes on one machine: nodes that a test adds and kills, or that an autoscaler brings up.

Every process of a cluster names or holds open a file below the cluster's own folder: that is how they are found, killed
and taken away, and no other Ray on the machine is touched.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RAY = str(Path(sys.executable).with_name("ray"))
OBJECT_STORE_BYTES = 100_000_000
FAKE_HEAD_ID = "f" * 51 + "00000"
# On the head: a node that is gone is declared dead after three seconds without an answer instead of fifteen.
SHORT_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass
class Cluster:
    """A head without CPUs, with token authentication, and its worker nodes.

    Attributes:
      folder: Ray's temporary folder: logs and sockets.
      address: host:port for RAY_ADDRESS.
      dashboard: http://host:port for `ray job submit`.
      environment: what every client of the cluster needs, the token included.
    """

    folder: Path
    address: str
    dashboard: str
    environment: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add_node(self, num_cpus: int = 1, **variables: str) -> None:
        """Starts a worker node, with environment variables of its own; it has joined when this returns."""
        options = {"address": self.address, "num-cpus": num_cpus, "dashboard-agent-listen-port": 0}
        before = self._num_started()
        # One after the other: Ray numbers a node's sockets by what it finds, and two at once would take the same.
        self.started.append(_ray_start(self.folder, {**self.environment, **variables}, options))
        wait_until(lambda: self._num_started() > before, "new node")

    def _num_started(self) -> int:
        return (self.folder / "ray-start.log").read_text().count("Ray runtime started.")

    def processes(self) -> list[int]:
        """Ids of all processes of this cluster, its jobs included."""
        return [pid for pid in _all_processes() if pid != os.getpid() and self._owns(pid)]

    def _owns(self, pid: int) -> bool:
        return _mentions(pid, str(self.folder))

    def training_workers(self) -> list[int]:
        """Ids of the processes that train."""
        return [pid for pid in _all_processes() if "RayTrainWorker" in command_of(pid) and self._owns(pid)]

    def kill_node_of(self, pid: int) -> None:
        """SIGKILL to the raylet above a worker and to everything below that raylet: what a lost machine looks like."""
        kill_tree(parent(pid))

    def give_notice(self, pid: int, seconds: float) -> None:
        """Tells Ray that the node of a worker will be taken away, as a watcher of spot machines does."""
        node_id = command_of(parent(pid)).partition("--node_id=")[2].split()[0]
        deadline = int((time.time() + seconds) * 1000)
        code = (
            f"from ray._raylet import GcsClient\n"
            f"answer = GcsClient({self.address!r}).drain_node({node_id!r}, 2, 'spot', {deadline}, timeout=10)\n"
            f"assert answer[0], answer"
        )
        subprocess.run([sys.executable, "-c", code], env=self.environment, check=True, timeout=60)

    def log(self, name: str) -> str:
        """The end of a log of the head's session, for a failed test's message."""
        found = sorted(self.folder.glob(f"session_*/logs/{name}"))
        return found[-1].read_text(errors="replace")[-4000:] if found else ""


@contextmanager
def cluster(
    num_nodes: int = 0,
    node_types: dict[str, Any] | None = None,
    max_workers: int = 4,
    redis: str | None = None,
    **variables: str,
) -> Iterator[Cluster]:
    """A running cluster; all its processes are gone when the block ends, however it ends.

    Args:
      num_nodes: worker nodes of one CPU to start at once.
      node_types: for an autoscaler: name -> {"resources": ..., "min_workers": ..., "max_workers": ...}.
      max_workers: of the autoscaler, over all types.
      redis: host:port of a Redis that outlives the head.
      variables: environment of all nodes and clients.
    """
    # Sockets live below this folder, and their paths have a length limit.
    folder = Path(tempfile.mkdtemp(prefix="rayc-", dir="/tmp"))
    made = _describe(folder, variables)
    try:
        _start_head(made, node_types, max_workers, redis)
        for _ in range(num_nodes):
            made.add_node()
        yield made
    finally:
        _stop(made)
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 120.0, every_s: float = 0.2) -> Any:
    """The first true value of `condition`; AssertionError when the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every_s)
    raise AssertionError(f"no {what} within {timeout_s:g} s")


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and its descendants; stopped first, so that none of them sees the others go."""
    below = tree(pid)
    for kind in (signal.SIGSTOP, signal.SIGKILL):
        for one in below:
            with suppress(ProcessLookupError):
                os.kill(one, kind)


def tree(pid: int) -> set[int]:
    """A process and its descendants."""
    below, children = {pid}, {pid}
    while children := {one for one in _all_processes() if parent(one) in children}:
        below |= children
    return below


def free_port() -> int:
    """A port above 20000 that nobody listens on."""
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def _describe(folder: Path, variables: dict[str, str]) -> Cluster:
    from ray.util import get_node_ip_address

    home = folder / "home"
    home.mkdir()
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        **variables,
    }
    environment.pop("RAY_ADDRESS", None)
    return Cluster(folder, f"{get_node_ip_address()}:{free_port()}", f"http://127.0.0.1:{free_port()}", environment)


def _start_head(made: Cluster, node_types: dict[str, Any] | None, max_workers: int, redis: str | None) -> None:
    environment = {**made.environment, **SHORT_HEALTH_CHECKS}
    if redis is not None:
        environment["RAY_REDIS_ADDRESS"] = redis
    options: dict[str, Any] = {
        "head": None,
        "port": made.address.rpartition(":")[2],
        "dashboard-port": made.dashboard.rpartition(":")[2],
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": 0,
        "temp-dir": made.folder,
        "num-cpus": 0,
    }
    if node_types is not None:
        path = made.folder / "autoscaling.json"
        path.write_text(json.dumps(_autoscaling(made.address, node_types, max_workers)))
        options["autoscaling-config"] = path
        environment |= {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_ID,
        }
    made.started.append(_ray_start(made.folder, environment, options))
    port = int(made.dashboard.rpartition(":")[2])
    wait_until(lambda: listens(port) and made._num_started(), "head node")


def _autoscaling(address: str, node_types: dict[str, Any], max_workers: int) -> dict[str, Any]:
    """What `ray up` would leave on the head, for Ray's provider whose nodes are processes of this machine."""
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_ID,
        "gcs_address": address,
    }
    workers = {name: {"node_config": {}, "min_workers": 0, **kind} for name, kind in node_types.items()}
    head = {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    unused = ("auth", "docker", "file_mounts")
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter")
    lists += ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    return {
        "cluster_name": "on-one-machine",
        "max_workers": max_workers,
        "upscaling_speed": 10,
        "idle_timeout_minutes": 5,
        "provider": provider,
        "available_node_types": {**workers, **head},
        "head_node_type": "ray.head.default",
        **{name: {} for name in unused},
        **{name: [] for name in (*lists, "head_start_ray_commands", "worker_start_ray_commands")},
    }


def _ray_start(folder: Path, environment: dict[str, str], options: dict[str, Any]) -> subprocess.Popen[bytes]:
    common = {"object-store-memory": OBJECT_STORE_BYTES, "min-worker-port": 0, "max-worker-port": 0}
    given = [f"--{name}" if value is None else f"--{name}={value}" for name, value in {**options, **common}.items()]
    with open(folder / "ray-start.log", "ab") as log:
        return subprocess.Popen([RAY, "start", "--block", *given], env=environment, stdout=log, stderr=log)


def _stop(made: Cluster) -> None:
    """No process asks another to end: what is left on one machine needs no farewell."""
    for process in made.started:
        kill_tree(process.pid)
        process.wait()
    while left := made.processes():
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _mentions(pid: int, folder: str) -> bool:
    """In its command line, its environment, or the files it has open (Ray overwrites the first two in workers)."""
    mark = folder.encode()
    with suppress(OSError):
        if mark in Path(f"/proc/{pid}/cmdline").read_bytes() or mark in Path(f"/proc/{pid}/environ").read_bytes():
            return True
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}").startswith(folder):
                    return True
    return False
