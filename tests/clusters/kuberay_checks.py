"""The layers of clusters/kuberay.yaml: KubeRay's own fields, Kubernetes' objects, and Ray's autoscaler.

KubeRay's definitions are in no Python package. The fields below are those of its API reference (ray.io/v1) that a
cluster of ours may need; whatever else a file says is refused.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from cluster_checks import Node, RefusedError, check_commands, check_ray
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

KUBERNETES = "1.34"
TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
ANYTHING = {"type": "object"}  # checked as a part of a pod
PARAMETERS = {"type": "object", "additionalProperties": TEXT}


def _fields(required: tuple[str, ...] = (), **properties: Any) -> Node:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def _one_of(*values: str) -> Node:
    return {"enum": list(values)}


SECRET = _fields(
    ("valueFrom",), valueFrom=_fields(("secretKeyRef",), secretKeyRef=_fields(("name", "key"), name=TEXT, key=TEXT))
)
WORKERS = _fields(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=PARAMETERS,
    template=ANYTHING,
)
CLUSTER = _fields(
    ("rayVersion", "headGroupSpec", "workerGroupSpecs"),
    rayVersion=TEXT,
    authOptions=_fields(("mode",), mode=_one_of("token", "disabled")),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=_fields(
        version=_one_of("v1", "v2"),
        idleTimeoutSeconds=COUNT,
        upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
    ),
    gcsFaultToleranceOptions=_fields(
        redisAddress=TEXT, redisUsername=SECRET, redisPassword=SECRET, externalStorageNamespace=TEXT
    ),
    headGroupSpec=_fields(("rayStartParams", "template"), rayStartParams=PARAMETERS, template=ANYTHING),
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
JOB = _fields(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=TEXT,
    entrypointNumCpus={"type": "number"},
    entrypointResources=TEXT,
    submissionMode=_one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    runtimeEnvYAML=TEXT,
    rayClusterSpec=CLUSTER,
)
SPEC = {"RayCluster": CLUSTER, "RayJob": JOB}


def objects(text: str) -> list[Node]:
    return yaml.safe_load(text)["items"]


def cluster_of(item: Node) -> Node:
    """The specification of a RayCluster or of a RayJob's own cluster."""
    return item["spec"] if item["kind"] == "RayCluster" else item["spec"]["rayClusterSpec"]


def pods(cluster: Node) -> dict[str, Node]:
    """The one container of each group, by the group's name."""
    groups = {"head": cluster["headGroupSpec"], **{one["groupName"]: one for one in cluster["workerGroupSpecs"]}}
    return {name: group["template"]["spec"]["containers"][0] for name, group in groups.items()}


def check_manifests(text: str) -> list[Node]:
    """All layers of the file; its objects."""
    found = objects(text)
    for item in found:
        if item["apiVersion"] == "ray.io/v1":
            _check_ray_object(item)
        else:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
    _check_names(found)
    return found


def _check_ray_object(item: Node) -> None:
    if item["kind"] not in SPEC:
        raise RefusedError(f"kind={item['kind']}: KubeRay has no such object here")
    jsonschema.validate(item["spec"], SPEC[item["kind"]])
    cluster = cluster_of(item)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        template = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "pod"},
            "template": group["template"],
        }
        kubernetes_validate.validate(template, KUBERNETES, strict=True)
        check_ray(["start", *(f"--{name}={value}" for name, value in group["rayStartParams"].items())])
    autoscaling(item)
    if item["kind"] == "RayJob":
        check_commands(item["spec"]["entrypoint"])
        json.loads(item["spec"]["entrypointResources"])


def autoscaling(item: Node) -> Node:
    """What Ray's autoscaler makes of a cluster, by its own code."""
    named = {"metadata": {"name": item["metadata"]["name"], "namespace": "default"}, "spec": cluster_of(item)}
    return _derive_autoscaling_config_from_ray_cr(named)


def _check_names(found: list[Node]) -> None:
    """What one object calls another by."""
    services = {item["metadata"]["name"]: item["spec"] for item in found if item["kind"] == "Service"}
    labels = [item["spec"]["template"]["metadata"]["labels"] for item in found if item["kind"] == "Deployment"]
    accounts = {item["metadata"]["name"] for item in found if item["kind"] == "ServiceAccount"}
    for service in services.values():
        if service["selector"] not in labels:
            raise RefusedError(f"selector {service['selector']}: no such pod")
    for cluster in [cluster_of(item) for item in found if item["kind"] in SPEC]:
        host = cluster["gcsFaultToleranceOptions"]["redisAddress"].split(":")[0]
        if host not in services:
            raise RefusedError(f"redisAddress {host}: no such service")
        for group in cluster["workerGroupSpecs"]:
            if group["template"]["spec"]["serviceAccountName"] not in accounts:
                raise RefusedError(f"{group['groupName']}: no such service account")
