"""What a plan's releases say beyond one epsilon, as points of curves; nothing here is sensitive.

All of it follows from the privacy loss distribution of the releases, on the coarsest grid of losses that gives the
plan's epsilon within half a percent. That is an upper bound on any grid.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

GRIDS = (1e-2, 2e-3, 5e-4)  # of the privacy loss
Curve = list[tuple[float, float]]


def best_guess(plan: Mapping[str, Any]) -> float:
    """Largest chance of telling right whether one record took part, after a fair coin decided that; in [0.5, 1].

    (1 + delta(0)) / 2: delta at epsilon 0 is the total variation between the two worlds (Kairouz et al. 2015).
    """
    return (1 + float(_profile(*_key(plan))[1][0])) / 2


def hit_rate(plan: Mapping[str, Any], false_alarms: float) -> float:
    """Largest share of true members that a test finds while it accuses that share of the others; both in [0, 1]."""
    return 1 - float(_misses(plan, np.array([false_alarms]))[0])


def trade_off(plan: Mapping[str, Any]) -> Curve:
    """(false alarms, smallest possible share of misses) of any test for one record, both in [0, 1].

    Every (epsilon, delta(epsilon)) bounds the errors by two lines; their upper envelope is the curve (Dong, Roth and
    Su 2022, Proposition 6).
    """
    alarms = np.unique(np.r_[0, np.geomspace(1e-3, 1, 60), np.linspace(0, 1, 41)])
    return list(zip(alarms.tolist(), _misses(plan, alarms).tolist(), strict=True))


def _misses(plan: Mapping[str, Any], alarms: NDArray[np.float64]) -> NDArray[np.float64]:
    epsilons, deltas = _profile(*_key(plan))
    steep = 1 - deltas - np.exp(epsilons) * alarms[:, None]
    flat = np.exp(-epsilons) * (1 - deltas - alarms[:, None])
    found: NDArray[np.float64] = np.maximum(0, np.maximum(steep, flat)).max(axis=1)
    return found


def spent_after(plan: Mapping[str, Any]) -> list[float]:
    """Epsilon at the plan's delta once each of its releases has been charged; the last is the plan's."""
    spent = [*_spent(*_key(plan)), plan["epsilon"]]
    return [plan["releases"][0]["epsilon_alone"], *spent[1:]] if len(spent) > 1 else spent


def noise_by_share(plan: Mapping[str, Any]) -> dict[str, Curve] | None:
    """Noise multipliers of the central images and of DP-SGD against the share of epsilon that central images get.

    All at the plan's epsilon, delta, sampling probabilities and numbers of steps. The share is of the stage's cost
    alone. None where the plan has not got both stages, or a search draws its noise.
    """
    events = {one["name"]: one["event"] for one in plan["releases"]}
    different = len(events) == len(plan["releases"])  # trials that all are paid for have names in common
    if not {"central", "finetune"} <= events.keys() or "search" in events or not different:
        return None
    return _by_share(*_key(plan))


def _key(plan: Mapping[str, Any]) -> tuple[str, float, float]:
    releases = json.dumps([{"name": one["name"], "event": one["event"]} for one in plan["releases"]])
    return releases, plan["delta"], plan["epsilon"]


def _loss(releases: Sequence[Mapping[str, Any]], grid: float) -> Any:
    from e2h.privacy.accounting import privacy_loss  # a second to import, and every `import e2h.reporting` would pay it
    from e2h.privacy.events import charge, event_from_json

    return privacy_loss([charge(one["name"], event_from_json(one["event"])) for one in releases], grid)


@functools.lru_cache(maxsize=16)
def _whole(releases: str, delta: float, epsilon: float) -> tuple[float, Any]:
    """The grid, and the privacy loss of all releases on it."""
    for grid in GRIDS:
        loss = _loss(json.loads(releases), grid)
        if loss.get_epsilon_for_delta(delta) <= 1.005 * epsilon:
            break
    return grid, loss


@functools.lru_cache(maxsize=16)
def _profile(releases: str, delta: float, epsilon: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Epsilons from 0 on, until delta is negligible in a picture, and delta at each."""
    _, loss = _whole(releases, delta, epsilon)
    epsilons = max(0.1, loss.get_epsilon_for_delta(1e-6)) * np.linspace(0, 1, 60) ** 2
    return epsilons, np.clip(loss.get_delta_for_epsilon(epsilons), 0, 1)


@functools.lru_cache(maxsize=16)
def _spent(releases: str, delta: float, epsilon: float) -> list[float]:
    """Epsilon after each release but the last."""
    charged, (grid, _) = json.loads(releases), _whole(releases, delta, epsilon)
    return [max(0.0, _loss(charged[:end], grid).get_epsilon_for_delta(delta)) for end in range(1, len(charged))]


@functools.lru_cache(maxsize=16)
def _by_share(releases: str, delta: float, epsilon: float) -> dict[str, Curve]:
    charged, (grid, _) = {one["name"]: one for one in json.loads(releases)}, _whole(releases, delta, epsilon)
    fixed = _loss([one for name, one in charged.items() if name not in ("central", "finetune")], grid)
    hard = _family(charged["finetune"], delta, epsilon, grid, np.geomspace(0.95, 4, 10))
    found: dict[str, Curve] = {"central": [], "finetune": []}
    for noise, loss in _family(charged["central"], delta, epsilon, grid, 1 + np.geomspace(0.03, 11, 12)):
        share, before = loss.get_epsilon_for_delta(delta) / epsilon, loss.compose(fixed)
        costs = [(before.compose(step).get_epsilon_for_delta(delta), after) for after, step in hard]
        if costs[-1][0] < epsilon < costs[0][0]:
            x, y = np.log(np.array(costs[::-1])).T
            found["central"].append((share, noise))
            found["finetune"].append((share, float(np.exp(np.interp(np.log(epsilon), x, y)))))
    return {name: sorted(points) for name, points in found.items()}


def _family(
    release: Mapping[str, Any], delta: float, epsilon: float, grid: float, factors: NDArray[np.float64]
) -> list[tuple[float, Any]]:
    """(noise multiplier, privacy loss) of the release at `factors` of about the noise that alone costs `epsilon`."""
    event = release["event"]

    def loss(noise: float) -> Any:
        return _loss([{**release, "event": {**event, "noise_multiplier": noise}}], grid)

    noise = float(event["noise_multiplier"])
    for _ in range(4):  # epsilon is about one over the noise
        noise *= max(0.1, loss(noise).get_epsilon_for_delta(delta) / epsilon)
    return [(noise * factor, loss(noise * factor)) for factor in factors.tolist()]
