"""Append-only privacy ledger: a step is charged, durably, before its noise is drawn.

A JSON line a record, each with its own SHA-256 and that of the line before it, written under an exclusive lock and
synced to disk.
What is stored are events, not epsilons: a better accountant never rewrites history.

A *domain* names everything that determines a release bit for bit (key, data, code, configuration, event). Steps are a
set within a domain: a step replayed after a crash gives the same output, so it is paid once; the same step in another
domain draws other noise and is paid again. Nothing in the ledger depends on the data.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from e2h.errors import BudgetError, InputError
from e2h.privacy.events import PoissonSampledGaussian, Release

GENESIS = "0" * 64
VERSION = 1


@dataclass(frozen=True)
class Budget:
    """What all releases of the ledger together may cost, and what they are planned to be."""

    epsilon: float
    delta: float
    neighbouring_relation: str
    planned: tuple[Release, ...]


class Ledger:
    """The ledger of one run. Safe for several processes; each call reads the file anew under the lock.

    Args:
      path: the JSON-lines file; its folder must exist.
      cost: epsilon of a list of releases at the budget's delta.
      witness: a small file elsewhere that holds the ledger's length and head, so that a cut tail is noticed.
    """

    def __init__(
        self, path: Path, cost: Callable[[Sequence[Release], float], float], witness: Path | None = None
    ) -> None:
        self.path, self.cost, self.witness = path, cost, witness

    def open(self, budget: Budget) -> None:
        """Starts the ledger, or checks that it was started with this budget.

        Raises:
          InputError: if it holds another budget.
          BudgetError: if the plan costs more than the budget.
        """
        with self._locked() as file:
            lines = self._read(file)
            if not lines:
                planned_cost = self.cost(budget.planned, budget.delta)
                if planned_cost > budget.epsilon:
                    raise BudgetError(
                        f"privacy.epsilon={budget.epsilon:g}: the plan costs {planned_cost:.4g}; nothing was spent"
                    )
                self._append(file, lines, "OPEN", _budget_json(budget))
            elif (opened := _budget_from(lines[0])) != budget:
                raise InputError(f"{self.path}: expected the budget of this plan, found {opened}; use a new run.name")

    def spend(self, name: str, event: PoissonSampledGaussian, domain: str, start: int, stop: int) -> bool:
        """Charges steps [start, stop) of a release; durable when it returns.

        Args:
          name: the release.
          event: its mechanism; `count` is the planned number of steps.
          domain: hexadecimal digest of all that determines the output.
          start, stop: 0 <= start < stop <= event.count.

        Returns:
          Whether anything was charged; False for a replay of steps already paid.

        Raises:
          BudgetError: if the charge exceeds the budget; then nothing is written.
        """
        if not 0 <= start < stop <= event.count:
            raise ValueError(f"steps [{start}, {stop}): expected steps of the {event.count} that are planned")
        with self._locked() as file:
            lines = self._read(file)
            steps = set(range(start, stop)) - _steps(lines, domain, name, event)
            if not steps:
                return False
            record = {
                "release": name,
                "event": replace(event, count=1).to_json(),
                "domain": domain,
                "steps": [start, stop],
            }
            # Not this block alone: a release that can't be finished must not begin.
            self._check(lines, {**record, "steps": [0, event.count]})
            self._append(file, lines, "SPEND", record)
        return True

    def _check(self, lines: list[bytes], record: dict[str, Any]) -> None:
        if not lines:
            raise BudgetError(f"{self.path}: no budget was opened; nothing can be spent")
        budget = _budget_from(lines[0])
        after = charged([*lines, json.dumps({"kind": "SPEND", **record}).encode()])
        if _within(after, budget.planned):
            return
        total = self.cost(after, budget.delta)
        if total > budget.epsilon:
            raise BudgetError(
                f"privacy.epsilon={budget.epsilon:g}: charging {record['release']} steps {record['steps']} would bring "
                f"epsilon to {total:.4g}. Steps of another domain (other data, code, key or machine) were already "
                f"released and can't be replayed: continue where the run began, with its key, code and kind of machine"
            )

    def budget(self) -> Budget | None:
        """What the ledger was opened with."""
        with self._locked() as file:
            lines = self._read(file)
        return _budget_from(lines[0]) if lines else None

    def charged(self) -> tuple[Release, ...]:
        """All releases paid so far, equal mechanisms of one name merged.

        Raises:
          BudgetError: if the file was altered.
        """
        if not self.path.exists():
            return ()
        with self._locked() as file:
            return charged(self._read(file))

    def paid(self, name: str, domain: str) -> set[int]:
        """Steps of a release paid in a domain."""
        with self._locked() as file:
            records = [json.loads(line) for line in self._read(file)]
        spends = [r for r in records if r["kind"] == "SPEND" and r["release"] == name and r["domain"] == domain]
        return {step for record in spends for step in range(*record["steps"])}

    def head(self) -> tuple[int, str]:
        """Number of records and SHA-256 of the last one: published, so that a cut tail can be noticed."""
        with self._locked() as file:
            return _head(self._read(file))

    def _read(self, file: BinaryIO) -> list[bytes]:
        lines = _read(file, self.path)
        # An empty ledger is a run begun anew: with the old key it can only repeat what it released.
        if lines and self.witness is not None and self.witness.exists():
            try:
                length, head = json.loads(self.witness.read_text())
            except ValueError as error:
                raise BudgetError(f"{self.witness}: expected the ledger's length and head; remove it") from error
            if _head(lines[:length]) != (length, head):
                raise BudgetError(
                    f"{self.path}: expected the {length} records that {self.witness} saw; some are missing"
                )
        return lines

    def _append(self, file: BinaryIO, lines: Sequence[bytes], kind: str, content: dict[str, Any]) -> None:
        line = _append(file, lines, kind, content)
        if self.witness is not None:
            # After the record: a kill in between leaves a witness of fewer records, which the ledger satisfies.
            temporary = self.witness.with_name(f".{self.witness.name}.{os.getpid()}")
            temporary.write_text(json.dumps(_head([*lines, line])))
            temporary.replace(self.witness)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def _head(lines: Sequence[bytes]) -> tuple[int, str]:
    return len(lines), hashlib.sha256(lines[-1]).hexdigest() if lines else GENESIS


def charged(lines: Sequence[bytes]) -> tuple[Release, ...]:
    """The releases that ledger lines charge: every step of every domain counts once."""
    steps: dict[tuple[str, PoissonSampledGaussian], set[tuple[str, int]]] = {}
    for record in map(json.loads, lines):
        if record["kind"] == "SPEND":
            key = (record["release"], PoissonSampledGaussian.from_json(record["event"]))
            steps.setdefault(key, set()).update((record["domain"], step) for step in range(*record["steps"]))
    return tuple(Release(name, replace(event, count=len(paid))) for (name, event), paid in steps.items())


def _within(releases: Sequence[Release], planned: Sequence[Release]) -> bool:
    allowed = {(release.name, replace(release.event, count=1)): release.event.count for release in planned}
    return all(r.event.count <= allowed.get((r.name, replace(r.event, count=1)), -1) for r in releases)


def _steps(lines: Sequence[bytes], domain: str, name: str, event: PoissonSampledGaussian) -> set[int]:
    found: set[int] = set()
    for record in map(json.loads, lines):
        if record["kind"] == "SPEND" and record["domain"] == domain:
            if (record["release"], record["event"]) != (name, replace(event, count=1).to_json()):
                raise BudgetError(
                    f"domain {domain[:12]}: expected one release and event, found another; ledger is invalid"
                )
            found.update(range(*record["steps"]))
    return found


def _read(file: BinaryIO, path: Path) -> list[bytes]:
    """All records, the chain verified. A torn last line was never acknowledged and is cut."""
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        _check_torn(content[len(whole) :], path)
        os.ftruncate(file.fileno(), len(whole))
        os.fsync(file.fileno())
    lines, previous = whole.splitlines(), GENESIS
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            intact = line == _encode(record) and record["v"] == VERSION
            intact = intact and record["prev"] == previous and record["seq"] == number
        except (ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise BudgetError(
                f"{path}: record {number} does not continue the chain; the ledger was altered, so nothing can be spent"
            )
        previous = hashlib.sha256(line).hexdigest()
    return lines


def _check_torn(tail: bytes, path: Path) -> None:
    """A torn line is a beginning of one; a whole record with another byte for its line end was altered."""
    try:
        whole = tail[:-1] == _encode(json.loads(tail[:-1]))
    except (ValueError, AttributeError):
        return
    if whole:
        raise BudgetError(f"{path}: the last record's end was altered, so nothing can be spent")


def _encode(record: dict[str, Any]) -> bytes:
    """A line: canonical JSON that carries the SHA-256 of all its other entries."""
    content = {name: value for name, value in record.items() if name != "sha256"}
    body = json.dumps(content, sort_keys=True, separators=(",", ":"))
    own = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, sort_keys=True, separators=(",", ":")).encode()


def _append(file: BinaryIO, lines: Sequence[bytes], kind: str, content: dict[str, Any]) -> bytes:
    """Adds one record durably; returns its line."""
    _, previous = _head(lines)
    record = {"v": VERSION, "seq": len(lines), "prev": previous, "time": round(time.time(), 3), "kind": kind, **content}
    line = _encode(record) + b"\n"
    size = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) != len(line):
            raise OSError("short write")
        os.fsync(file.fileno())
    except OSError:
        # A full disk: take the torn line back, so that nothing half-written stays.
        os.ftruncate(file.fileno(), size)
        raise
    return line[:-1]


def _budget_json(budget: Budget) -> dict[str, Any]:
    planned = [{"release": release.name, "event": release.event.to_json()} for release in budget.planned]
    return {
        "epsilon": budget.epsilon,
        "delta": budget.delta,
        "neighbouring_relation": budget.neighbouring_relation,
        "planned": planned,
    }


def _budget_from(line: bytes) -> Budget:
    record = json.loads(line)
    if record["kind"] != "OPEN":
        raise BudgetError("the ledger's first record opens no budget; the ledger was altered, so nothing can be spent")
    planned = tuple(Release(p["release"], PoissonSampledGaussian.from_json(p["event"])) for p in record["planned"])
    return Budget(record["epsilon"], record["delta"], record["neighbouring_relation"], planned)
