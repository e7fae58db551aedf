"""The files of clusters/ pass every check that needs no cloud; a typo in each layer is caught; they agree with e2h."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from cluster_checks import CLUSTERS, LAUNCHED, ROOT, check_commands, check_job, check_launched, launched, read
from kuberay_checks import autoscaling, check_manifests, cluster_of, objects, pods

from e2h.config import ScalingConfig

CLOUDS = ("aws-gpu", "gcp-gpu", "kuberay")
SCALING = sorted((ROOT / "e2h" / "conf" / "scaling").glob("*.yaml"))


def check(name: str, text: str) -> None:
    if name == "kuberay":
        check_manifests(text)
    else:
        check_launched(name, text)


def node_types(name: str) -> dict[str, dict[str, Any]]:
    """As Ray's autoscaler sees them."""
    if name == "kuberay":
        return autoscaling(next(item for item in objects(read(name)) if item["kind"] == "RayCluster"))[
            "available_node_types"
        ]
    return launched(read(name))["available_node_types"]


@pytest.mark.parametrize("name", [*LAUNCHED, "kuberay"])
def test_a_cluster_file_passes_every_layer(name):
    check(name, read(name))


def test_every_cluster_file_is_checked():
    assert {path.stem for path in CLUSTERS.glob("*.yaml")} == {*LAUNCHED, "kuberay"}


RAY_SCHEMA = [
    ("aws-gpu", "idle_timeout_minutes: 5", "idle_timeout_minute: 5"),
    ("aws-gpu", "max_workers: 8", "max_workers: eight"),
    ("gcp-gpu", "head_node_type: head", "head_node_type: hed"),
    ("gcp-gpu", "run_options:", "run_option:"),
    ("local", "rsync_exclude:", "rsync_excludes:"),
    ("local", '"~/e2h/e2h": e2h', '"~/e2h/e2h": e2hh'),
]
PROVIDER_KEYS = [
    ("local", "head_ip:", "headip:"),
    ("aws-gpu", "cache_stopped_nodes: false", "cache_stopped_node: false"),
    ("gcp-gpu", "project_id:", "project:"),
    ("local", "worker_ips:", "workers_ips:"),
]
EC2 = [
    ("aws-gpu", "InstanceType: g6.2xlarge", "InstanceTyp: g6.2xlarge"),
    ("aws-gpu", "InstanceType: g6.2xlarge", "InstanceType: g6.2xlage"),
    ("aws-gpu", "MarketType: spot", "MarketType: spott"),
    ("aws-gpu", "VolumeSize: 150", "VolumeSize: large"),
    ("aws-gpu", "{Name: e2h-node}", "{Named: e2h-node}"),
]
GCE = [
    ("gcp-gpu", "machineType: g2", "machinType: g2"),
    ("gcp-gpu", "provisioningModel: SPOT", "provisioningModel: SPOTS"),
    ("gcp-gpu", 'diskSizeGb: "150"', "diskSize: 150"),
    ("gcp-gpu", "automaticRestart: false", "automaticRestart: never"),
    ("gcp-gpu", "scopes: [", "scope: ["),
]
COMMANDS = [
    ("aws-gpu", "--num-cpus=0", "--num-cpu=0"),
    ("gcp-gpu", "--autoscaling-config=", "--autoscaler-config="),
    ("local", "ray start --address", "ray begin --address"),
    ("kuberay", "{num-cpus:", "{numcpus:"),
    ("kuberay", "scaling=gpu8 data=image_folder", "scaling=gpu9 data=image_folder"),
    ("kuberay", "privacy.secret=env:E2H_SECRET\n      entry", "privacy.secrets=env:E2H_SECRET\n      entry"),
]
KUBERAY = [
    ("kuberay", "authOptions:", "authOption:"),
    ("kuberay", "version: v2", "version: v3"),
    ("kuberay", "shutdownAfterJobFinishes:", "shutdownAfterJobFinish:"),
    ("kuberay", "minReplicas: 0", "minReplica: 0"),
    ("kuberay", "redisPassword:", "redisPasswort:"),
]
KUBERNETES = [
    ("kuberay", "secretKeyRef: {name: e2h-secrets, key: master}", "secretRef: {name: e2h-secrets, key: master}"),
    ("kuberay", "nodeSelector: {karpenter.sh/capacity-type: spot", "nodeSelectors: {karpenter.sh/capacity-type: spot"),
    ("kuberay", "runAsNonRoot: true", "runAsNonroot: true"),
    ("kuberay", "containerPort: 8265", 'containerPort: "8265"'),
    ("kuberay", "matchLabels:", "matchLabel:"),
]
NAMES = [
    ("kuberay", "redisAddress: e2h-redis:6379", "redisAddress: redis:6379"),
    ("kuberay", "serviceAccountName: e2h-node\n", "serviceAccountName: e2h-nodes\n"),
    ("kuberay", "selector: {app: e2h-redis}", "selector: {app: e2h-reddis}"),
]


# What each layer says of it.
SAID = [
    (RAY_SCHEMA, "unexpected|not of type|must be one of|no such file"),
    (PROVIDER_KEYS, "^provider.*unknown"),
    (EC2, "^Unknown parameter|^Invalid type|one of EC2's"),
    (GCE, "^Instance"),
    (COMMANDS, "no such|scaling/gpu9|privacy.secrets"),
    (KUBERAY, "unexpected|'v3' is not one of"),
    (KUBERNETES, "unexpected|not of type"),
    (NAMES, "no such"),
]


@pytest.mark.parametrize(("name", "right", "wrong", "said"), [(*one, said) for layer, said in SAID for one in layer])
def test_a_typo_is_caught(name, right, wrong, said):
    text = read(name)
    assert right in text
    with pytest.raises(Exception, match=said):
        check(name, text.replace(right, wrong))


def capacity(types: dict[str, dict[str, Any]], cpus: float, gpus: int) -> float:
    """Workers of that size that fit at most."""
    total = 0
    for one in types.values():
        has = one["resources"]
        fit = [has.get("CPU", 0) // cpus, *([has.get("GPU", 0) // gpus] if gpus else [])]
        total += min(fit) * one["max_workers"]
    return total


@pytest.mark.parametrize("preset", SCALING, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", CLOUDS)
def test_every_scaling_preset_fits_the_node_types(name, preset):
    values = yaml.safe_load(preset.read_text())
    workers = max(value for key, value in values.items() if key.endswith("_workers"))
    defaults = ScalingConfig()
    cpus = values.get("cpus_per_worker", defaults.cpus_per_worker)
    assert workers <= capacity(node_types(name), cpus, int(values.get("use_gpu", defaults.use_gpu)))


def test_what_does_not_fit_is_seen():
    assert capacity(node_types("aws-gpu"), 4.0, 1) == 8
    assert capacity(node_types("aws-gpu"), 16.0, 1) == 0


def instance_cpus(node_config: dict[str, Any]) -> int:
    """CPUs by the name of the machine type."""
    if name := node_config.get("machineType"):
        return int(name.rsplit("-", 1)[1])
    size = node_config["InstanceType"].split(".")[1]
    return {"large": 2, "xlarge": 4}.get(size) or 4 * int(size.removesuffix("xlarge"))


@pytest.mark.parametrize("name", ["aws-gpu", "gcp-gpu"])
def test_declared_cpus_are_those_of_the_machine_type(name):
    for key, node_type in node_types(name).items():
        if key != "head":
            assert node_type["resources"]["CPU"] == instance_cpus(node_type["node_config"]), key


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds_start_from_a_head_that_computes_nothing(name):
    types = node_types(name)
    head = types.pop(next(key for key in types if key.startswith("head")))
    assert head["resources"].get("CPU") == 0
    assert head["resources"].get("GPU", 0) == 0
    assert {key: one["min_workers"] for key, one in types.items()} == {"driver": 0, "gpu": 0}
    assert types["driver"]["resources"]["driver"] == 1
    assert types["driver"]["max_workers"] == 1


@pytest.mark.parametrize("name", ["aws-gpu", "gcp-gpu"])
def test_launched_clouds_ask_for_a_token_and_keep_no_disk(name):
    config = launched(read(name))
    assert config["provider"]["cache_stopped_nodes"] is False
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--num-cpus=0" in config["head_start_ray_commands"][1]


def test_only_gpu_nodes_are_spot():
    aws, gcp = (launched(read(name))["available_node_types"] for name in ("aws-gpu", "gcp-gpu"))
    assert [key for key, one in aws.items() if "InstanceMarketOptions" in one["node_config"]] == ["gpu"]
    assert [key for key, one in gcp.items() if "scheduling" in one["node_config"]] == ["gpu"]
    cluster = cluster_of(next(item for item in objects(read("kuberay")) if item["kind"] == "RayCluster"))
    selected = {one["groupName"]: one["template"]["spec"]["nodeSelector"] for one in cluster["workerGroupSpecs"]}
    assert [key for key, one in selected.items() if one["karpenter.sh/capacity-type"] == "spot"] == ["gpu"]


def test_the_head_pod_has_no_secret_and_the_others_take_it_from_kubernetes():
    cluster = cluster_of(next(item for item in objects(read("kuberay")) if item["kind"] == "RayCluster"))
    secrets = {
        name: [one["name"] for one in pod.get("env", []) if "valueFrom" in one] for name, pod in pods(cluster).items()
    }
    assert secrets == {"head": [], "driver": ["E2H_SECRET"], "gpu": ["E2H_SECRET"]}
    assert cluster["authOptions"] == {"mode": "token"}


def test_a_kubernetes_job_brings_its_cluster_and_removes_it():
    cluster, job = (
        next(one for one in objects(read("kuberay")) if one["kind"] == kind) for kind in ("RayCluster", "RayJob")
    )
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    config = check_job(job["spec"]["entrypoint"].split()[1:])
    assert config.privacy.secret == "env:E2H_SECRET"
    assert config.run.storage.startswith("s3://")


def locked(package: str) -> str:
    pins = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    return pins[package]


def test_ray_is_the_locked_one_everywhere():
    named = re.findall(
        r'rayproject/ray:([\d.]+)|rayVersion: "([\d.]+)"', (CLUSTERS / "Dockerfile").read_text() + read("kuberay")
    )
    assert {first or second for first, second in named} == {locked("ray")}
    assert len(named) == 2


def header(text: str) -> str:
    """The comment at the top, as text."""
    lines = re.match(r"(#.*\n)+", text)
    assert lines is not None
    return re.sub(r"(?m)^# ?", "", lines[0])


@pytest.mark.parametrize("name", [*LAUNCHED, "kuberay"])
def test_the_commands_at_the_top_exist(name):
    """From the indented lines: `ray`'s commands and options, and the settings of a job."""
    lines = [line for line in header(read(name)).splitlines() if line.startswith("  ")]
    assert check_commands("\n".join(lines)) >= (1 if name == "kuberay" else 4)


def test_the_commands_of_the_guide_to_clusters_exist():
    blocks = re.findall(r"(?s)```sh[^\n]*\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text())
    assert sum(check_commands(block) for block in blocks) >= 8


@pytest.mark.parametrize(
    "command",
    [
        "ray job submit --adress http://127.0.0.1:8265 -- python jobs/pipeline.py",
        "ray job send -- python jobs/pipeline.py",
        "ray job submit -- python jobs/pipelin.py",
        "ray job submit --working-dir . -- python jobs/pipeline.py scalling=gpu8",
        "export A=1; ray start --hed",
    ],
)
def test_a_typo_in_a_command_is_caught(command):
    with pytest.raises(Exception, match=r"no such|scalling"):
        check_commands(command)
