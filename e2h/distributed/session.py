"""A Ray session that leaves the user's terminal alone: one machine's own Ray, or the cluster that runs the job."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from e2h.config import ScalingConfig
from e2h.distributed.console import say, working

# Ray reads these when it is imported, in this process and in those it starts.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # a worker that answers nothing for so long is replaced
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "NONE",
    "PYTHONWARNINGS": "ignore",
}
# There a machine may have to be bought first, and may be taken away: its notice is looked for every second.
ON_A_CLUSTER = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
LOCAL_OBJECT_STORE_BYTES = 200 * 2**20


@contextmanager
def session(scaling: ScalingConfig, log: Path) -> Iterator[None]:
    """Connects to the cluster of RAY_ADDRESS, or starts Ray on this machine; stops what it started.

    Args:
      scaling: how many workers must fit.
      log: where Ray's own messages go instead of the terminal; replaced.

    Raises:
      InputError: if the cluster can never hold the workers.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with _stderr_to(log):
        import ray

        started_here = not ray.is_initialized()
        if started_here:
            with working("ray", "starting"):
                _start(scaling)
        try:
            from e2h.distributed.capacity import check_capacity

            _quiet_data()
            check_capacity(scaling)
            yield
        finally:
            if started_here:
                ray.shutdown()


@contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """File descriptor 2 goes to a file: Ray's C++ core and its child processes write there, past Python.

    `sys.stderr` still writes to where descriptor 2 went before.
    """
    terminal, python_stderr = os.dup(2), sys.stderr
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stderr = io.TextIOWrapper(os.fdopen(terminal, "wb", buffering=0, closefd=False), write_through=True)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        sys.stderr = python_stderr


def _start(scaling: ScalingConfig) -> None:
    import ray

    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if os.environ.get("RAY_ADDRESS"):
            for name, value in ON_A_CLUSTER.items():
                os.environ.setdefault(name, value)
            _say_where(ray.init(**common).dashboard_url)
            return
        cpus = max(os.cpu_count() or 1, round(scaling.num_workers * scaling.cpus_per_worker))
        ray.init(
            address="local",
            num_cpus=cpus,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=False,
            # Ray would show them to the whole network, and nobody on one machine collects them.
            _system_config={"enable_metrics_collection": False},
            **common,
        )


def _say_where(dashboard: str | None) -> None:
    from e2h.distributed.nodes import describe_nodes

    say("ray", (f"http://{dashboard}, " if dashboard else "") + describe_nodes())


def _quiet_data() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It shows the traceback and the number of a trial that is tried again; a selection keeps numbers to itself.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
