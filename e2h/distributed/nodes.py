"""The nodes of the cluster that are up: what they hold, and whether they all see a folder."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from e2h.errors import InputError

Answer = TypeVar("Answer")
HEAD = "node:__internal_head__"  # the resource by which Ray marks the head node


def alive() -> list[dict[str, Any]]:
    """Ray's description of each node that is up."""
    return [node for node in ray.nodes() if node["Alive"]]


def slots(resources: Mapping[str, float], worker: Mapping[str, float]) -> int:
    """How many workers fit on a node of these resources."""
    return min(int(resources.get(kind, 0.0) / amount + 1e-9) for kind, amount in worker.items())


def describe(resources: Mapping[str, float]) -> str:
    """`8 CPU`, or `8 CPU and 1 GPU`."""
    gpus = f" and {resources['GPU']:g} GPU" if resources.get("GPU") else ""
    return f"{resources.get('CPU', 0):g} CPU{gpus}"


def describe_nodes() -> str:
    """The nodes that are up, equal ones together: `2 nodes of 1 CPU, 1 node of 0 CPU`."""
    kinds = sorted(describe(node["Resources"]) for node in alive())
    counts = {kind: kinds.count(kind) for kind in kinds}
    return ", ".join(f"{count} node{'s' * (count > 1)} of {kind}" for kind, count in counts.items())


def on_node(node_id: str, work: Callable[[], Any]) -> ray.ObjectRef:
    """Runs `work` on that very node, besides what it is busy with."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0)(work).options(scheduling_strategy=strategy).remote()


def on_any_node(work: Callable[[], Answer]) -> Answer:
    """What `work` returns, computed on any node: the caller may be a trial of Tune, whose own resources have no CPU."""
    call: Any = ray.remote(scheduling_strategy="DEFAULT")(_call)
    answer: Answer = ray.get(call.remote(work))
    return answer


def _call(work: Callable[[], Answer]) -> Answer:
    return work()


def check_shared(folder: Path) -> None:
    """Refuses a folder that some node sees otherwise than this process does: one on a disk of its own.

    Nodes without CPUs are not asked: they are given no work.

    Raises:
      InputError: naming the nodes.
    """
    token = secrets.token_hex(16)
    probe = folder / f".seen-{token[:8]}"
    probe.write_text(token)
    try:
        blind = sorted({host for host, seen in on_each_node(_reader(probe)) if seen != token})
    finally:
        probe.unlink(missing_ok=True)
    if blind:
        raise InputError(
            f"run.storage={folder}: expected a folder that all nodes of the cluster share; {', '.join(blind)} "
            "see another one; use a folder on NFS 4, or s3://bucket/prefix"
        )


def _reader(probe: Path) -> Callable[[], tuple[str, str]]:
    def read() -> tuple[str, str]:
        try:
            return socket.gethostname(), probe.read_text()
        except OSError:
            return socket.gethostname(), ""

    return read


def on_each_node(work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on every node that may be given work; a node that is lost meanwhile is left out."""
    nodes = [node["NodeID"] for node in alive() if node["Resources"].get("CPU")]
    answers = []
    for node_id, pending in [(node_id, on_node(node_id, work)) for node_id in nodes]:
        try:
            answers.append(ray.get(pending))
        except ray.exceptions.RayError:
            if any(node["NodeID"] == node_id for node in alive()):
                raise
    return answers
