"""The privacy ledger of one run: a step is charged, durably, before its noise is drawn.

What is stored are events, not epsilons: a better accountant never rewrites history. The ledger opens with the budget
and the plan, and charges nothing beyond the plan.

A *domain* names everything that determines a release bit for bit (key, data, code, configuration, event). Steps are a
set within a domain: a step replayed after a crash gives the same output, so it is paid once; the same step in another
domain draws other noise and is paid again. Nothing in the ledger depends on the data.

An *owner* is one driver with its workers, known by a random token. The newest owner alone may spend: what an older one
left running, on this machine or another, is refused.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from e2h.errors import BudgetError, InputError
from e2h.privacy.chain import Chain, Log, Record, Witness
from e2h.privacy.events import Charge, Event, charge, event_from_json

Cost = Callable[[Sequence[Charge], float], float]


@dataclass(frozen=True)
class Budget:
    """What all releases of the ledger together may cost, and what they are planned to be."""

    epsilon: float
    delta: float
    neighbouring_relation: str
    planned: tuple[Charge, ...]


@dataclass
class State:
    """What the records of a ledger say.

    Attributes:
      budget: with which it was opened; None before.
      identity: names this very ledger; empty before it was opened.
      owners: the OWNER records, the newest last.
      steps: charged steps by release, event (with count 1) and domain.
    """

    budget: Budget | None = None
    identity: str = ""
    owners: list[Record] = field(default_factory=list)
    steps: dict[tuple[str, Event, str], set[int]] = field(default_factory=dict)

    def charged(self) -> tuple[Charge, ...]:
        """All releases paid so far, a release's domains added up."""
        counts: dict[tuple[str, Event], int] = {}
        for (name, event, _), steps in self.steps.items():
            counts[name, event] = counts.get((name, event), 0) + len(steps)
        return tuple(charge(name, replace(event, count=count)) for (name, event), count in counts.items())

    def domains(self, name: str) -> dict[str, set[int]]:
        """Charged steps of a release by domain."""
        return {domain: steps for (release, _, domain), steps in self.steps.items() if release == name}

    def open_budget(self, location: str) -> Budget:
        if self.budget is None:
            raise BudgetError(f"{location}: no budget was opened; nothing can be spent")
        return self.budget

    def check_owner(self, token: str) -> None:
        if not self.owners:
            raise BudgetError("no process has taken this ledger over; nothing can be spent")
        newest = self.owners[-1]
        if newest["owner"] == token:
            return
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(newest["time"]))
        raise BudgetError(
            f"another process took over this run at {when} (pid {newest['pid']} on {newest['host']}); this one may not "
            "spend any more"
        )

    def check_room(self, name: str, event: Event, domain: str, steps: Iterable[int]) -> None:
        """Raises `BudgetError` unless these steps, with all that is charged, are within the plan."""
        unit = replace(event, count=1)
        if any(d == domain and (n, e) != (name, unit) for n, e, d in self.steps):
            raise BudgetError(f"domain {domain[:12]}: expected one release and event, found another; ledger is invalid")
        planned = sum(
            release.event.count
            for release in (self.budget.planned if self.budget else ())
            if (release.name, replace(release.event, count=1)) == (name, unit)
        )
        if planned == 0:
            raise BudgetError(f"release {name} with {unit}: expected a release of the plan; nothing was charged")
        elsewhere = sum(len(paid) for (n, e, d), paid in self.steps.items() if (n, e) == (name, unit) and d != domain)
        paid_here = self.steps.get((name, unit, domain), set())
        here = len(paid_here) + sum(step not in paid_here for step in steps)
        if elsewhere + here > planned:
            reason = (
                f"{elsewhere} were released in another domain (other data, code, key or machine) and can't be replayed "
                "here; continue where the run began, with its key, code and kind of machine, or begin another run"
            )
            raise BudgetError(
                f"release {name}: the budget pays for {planned} steps, and {elsewhere + here} would be needed"
                + (f": {reason}" if elsewhere else "")
            )


def replay(records: Sequence[Record], location: str) -> State:
    """The state after all records, each held against the rules that its writer had to keep.

    Raises:
      BudgetError: if a record breaks them; then the ledger was not written by this code.
    """
    state = State()
    for number, record in enumerate(records):
        try:
            _apply(state, record)
        except (BudgetError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BudgetError(
                f"{location}: record {number} ({record.get('kind')}) can't stand in a run's ledger, so nothing can be "
                f"spent ({error})"
            ) from error
    return state


def _apply(state: State, record: Record) -> None:
    kind = record["kind"]
    if (kind == "OPEN") != (state.budget is None):
        raise ValueError("expected the budget first, and once")
    if kind == "OPEN":
        state.budget, state.identity = _budget_from(record), record["sha256"]
    elif kind == "OWNER":
        state.owners.append({key: record[key] for key in ("owner", "host", "pid", "time")})
    elif kind == "SPEND":
        event, steps = event_from_json(record["event"]), range(*record["steps"])
        state.check_owner(record["owner"])
        state.check_room(record["release"], event, record["domain"], steps)
        state.steps.setdefault((record["release"], event, record["domain"]), set()).update(steps)
    else:
        raise ValueError("unknown kind")


class Ledger:
    """The ledger of one run. Safe for several processes, on several machines; each call reads the log anew.

    Args:
      log: where the records are kept; see `e2h.privacy.logs`.
      owner: token of the driver; its workers spend with the same.
      witness: see `e2h.privacy.chain.Chain`.
    """

    def __init__(self, log: Log, owner: str | None = None, witness: Witness | None = None) -> None:
        self.chain, self.location = Chain(log, witness), log.location
        self.owner = owner or secrets.token_hex(16)
        self._took_over = False

    def open(self, budget: Budget, cost: Cost) -> None:
        """Starts the ledger, or checks that it was started with this budget.

        Args:
          cost: epsilon of a list of releases at a delta.

        Raises:
          InputError: if it holds another budget.
          BudgetError: if the plan costs more than the budget.
        """

        def decide(records: list[Record]) -> Record | None:
            opened = replay(records, self.location).budget
            if opened is None:
                planned_cost = cost(budget.planned, budget.delta)
                if planned_cost > budget.epsilon:
                    raise BudgetError(
                        f"privacy.epsilon={budget.epsilon:g}: the plan costs {planned_cost:.4g}; nothing was spent"
                    )
                return {"kind": "OPEN", **_budget_json(budget)}
            if opened != budget:
                raise InputError(
                    f"{self.location}: expected the budget of this plan, found {opened}; use a new run.name"
                )
            return None

        self.chain.append(decide)

    def take_over(self) -> None:
        """Makes this owner the newest one, unless it is.

        Raises:
          BudgetError: if it was, and another one took over since.
        """

        def decide(records: list[Record]) -> Record | None:
            state = replay(records, self.location)
            state.open_budget(self.location)
            if all(known["owner"] != self.owner for known in state.owners):
                return {"kind": "OWNER", "owner": self.owner, "host": socket.gethostname(), "pid": os.getpid()}
            state.check_owner(self.owner)
            return None

        self.chain.append(decide)
        self._took_over = True

    def spend(self, name: str, event: Event, domain: str, start: int, stop: int) -> bool:
        """Charges steps [start, stop) of a release; durable when it returns.

        Args:
          name: the release.
          event: its mechanism; `count` is the planned number of steps.
          domain: hexadecimal digest of all that determines the output.
          start, stop: 0 <= start < stop <= event.count.

        Returns:
          Whether anything was charged; False for a replay of steps already paid.

        Raises:
          BudgetError: if the plan does not have these steps, or another owner took over; then nothing is charged.
        """
        if not 0 <= start < stop <= event.count:
            raise ValueError(f"steps [{start}, {stop}): expected steps of the {event.count} that are planned")
        unit = replace(event, count=1)

        def decide(records: list[Record]) -> Record | None:
            state = replay(records, self.location)
            state.check_owner(self.owner)
            # Not this block alone: a release that can't be finished must not begin.
            state.check_room(name, event, domain, range(event.count))
            if state.steps.get((name, unit, domain), set()).issuperset(range(start, stop)):
                return None
            what = {"release": name, "event": unit.to_json(), "domain": domain, "steps": [start, stop]}
            return {"kind": "SPEND", "owner": self.owner, **what}

        if not self._took_over:
            self.take_over()
        return self.chain.append(decide)

    def state(self) -> State:
        """Everything that the ledger says; `BudgetError` if it was altered."""
        return replay(self.chain.read(), self.location)

    def budget(self) -> Budget | None:
        """What the ledger was opened with."""
        return self.state().budget

    def charged(self) -> tuple[Charge, ...]:
        """All releases paid so far, equal mechanisms of one name merged."""
        return self.state().charged()

    def paid(self, name: str, domain: str) -> set[int]:
        """Steps of a release paid in a domain."""
        return self.state().domains(name).get(domain, set())

    def head(self) -> tuple[int, str]:
        """Number of records and SHA-256 of the last one."""
        return self.chain.head()


def releases_json(releases: Iterable[Charge]) -> list[Record]:
    return [{"release": release.name, "event": release.event.to_json()} for release in releases]


def releases_from(values: Iterable[Record]) -> tuple[Charge, ...]:
    return tuple(charge(one["release"], event_from_json(one["event"])) for one in values)


def _budget_json(budget: Budget) -> Record:
    return {
        "epsilon": budget.epsilon,
        "delta": budget.delta,
        "neighbouring_relation": budget.neighbouring_relation,
        "planned": releases_json(budget.planned),
    }


def _budget_from(record: Record) -> Budget:
    planned = releases_from(record["planned"])
    return Budget(record["epsilon"], record["delta"], record["neighbouring_relation"], planned)
