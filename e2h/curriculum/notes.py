"""What a run's folder says of itself: how it is made (settings, command, packages), and whether it may go on."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import yaml

import e2h
from e2h.binding import binding, differences
from e2h.config import Config
from e2h.data.filesystem import store_refusal, write_bytes
from e2h.data.remote import Place
from e2h.errors import InputError, is_disk_full, one_line

PACKAGES = ("torch", "numpy", "opacus", "dp-accounting", "pyarrow", "cryptography")


def describe(root: Place, config: Config) -> None:
    """Writes config.yaml, command.txt and environment.json into a run directory."""
    values = json.loads(json.dumps(binding(config)))
    write_bytes(root / "config.yaml", yaml.safe_dump(values, sort_keys=False).encode())
    write_bytes(root / "command.txt", (shlex.join(["python", *sys.argv]) + "\n").encode())
    packages = {name: version(name) for name in PACKAGES}
    environment = {
        "e2h": e2h.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **packages,
    }
    write_bytes(root / "environment.json", json.dumps(environment, indent=2).encode())


@contextmanager
def usable(config: Config) -> Iterator[None]:
    """Around what reads and writes `run.storage` alone; a full disk says so by itself.

    Raises:
      InputError: in place of any other error of the system or the store.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        reason = f"{error.strerror}: {error.filename}" if error.filename else one_line(error)
        expectation = f"expected a folder to write to ({reason}; choose another, or another run.name)"
        raise InputError(f"run.storage={config.run.storage}: {store_refusal(error) or expectation}") from error


def check_binding(root: Place, config: Config) -> None:
    """Raises `InputError` if the folder holds a run of another configuration, or can't be read."""
    path = root / "binding.json"
    with usable(config):
        content = path.read_bytes() if path.exists() else None
    if content is None:
        return
    try:
        bound = json.loads(content)
        changed = differences(bound, json.loads(json.dumps(binding(config))))
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: expected the configuration that this run began with; the file is damaged: restore it, or choose "
            f"a new name: run.name={root.name}-2"
        ) from error
    if changed:
        shown = ", ".join(f"{name} is {new} and was {old}" for name, old, new in changed)
        raise InputError(
            f"run.name={root.name}: expected the configuration that this run began with, but {shown}; "
            f"change it back to resume, or choose a new name: run.name={root.name}-2"
        )
