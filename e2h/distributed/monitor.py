"""Prometheus gauges of a run, on the metrics port of the node that rank 0 runs on, beside Ray's own.

They are for the owner, inside the cluster: whoever scrapes them sees how long each private step took, and that depends
on the records drawn (docs/guarantee.md, section 9).
"""

from __future__ import annotations

import time
from typing import Any

from e2h.config import EASY_STAGES, Config, warmups
from e2h.data.remote import Place
from e2h.errors import InputError
from e2h.reporting.facts import read_json

# Prometheus knows them as ray_e2h_...
GAUGES = {
    "e2h_epsilon_spent": "Epsilon charged so far, all stages together, rounded up to the plan's next point; releasable",
    "e2h_steps_done": "Finished steps of the stage; sensitive by its times",
    "e2h_images_per_second": "Expected batch size x steps a second; sensitive in the stage finetune",
    "e2h_worker_group_restarts": "How often the workers were started anew; public",
}
RATE_OVER_S = 5.0


class Monitor:
    """The gauges of one run, tagged with its name and the stage.

    Args:
      root: the run directory, with plan.json.
      config: of the run.
      restarts: how often the group of workers was started anew.
    """

    def __init__(self, root: Place, config: Config, restarts: int) -> None:
        from ray.util.metrics import Gauge  # Ray is imported where it is used: the session sets it up before

        plan = _plan(root)
        self.batch = {name: settings.batch_size for name, (_, settings) in warmups(config).items()}
        self.batch["finetune"] = config.finetune.expected_batch_size
        self.block, self.schedule = config.finetune.ledger_block, plan["epsilon_schedule"]
        self.before = sum(one["epsilon_alone"] for one in plan["releases"] if one["name"] in EASY_STAGES)
        self.restarts, self.rate_from = restarts, ("", 0, 0.0)
        self.gauges = {name: Gauge(name, text, ("run", "stage")) for name, text in GAUGES.items()}
        for gauge in self.gauges.values():
            gauge.set_default_tags({"run": root.name})

    def update(self, stage: str, step: int) -> None:
        """Sets the gauges after a finished step; throughput once there are some seconds of steps."""
        if self.schedule:
            self._set("e2h_epsilon_spent", self._charged(step) if stage == "finetune" else self.before, stage)
        self._set("e2h_steps_done", step, stage)
        self._set("e2h_worker_group_restarts", self.restarts, stage)
        now = time.monotonic()
        last_stage, last_step, since = self.rate_from
        if stage != last_stage:
            self.rate_from = stage, step, now
        elif now - since >= RATE_OVER_S:
            self._set("e2h_images_per_second", self.batch[stage] * (step - last_step) / (now - since), stage)
            self.rate_from = stage, step, now

    def _charged(self, step: int) -> float:
        # Steps are charged in blocks before they are taken: a block more covers what the ledger holds.
        return epsilon_after(self.schedule, step + self.block)

    def _set(self, name: str, value: float, stage: str) -> None:
        self.gauges[name].set(value, {"stage": stage})


def _plan(root: Place) -> dict[str, Any]:
    """plan.json. Where that can't be read there is no gauge of epsilon: not to be watched is no reason to end a run."""
    try:
        return read_json(root / "plan.json")
    except InputError:
        return {"epsilon_schedule": [], "releases": []}


def epsilon_after(schedule: list[tuple[int, float]], step: int) -> float:
    """The plan's next (steps, epsilon) point: never below what so many steps have cost."""
    return next((epsilon for paid, epsilon in schedule if paid >= step), schedule[-1][1])
