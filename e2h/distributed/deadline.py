"""An end to waiting for workers: Ray Train by itself tries for ever to start a group that can't be started.

It also gives a worker that answers nothing any more half a minute to take leave of its group.
"""

from __future__ import annotations

import os
import time

from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    SchedulingState,
    TrainControllerState,
)

from e2h.errors import InputError

WITHOUT_WORKERS = (InitializingState, RestartingState, SchedulingState, ReschedulingState)
PAUSE_S = 0.5
LEAVE_S = 5


class StartDeadline(ControllerCallback):
    """Ends a training that has had no group of workers for too long; runs in Ray Train's controller.

    Args:
      limit_s: how long a group may take to start, at the beginning and after each loss.
      refusal: the message of the `InputError` that then ends the training.
    """

    def __init__(self, limit_s: float, refusal: str) -> None:
        self.limit_s, self.refusal = limit_s, refusal
        self.since: float | None = None

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        # Here, as Ray hands this variable on to nobody.
        os.environ.setdefault(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, str(LEAVE_S))

    def after_controller_state_update(self, previous: TrainControllerState, current: TrainControllerState) -> None:
        if not isinstance(current, WITHOUT_WORKERS):
            self.since = None
            return
        self.since = self.since or time.monotonic()
        if time.monotonic() - self.since >= self.limit_s:
            raise InputError(self.refusal)
        if type(previous) is type(current):
            time.sleep(PAUSE_S)  # nothing changed: the controller of an elastic group asks again without a pause
