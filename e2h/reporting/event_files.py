"""TensorBoard's event files, without what TensorBoard's own writer adds: the second it was made, host and process."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from e2h.data import filesystem
from e2h.data.remote import Place

FLUSH_EVERY_S = 10.0


class EventFile:
    """A new file of a TensorBoard directory, the next after those that are there.

    Args:
      folder: on this machine, and there.
      target: where the directory lies in the end; `folder`, or one in a bucket with the files of earlier writers.
      clock: seconds since 1970 that an event made now may tell.
    """

    def __init__(self, folder: Path, target: Place, clock: Callable[[], float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import summary  # half a second to import: only who writes pays
        self._event, self._summary, self._clock = Event, summary, clock
        self._file = _next_file(folder, _number_of_files(target))
        self._records, self._flushed = RecordWriter(self._file), time.monotonic()
        self._write(file_version="brain.Event:2")

    def scalar(self, name: str, value: float, step: int) -> None:
        self._write(summary=self._summary.scalar(name, value), step=step)

    def image(self, name: str, array: NDArray[np.uint8], step: int) -> None:
        """One image, uint8 [H, W, C]."""
        self._write(summary=self._summary.image(name, array, dataformats="HWC"), step=step)

    def text(self, name: str, words: str) -> None:
        self._write(summary=self._summary.text(name, words))

    def settings(self, values: Mapping[str, Any], name: str) -> None:
        """A row of the HParams view; `name` is the number that it ends in."""
        for one in self._summary.hparams(dict(values), {name: None}):
            self._write(summary=one)

    def _write(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=self._clock(), **content).SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


def _number_of_files(folder: Place) -> int:
    try:
        return sum("/" not in name and "tfevents" in name for name, _ in filesystem.list_files(folder))
    except FileNotFoundError:  # of a bucket, where nothing has been copied to
        return 0


def _next_file(folder: Path, number: int) -> Any:
    """TensorBoard reads files in the order of their names."""
    while True:
        try:
            return open(folder / f"events.out.tfevents.{number:010d}.e2h", "xb")
        except FileExistsError:  # another process has just made it
            number += 1
