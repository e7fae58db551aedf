"""The run directory: where each stage's files lie, what the run is bound to, and which stages are done."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import e2h
from e2h.config import Config, binding, differences, digest, run_name
from e2h.data.filesystem import write_bytes
from e2h.errors import InputError
from e2h.privacy.accounting import epsilon
from e2h.privacy.keys import TEST_SECRET, create_secret, derive_key, load_secret
from e2h.privacy.ledger import Ledger
from e2h.privacy.plan import code_digest

PACKAGES = ("torch", "numpy", "opacus", "dp-accounting", "pyarrow", "cryptography")


@dataclass(frozen=True)
class Run:
    """One run on local or shared storage; every artefact's path comes from here."""

    root: Path
    config: Config

    @property
    def prepared(self) -> Path:
        return self.root / "prepared"

    @property
    def central(self) -> Path:
        return self.root / "central"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.checkpoints / "model.safetensors"

    @property
    def synthetic(self) -> Path:
        return self.root / "synthetic"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def release(self) -> Path:
        return self.root / "release"

    @property
    def ledger(self) -> Ledger:
        witness = self.root.parent / ".secrets" / f"{self.root.name}.head"
        return Ledger(self.root / "ledger.jsonl", lambda releases, delta: epsilon(releases, delta).epsilon, witness)

    @property
    def secret_reference(self) -> str:
        """Where the master secret lies: apart from the run directory, which people copy and publish from."""
        return self.config.privacy.secret or f"file:{self.root.parent / '.secrets' / (self.root.name + '.key')}"

    def secret(self) -> bytes:
        """The master secret; in test mode a published one."""
        return TEST_SECRET if self.config.privacy.test_mode else load_secret(self.secret_reference)

    @property
    def training_binding(self) -> str:
        """Digest of all settings that the weights depend on."""
        kept = ("data", "model", "privacy", "central", "warmup", "finetune", "seed")
        return digest({key: value for key, value in binding(self.config).items() if key in kept})

    def domain(self, event: dict[str, Any], dataset_digest: str, fingerprint: str) -> str:
        """Names everything that determines a release bit for bit (see `e2h.privacy.ledger`).

        Keyed, because the ledger keeps it: without the secret it tells nothing about the data.
        """
        parts = [self.training_binding, code_digest(), event, dataset_digest, fingerprint]
        return derive_key(self.secret(), "domain", digest(parts)).hex()

    def done(self, stage: str) -> bool:
        """Whether a stage of this very configuration has finished."""
        path = self._marker(stage)
        return path.exists() and json.loads(path.read_text())["binding"] == digest(binding(self.config))

    def bind(self) -> None:
        """From now on only this configuration may go on with the run: what was prepared depends on it."""
        write_bytes(self.root / "binding.json", json.dumps(binding(self.config), indent=2).encode())

    def mark_done(self, stage: str) -> None:
        content = json.dumps({"stage": stage, "binding": digest(binding(self.config))})
        write_bytes(self._marker(stage), content.encode())

    def _marker(self, stage: str) -> Path:
        folders = {
            "prepare": self.prepared,
            "central": self.central,
            "train": self.checkpoints,
            "sample": self.synthetic,
        }
        return folders[stage] / "_SUCCESS.json"


def run_root(config: Config) -> Path:
    if "://" in config.run.storage:
        raise InputError(
            f"run.storage={config.run.storage}: expected a local folder, or one shared by NFS 4; the ledger needs "
            "locks and appends that an object store does not give; the data itself may lie at data.path=s3://..."
        )
    return Path(config.run.storage).expanduser().resolve() / run_name(config)


@contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Opens or resumes the run of a configuration, alone.

    Raises:
      InputError: if the directory holds a run of another configuration, or another process is running it.
    """
    run = Run(run_root(config), config)
    check_binding(run.root, config)
    try:
        run.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        advice = f"{error.strerror}: {error.filename}; choose another"
        raise InputError(f"run.storage={config.run.storage}: expected a folder to write to ({advice})") from error
    with _only_one(run.root / ".lock"):
        check_binding(run.root, config)
        (run.root.parent / ".secrets").mkdir(exist_ok=True, mode=0o700)
        if not config.privacy.test_mode and config.privacy.secret is None:
            create_secret(Path(run.secret_reference.removeprefix("file:")))
        run.secret()
        _describe(run)
        yield run


def check_binding(root: Path, config: Config) -> None:
    """Raises `InputError` if the folder holds a run of another configuration."""
    path = root / "binding.json"
    if not path.exists():
        return
    changed = differences(json.loads(path.read_text()), json.loads(json.dumps(binding(config))))
    if changed:
        shown = ", ".join(f"{name} is {new} and was {old}" for name, old, new in changed)
        raise InputError(
            f"run.name={root.name}: expected the configuration that this run began with, but {shown}; "
            f"change it back to resume, or choose a new name: run.name={root.name}-2"
        )


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            f"run.name={path.parent.name}: another process is running it; wait, or use a new run.name"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


def _describe(run: Run) -> None:
    """config.yaml, command.txt, environment.json."""
    values = json.loads(json.dumps(binding(run.config)))
    write_bytes(run.root / "config.yaml", yaml.safe_dump(values, sort_keys=False).encode())
    write_bytes(run.root / "command.txt", (shlex.join(["python", *sys.argv]) + "\n").encode())
    packages = {name: version(name) for name in PACKAGES}
    environment = {
        "e2h": e2h.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **packages,
    }
    write_bytes(run.root / "environment.json", json.dumps(environment, indent=2).encode())
