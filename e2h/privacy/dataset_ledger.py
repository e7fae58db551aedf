"""The ledger of a data set: all its runs share one budget, and each holds its whole plan before it spends anything.

A run is known by its name and the identity of its own ledger, so a resumed run holds once, and a run whose ledger was
deleted holds anew, as does a copy under another name. What is held is never given back: a run that stopped early may
have released all that it planned.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import dp_accounting

from e2h.errors import BudgetError, InputError
from e2h.privacy.accounting import NEIGHBOURING_RELATION, epsilon_pld
from e2h.privacy.chain import Chain, Log, Record, Witness
from e2h.privacy.events import Charge
from e2h.privacy.ledger import releases_from, releases_json

Key = tuple[str, str]  # identity of the run's own ledger, name of the run
Holds = dict[Key, tuple[Charge, ...]]


@dataclass(frozen=True)
class SharedBudget:
    """What all runs on a data set may cost together, and what is held of it, by how many runs."""

    name: str
    epsilon: float
    epsilon_held: float
    num_runs: int


class Folder(Protocol):
    """A path, local or not."""

    def __truediv__(self, name: str) -> Witness: ...


class DatasetLedger:
    """The holds of all runs on one data set. Safe for several processes, on several machines.

    Args:
      log: see `e2h.privacy.logs`.
      folder: where the witness of this log is kept (see `e2h.privacy.chain.Chain`): a log that was seen here once may
        not be empty later; None for none.
      name: of the data set; for people.
      epsilon, delta: the budget, the same for all runs.
    """

    def __init__(self, log: Log, folder: Folder | None, name: str, epsilon: float, delta: float) -> None:
        place = hashlib.sha256(log.location.encode()).hexdigest()[:16]
        witness = folder / f".dataset-{place}.head" if folder else None
        self.chain, self.location = Chain(log, witness, begins_anew=False), log.location
        self.name, self.epsilon, self.delta = name, epsilon, delta

    def check(self, identity: str, run: str, planned: Sequence[Charge]) -> SharedBudget:
        """What would be held after this run's hold; writes nothing.

        Args:
          identity: `State.identity` of the run's own ledger; empty for one that was not opened yet.
          run: its name.
          planned: all its releases.

        Raises:
          InputError: if the data set's ledger was opened with another budget.
          BudgetError: if all runs together would cost more than its epsilon.
        """
        records = self.chain.read()
        self._check_opened(records)
        return self._room(records, (identity, run), planned)

    def hold(self, identity: str, run: str, planned: Sequence[Charge]) -> None:
        """Holds the plan of a run, once; durable when it returns. Raises as `check` does; then nothing is held."""

        def opened(records: list[Record]) -> Record | None:
            self._check_opened(records)
            relation = NEIGHBOURING_RELATION.name
            content = {"epsilon": self.epsilon, "delta": self.delta, "neighbouring_relation": relation}
            return None if records else {"kind": "DATASET", "name": self.name, **content}

        def held(records: list[Record]) -> Record | None:
            own = holds(records, self.location).get((identity, run))
            if own is None:
                self._room(records, (identity, run), planned)
            elif own != tuple(planned):
                raise BudgetError(f"{self.location}: expected the plan that this run holds, {own}, found {planned}")
            else:
                return None
            return {"kind": "HOLD", "ledger": identity, "run": run, "planned": releases_json(planned)}

        self.chain.append(opened)
        self.chain.append(held)

    def _check_opened(self, records: list[Record]) -> None:
        if not records:
            return
        holds(records, self.location)
        values = {"ledger.epsilon": self.epsilon, "privacy.delta": self.delta}
        for (name, value), key in zip(values.items(), ("epsilon", "delta"), strict=True):
            if records[0][key] != value:
                raise InputError(
                    f"{name}={value:g}: expected {records[0][key]:g}, with which the data set's ledger {self.location} "
                    "was opened; one budget holds for all its runs"
                )
        if records[0]["neighbouring_relation"] != NEIGHBOURING_RELATION.name:
            raise InputError(f"{self.location}: expected the neighbouring relation {NEIGHBOURING_RELATION.name}")

    def _room(self, records: list[Record], key: Key, planned: Sequence[Charge]) -> SharedBudget:
        held = holds(records, self.location)
        after = {**held, key: tuple(planned)}
        total = composed(after, self.delta)
        if total > self.epsilon:
            raise BudgetError(self._refusal(held, total))
        return SharedBudget(self.name, self.epsilon, total, len(after))

    def _refusal(self, held: Holds, total: float) -> str:
        already = composed(held, self.delta)
        left = _left(already, self.epsilon, self.delta)
        return (
            f"ledger.epsilon={self.epsilon:g}: with this run, all runs on data set {self.name} would cost epsilon "
            f"{total:.4g} at delta {self.delta:g}; {len(held)} of them hold {already:.4g} already, which leaves about "
            f"privacy.epsilon={left:g} for another run; nothing was spent"
        )


def holds(records: Sequence[Record], location: str) -> Holds:
    """The plans that are held.

    Raises:
      BudgetError: if the records are not those of a data set's ledger.
    """
    held: Holds = {}
    for number, record in enumerate(records):
        kind, key = record.get("kind"), (record.get("ledger", ""), record.get("run", ""))
        if kind != ("HOLD" if number else "DATASET") or key in held:
            raise BudgetError(
                f"{location}: record {number} ({kind}) can't stand in a data set's ledger, so nothing can be spent"
            )
        if number:
            held[key] = releases_from(record["planned"])
    return held


def composed(held: Holds, delta: float) -> float:
    """Epsilon of all held plans together."""
    return _composed(tuple(release for planned in held.values() for release in planned), delta)


@functools.lru_cache(maxsize=8)
def _composed(releases: tuple[Charge, ...], delta: float) -> float:
    return epsilon_pld(releases, delta)


def _left(held: float, target: float, delta: float) -> float:
    """About the epsilon of one more run that uses up the rest; two digits, rounded down.

    As if all were Gaussian mechanisms, whose 1 / sigma^2 add up: compositions of many rounds are close to one.
    """
    rest = sum(sign * _gaussian_precision(one, delta) for sign, one in ((1, target), (-1, held)))
    if rest <= 0:
        return 0.0
    alone = dp_accounting.get_epsilon_gaussian(rest**-0.5, delta)
    unit = 10.0 ** (math.floor(math.log10(max(alone, 1e-6))) - 1)
    return round(math.floor(alone / unit) * unit, 12)


def _gaussian_precision(epsilon: float, delta: float) -> float:
    """1 / sigma^2 of the Gaussian mechanism that costs (epsilon, delta)."""
    return float(dp_accounting.get_sigma_gaussian(epsilon, delta) ** -2) if epsilon > 0 else 0.0
