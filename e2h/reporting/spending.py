"""What a ledger says, as a table for people, and whether it holds together; nothing in it depends on the data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from e2h.errors import BudgetError, InputError
from e2h.privacy.accounting import epsilon_pld
from e2h.privacy.chain import Chain, Record, Witness
from e2h.privacy.dataset_ledger import composed, holds
from e2h.privacy.events import Selection, charge, event_from_json
from e2h.privacy.ledger import Budget, State, replay
from e2h.privacy.logs import open_log
from e2h.privacy.rounding import delta_in_words, rounded_up


def read(location: str, witness: Witness | None) -> Chain:
    """The ledger at a path or s3:// prefix.

    Raises:
      InputError: if nothing is there.
      BudgetError: if it was altered.
    """
    chain = Chain(open_log(location), witness, begins_anew=False)
    if not chain.read():
        raise InputError(
            f"{location}: expected a ledger, found none; name a run directory, its ledger.jsonl, or s3://..."
        )
    return chain


def table(chain: Chain) -> list[str]:
    """Lines that show a run's ledger, or a data set's."""
    records = chain.read()
    length, head = chain.head()
    top = [f"ledger     {chain.log.location}", f"records    {length}, head {head}"]
    if records[0].get("kind") == "DATASET":
        return [*top, *_dataset_lines(records, chain.log.location)]
    return [*top, *_run_lines(replay(records, chain.log.location), records)]


def verify(chain: Chain, plan: dict[str, Any] | None) -> str:
    """Checks what can be checked without the run's secret.

    The chain of hashes, the witness, that every charge or hold is within its plan and by its owner, and that the plan
    costs no more than the budget by today's accountant.

    Args:
      plan: `plan.json` of the run, where there is one.

    Raises:
      BudgetError: naming what does not hold.
    """
    records = chain.read()
    location = chain.log.location
    if records[0].get("kind") == "DATASET":
        _check_cost(location, composed(holds(records, location), records[0]["delta"]), records[0]["epsilon"])
    else:
        budget = _opened(replay(records, location))
        if plan is not None and _planned(plan) != (*_numbers(budget), budget.planned):
            raise BudgetError(f"{location}: expected the plan with which it was opened in plan.json, found another")
        _check_cost(location, epsilon_pld(budget.planned, budget.delta), budget.epsilon)
    length, head = chain.head()
    return f"ok: {length} records, head {head}"


def _planned(plan: dict[str, Any]) -> tuple[Any, ...]:
    try:
        releases = tuple(charge(one["name"], event_from_json(one["event"])) for one in plan["releases"])
        return plan["target_epsilon"], plan["delta"], plan["neighbouring_relation"], releases
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"plan.json: expected the plan of a run ({error!r})") from error


def _numbers(budget: Budget) -> tuple[Any, ...]:
    return budget.epsilon, budget.delta, budget.neighbouring_relation


def _opened(state: State) -> Budget:
    assert state.budget is not None  # `replay` refuses records without one
    return state.budget


def _check_cost(location: str, cost: float, epsilon: float) -> None:
    if cost > epsilon:
        raise BudgetError(f"{location}: expected plans of at most epsilon {epsilon:g}, found {cost:.6g}")


def _run_lines(state: State, records: Sequence[Record]) -> list[str]:
    budget = _opened(state)
    spent, planned = (epsilon_pld(releases, budget.delta) for releases in (state.charged(), budget.planned))
    target = f"epsilon {budget.epsilon:g} at delta {delta_in_words(budget.delta)}"
    found = [
        f"budget     {target}, {budget.neighbouring_relation}",
        f"epsilon    {rounded_up(spent):.4f} spent of {rounded_up(planned):.4f} planned",
        f"opened     {_when(records[0]['time'])}",
        *(f"owner      {_when(one['time'])} pid {one['pid']} on {one['host']}" for one in state.owners),
        f"{'release':<10} {'q':>9}{'noise':>10}{'charged':>10}{'planned':>10}{'domains':>10}",
    ]
    charged = {(one.name, replace(one.event, count=1)): one.event.count for one in state.charged()}
    for name, event in ((release.name, release.event) for release in budget.planned):
        counts = f"{charged.get((name, replace(event, count=1)), 0):>10}{event.count:>10}{len(state.domains(name)):>10}"
        if isinstance(event, Selection):
            found.append(f"{name:<10} {'best of':>9}{event.law.expected_trials:>10g}{counts}")
        else:
            found.append(f"{name:<10} {event.sampling_prob:>9.4f}{event.noise_multiplier:>10.4f}{counts}")
    return found


def _dataset_lines(records: Sequence[Record], location: str) -> list[str]:
    opened, held = records[0], holds(records, location)
    total = composed(held, opened["delta"])
    found = [
        f"data set   {opened['name']}",
        f"budget     epsilon {opened['epsilon']:g} at delta {delta_in_words(opened['delta'])} for all runs together, "
        f"{opened['neighbouring_relation']}",
        f"epsilon    {rounded_up(total):.4f} held by {len(held)} run{'s' * (len(held) != 1)}",
        f"{'held':<24}{'epsilon alone':>14}  run",
    ]
    for record, planned in zip(records[1:], held.values(), strict=True):
        found.append(
            f"{_when(record['time']):<24}{rounded_up(epsilon_pld(planned, opened['delta'])):>14.4f}  {record['run']}"
        )
    return found


def _when(seconds: float) -> str:
    """For readers: a clock may have been wrong."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
