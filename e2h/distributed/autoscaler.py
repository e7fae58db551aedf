"""What the cluster's autoscaler may add, and what it is about to add or can't.

Ray has no public call for either. Node types are in the configuration that the autoscaler was started with, on the head
node or in the RayCluster of KubeRay; the rest is the autoscaler's last report.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from e2h.distributed.nodes import HEAD, alive, describe, on_node, slots


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind; at most `max_count` of them."""

    name: str
    resources: dict[str, float]
    max_count: int


@dataclass(frozen=True)
class Offer:
    """All that an autoscaler may add.

    Attributes:
      max_nodes: over all types together.
    """

    node_types: list[NodeType]
    max_nodes: int

    def slots(self, worker: dict[str, float]) -> int:
        """How many workers all nodes hold that may be added: the best types first."""
        left, total = self.max_nodes, 0
        for kind in sorted(self.node_types, key=lambda kind: -slots(kind.resources, worker)):
            count = min(kind.max_count, left)
            left, total = left - count, total + count * slots(kind.resources, worker)
        return total

    @property
    def sized(self) -> bool:
        """Whether it says what every node has; of given machines (`provider: local`) Ray learns that when they come."""
        return all(kind.resources for kind in self.node_types)

    def __str__(self) -> str:
        kinds = [f"{kind.max_count} {kind.name} of {describe(kind.resources)}" for kind in self.node_types]
        return f"up to {', '.join(kinds)}; {self.max_nodes} in all"


def offer() -> Offer | None:
    """What the autoscaler may add; None where there is none, or its configuration can't be read."""
    import ray

    head = next((node["NodeID"] for node in alive() if HEAD in node["Resources"]), None)
    return ray.get(on_node(head, read_offer)) if head else None


def read_offer() -> Offer | None:
    """`offer` on the head node itself."""
    with suppress(Exception):  # another's file or service: whatever it is, it is not readable
        if config := _configuration():
            return parse_offer(config)
    return None


def parse_offer(config: dict[str, Any]) -> Offer:
    """An autoscaler's configuration, as `ray up` leaves it on the head node.

    Raises:
      KeyError: if it doesn't say what a node has.
    """
    head = config["head_node_type"]  # where all machines are of one type, the head's too
    types = {
        name: kind
        for name, kind in config["available_node_types"].items()
        if name != head or int(kind.get("max_workers", 0)) > 0
    }
    limit = int(config.get("max_workers", 2))  # Ray's default
    counts = {name: int(kind.get("max_workers", limit)) for name, kind in types.items()}
    return Offer([NodeType(name, dict(kind["resources"]), counts[name]) for name, kind in types.items()], limit)


def _configuration() -> dict[str, Any] | None:
    names = [os.environ.get(f"RAY_CLUSTER_{part}") for part in ("NAME", "NAMESPACE")]
    if all(names):  # KubeRay sets them
        from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

        return AutoscalingConfigProducer(*names)()
    import ray

    # The process that is this cluster's autoscaler: several clusters may run on one machine.
    own = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = command.read_text(errors="replace").split("\0")
            files = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
            if own in words and files:
                return yaml.safe_load(Path(files[0]).expanduser().read_text())
    return None


def report() -> Any:
    """The autoscaler's last `AutoscalingState` message; its `autoscaler_state_version` is 0 where there is none."""
    import ray
    from ray import _raylet
    from ray.core.generated import autoscaler_pb2

    client: Any = _raylet
    messages: Any = autoscaler_pb2
    reply = messages.GetClusterStatusReply()
    address = ray.get_runtime_context().gcs_address
    reply.ParseFromString(client.GcsClient(address).get_cluster_status(timeout_s=10))
    return reply.autoscaling_state
