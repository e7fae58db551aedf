"""Ray Train: the curriculum's worker loop on 1 to N workers, restarted by Ray where one is lost."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from e2h.curriculum.run import Run
from e2h.curriculum.train import train
from e2h.curriculum.workers import Workers
from e2h.data.filesystem import remove, write_bytes
from e2h.data.remote import Place
from e2h.distributed.failures import budget_refusal, refusal
from e2h.distributed.progress import PROGRESS_FILE, Progress
from e2h.errors import BudgetError, InputError
from e2h.privacy.events import Release
from e2h.reporting.metrics import MetricWriter


def train_on_workers(run: Run, release: Release) -> None:
    """Warms up and fine-tunes on `scaling.num_workers` workers; returns when the final weights are written.

    Raises:
      InputError, BudgetError: what a worker refused.
    """
    note = run.refusal
    note.unlink(missing_ok=True)
    storage = run.root / "ray"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"run": run, "release": release},
        scaling_config=_scaling(run),
        run_config=RunConfig(
            name=f"train-{int(time.time() * 1000)}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=run.config.scaling.max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if run.config.scaling.use_gpu else "gloo"),
    )
    try:
        trainer.fit()
    except Exception as error:
        _raise_noted(note)
        _raise_refusal(error)
        raise
    finally:
        remove(storage)
    _raise_noted(note)


def _raise_noted(note: Place) -> None:
    if note.exists():
        refused = json.loads(note.read_text())
        note.unlink()
        raise {"budget": BudgetError, "input": InputError}[refused["kind"]](refused["message"]) from None


def _scaling(run: Run) -> ScalingConfig:
    scaling = run.config.scaling
    return ScalingConfig(
        num_workers=scaling.num_workers,
        use_gpu=scaling.use_gpu,
        resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})},
    )


def _raise_refusal(error: BaseException) -> None:
    if message := budget_refusal(error):
        raise BudgetError(message) from None
    if message := refusal(error):
        raise InputError(message) from None


def _worker(config: dict[str, Any]) -> None:
    """One worker. A refusal goes into a note for the driver and ends the group: a group started anew reads it too."""
    run: Run = config["run"]
    note = run.refusal
    if note.exists():
        return
    workers = Workers.current(ray.train.torch.get_device())
    metrics = MetricWriter(run.root, run.config.privacy.test_mode) if workers.rank == 0 else None
    progress = Progress(run.root / PROGRESS_FILE) if workers.rank == 0 else None
    try:
        train(
            run,
            config["release"],
            workers,
            metrics.scalar if metrics else lambda name, value, step: None,
            progress.update if progress else lambda stage, step: None,
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
