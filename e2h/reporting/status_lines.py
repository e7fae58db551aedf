"""A run's status as lines for a terminal, and what to do next."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from e2h.config import NOT_PRIVATE
from e2h.privacy.rounding import delta_in_words
from e2h.reporting.facts import number, up
from e2h.reporting.stages import Stage
from e2h.reporting.status import Status

SILENT_AFTER_S = 600.0
# Which job makes a stage, in their order.
JOBS = {
    **{"prepare": "prepare", "central": "central", "frequency": "central"},
    **{"warmup": "train", "warmup2": "train", "finetune": "train"},
    **{"sample": "sample", "evaluate": "evaluate", "publish": "publish"},
}


def to_json(status: Status) -> dict[str, Any]:
    """One object; epsilon `spent` is an upper bound."""
    return {**asdict(status), "next": advice(status)}


def lines(status: Status) -> list[str]:
    """What a person wants to know who comes back in the morning."""
    rows = [("run", status.run), ("", configuration(status.config))]
    if status.config["not_private"]:
        rows.append(("", NOT_PRIVATE))
    rows.append(("driver", status.holder or ("none" if _finished(status) else "none: nobody is running it")))
    if status.moved:
        rows.append(("moved", f"{duration(status.moved[1])} ago ({status.moved[0]})"))
    rows += [(stage.name, _stage(stage, status.charged)) for stage in status.stages]
    rows.append(("epsilon", _epsilon(status)))
    if status.checkpoint:
        rows.append(("checkpoint", f"{status.checkpoint[0]} step {status.checkpoint[1]}"))
    rows += [("restarts", text) for text in _restarts(status)]
    rows += [("ended", status.ended)] if status.ended else []
    rows += [("refused", text) for text in status.refusals]
    rows += [("problem", text) for text in status.problems]
    rows.append(("next", advice(status)))
    return [f"{name:<10} {text}" for name, text in rows]


def configuration(known: dict[str, Any]) -> str:
    """The settings that people know a run by, in one line."""
    size = f"{known['image_size']}x{known['image_size']}x{known['channels']}"
    draws = known["noise_multiplicity"]
    batch = f"{known['expected_batch_size']} images x {draws} noise draw{'s' * (draws != 1)}"
    return (
        f"{known['data']} {size}, epsilon {number(known['epsilon'])} at delta {delta_in_words(known['delta'])}, "
        f"{known['finetune_steps']} DP-SGD steps of {batch}, {known['num_images']} synthetic images, "
        f"seed {known['seed']}"
    )


def advice(status: Status) -> str:
    """What to do next, in one line."""
    again = f"the same command again: {status.command}" if status.command else "the same command again"
    if status.altered:
        return "nothing can be spent: put the ledger back as it was, or begin another run.name"
    if status.holder:
        silent = status.moved[1] if status.moved else 0.0
        waited = f"nothing was written for {duration(silent)}: look at its log, and at Ray's (dashboard, ray.log)"
        return "wait: it goes on" if silent < SILENT_AFTER_S else waited
    if _finished(status):
        return f"publish {status.run}/release; first: python -m e2h check {status.run}/release"
    if status.refusals or (status.ended or "").startswith("refused"):
        return f"mend what was refused, then run {again}"
    if status.ended:
        return f"read {status.run}/failure.txt, then run {again}"
    return f"run {_next_job(status) or again}"


def _next_job(status: Status) -> str | None:
    """The command of the job after the one that ran last, where that one has done its part; None: the same again."""
    waiting = next(stage.name for stage in status.stages if stage.state not in ("done", "off"))
    last, wanted, order = re.search(r"jobs/(\w+)\.py", status.command), JOBS.get(waiting), list(JOBS.values())
    if last is None or wanted is None or last[1] not in order or order.index(last[1]) >= order.index(wanted):
        return None
    return status.command.replace(last[0], f"jobs/{wanted}.py", 1)


def _finished(status: Status) -> bool:
    return all(stage.state in ("done", "off") for stage in status.stages)


def duration(seconds: float) -> str:
    """Two units at most: 12 s, 3 min 4 s, 5 h 6 min, 7 d 8 h."""
    whole = round(seconds)
    for name, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length} {name} {whole % length // part} {smaller}"
    return f"{whole} s"


def _stage(stage: Stage, charged: Mapping[str, int]) -> str:
    if stage.state == "not begun" and charged.get(stage.name):
        return "stopped before its first checkpoint"
    if stage.done is None or not stage.total or stage.state in ("off", "not begun", "done"):
        return stage.state
    unit = "shard" if stage.name == "sample" else "step"
    return f"{stage.state}, {unit} {stage.done} of {stage.total}, {stage.done / stage.total:.0%}"


def _epsilon(status: Status) -> str:
    target = f"{number(status.epsilon['target'])} at delta {delta_in_words(status.epsilon['delta'])}"
    if "spent" not in status.epsilon:
        return f"unknown: the ledger can't be read (target {target})"
    steps = ", ".join(f"{name} {count}" for name, count in status.charged.items())
    return f"{up(status.epsilon['spent'])} spent of {target}" + (f"; steps charged: {steps}" if steps else "")


def _restarts(status: Status) -> list[str]:
    group, later = status.worker_group_restarts, max(status.drivers - 1, 0)
    told = [f"{group} of the worker group"] if group else []
    told += [f"{later} of the driver"] if later else []
    return [", ".join(told)] if told else []
