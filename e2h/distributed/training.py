"""Ray Train: the curriculum's worker loop on 1 to N workers, restarted by Ray where one is lost or more can be had."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

import ray.train
import torch
from ray.exceptions import RayError
from ray.train import ControllerError
from ray.train.torch import TorchConfig
from ray.train.v2.api import config as ray_config  # ray.train names the same classes, but with the types of old ones
from ray.train.v2.torch.torch_trainer import TorchTrainer

from e2h.config import ScalingConfig
from e2h.curriculum.run import Run
from e2h.curriculum.train import forget_mapped, train
from e2h.curriculum.workers import Workers
from e2h.data.filesystem import remove, write_bytes
from e2h.data.remote import Place, S3Path, escaped
from e2h.distributed.capacity import START_TIMEOUT, start_timeout_s
from e2h.distributed.deadline import StartDeadline
from e2h.distributed.failures import budget_refusal, refusal
from e2h.distributed.nodes import on_each_node
from e2h.distributed.progress import PROGRESS_FILE, Progress
from e2h.errors import BudgetError, InputError
from e2h.privacy.events import Release
from e2h.reporting.metrics import MetricWriter

RESIZE_EVERY_S = 30.0  # a group that grows does the work since its last checkpoint again
ELASTIC_ATTEMPT_S = 20.0
# Ray's answer takes 2 ms with one worker and 26 ms with 64, while the shortest notice that clouds give is 30 s.
ASK_EVERY_S, ASK_EVERY_STEPS = 1.0, 16


def train_on_workers(run: Run, release: Release, until: int | None = None) -> None:
    """Warms up and fine-tunes on the workers of `scaling`; returns when the weights are written.

    Args:
      run: with what `e2h.curriculum.train.train` asks for.
      release: the accounted DP-SGD event.
      until: DP-SGD steps after which to stop; none: all.

    Raises:
      InputError, BudgetError: what a worker refused, or that no group of workers could be started in time.
    """
    note, storage = run.refusal, run.root / "ray"
    note.unlink(missing_ok=True)
    remove(storage)  # Ray's notes of a driver that was killed
    try:
        _fit(run, release, until, escaped(storage))
    except Exception as error:
        with suppress(OSError):  # nor can a note be read from a store that is away
            _raise_noted(note)
        _raise_refusal(error)
        raise
    finally:
        with suppress(OSError):  # the error itself tells more, and the next call removes what is left
            remove(storage)
    _raise_noted(note)
    if isinstance(run.root, S3Path):
        # Also where a worker was that is not in the last group. The run does not fail by what it leaves there.
        with suppress(RayError):
            on_each_node(lambda: forget_mapped(run))


def _fit(run: Run, release: Release, until: int | None, storage: str) -> None:
    """Trains to the end. Ray restarts a group that lost a worker, but gives up when one is lost while it starts."""
    for left in reversed(range(run.config.scaling.max_failures + 1)):
        try:
            trainer = _trainer(run, release, until, storage)
            with _short_attempts(run.config.scaling):
                _interruptible(trainer.fit)
            return
        except ControllerError as error:
            if left == 0 or isinstance(error.controller_failure, InputError):
                raise error.controller_failure from None


def _interruptible(work: Callable[[], object]) -> None:
    """Runs `work` in a thread: in the main one Ray Train takes Ctrl-C for itself, and ends a minute later, silent."""
    outcome: Future[object] = Future()

    def do() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=do, name="fit", daemon=True).start()
    outcome.result()


def _trainer(run: Run, release: Release, until: int | None, storage: str) -> TorchTrainer:
    scaling = run.config.scaling
    callbacks: list[Any] = [_deadline(scaling)]
    return TorchTrainer(
        _worker,
        train_loop_config={"run": run, "release": release, "until": until},
        scaling_config=_scaling(scaling),
        run_config=ray_config.RunConfig(
            name=f"train-{int(time.time() * 1000)}",
            storage_path=storage,
            # Machines that are taken away with notice are nobody's failure.
            failure_config=ray_config.FailureConfig(max_failures=scaling.max_failures, max_preemption_failures=-1),
            callbacks=callbacks,
        ),
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
    )


def _deadline(scaling: ScalingConfig) -> StartDeadline:
    limit, name, fewest = start_timeout_s(), "num_workers", scaling.num_workers
    if scaling.min_workers is not None:
        name, fewest = ("min_workers", scaling.min_workers)
    return StartDeadline(
        limit,
        f"scaling.{name}={fewest}: expected room for so many workers within {limit:g} s ({START_TIMEOUT}); give the "
        "cluster more nodes, then run the same command again: it goes on from the last checkpoint",
    )


@contextmanager
def _short_attempts(scaling: ScalingConfig) -> Iterator[None]:
    """An elastic group starts on nodes that are there: where one of them just died, a smaller group is tried soon."""
    before = os.environ.get(START_TIMEOUT)
    if scaling.min_workers is not None:
        os.environ[START_TIMEOUT] = f"{ELASTIC_ATTEMPT_S:g}"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(START_TIMEOUT, None)
        else:
            os.environ[START_TIMEOUT] = before


def _raise_noted(note: Place) -> None:
    if note.exists():
        refused = json.loads(note.read_text())
        note.unlink()
        raise {"budget": BudgetError, "input": InputError}[refused["kind"]](refused["message"]) from None


def _scaling(scaling: ScalingConfig) -> ray_config.ScalingConfig:
    """A fixed group, or one that Ray starts anew, from the last checkpoint, when there is room for more workers."""
    fewest = scaling.min_workers
    return ray_config.ScalingConfig(
        num_workers=scaling.num_workers if fewest is None else (fewest, scaling.num_workers),
        elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
        use_gpu=scaling.use_gpu,
        resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})},
    )


def _raise_refusal(error: BaseException) -> None:
    if message := budget_refusal(error):
        raise BudgetError(message) from None
    if message := refusal(error):
        raise InputError(message) from None


class _Notice:
    """Whether a machine of the group was given notice; it goes on until then, with a checkpoint as often as can be.

    Ray answers when all workers have asked, so they ask about once a second, all after the same steps: how many steps
    they take until then is what rank 0 says.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers, self._given = workers, False
        self._asked, self._interval, self._time = math.inf, 1, 0.0

    def __call__(self, step: int) -> bool:
        """Call it on every worker after each step with the number of steps made."""
        since = step - self._asked
        if 0 < since < self._interval:
            return self._given
        self._given = ray.train.get_preemption_info() is not None
        now = time.monotonic()
        # Where another stage began, at step 1, nobody knows yet how long a step takes.
        a_step_s = (now - self._time) / since if since > 0 else math.inf
        self._interval = self._agreed(a_step_s)
        self._asked, self._time = step, now
        return self._given

    def _agreed(self, a_step_s: float) -> int:
        """Steps until the next question, the same on every worker."""
        own = max(1, min(ASK_EVERY_STEPS, int(ASK_EVERY_S / max(a_step_s, 1e-9))))
        agreed = torch.tensor([own if self._workers.rank == 0 else 0], device=self._workers.device)
        self._workers.sum_integers(agreed)
        return int(agreed)


def _worker(config: dict[str, Any]) -> None:
    """One worker. A refusal goes into a note for the driver and ends the group: a group started anew reads it too."""
    run: Run = config["run"]
    note = run.refusal
    if note.exists():
        return
    workers = Workers.current(ray.train.torch.get_device())
    metrics = MetricWriter(run.root, run.config.privacy.test_mode) if workers.rank == 0 else None
    watched = run.config if run.common is None else None
    progress = Progress(run.root / PROGRESS_FILE, watched) if workers.rank == 0 else None
    try:
        train(
            run,
            config["release"],
            workers,
            metrics.scalar if metrics else lambda name, value, step: None,
            progress.update if progress else lambda stage, step: None,
            _Notice(workers),
            config["until"],
        )
    except Exception as error:
        kind, message = ("budget", one) if (one := budget_refusal(error)) else ("input", refusal(error))
        if message is None:
            raise
        with suppress(OSError):  # on a full disk the error itself must do
            write_bytes(note, json.dumps({"kind": kind, "message": message}).encode())
        # Raised, so that workers who wait for this one in a reduction are stopped by Ray.
        raise (BudgetError if kind == "budget" else InputError)(message) from error
    finally:
        if metrics:
            metrics.close()
