"""Releases as values: each is a mechanism with all its parameters, and composes to a `dp_accounting` event."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import dp_accounting

from e2h.config import MAX_NOISE_MULTIPLIER
from e2h.privacy.trial_law import TrialLaw


@dataclass(frozen=True)
class PoissonSampledGaussian:
    """`count` adaptive rounds: each record joins with `sampling_prob`; the sum gets Gaussian noise once.

    `noise_multiplier`, at most MAX_NOISE_MULTIPLIER, is the noise's standard deviation over the L2 sensitivity of one
    record's contribution (Abadi et al. 2016; Mironov et al. 2019).
    """

    sampling_prob: float
    noise_multiplier: float
    count: int

    def __post_init__(self) -> None:
        if not (0 < self.sampling_prob <= 1 and self.count >= 0):
            raise ValueError(f"not a mechanism: {self}")
        if not 0 < self.noise_multiplier <= MAX_NOISE_MULTIPLIER:
            raise ValueError(f"not a mechanism: {self}")

    def dp_event(self) -> dp_accounting.DpEvent:
        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(self.sampling_prob, gaussian)
        return dp_accounting.SelfComposedDpEvent(sampled, self.count)

    def to_json(self) -> dict[str, Any]:
        return {
            "type": "poisson_sampled_gaussian",
            "sampling_prob": self.sampling_prob,
            "noise_multiplier": self.noise_multiplier,
            "count": self.count,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> PoissonSampledGaussian:
        if value["type"] != "poisson_sampled_gaussian":
            raise ValueError(f"unknown event type {value['type']!r}")
        return PoissonSampledGaussian(value["sampling_prob"], value["noise_multiplier"], value["count"])


@dataclass(frozen=True)
class Release:
    """One named release of a run or of a trial: `central`, `finetune` or `score`."""

    name: str
    event: PoissonSampledGaussian


@dataclass(frozen=True)
class Selection:
    """The best of K trials, K from `law`, each trial one of `candidates` drawn from a fixed prior.

    A candidate is everything that one trial releases to the choice: its stages and its score. With several candidates
    the pointwise maximum of their profiles is charged, whatever the prior. `count` is how often it happens.
    """

    law: TrialLaw
    candidates: tuple[tuple[Release, ...], ...]
    count: int = 1

    def __post_init__(self) -> None:
        if not self.candidates or not all(self.candidates):
            raise ValueError("expected at least one candidate, and a release in each")

    def to_json(self) -> dict[str, Any]:
        candidates = [[{"name": r.name, "event": r.event.to_json()} for r in trial] for trial in self.candidates]
        return {"type": "selection", "law": self.law.to_json(), "candidates": candidates, "count": self.count}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Selection:
        if value["type"] != "selection":
            raise ValueError(f"unknown event type {value['type']!r}")
        trials = [
            tuple(Release(one["name"], PoissonSampledGaussian.from_json(one["event"])) for one in trial)
            for trial in value["candidates"]
        ]
        return Selection(TrialLaw.from_json(value["law"]), tuple(trials), value["count"])


@dataclass(frozen=True)
class Choice:
    """The release of a whole search: its best trial."""

    name: str
    event: Selection


Event = PoissonSampledGaussian | Selection
Charge = Release | Choice  # what a ledger pays for


def charge(name: str, event: Event) -> Charge:
    return Choice(name, event) if isinstance(event, Selection) else Release(name, event)


def event_from_json(value: dict[str, Any]) -> Event:
    """The event that `to_json` wrote; `ValueError` if it is of no known type."""
    return Selection.from_json(value) if value["type"] == "selection" else PoissonSampledGaussian.from_json(value)


def compose(releases: Iterable[Release]) -> dp_accounting.DpEvent:
    """Sequential composition of all releases; those of no rounds are left out, which accountants don't take."""
    events = [release.event.dp_event() for release in releases if release.event.count > 0]
    return dp_accounting.ComposedDpEvent(events) if events else dp_accounting.NoOpDpEvent()
