"""A prepared split as uncompressed files on a node's own disk, mapped by all its workers."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from e2h.data import filesystem
from e2h.data.storage import BATCH, ImageSet, Prepared, iter_batches
from e2h.errors import InputError


def map_split(prepared: Prepared, split: str, cache_folder: str | os.PathLike[str]) -> ImageSet:
    """A split whose images stay on disk: reading an image costs page faults only, processes of a node share the pages.

    The first call writes ids with labels, then images, as uncompressed .npy files whose names carry the digest of the
    rows, which it verifies. Of several processes that ask at once, one writes and the others wait.

    Args:
      prepared: where to read.
      split: `train` or `test`.
      cache_folder: local; created owner-only if absent.

    Returns:
      ids and labels in memory, images mapped read-only.

    Raises:
      InputError: where the disk has no room, or a file is not what was written.
    """
    path = Path(cache_folder).absolute() / f"{split}-{prepared.manifest.digest[:32]}.npy"
    shape, records = prepared.shape(split), path.with_suffix(".records.npy")
    if not path.exists() or not records.exists():
        filesystem.make_folder(path.parent)
        with _only_writer(path):
            if not path.exists() or not records.exists():
                _check_room(path, prepared, split)
                _write_npy(path, records, prepared, split)
    ids, labels = _map_npy(records, (2, shape[0]), np.int64)
    return ImageSet(np.array(ids), np.array(labels), _map_npy(path, shape, np.uint8))


@contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Waits until no other process of this machine writes `path`; removes what a killed one left half-written."""
    lock = path.with_name(f".{path.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, filesystem.OWNER_ONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # the system gives it back when a process dies
        for left in path.parent.glob(f".{path.stem}.*.tmp"):
            left.unlink()
        yield
    finally:
        os.close(descriptor)


def _check_room(path: Path, prepared: Prepared, split: str) -> None:
    needed, free = math.prod(prepared.shape(split)), shutil.disk_usage(path.parent).free
    if needed > free:
        raise InputError(
            f"folder={path.parent}: expected {needed} bytes of free disk for the images of {split}, found {free}; "
            "make room, then run the same command again"
        )


def _map_npy(path: Path, shape: tuple[int, ...], kind: type[np.generic]) -> np.ndarray:
    try:
        # An empty file can't be mapped.
        array = np.load(path, mmap_mode="r" if math.prod(shape) else None)
    except (ValueError, EOFError) as error:
        raise InputError(f"file={path}: expected a .npy file ({error}); delete it") from error
    if array.shape != shape or array.dtype != kind:
        raise InputError(f"file={path}: expected {kind.__name__} of shape {shape}; delete it")
    return array


def _write_npy(path: Path, records: Path, prepared: Prepared, split: str) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": prepared.shape(split)}
    known, start = np.empty((2, prepared.shape(split)[0]), np.int64), 0
    # Written, not mapped: a full disk then raises an error instead of killing the process.
    with filesystem.atomic_writer(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for batch in iter_batches(prepared.files(split), BATCH):
            file.write(batch.images.tobytes())
            known[:, start : start + len(batch)] = batch.ids, batch.labels
            start += len(batch)
        with filesystem.atomic_writer(records) as file:
            np.save(file, known)
