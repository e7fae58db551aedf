"""Which stages of a run are done, by the files that it has; for `e2h.reporting.status`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Stage:
    """A stage of the run; `state` is `done`, `running`, `stopped`, `not begun` or `off`.

    `done` of `total` are steps, or shards of images; None where nothing is counted.
    """

    name: str
    state: str
    done: int | None = None
    total: int | None = None


def stages(
    known: Mapping[str, Any], names: Mapping[str, Any], finished: Mapping[str, bool], at: tuple[str, int], held: bool
) -> list[Stage]:
    """All stages in their order.

    Args:
      known: the run's settings, as `Status.config`.
      names: files of the run directory, by relative name.
      finished: by stage with a `_SUCCESS.json`, whether that is there, with its product, and of this configuration.
      at: stage and step by the progress file; ("", 0) without one.
      held: whether a process holds the run; then the first stage that is not done is running.
    """
    shards = known["num_shards"]
    parts = sum(name.startswith("synthetic/part-") for name in names)
    found = [
        _stage("prepare", finished["prepare"], _any(names, "prepared")),
        *([_stage("search", "search.json" in names, _any(names, "trials/"))] if known["search"] else []),
        *(_stage(stage, finished[stage], _any(names, f"{stage}/")) for stage in known["easy_stages"]),
        *_training(known, names, finished["train"], at),
        _stage("sample", finished["sample"] and parts == shards, parts > 0, done=parts, total=shards),
        _stage("evaluate", "evaluation.json" in names, False, on=known["evaluation"]),
        _stage("publish", {"report.html", "release/ledger.json"} <= names.keys(), _any(names, "release/")),
    ]
    waiting = next((stage for stage in found if stage.state not in ("done", "off")), None)
    if waiting is not None and held:
        waiting.state = "running"
    return found


def checkpoint_step(names: Mapping[str, Any], stage: str) -> int:
    """Steps that the newest checkpoint of a training stage holds; 0 if there is none."""
    found = (re.fullmatch(rf"checkpoints/{stage}-(\d{{8}})\.pt", name) for name in names)
    return max((int(one[1]) for one in found if one), default=0)


def _training(known: Mapping[str, Any], names: Mapping[str, Any], trained: bool, at: tuple[str, int]) -> list[Stage]:
    totals = {**known["warmup_steps"], "finetune": known["finetune_steps"]}
    steps = {stage: at[1] if stage == at[0] else checkpoint_step(names, stage) for stage in totals}
    private = trained or at[0] == "finetune" or steps["finetune"] > 0
    ends = {stage: private or steps[stage] >= total for stage, total in totals.items()} | {"finetune": trained}
    shown = {stage: total if ends[stage] else steps[stage] for stage, total in totals.items()}
    return [
        _stage(stage, ends[stage], steps[stage] > 0, done=shown[stage], total=total) for stage, total in totals.items()
    ]


def _stage(
    name: str, finished: bool, begun: bool, on: bool = True, done: int | None = None, total: int | None = None
) -> Stage:
    return Stage(name, "off" if not on else "done" if finished else "stopped" if begun else "not begun", done, total)


def _any(names: Mapping[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)
