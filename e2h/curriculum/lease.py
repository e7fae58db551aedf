"""One driver a run: a file lock where the run lies in a folder, a renewed object where it lies in a bucket.

What is held here keeps two drivers from writing each other's files. The budget does not hang on it: of two drivers the
ledger lets the newest alone spend.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from e2h import s3
from e2h.data.remote import Place, S3Path
from e2h.errors import InputError

NAME = ".lock"
RENEWED_EVERY_S = 10.0
STALE_AFTER_S = 60.0  # a holder that did not renew for so long is gone
SURELY_STALE_S = STALE_AFTER_S + 2 * RENEWED_EVERY_S  # after its death, wherever its files lie
ASK_EVERY_S = 2.0


@contextmanager
def only_driver(root: Place, patience_s: float = 0.0) -> Iterator[None]:
    """Holds the run's lease while the block runs.

    Args:
      patience_s: how long to ask again where it can't be had.

    Raises:
      InputError: if another process holds it, or the store gives no conditional writes.
    """
    deadline = time.monotonic() + patience_s
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(_locked(root / NAME) if isinstance(root, Path) else _leased(root / NAME))
                break
            except InputError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(ASK_EVERY_S)
        yield


def holder(root: Place) -> str | None:
    """Who holds the run's lease at this moment, in words; None if nobody does. Nothing is written or kept.

    Raises:
      InputError: if the store can't be reached.
    """
    path = root / NAME
    if isinstance(path, Path):
        return _lock_holder(path)
    with s3.explained(str(root)):
        return _lease_holder(path)


def _lock_holder(path: Path) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # Shared, and for an instant: whoever looks at the same time is not told of a holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 1000).decode(errors="replace").strip() or "just started"
    finally:
        os.close(descriptor)
    return None


def _lease_holder(path: S3Path) -> str | None:
    store = s3.client()
    try:
        name, silent = _seen(store.get_object(Bucket=path.bucket, Key=path.key))
    except store.exceptions.NoSuchKey:
        return None
    return f"{name}, seen {silent:.0f} s ago" if silent < STALE_AFTER_S else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = path.read_text().strip()
        os.close(descriptor)
        raise _held(path, holder or "just started") from error
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{_self()}\n".encode())
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _leased(path: S3Path) -> Iterator[None]:
    lease = _Lease(path)
    with s3.explained(str(path.parent)):
        lease.take()
    stop = threading.Event()
    thread = threading.Thread(target=lease.renew_until, args=(stop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        lease.give_up()


class _Lease:
    """An object whose version (ETag) only its holder knows how to replace."""

    def __init__(self, path: S3Path) -> None:
        self.path, self.store, self.version = path, s3.client(), ""
        self.content = f"{_self()} {secrets.token_hex(8)}".encode()

    def take(self) -> None:
        """Creates the object, or replaces one that its holder no longer renews."""
        if self._put(IfNoneMatch="*"):
            return
        found = self.store.get_object(Bucket=self.path.bucket, Key=self.path.key)
        name, silent = _seen(found)
        if silent < STALE_AFTER_S or not self._put(IfMatch=found["ETag"]):
            raise _held(self.path, f"{name}, seen {silent:.0f} s ago")

    def renew_until(self, stop: threading.Event) -> None:
        while not stop.wait(RENEWED_EVERY_S):
            # A store that is away for a moment is no reason to end a run; nor is a lease lost to another driver: the
            # ledger refuses this one's next charge and says who took over.
            with suppress(Exception):
                self._put(IfMatch=self.version)

    def give_up(self) -> None:
        with suppress(Exception):  # else it goes stale by itself
            if self._put(IfMatch=self.version):
                self.store.delete_object(Bucket=self.path.bucket, Key=self.path.key)

    def _put(self, **condition: str) -> bool:
        version = s3.put(self.store, self.path.bucket, self.path.key, self.content, **condition)
        self.version = version or self.version
        return version is not None


def _seen(found: dict[str, Any]) -> tuple[str, float]:
    """The holder that a lease names, and the seconds since it was renewed."""
    name = found["Body"].read().decode(errors="replace").rpartition(" ")[0]
    return name, s3.age(found, found["LastModified"])


def _self() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _held(path: Place, holder: str) -> InputError:
    name = path.parent.name
    return InputError(f"run.name={name}: another process ({holder}) is running it; wait, or use a new run.name")
