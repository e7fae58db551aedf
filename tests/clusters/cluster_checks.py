"""Everything about the files of clusters/ that can be checked without a cloud, a layer a function.

Each raises where its layer would refuse the file. docs/cluster.md lists what no layer here sees.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import botocore.session
import click
import ray.autoscaler
import yaml
from botocore.model import ListShape, Shape, StructureShape
from botocore.validate import ParamValidator
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job.cli import job_cli_group
from ray.scripts.scripts import cli

from e2h.config import Config
from e2h.validation import validate

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = ROOT / "clusters"
LAUNCHED = ("local", "aws-gpu", "gcp-gpu")
Node = dict[str, Any]


class RefusedError(Exception):
    """One line: where, and what is wrong."""


def read(name: str) -> str:
    return (CLUSTERS / f"{name}.yaml").read_text()


def launched(text: str) -> Node:
    """What `ray up` makes of the file, checked as far as Ray itself goes."""
    config = yaml.safe_load(text)
    known = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    # Ray lets any key of the provider pass; a mistyped one would be ignored in silence.
    for key in config["provider"]:
        if key not in known["properties"]["provider"]["properties"]:
            raise RefusedError(f"provider.{key}: unknown")
    for source in config["file_mounts"].values():
        if not source.startswith("~") and not (ROOT / source).exists():
            raise RefusedError(f"file_mounts: {source}: no such file")
    prepared = prepare_config(deepcopy(config))
    validate_config(prepared)
    for name in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for line in prepared[name]:
            check_commands(line)
    return prepared


# Commands ---------------------------------------------------------------------------------------------------------


def check_commands(text: str) -> int:
    """Every `ray ...` in some shell lines exists, options too, and every job's settings compose; returns how many."""
    found = 0
    for words in _commands(text):
        program, *rest = words
        if Path(program).name == "ray":
            check_ray(rest)
        elif Path(program).name == "python" and rest[:1] and rest[0].endswith(".py"):
            check_job(rest)
        else:
            continue
        found += 1
    return found


def _commands(text: str) -> Iterator[list[str]]:
    """The simple commands of shell lines, without what is assigned or exported before them."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                while words and re.fullmatch(r"export|sudo|\w+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def check_ray(words: list[str]) -> None:
    command: click.Command = cli
    while isinstance(command, click.Group) and words:
        name, *words = words
        group = job_cli_group if name == "job" and command is cli else command.commands.get(name)
        if group is None:
            raise RefusedError(f"ray {name}: no such command")
        command = group
    end = words.index("--") if "--" in words else len(words)
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words[:end]:
        if word.startswith("-") and word.split("=")[0] not in known:
            raise RefusedError(f"ray ... {word}: no such option")
    if words[end + 1 :]:
        check_commands(shlex.join(words[end + 1 :]))


def check_job(words: list[str]) -> Config:
    """The configuration that the words of a job's command compose."""
    script, *settings = words
    if not (ROOT / "jobs" / Path(script).name).is_file():
        raise RefusedError(f"{script}: no such job")
    ConfigStore.instance().store("schema", Config)
    with initialize_config_module("e2h.conf", version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [word for word in settings if word != "..."]))
    assert isinstance(config, Config)
    return validate(config)


# AWS --------------------------------------------------------------------------------------------------------------


@cache
def _run_instances() -> StructureShape:
    model = botocore.session.get_session().get_service_model("ec2")
    return model.operation_model("RunInstances").input_shape


def check_ec2(node_config: Node) -> None:
    """The parameters of EC2's RunInstances: names, types, and values where the API lists them."""
    parameters = {**node_config, "MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(parameters, _run_instances())
    if report.has_errors():
        raise RefusedError(report.generate_report())
    _check_enums(parameters, _run_instances(), "RunInstances")


def _check_enums(value: Any, shape: Shape, place: str) -> None:
    if isinstance(shape, StructureShape):
        for key, inner in value.items():
            _check_enums(inner, shape.members[key], f"{place}.{key}")
    elif isinstance(shape, ListShape):
        for inner in value:
            _check_enums(inner, shape.member, place)
    elif getattr(shape, "enum", None) and value not in shape.enum:
        raise RefusedError(f"{place}={value}: not one of EC2's")


# Google Cloud -----------------------------------------------------------------------------------------------------


@cache
def _compute() -> Node:
    text = files("googleapiclient").joinpath("discovery_cache", "documents", "compute.v1.json").read_text()
    return json.loads(text)["schemas"]


def check_gce(node_config: Node) -> None:
    """Compute Engine's Instance: names, types, and values where the API lists them."""
    _check_gce(node_config, {"$ref": "Instance"}, "Instance")


def _check_gce(value: Any, schema: Node, place: str) -> None:
    schema = _compute()[schema["$ref"]] if "$ref" in schema else schema
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    if not isinstance(value, types[schema["type"]]):
        raise RefusedError(f"{place}: expected {schema['type']}")
    if "enum" in schema and value not in schema["enum"]:
        raise RefusedError(f"{place}={value}: not one of {schema['enum']}")
    if isinstance(value, list):
        for inner in value:
            _check_gce(inner, schema["items"], place)
    elif isinstance(value, dict):
        for key, inner in value.items():
            known = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
            if known is None:
                raise RefusedError(f"{place}.{key}: unknown")
            _check_gce(inner, known, f"{place}.{key}")


CHECK_NODE = {"aws-gpu": check_ec2, "gcp-gpu": check_gce}


def check_launched(name: str, text: str) -> Node:
    """All layers of a file for `ray up`."""
    config = launched(text)
    if name in CHECK_NODE:
        for node_type in config["available_node_types"].values():
            CHECK_NODE[name](node_type["node_config"])
    return config
