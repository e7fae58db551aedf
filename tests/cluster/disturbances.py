"""What befalls a cluster from outside: a store out of reach, a replaced head process, processes that stand still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clusters import Cluster, command_of, free_port, listens, wait_until

PROXY = Path(__file__).with_name("tcp_proxy.py")


@dataclass
class Gate:
    """A port through which a server of this machine is reached, as long as the gate's process lives.

    What the server keeps outlives the gate; connections do not.
    """

    to: int
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        self.process = subprocess.Popen([sys.executable, PROXY, str(self.port), str(self.to)])
        wait_until(lambda: listens(self.port), "open gate", 20)

    def shut(self) -> None:
        """SIGKILL: what is under way breaks off, and who comes is refused."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def gate(url: str) -> Iterator[Gate]:
    """An open gate before a server of this machine."""
    made = Gate(int(url.rpartition(":")[2]), free_port())
    made.open()
    try:
        yield made
    finally:
        made.shut()


def replace_gcs(nodes: Cluster, away_s: float) -> None:
    """SIGKILL to the head's control process; later its like takes its place, as under a supervisor."""
    os.kill(nodes.started[0].pid, signal.SIGSTOP)  # `ray start --block` would end the rest of the head as well
    [old] = [pid for pid in nodes.processes() if "gcs_server " in command_of(pid)]
    call, environment = (_strings(old, name) for name in ("cmdline", "environ"))
    os.kill(old, signal.SIGKILL)
    time.sleep(away_s)
    place = dict(line.split("=", 1) for line in environment)
    nodes.started.append(subprocess.Popen(call, env=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    wait_until(lambda: listens(int(nodes.address.rpartition(":")[2])), "new control process", 30)


def _strings(pid: int, name: str) -> list[str]:
    return Path(f"/proc/{pid}/{name}").read_bytes().decode().split("\0")[:-1]


@contextmanager
def standing_still(pids: Iterable[int]) -> Iterator[None]:
    """Processes that do nothing while the block runs, as on a machine that is overloaded or swaps."""
    stopped = list(pids)
    _signal(stopped, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(stopped, signal.SIGCONT)


def _signal(pids: Iterable[int], kind: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, kind)
        except ProcessLookupError:  # it has been taken for lost, and was killed
            continue
