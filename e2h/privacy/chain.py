"""A hash chain of records over an append-only log: whoever alters, drops or inserts one is noticed.

A record is a line of canonical JSON with its own SHA-256 and that of the line before. Writers are optimistic: read,
decide, append at the position that was read. A log that grew meanwhile answers `ConflictError`, and the writer reads
and decides anew, so no decision rests on an old state. Times are for readers; nothing is decided by a clock.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from e2h import s3
from e2h.errors import BudgetError, InputError

Record = dict[str, Any]
GENESIS = "0" * 64
VERSION = 2
# Among racing writers one succeeds each time, so this many failures mean something else.
ATTEMPTS = 1000
LONGEST_WAIT_S = 0.5


class ConflictError(Exception):
    """The log is no longer as long as its writer thought: read again."""


class Log(Protocol):
    """Where lines are kept; see `e2h.privacy.logs`."""

    location: str

    def read(self) -> list[bytes]:
        """All lines, without line ends."""

    def append(self, line: bytes, position: int) -> None:
        """Adds a line, durable when it returns; `ConflictError` if the log does not hold `position` lines."""


Witness = os.PathLike[str]  # a file, or s3://bucket/key


class Chain:
    """The records of a log, verified at each reading.

    Args:
      log: where they are kept.
      witness: a small file or object that holds the length and head that was last seen, so that a cut tail or a
        deleted object is noticed; None where there is no such place.
      begins_anew: whether an empty log is a new beginning although the witness saw records.
    """

    def __init__(self, log: Log, witness: Witness | None = None, begins_anew: bool = True) -> None:
        self.log, self.witness, self.begins_anew = log, witness, begins_anew
        self._memory = None if witness is None else _memory(os.fspath(witness))
        self._known: tuple[list[bytes], list[Record]] = [], []

    def read(self) -> list[Record]:
        """All records.

        Raises:
          BudgetError: if one was altered or is missing.
        """
        # The witness first: what it saw then must be in what is read now, while others go on appending.
        seen = self._seen()
        lines = self.log.read()
        records = self._verified(lines)
        if seen and (lines or not self.begins_anew) and _head(lines[: seen[0]], min(seen[0], len(lines))) != seen:
            raise BudgetError(
                f"{self.log.location}: expected the {seen[0]} records that {self.witness} saw; some are missing, so "
                "nothing can be spent"
            )
        return records

    def append(self, decide: Callable[[list[Record]], Record | None]) -> bool:
        """Appends the record that `decide` makes of all records so far; it is asked again after a conflict.

        Args:
          decide: answers the new record's content, or None for nothing to append; raises to refuse.

        Returns:
          Whether a record was appended; it is durable then.
        """
        for attempt in range(ATTEMPTS):
            records = self.read()
            content = decide(records)
            if content is None:
                return False
            line = next_line(records, content)
            try:
                self.log.append(line, len(records))
            except ConflictError:
                time.sleep(random.uniform(0, min(LONGEST_WAIT_S, 0.002 * 2 ** min(attempt, 10))))
                continue
            self._testify(len(records) + 1, line)
            return True
        raise InputError(f"{self.log.location}: {ATTEMPTS} attempts to append failed; nothing was spent, try again")

    def head(self) -> tuple[int, str]:
        """Number of records and SHA-256 of the last one: published, so that a cut tail can be noticed."""
        records = self.read()
        return _head([encode(records[-1])] if records else [], len(records))

    def _verified(self, lines: list[bytes]) -> list[Record]:
        """The records of lines; those that are, byte for byte, what was verified before are not verified again."""
        known_lines, known = self._known
        start = len(known) if lines[: len(known)] == known_lines else 0
        self._known = lines, [*known[:start], *_verified(lines, start, self.log.location)]
        return list(self._known[1])

    def _seen(self) -> tuple[int, str] | None:
        content = self._memory.read() if self._memory else None
        if content is None:
            return None
        try:
            length, head = json.loads(content)
        except (ValueError, TypeError) as error:
            raise BudgetError(f"{self.witness}: expected the ledger's length and head; remove it") from error
        return length, head

    def _testify(self, length: int, line: bytes) -> None:
        """After the record: a kill in between leaves a witness of fewer records, which the log satisfies."""
        if self._memory:
            self._memory.replace(json.dumps(_head([line], length)).encode())


class _FileMemory:
    """A witness on a file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> bytes | None:
        return self.path.read_bytes() if self.path.exists() else None

    def replace(self, content: bytes) -> None:
        temporary = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}.tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


class _ObjectMemory:
    """A witness in a bucket, where an object is read and replaced by one request."""

    def __init__(self, location: str) -> None:
        self.location = location
        bucket, self.key = s3.split(location)
        self.bucket = s3.Bucket(bucket)

    def read(self) -> bytes | None:
        with s3.explained(self.location):
            return self.bucket.get(self.key)

    def replace(self, content: bytes) -> None:
        with s3.explained(self.location):
            self.bucket.put(self.key, content)


def _memory(location: str) -> _FileMemory | _ObjectMemory:
    return _ObjectMemory(location) if location.startswith("s3://") else _FileMemory(Path(location))


def encode(record: Record) -> bytes:
    """A line: canonical JSON that carries the SHA-256 of all its other entries."""
    content = {name: value for name, value in record.items() if name != "sha256"}
    body = json.dumps(content, sort_keys=True, separators=(",", ":"))
    own = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, sort_keys=True, separators=(",", ":")).encode()


def is_record(line: bytes) -> bool:
    """Whether a line is a whole record, whatever its place."""
    try:
        return line == encode(json.loads(line))
    except (ValueError, AttributeError):
        return False


def next_line(records: Sequence[Record], content: Record) -> bytes:
    """The line that goes on after `records`. Its nonce tells a writer its own line from an equal one."""
    _, previous = _head([encode(records[-1])] if records else [], len(records))
    place = {"v": VERSION, "seq": len(records), "prev": previous}
    return encode({**place, "time": round(time.time(), 3), "nonce": secrets.token_hex(8), **content})


def _head(lines: Sequence[bytes], length: int) -> tuple[int, str]:
    return length, hashlib.sha256(lines[-1]).hexdigest() if lines else GENESIS


def _verified(lines: Sequence[bytes], start: int, location: str) -> list[Record]:
    """The records from `start` on; those before are known to be right."""
    records, previous = [], _head(lines[:start], start)[1]
    for number, line in enumerate(lines[start:], start):
        try:
            record = json.loads(line)
            intact = line == encode(record) and record["prev"] == previous and record["seq"] == number
            version = record["v"]
        except (ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise BudgetError(
                f"{location}: record {number} does not continue the chain; the ledger was altered, so nothing can be "
                "spent"
            )
        if version != VERSION:
            raise InputError(f"{location}: expected a ledger of version {VERSION}, found {version}; use a new run.name")
        records.append(record)
        previous = hashlib.sha256(line).hexdigest()
    return records
