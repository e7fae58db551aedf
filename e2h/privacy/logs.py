"""Append-only logs of lines: a file, or one object a line in an S3 bucket.

Both let exactly one of several writers append at a position, and return only when the line is durable.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from e2h import s3
from e2h.errors import BudgetError, InputError, is_disk_full
from e2h.privacy.chain import ConflictError, is_record

OBJECT_DIGITS = 12
PROBE = ".probe"


def open_log(location: str | os.PathLike[str]) -> FileLog | ObjectLog:
    """The log of a local path, or of `s3://bucket/prefix`."""
    place = os.fspath(location)
    return ObjectLog(place) if place.startswith("s3://") else FileLog(Path(os.path.expanduser(place)))


class FileLog:
    """One file on a POSIX file system with locks; NFS 4 has them."""

    def __init__(self, path: Path) -> None:
        self.path, self.location = path, str(path)

    def read(self) -> list[bytes]:
        with self._explained():
            if not self.path.exists():
                return []
        with self._opened(os.O_RDONLY, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            whole, _ = self._split(file.read())
        return whole.split(b"\n")[:-1]

    def append(self, line: bytes, position: int) -> None:
        with self._opened(os.O_RDWR | os.O_CREAT | os.O_APPEND, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            whole, torn = self._split(file.read())
            if whole.count(b"\n") != position:
                raise ConflictError
            if torn:
                os.ftruncate(file.fileno(), len(whole))
            try:
                _write(file, line + b"\n")
                if position == 0:
                    _sync_folder(self.path.parent)
            except OSError:
                # A full disk: take the line back, so that nothing half-written stays.
                os.ftruncate(file.fileno(), len(whole))
                raise

    @contextmanager
    def _opened(self, flags: int, mode: str) -> Iterator[IO[bytes]]:
        with self._explained():
            descriptor = os.open(self.path, flags, 0o600)
        with os.fdopen(descriptor, mode, buffering=0) as file:
            yield file

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if is_disk_full(error):
                raise
            raise InputError(
                f"ledger {self.path}: expected a file in a folder that exists and may be written ({error.strerror})"
            ) from error

    def _split(self, content: bytes) -> tuple[bytes, bytes]:
        """Whole lines, and a torn last one: never acknowledged, so it counts for nothing."""
        end = content.rfind(b"\n") + 1
        whole, torn = content[:end], content[end:]
        # A torn line is a beginning of one; a whole record with another byte for its line end was altered.
        if is_record(torn[:-1]):
            raise BudgetError(f"{self.path}: the last record's end was altered, so nothing can be spent")
        return whole, torn


def _write(file: IO[bytes], content: bytes) -> None:
    while content:
        content = content[file.write(content) :]
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes a new file's name durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ObjectLog:
    """One object a line, `PREFIX/000000000000` and on, each created only where none is (If-None-Match: *).

    Lines that were read or written are kept: an object is never written twice. Credentials, region and endpoint come
    from boto3's usual places.
    """

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        bucket, self.prefix = s3.split(self.location)
        self.bucket = s3.Bucket(bucket)
        self._lines: list[bytes] = []
        self._probed = False

    def read(self) -> list[bytes]:
        with self._explained():
            if not self._lines:
                with ThreadPoolExecutor(8) as pool:
                    self._lines = [line for line in pool.map(self._get, range(self._count())) if line is not None]
            while (line := self._get(len(self._lines))) is not None:
                self._lines.append(line)
        return list(self._lines)

    def append(self, line: bytes, position: int) -> None:
        with self._explained():
            self.probe()
            try:
                created = self._create(self._name(position), line)
            except self._lost_answers:
                # The answer is lost, the write may not be: what is there now decides.
                if self._get(position) != line:
                    raise
                created = True
            # A retried request finds its own object: it was written, and only the first answer was lost.
            if not created and self._get(position) != line:
                raise ConflictError
        if position == len(self._lines):
            self._lines.append(line)

    def probe(self) -> None:
        """Refuses a store that ignores If-None-Match: there two writers could take one position.

        Raises:
          InputError: then, or if the store can't be reached or written.
        """
        if self._probed:
            return
        with self._explained():
            # The object stays: on the next start the first of the two calls is refused, which proves the same.
            if self._create(PROBE, b"") and self._create(PROBE, b""):
                raise InputError(
                    f"ledger {self.location}: expected a store that honours If-None-Match on writes; this one ignores "
                    "it, so two processes could spend the same budget; use another store, or a file"
                )
        self._probed = True

    @property
    def _lost_answers(self) -> tuple[type[Exception], ...]:
        from botocore.exceptions import ClientError, HTTPClientError

        return (ClientError, HTTPClientError)

    def _name(self, position: int) -> str:
        return f"{position:0{OBJECT_DIGITS}d}"

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def _create(self, name: str, content: bytes) -> bool:
        """False if the object is there already, or another write to it is under way."""
        return self.bucket.put(self._key(name), content, IfNoneMatch="*")

    def _get(self, position: int) -> bytes | None:
        return self.bucket.get(self._key(self._name(position)))

    def _count(self) -> int:
        """Objects from the first on, by a listing: a gap means that some were deleted."""
        pages = self.bucket.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket.name, Prefix=f"{self.prefix}/"
        )
        names = {entry["Key"].rpartition("/")[2] for page in pages for entry in page.get("Contents", [])}
        found = {int(name) for name in names if name.isdigit() and len(name) == OBJECT_DIGITS}
        missing = sorted(set(range(max(found, default=-1) + 1)) - found)
        if missing:
            raise BudgetError(
                f"{self.location}: record {missing[0]} is missing; the ledger was altered, so nothing can be spent"
            )
        return len(found)

    def _explained(self) -> AbstractContextManager[None]:
        advice = "what was not confirmed was not used: run the same command again"
        return s3.explained(f"ledger {self.location}", advice)
