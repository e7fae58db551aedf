"""How far training is, as rank 0 leaves it for the driver's status line, `jobs/status.py` and Prometheus."""

from __future__ import annotations

import json
import time
from contextlib import suppress

from e2h.config import Config
from e2h.data.filesystem import write_bytes
from e2h.data.remote import Place, S3Path
from e2h.distributed.monitor import Monitor

PROGRESS_FILE = "progress.json"
EVERY_S = 0.5
TO_BUCKET_EVERY_S = 5.0


class Progress:
    """One for each start of the worker group, on rank 0.

    Args:
      path: a file in the run directory. The driver removes it before training, so one that is there was left by the
        group before this one.
      watched: the run's configuration, for its gauges; none for a trial of a search, whose number may be a secret.
    """

    def __init__(self, path: Place, watched: Config | None) -> None:
        self.path, self.written = path, 0.0
        self.interval = TO_BUCKET_EVERY_S if isinstance(path, S3Path) else EVERY_S
        before = read_progress(path)
        self.restarts = 0 if before is None else before[2] + 1
        self.monitor = Monitor(path.parent, watched, self.restarts) if watched else None
        self._write("", 0)

    def update(self, stage: str, step: int) -> None:
        """Call it after each finished step."""
        if self.monitor:
            self.monitor.update(stage, step)
        now = time.monotonic()
        if now - self.written >= self.interval:
            self.written = now
            self._write(stage, step)

    def _write(self, stage: str, step: int) -> None:
        content = {"stage": stage, "step": step, "restarts": self.restarts}
        with suppress(OSError):  # that nobody can watch is no reason to end a run
            write_bytes(self.path, json.dumps(content).encode())


def read_progress(path: Place) -> tuple[str, int, int] | None:
    """Stage ("" before the first step), finished steps, and restarts of the group; None if that can't be read now."""
    try:
        found = json.loads(path.read_text())
        return str(found["stage"]), int(found["step"]), int(found["restarts"])
    except (OSError, ValueError, KeyError, TypeError):  # not there yet; in a bucket, replaced this moment
        return None
