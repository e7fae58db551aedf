"""What an autoscaler's configuration says that may still come."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from e2h.config import ScalingConfig
from e2h.distributed import autoscaler, capacity
from e2h.distributed.autoscaler import parse_offer, read_offer
from e2h.distributed.nodes import HEAD, describe, slots
from e2h.errors import InputError

GPU_WORKER = {"CPU": 4.0, "GPU": 1.0}
# What matters of the file that `ray up` leaves on the head node.
LAUNCHED = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 8}},
        "one": {"resources": {"CPU": 16, "GPU": 1}, "max_workers": 9},
        "eight": {"resources": {"CPU": 96, "GPU": 8}, "max_workers": 2},
        "none": {"resources": {"CPU": 64}},
    },
}
GROUP = {
    "groupName": "spot",
    "minReplicas": 0,
    "maxReplicas": 3,
    "rayStartParams": {"num-cpus": "4", "num-gpus": "1"},
    "template": {"spec": {"containers": [{"resources": {"limits": {"cpu": "4", "memory": "8Gi"}}}]}},
}
HEAD_GROUP = {"rayStartParams": {"num-cpus": "0"}, "template": GROUP["template"]}
RAY_CLUSTER = {
    "metadata": {"name": "e2h", "namespace": "default"},
    "spec": {"headGroupSpec": HEAD_GROUP, "workerGroupSpecs": [GROUP]},
}


@pytest.mark.parametrize(
    ("node", "worker", "number"),
    [
        ({"CPU": 8, "GPU": 1}, GPU_WORKER, 1),
        ({"CPU": 96, "GPU": 8}, GPU_WORKER, 8),
        ({"CPU": 16, "GPU": 8}, GPU_WORKER, 4),
        ({"CPU": 8}, GPU_WORKER, 0),
        ({"CPU": 0.3}, {"CPU": 0.1}, 3),
        ({}, {"CPU": 1.0}, 0),
    ],
)
def test_slots_of_a_node(node, worker, number):
    assert slots(node, worker) == number


def test_an_offer_holds_as_many_workers_as_its_best_nodes():
    offer = parse_offer(LAUNCHED)
    assert offer.slots(GPU_WORKER) == 2 * 8 + 3 * 1  # five nodes in all
    assert offer.slots({"CPU": 64.0}) == 2 + 3
    assert str(offer).startswith("up to 9 one of 16 CPU and 1 GPU, 2 eight of 96 CPU and 8 GPU, 5 none of 64 CPU; 5 in")


def test_of_given_machines_it_is_not_known_what_they_have(monkeypatch):
    """All machines of clusters/local.yaml are of one type, the head's too; Ray learns what they have when they come."""
    listed = yaml.safe_load((Path(__file__).parents[2] / "clusters" / "local.yaml").read_text())
    offer = parse_offer(prepare_config(listed))
    assert not offer.sized
    assert parse_offer(LAUNCHED).sized
    monkeypatch.setattr(capacity, "alive", lambda: [{"Resources": {"CPU": 4.0, HEAD: 1.0}, "NodeID": "head"}])
    monkeypatch.setattr(capacity, "describe_nodes", lambda: "1 node of 4 CPU")
    monkeypatch.setattr(autoscaler, "report", lambda: SimpleNamespace(autoscaler_state_version=1))
    monkeypatch.setattr(autoscaler, "offer", lambda: offer)
    capacity.check_capacity(ScalingConfig(num_workers=12))  # `ray up` returns before all machines have joined
    monkeypatch.setattr(autoscaler, "offer", lambda: parse_offer({**LAUNCHED, "max_workers": 0}))
    with pytest.raises(InputError, match=r"^scaling\.num_workers=12: expected at most 4"):
        capacity.check_capacity(ScalingConfig(num_workers=12))


def test_a_configuration_that_hides_its_resources_is_no_offer(monkeypatch):
    types = {**LAUNCHED["available_node_types"], "one": {}}
    monkeypatch.setattr(autoscaler, "_configuration", lambda: {**LAUNCHED, "available_node_types": types})
    assert read_offer() is None
    monkeypatch.setattr(autoscaler, "_configuration", lambda: LAUNCHED)
    assert read_offer() == parse_offer(LAUNCHED)


def test_worker_groups_of_kuberay_are_node_types(monkeypatch):
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    monkeypatch.setenv("RAY_CLUSTER_NAME", "e2h")
    monkeypatch.setenv("RAY_CLUSTER_NAMESPACE", "default")
    monkeypatch.setattr(AutoscalingConfigProducer, "__init__", lambda self, name, namespace: None)
    monkeypatch.setattr(AutoscalingConfigProducer, "_fetch_ray_cr_from_k8s_with_retries", lambda self: RAY_CLUSTER)
    offer = read_offer()
    assert [(kind.name, kind.max_count) for kind in offer.node_types] == [("spot", 3)]
    assert offer.slots(GPU_WORKER) == 3


def test_resources_are_named_shortly():
    assert describe({"CPU": 8, "memory": 1e9}) == "8 CPU"
    assert describe({"GPU": 2.0}) == "0 CPU and 2 GPU"
