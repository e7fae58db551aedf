"""A plan of 100 steps, a ledger of it, a cost that can be added up by hand, and a race for one ledger."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.ledger import Budget, Ledger
from e2h.privacy.logs import FileLog, open_log

EVENT = PoissonSampledGaussian(0.1, 2.0, 100)
PLAN = Budget(1.0, 1e-5, "REPLACE_SPECIAL", (Release("finetune", EVENT),))
OWNER = "0f" * 16


def one_per_cent_a_step(releases, delta):
    """A cost that is quick and can be added up by hand: the plan of 100 steps costs 1."""
    return sum(release.event.count for release in releases) / 100


def file_ledger(path: Path, owner: str = OWNER, witness: Path | None = None) -> Ledger:
    return Ledger(FileLog(path), owner, witness)


def spend(ledger: Ledger, start: int, stop: int, domain: str = "a") -> bool:
    return ledger.spend("finetune", EVENT, domain, start, stop)


def steps(ledger: Ledger) -> int:
    return sum(release.event.count for release in ledger.charged())


# Forking is safe here: the children touch files and make connections of their own.
FORK = multiprocessing.get_context("fork")
RACERS = "bcdefg"


def spend_in_turn(location: str, witness: Path, own: str, num_steps: int, answers) -> None:
    ledger, event = Ledger(open_log(location), OWNER, witness), replace(EVENT, count=num_steps)
    answers.put(
        [
            tuple(ledger.spend("finetune", event, domain, step, step + 1) for domain in ("shared", own))
            for step in range(num_steps)
        ]
    )


def race(location: str, witness: Path, num_steps: int) -> None:
    """Six workers of one owner charge the same steps in a shared domain and, in turn, in one of their own."""
    ledger, total = Ledger(open_log(location), OWNER, witness), num_steps * (len(RACERS) + 1)
    planned = (Release("finetune", replace(EVENT, count=total)),)
    ledger.open(Budget(9.0, 1e-5, "REPLACE_SPECIAL", planned), one_per_cent_a_step)
    answers = FORK.Queue()
    racers = [FORK.Process(target=spend_in_turn, args=(location, witness, own, num_steps, answers)) for own in RACERS]
    for racer in racers:
        racer.start()
    got = [answers.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join(timeout=60)
        assert racer.exitcode == 0
    # Each shared step was charged by exactly one of the six, each own step by its own.
    assert [sum(charged[step][0] for charged in got) for step in range(num_steps)] == [1] * num_steps
    assert all(own for charged in got for _, own in charged)
    assert ledger.charged() == planned
    assert ledger.head()[0] == 2 + total
    for domain in ("shared", *RACERS):
        assert ledger.paid("finetune", domain) == set(range(num_steps))
