"""How far training is, as rank 0 leaves it for others to read: the driver's status line, and `jobs/status.py`."""

from __future__ import annotations

import json
import time

from e2h.data.filesystem import write_bytes
from e2h.data.remote import Place, S3Path

PROGRESS_FILE = "progress.json"
EVERY_S = 0.5
TO_BUCKET_EVERY_S = 5.0


class Progress:
    """Where the driver's status line reads from."""

    def __init__(self, path: Place) -> None:
        self.path, self.written = path, 0.0
        self.interval = TO_BUCKET_EVERY_S if isinstance(path, S3Path) else EVERY_S

    def update(self, stage: str, step: int) -> None:
        now = time.monotonic()
        if now - self.written >= self.interval:
            self.written = now
            write_bytes(self.path, json.dumps({"stage": stage, "step": step}).encode())
