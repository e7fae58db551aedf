"""A plan of 100 steps, a ledger of it, and a cost that can be added up by hand."""

from __future__ import annotations

from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.ledger import Budget, Ledger

EVENT = PoissonSampledGaussian(0.1, 2.0, 100)
PLAN = Budget(1.0, 1e-5, "REPLACE_SPECIAL", (Release("finetune", EVENT),))


def one_per_cent_a_step(releases, delta):
    """A cost that is quick and can be added up by hand: the plan of 100 steps costs 1."""
    return sum(release.event.count for release in releases) / 100


def spend(ledger: Ledger, start: int, stop: int, domain: str = "a") -> bool:
    return ledger.spend("finetune", EVENT, domain, start, stop)


def steps(ledger: Ledger) -> int:
    return sum(release.event.count for release in ledger.charged())
