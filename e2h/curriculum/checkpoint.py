"""Checkpoints of training: atomic, bound to the run's configuration, read without executing anything.

They are written while training goes on. A kill loses the one being written, and the run goes on from the one before:
steps are addressed, so those that are taken again give the same bits.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from e2h.data.filesystem import write_bytes
from e2h.data.remote import Place
from e2h.errors import InputError

FORMAT = "e2h-checkpoint-2"  # ends with the SHA-256 of what is before: torch reads a changed bit without a word
# A kill costs at most a minute of work: so much, and a quarter of a minute to write it.
EVERY_S = 45.0
DIGEST_BYTES = hashlib.sha256().digest_size
KEYS = {"format", "binding", "stage", "step", "state"}


class Checkpoints:
    """The folder `checkpoints/` of a run; keeps the newest two of each stage.

    Args:
      folder: created if absent, owner-only.
      binding: digest of what the weights depend on; a checkpoint of another binding is refused.
      leaving: whether a machine of the group was given notice, asked on every worker with the number of steps made.
    """

    def __init__(self, folder: Place, binding: str, leaving: Callable[[int], bool] = lambda step: False) -> None:
        self.folder, self.binding, self.leaving = folder, binding, leaving
        self.saved = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def due(self, step: int, every: int, last: int) -> bool:
        """Whether to save the state after `step` steps; call it on every worker after each step.

        Always after the last step. Otherwise after `every` steps, when `EVERY_S` have passed, or as often as can be
        once a machine of the group must leave; but never while one is being written: no step waits for the store.
        """
        leaving = self.leaving(step)
        if step == last:
            return True
        if self._writing is not None and not self._writing.done():
            return False
        return leaving or step % every == 0 or time.monotonic() - self.saved >= EVERY_S

    def save(self, stage: str, step: int, state: dict[str, Any]) -> None:
        """Writes the state after `step` steps of a stage: begun when it returns, durable after the next `wait`.

        Raises:
          OSError: that the one before could not be written.
        """
        self.wait()
        self.saved = time.monotonic()
        content = {"format": FORMAT, "binding": self.binding, "stage": stage, "step": step, "state": state}
        buffer = io.BytesIO()
        torch.save(content, buffer)  # in memory: on a full disk torch's writer hides the reason
        self._writing = self._thread.submit(self._write, stage, step, buffer.getvalue())

    def wait(self) -> None:
        """Returns when the last checkpoint is durable; raises what kept it from being."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, stage: str, step: int, content: bytes) -> None:
        for left in self.folder.glob(f".{stage}-*.tmp"):  # by a writer that was killed
            left.unlink(missing_ok=True)
        write_bytes(self._path(stage, step), content + hashlib.sha256(content).digest())
        for old in self._paths(stage)[:-2]:
            old.unlink(missing_ok=True)

    def latest(self, stage: str) -> tuple[int, dict[str, Any]] | None:
        """The newest (step, state) of a stage, or None.

        Raises:
          InputError: if the file isn't a checkpoint of this run.
        """
        self.wait()
        paths = self._paths(stage)
        if not paths:
            return None
        content = self._load(paths[-1])
        if content["binding"] != self.binding:
            raise InputError(f"{paths[-1]}: expected a checkpoint of this configuration and data; use a new run.name")
        return content["step"], content["state"]

    def _load(self, path: Place) -> dict[str, Any]:
        try:
            whole = path.read_bytes()
            written, digest = whole[:-DIGEST_BYTES], whole[-DIGEST_BYTES:]
            if hashlib.sha256(written).digest() != digest:
                raise InputError(
                    f"{path}: expected a checkpoint that e2h wrote, of this version; go on with the version that it is "
                    "of, or remove it if it is damaged"
                )
            content = torch.load(io.BytesIO(written), map_location="cpu", weights_only=True)
        except (OSError, InputError):
            raise
        except Exception as error:  # a damaged pickle fails in a dozen ways
            raise InputError(
                f"{path}: expected a checkpoint that e2h wrote; it can't be read safely, remove it"
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT or not content.keys() >= KEYS:
            raise InputError(f"{path}: expected a checkpoint that e2h wrote; remove it")
        return content

    def _paths(self, stage: str) -> list[Place]:
        return sorted(self.folder.glob(f"{stage}-*.pt"))

    def _path(self, stage: str, step: int) -> Place:
        return self.folder / f"{stage}-{step:08d}.pt"
