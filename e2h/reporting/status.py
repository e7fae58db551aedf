"""How a run stands, from its storage alone: no Ray, nothing written, no number computed on private records.

It is for the owner all the same: ages and steps tell how long a step takes, and that depends on the records drawn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any

from e2h import s3
from e2h.binding import digest
from e2h.config import PRODUCTS, WARMUPS
from e2h.data.filesystem import is_visible
from e2h.data.remote import Place
from e2h.errors import BudgetError, InputError
from e2h.privacy.accounting import epsilon_pld
from e2h.privacy.chain import Chain, Witness
from e2h.privacy.ledger import replay
from e2h.privacy.logs import open_log
from e2h.reporting.facts import read_config
from e2h.reporting.stages import Stage, checkpoint_step, stages

# Ray's own, which change although the run stands still.
OF_RAY = ("ray.log", "ray/")


@dataclass
class Status:
    """What can be said of a run; sizes are counts, ages seconds.

    Attributes:
      config: the settings that people know a run by.
      holder: the process that runs it now, in words.
      moved: the newest file and its age, by the storage's clock.
      epsilon: `spent` (upper bound, from the ledger), `target`, `delta`; and charged steps by release.
      checkpoint: stage and step that training would go on from.
      worker_group_restarts: of the training that goes on or was killed; None where none does.
      drivers: processes that have taken over the ledger, the first included.
      ended: why the last call ended early.
      refusals: what workers refused without a driver to hear it.
      problems: files that are damaged.
      altered: whether the ledger is one of them; then nothing can be spent.
      command: the last call.
    """

    run: str
    config: dict[str, Any]
    holder: str | None = None
    moved: tuple[str, float] | None = None
    stages: list[Stage] = field(default_factory=list)
    epsilon: dict[str, float] = field(default_factory=dict)
    charged: dict[str, int] = field(default_factory=dict)
    checkpoint: tuple[str, int] | None = None
    worker_group_restarts: int | None = None
    drivers: int = 0
    ended: str | None = None
    refusals: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    altered: bool = False
    command: str = ""


def look(root: Place, witness: Witness, holder: str | None) -> Status:
    """Reads a run directory; nothing in it is changed.

    Args:
      root: the run directory.
      witness: what was last seen of the ledger.
      holder: who holds the run's lease.

    Raises:
      InputError: if there is no run, or its config.yaml is damaged.
    """
    ages = file_ages(root)
    if "config.yaml" not in ages:
        planned = "a plan alone (dry_run=true): nothing has begun" if "plan.json" in ages else "none"
        raise InputError(f"{root}: expected a run directory (runs/NAME or s3://bucket/prefix/NAME); found {planned}")
    config, known = _configuration(root)
    status = Status(str(root), known, holder)
    moving = [(age, _told(name)) for name, age in ages.items() if is_visible(name) and not name.startswith(OF_RAY)]
    status.moved = min(moving)[::-1]
    _read_ledger(status, ledger_of(root, config), witness)
    _read_notes(status, root, ages)
    _read_stages(status, root, ages, digest(config))
    return status


def _told(name: str) -> str:
    """A file's name without that of the trial it belongs to: how many trials a search has may be a secret."""
    return "trials" if name.startswith("trials/") else name


def file_ages(root: Place) -> dict[str, float]:
    """Files below a folder by relative name, with the seconds since each was written, by the storage's own clock."""
    return _local_ages(root) if isinstance(root, Path) else _object_ages(root.bucket, f"{root.key}/")


def _local_ages(root: Path) -> dict[str, float]:
    found, now = {}, time()
    for folder, _, names in os.walk(root):
        for path in (Path(folder) / name for name in names):
            try:
                found[path.relative_to(root).as_posix()] = max(0.0, now - path.lstat().st_mtime)
            except FileNotFoundError:  # replaced at this moment
                continue
    return found


def _object_ages(bucket: str, prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    with s3.explained(f"s3://{bucket}/{prefix}"):
        for page in s3.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for one in page.get("Contents", []):
                found[one["Key"].removeprefix(prefix)] = s3.age(page, one["LastModified"])
    return found


def _configuration(root: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.yaml, and what people know the run by."""
    try:
        config = read_config(root)
        return config, _known_by(config)
    except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{root / 'config.yaml'}: expected a run's configuration; the file is damaged, and the run's next call "
            "writes it anew"
        ) from error


def _known_by(config: Mapping[str, Any]) -> dict[str, Any]:
    data, privacy, finetune, sampling = (config[name] for name in ("data", "privacy", "finetune", "sampling"))
    return {
        "data": str(data["name"]),
        "image_size": int(data["image_size"]),
        "channels": int(data["channels"]),
        "epsilon": float(privacy["epsilon"]),
        "delta": float(privacy["delta"]),
        "not_private": bool(privacy["test_mode"]),
        "easy_stages": [str(stage) for stage in config["curriculum"]],
        "warmup_steps": _warmup_steps(config),
        "finetune_steps": int(finetune["num_steps"]),
        "expected_batch_size": int(finetune["expected_batch_size"]),
        "noise_multiplicity": int(finetune["noise_multiplicity"]),
        "num_images": int(sampling["num_images"]),
        "num_shards": -(-int(sampling["num_images"]) // int(sampling["images_per_shard"])),
        "evaluation": bool(config["evaluation"]["enabled"]),
        "search": (config.get("search") or {}).get("privacy"),
        "seed": int(config["seed"]),
    }


def _warmup_steps(config: Mapping[str, Any]) -> dict[str, int]:
    """Of each warm-up, by its name (`e2h.config.warmups`)."""
    of_stage = {"central": config["warmup"], "frequency": config["frequency"]["warmup"]}
    steps = [int(of_stage[stage]["num_steps"]) for stage in config["curriculum"]]
    return dict(zip(WARMUPS, steps, strict=False))


def ledger_of(root: Place, config: Mapping[str, Any]) -> str:
    """Where the ledger of a run lies, by its settings (as `Run.ledger`)."""
    settings = config.get("ledger") or {}
    elsewhere = settings.get("path") if settings.get("scope") == "run" else None
    return str(elsewhere or root / "ledger.jsonl")


def _read_ledger(status: Status, location: str, witness: Witness) -> None:
    target = {"target": status.config["epsilon"], "delta": status.config["delta"]}
    try:
        records = Chain(open_log(location), witness, begins_anew=False).read()
        state = replay(records, location)
        spent = epsilon_pld(state.charged(), target["delta"]) if state.steps else 0.0
    except (BudgetError, InputError, OSError) as error:
        status.epsilon, status.altered = target, isinstance(error, BudgetError)
        status.problems.append(str(error))
        return
    status.epsilon, status.drivers = {"spent": spent, **target}, len(state.owners)
    for release in state.charged():
        status.charged[release.name] = status.charged.get(release.name, 0) + release.event.count


def _read_notes(status: Status, root: Place, ages: Mapping[str, float]) -> None:
    if "command.txt" in ages:
        status.command = (_text(status, root / "command.txt") or "").strip()
    if "failure.txt" in ages:
        status.ended = ((_text(status, root / "failure.txt") or "").splitlines() or ["failure.txt does not say why"])[0]
    for name in sorted(name for name in ages if name.startswith("refused-")):
        if (message := _object(status, root, name).get("message")) is not None:
            status.refusals.append(str(message))


def _read_stages(status: Status, root: Place, ages: Mapping[str, float], binding: str) -> None:
    at = _object(status, root, "progress.json") if "progress.json" in ages else {}
    status.worker_group_restarts = _count(at.get("restarts")) if at else None
    saved = {stage: checkpoint_step(ages, stage) for stage in ("finetune", *reversed(WARMUPS))}
    status.checkpoint = next(((stage, step) for stage, step in saved.items() if step), None)
    marks = {stage: f"{product.partition('/')[0]}/_SUCCESS.json" for stage, product in PRODUCTS.items()}
    # As for the run itself, a mark of another configuration counts for nothing; a search has two of them, the one that
    # it began with and its best trial's.
    known = [binding] + ([digest(_object(status, root, "binding.json"))] if "binding.json" in ages else [])
    finished = {
        stage: {mark, PRODUCTS[stage]} <= ages.keys() and _object(status, root, mark).get("binding") in known
        for stage, mark in marks.items()
    }
    position = str(at.get("stage", "")), _count(at.get("step"))
    status.stages = stages(status.config, ages, finished, position, status.holder is not None)


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _text(status: Status, path: Place) -> str | None:
    """A file's text; None, and a problem noted, if it is damaged; None alone if it went since the files were listed."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        status.problems.append(f"{path.name}: expected a readable file ({type(error).__name__})")
        return None


def _object(status: Status, root: Place, name: str) -> dict[str, Any]:
    """A JSON object below the run directory; an empty one, and a problem noted, if it is damaged."""
    text = _text(status, root / name)
    if text is None:
        return {}
    with suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            return found
    status.problems.append(f"{name}: expected a JSON object; the file is damaged")
    return {}
