"""Releases as values: each is a mechanism with all its parameters, and composes to a `dp_accounting` event."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import dp_accounting


@dataclass(frozen=True)
class PoissonSampledGaussian:
    """`count` adaptive rounds: each record joins with `sampling_prob`; the sum gets Gaussian noise once.

    `noise_multiplier` is the noise's standard deviation over the L2 sensitivity of one record's contribution
    (Abadi et al. 2016; Mironov et al. 2019).
    """

    sampling_prob: float
    noise_multiplier: float
    count: int

    def __post_init__(self) -> None:
        if not (0 < self.sampling_prob <= 1 and self.count >= 0):
            raise ValueError(f"not a mechanism: {self}")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
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
    """One named release of a run: `central` or `finetune`."""

    name: str
    event: PoissonSampledGaussian


def compose(releases: Iterable[Release]) -> dp_accounting.DpEvent:
    """Sequential composition of all releases; those of no rounds are left out, which accountants don't take."""
    events = [release.event.dp_event() for release in releases if release.event.count > 0]
    return dp_accounting.ComposedDpEvent(events) if events else dp_accounting.NoOpDpEvent()
