"""Builds `release/`, the only folder of a run to publish, from a list of allowed names."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from e2h.config import NOT_PRIVATE
from e2h.errors import InputError
from e2h.reporting import facts
from e2h.reporting.card import card
from e2h.reporting.check import PRIVATE_KEYS, content_problems, ledger_problems
from e2h.reporting.report import count_images, released_figures, render


def publish(run_dir: str | os.PathLike[str], ledger_head: tuple[int, str] | None = None) -> Path:
    """Builds `release/` in a temporary folder beside it, checks it, and puts it in place of an older one.

    Args:
      run_dir: a run whose synthetic images and final weights exist.
      ledger_head: number of records of the run's ledger and SHA-256 of the last, so that a cut tail can be noticed.

    Returns:
      The path of the release folder.

    Raises:
      InputError: if something is missing, or if `check` finds a problem; an older release then stays as it was.
    """
    run_dir = Path(run_dir)
    building, release, old = run_dir / ".release-building", run_dir / "release", run_dir / ".release-old"
    if old.exists() and not release.exists():
        old.rename(release)  # killed between the two renames below
    shutil.rmtree(building, ignore_errors=True)
    try:
        _build(run_dir, building, ledger_head)
        problems = [*content_problems(building), *ledger_problems(building)]
        if problems:
            raise InputError(f"release: expected nothing private in it, found {'; '.join(problems)}")
        _replace(building, release, old)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return release


def _replace(new: Path, release: Path, old: Path) -> None:
    """Puts `new` in place of `release`; a folder can't be replaced in one call, so the older one steps aside first."""
    shutil.rmtree(old, ignore_errors=True)
    if release.exists():
        release.rename(old)
    new.rename(release)
    shutil.rmtree(old, ignore_errors=True)


def _build(run_dir: Path, target: Path, ledger_head: tuple[int, str] | None) -> None:
    plan, config = facts.read_json(run_dir / "plan.json"), facts.read_config(run_dir)
    tables = sorted((run_dir / "synthetic").glob("*.parquet"))
    weights, grid = run_dir / "checkpoints" / "model.safetensors", run_dir / "synthetic" / "grid.png"
    for path in (weights, grid, *(tables or [run_dir / "synthetic" / "part-00000.parquet"])):
        if not path.is_file():
            name = path.relative_to(run_dir)
            raise InputError(f"{name}: expected this file in the run directory; finish the run before publishing")
    num_bytes = sum(path.stat().st_size for path in tables)
    _write(target / "README.md", card(plan, config, count_images(run_dir), num_bytes))
    _write(target / "ledger.json", json.dumps(ledger(plan, ledger_head), indent=2) + "\n")
    _write(target / "config.yaml", yaml.safe_dump(public_config(config), sort_keys=False))
    _write(target / "report.html", render(run_dir, internal=False))
    for chart, drawing in released_figures(run_dir).items():
        warned = drawing.file(NOT_PRIVATE if plan["not_private"] else None)
        _write(target / "figures" / f"{chart}.svg", warned.decode())
    _copy(weights, target / "model.safetensors")
    _copy(grid, target / "grid.png")
    for path in tables:
        _copy(path, target / "data" / path.name)


def ledger(plan: Mapping[str, Any], head: tuple[int, str] | None = None) -> dict[str, Any]:
    """The published ledger: what was spent, enough to recompute epsilon, and nothing else of the plan."""
    same = ("epsilon", "delta", "target_epsilon", "neighbouring_relation", "accountant", "accountant_version")
    found = {key: plan[key] for key in same}
    found["releases"] = [{key: entry[key] for key in ("name", "event", "epsilon_alone")} for entry in plan["releases"]]
    found |= {"n_is_public": plan["n_is_public"], "tuning": plan.get("tuning")}
    if head is not None:
        found["ledger_head"] = {"records": head[0], "sha256": head[1]}
    return found | ({"not_private": True} if plan["not_private"] else {})


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without `PRIVATE_KEYS`."""
    found = copy.deepcopy(dict(config))
    for *sections, key in PRIVATE_KEYS:
        holder = found
        for section in sections:
            holder = holder.get(section, {})
        holder.pop(key, None)
    return found


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _copy(source: Path, path: Path) -> None:
    """Copies content only: the owner-only mode of a run's file would hide it from the readers of a release."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with open(source, "rb") as reader, open(path, "wb") as writer:
        shutil.copyfileobj(reader, writer)
        writer.flush()
        os.fsync(writer.fileno())
