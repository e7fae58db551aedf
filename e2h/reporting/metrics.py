"""Metrics whose release class is declared once, here, and can't be chosen where they are written.

*Sensitive*: computed on private data without noise. *Releasable*: a differentially private output, post-processing of
one, or a public setting. The time that a private step takes depends on how many records were drawn, so throughput of
DP-SGD is sensitive, and events in the releasable directory carry the hour only.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from e2h.config import NOT_PRIVATE
from e2h.data import filesystem
from e2h.data.remote import Place, place, scratch_folder
from e2h.reporting.event_files import EventFile

ROWS = "metrics.jsonl"
COPY_EVERY_S = 30.0


class ReleaseClass(StrEnum):
    """Who may see a number or a file."""

    RELEASABLE = "releasable"
    SENSITIVE = "sensitive"


class Metric(NamedTuple):
    """Declaration of one name; `unit` "image" is for `MetricWriter.image`, all others for `scalar`."""

    release_class: ReleaseClass
    title: str
    unit: str


_FREE, _SECRET = ReleaseClass.RELEASABLE, ReleaseClass.SENSITIVE

METRICS: dict[str, Metric] = {
    "central/grid": Metric(_FREE, "Central images", "image"),
    "frequency/grid": Metric(_FREE, "Images of the generator", "image"),
    "warmup/loss": Metric(_FREE, "Warm-up loss on the images of the easy stage", ""),
    "warmup2/loss": Metric(_FREE, "Warm-up loss on the images of the second easy stage", ""),
    "synthetic/grid": Metric(_FREE, "Synthetic images", "image"),
    "finetune/loss": Metric(_SECRET, "DP-SGD loss on the private images", ""),
    "finetune/clipped_fraction": Metric(_SECRET, "Share of clipped gradients", "share"),
    "finetune/mean_norm": Metric(_SECRET, "Mean gradient norm before the clip", ""),
    "finetune/batch_size": Metric(_SECRET, "Records drawn for a step", "records"),
    "evaluation/logistic_regression": Metric(_SECRET, "Accuracy of logistic regression on real images", "share"),
    "evaluation/mlp": Metric(_SECRET, "Accuracy of the perceptron on real images", "share"),
    "evaluation/cnn": Metric(_SECRET, "Accuracy of the CNN on real images", "share"),
    "evaluation/frechet": Metric(_SECRET, "Frechet distance to the real images", ""),
}


class MetricWriter:
    """Writes to `tb/releasable` or `tb/sensitive` (owner-only) as declared, and appends to `metrics.jsonl`.

    A run may open several writers one after the other (resume): all of them append. Use it as a context manager.
    For a run in a bucket, where nothing can be appended to, files grow on this machine and are copied there every now
    and then.
    """

    def __init__(self, run_dir: str | os.PathLike[str], not_private: bool = False) -> None:
        """Opens the run's metrics.

        Args:
          run_dir: an existing run directory, local or s3://.
          not_private: stamps every row and both TensorBoard directories.
        """
        self._not_private = not_private
        self._target, self._copied = place(run_dir), time.monotonic()
        self._folder = _local_folder(self._target)
        self._writers = {kind: self._event_file(kind, kind) for kind in ReleaseClass}
        self._rows = _open_append(self._folder / ROWS)
        if not_private:
            for writer in self._writers.values():
                writer.text("NOT_PRIVATE", NOT_PRIVATE)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Records one number.

        Raises:
          ValueError: if `name` is not declared as a scalar in `METRICS`.
        """
        metric, number = _declared(name, image=False), float(value)
        self._writers[metric.release_class].scalar(tag(name), number, step)
        # JSON knows no NaN or infinity: null says that there was a step without a usable number.
        self._append(name, metric, number if math.isfinite(number) else None, step)

    def image(self, name: str, array: NDArray[np.uint8], step: int) -> None:
        """Records one image, uint8 [H, W, C]; its row in `metrics.jsonl` holds the shape.

        Raises:
          ValueError: if `name` is not declared as an image in `METRICS`.
        """
        metric = _declared(name, image=True)
        self._writers[metric.release_class].image(name, array, step)
        self._append(name, metric, list(array.shape), step)

    def trial(self, name: str, values: Mapping[str, Any], score: float) -> None:
        """One row of TensorBoard's HParams view: what a trial of a search tried, and its score; both are releasable.

        Only of trials that are paid for or read public images, and of the best one.
        """
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in values.items()}
        writer = self._event_file(ReleaseClass.RELEASABLE, f"{ReleaseClass.RELEASABLE}/trials/{name}")
        writer.settings(plain, "search/score")
        writer.scalar("search/score", score, 0)
        writer.close()

    def _event_file(self, release_class: ReleaseClass, folder: str) -> EventFile:
        path = self._folder / "tb" / folder
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if release_class is ReleaseClass.SENSITIVE:
            path.chmod(0o700)
        return EventFile(path, self._target / "tb" / folder, partial(_event_time, release_class))

    def _append(self, name: str, metric: Metric, value: object, step: int) -> None:
        kind = str(metric.release_class)
        row = {"name": name, "value": value, "step": int(step), "class": kind, "time": time.time()}
        if self._not_private:
            row["not_private"] = True
        # One write call a line: lines of several processes don't mix.
        os.write(self._rows, (json.dumps(row) + "\n").encode())
        if self._folder != self._target and time.monotonic() - self._copied > COPY_EVERY_S:
            for writer in self._writers.values():
                writer.flush()
            self._copy()

    def _copy(self) -> None:
        names = [name for name, _ in filesystem.list_files(self._folder)]
        filesystem.copy_files(self._folder, self._target, names)
        self._copied = time.monotonic()

    def close(self) -> None:
        """Flushes and closes all files."""
        for writer in self._writers.values():
            writer.close()
        os.close(self._rows)
        if self._folder != self._target:
            self._copy()
            filesystem.remove(self._folder)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def tag(name: str) -> str:
    """What TensorBoard calls a number: its name and, where there is one, its unit."""
    unit = METRICS[name].unit
    return f"{name} ({unit})" if unit not in ("", "image") else name


def _declared(name: str, image: bool) -> Metric:
    metric = METRICS.get(name)
    if metric is None or (metric.unit == "image") != image:
        expected = ", ".join(known for known, entry in METRICS.items() if (entry.unit == "image") == image)
        raise ValueError(f"metric={name}: expected one of {expected}; declare it with its release class in METRICS")
    return metric


def _local_folder(run_dir: Place) -> Path:
    """Where files can grow: the run directory, or a new folder with the rows that a remote one has so far."""
    if isinstance(run_dir, Path):
        return run_dir
    folder = Path(tempfile.mkdtemp(prefix="metrics-", dir=scratch_folder(run_dir)))
    if (run_dir / ROWS).exists():
        filesystem.copy_files(run_dir, folder, [ROWS])
    return folder


def _event_time(release_class: ReleaseClass) -> float:
    """Seconds since 1970; rounded down to the hour for releasable events, so that no step's duration can be read."""
    return time.time() if release_class is ReleaseClass.SENSITIVE else time.time() // 3600 * 3600


def _open_append(path: Path) -> int:
    """Opens `path` for appending, owner-only; a line that a crash tore is closed, so that the next one is whole."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
    return descriptor


def read_curves(run_dir: str | os.PathLike[str]) -> dict[str, list[tuple[int, float]]]:
    """Numbers of `metrics.jsonl` as (step, value) by declared name, sorted by step.

    A step written twice (resume) counts with its last value; torn lines, images and undeclared names are left out.
    """
    path = Path(run_dir) / ROWS
    curves: dict[str, dict[int, float]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            name, step, value = row["name"], row["step"], row["value"]
        except (ValueError, KeyError, TypeError):
            continue
        if name in METRICS and isinstance(value, int | float):
            curves.setdefault(name, {})[int(step)] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}
