"""What a run leaves for its readers: with which settings, which command and which packages it was made."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from importlib.metadata import version

import yaml

import e2h
from e2h.binding import binding
from e2h.config import Config
from e2h.data.filesystem import write_bytes
from e2h.data.remote import Place

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
