"""epsilon(delta) of composed releases, and the noise multiplier that spends exactly what is left.

PLD (privacy loss distributions; Koskela et al. 2020, Doroshenko et al. 2022) is claimed, RDP (Mironov 2017) is the
cross-check. Both are upper bounds. Where PLD is the larger one (tiny q and very many steps, by its discretisation) the
claim stays PLD's, so that anyone recomputes it with dp_accounting's defaults. Below delta = 1e-10 its FFT becomes
optimistic and it is refused.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import dp_accounting
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.rdp import RdpAccountant

from e2h.config import MAX_NOISE_MULTIPLIER
from e2h.errors import BudgetError
from e2h.privacy import selection_profile
from e2h.privacy.events import Charge, Choice, PoissonSampledGaussian, Release, compose

# Add-or-remove one record in its zero-out form: the record's contribution is replaced by nothing, so N is public.
NEIGHBOURING_RELATION = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
MIN_DELTA = 1e-10
# Integer orders and quarters where large epsilons have their optimum. Any set of orders gives a valid bound; orders
# below 2 do not converge at large q, and dp_accounting says so once for each.
RDP_ORDERS = (*(2 + i / 4 for i in range(24)), *range(8, 64), 80, 96, 128, 192, 256, 512, 1024)
logging.getLogger("absl").setLevel(logging.ERROR)
# Discretisation of the privacy loss: the claim uses the fine grid (dp_accounting's default), the search both.
FINE_GRID = 1e-4
COARSE_GRID = 1e-3
# How far below the target a calibrated plan may stay (relative); it is never above.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Bound:
    """A valid upper bound on epsilon by PLD, and what RDP says of the same releases."""

    epsilon: float
    epsilon_rdp: float


def epsilon_pld(releases: Sequence[Charge], delta: float, grid: float = FINE_GRID) -> float:
    """Epsilon by privacy loss distributions; `grid` is the discretisation of the loss, coarser is larger and faster.

    Raises:
      ValueError: if delta is below `MIN_DELTA`, where the numerical convolution is optimistic.
    """
    return epsilon_curve(releases, [delta], grid)[0]


def epsilon_curve(releases: Sequence[Charge], deltas: Sequence[float], grid: float = FINE_GRID) -> list[float]:
    """`epsilon_pld` at several deltas, composed once."""
    if min(deltas) < MIN_DELTA:
        raise ValueError(f"delta={min(deltas)}: expected at least {MIN_DELTA}")
    total = privacy_loss(releases, grid)
    return [max(0.0, float(total.get_epsilon_for_delta(delta))) for delta in deltas]


def privacy_loss(releases: Sequence[Charge], grid: float = FINE_GRID) -> PrivacyLossDistribution:
    """The pessimistic privacy loss distribution of all releases together; a search's as `selection_profile` has it."""
    total = privacy_loss_distribution.identity(value_discretization_interval=grid)
    for one in releases:
        if isinstance(one, Release) and one.event.count > 0:
            total = total.compose(_rounds(one.event, grid))
    for event in (one.event for one in releases if isinstance(one, Choice)):
        trials = [privacy_loss(trial, grid) for trial in dict.fromkeys(event.candidates)]
        best = selection_profile.select(trials, event.law.probabilities)
        for _ in range(event.count):
            total = total.compose(best)
    return total


# As dp_accounting's PLDAccountant composes them, step by step, so that it finds the same number; kept, because plans
# ask for the same releases, and for the same round at several counts, again and again.
@functools.lru_cache(maxsize=32)
def _rounds(event: PoissonSampledGaussian, grid: float) -> PrivacyLossDistribution:
    return _one_round(event.sampling_prob, event.noise_multiplier, grid).self_compose(event.count)


@functools.lru_cache(maxsize=32)
def _one_round(sampling_prob: float, noise_multiplier: float, grid: float) -> PrivacyLossDistribution:
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        value_discretization_interval=grid,
        sampling_prob=sampling_prob,
        neighboring_relation=NEIGHBOURING_RELATION,
    )


def epsilon_rdp(releases: Sequence[Charge], delta: float) -> float:
    """Epsilon by Renyi differential privacy over `RDP_ORDERS`; of a search by Papernot and Steinke (2022).

    Their law of the number of trials is not truncated, and of several kinds of trial the costliest counts: for a
    search, this is a figure to compare with and no bound.
    """
    events = [compose(one for one in releases if isinstance(one, Release))]
    for event in (one.event for one in releases if isinstance(one, Choice)):
        repeated = [
            dp_accounting.dp_event.RepeatAndSelectDpEvent(compose(trial), event.law.expected_trials, event.law.shape)
            for trial in dict.fromkeys(event.candidates)
        ]
        events += [max(repeated, key=lambda one: _epsilon_rdp(one, delta))] * event.count
    return _epsilon_rdp(dp_accounting.ComposedDpEvent(events), delta)


def _epsilon_rdp(event: dp_accounting.DpEvent, delta: float) -> float:
    accountant = RdpAccountant(RDP_ORDERS, neighboring_relation=NEIGHBOURING_RELATION)
    accountant.compose(event)
    return max(0.0, float(accountant.get_epsilon(delta)))


def epsilon(releases: Sequence[Charge], delta: float) -> Bound:
    """Epsilon of all `releases` together at `delta`, by both accountants."""
    return Bound(epsilon_pld(releases, delta), epsilon_rdp(releases, delta))


def calibrate(
    spent: Sequence[Release],
    name: str,
    event: PoissonSampledGaussian,
    target: float,
    delta: float,
    grid: float = FINE_GRID,
) -> Release:
    """The release `name` with the smallest noise multiplier so that `spent` and it stay within (target, delta).

    Args:
      spent: releases already made or planned.
      event: sampling probability and count of the new release; its noise multiplier is ignored.
      target: total epsilon, above 0.
      grid: `COARSE_GRID` for a quick figure, with a little more noise than needed.

    Returns:
      A release whose composition with `spent` costs between (1 - TOLERANCE) * target and target.

    Raises:
      BudgetError: if `spent` leaves nothing.
    """

    def release(noise_multiplier: float) -> Release:
        return Release(name, replace(event, noise_multiplier=min(noise_multiplier, MAX_NOISE_MULTIPLIER)))

    @functools.cache
    def cost(bound: Callable[[Sequence[Release], float], float], noise_multiplier: float) -> float:
        return bound([*spent, release(noise_multiplier)], delta)

    already = epsilon_pld(spent, delta, grid)
    if already >= target or cost(functools.partial(epsilon_pld, grid=grid), MAX_NOISE_MULTIPLIER) > target:
        raise BudgetError(
            f"privacy.epsilon={target:g}: {', '.join(r.name for r in spent)} alone costs epsilon {already:.4g} at "
            f"delta {delta:g} and leaves nothing for {name}; give it more noise, fewer rounds, or raise the target"
        )
    # Every solution here is safe, and each is a close start for the next, slower accountant.
    start = _smallest(functools.partial(cost, epsilon_rdp), target, 1e-2, MAX_NOISE_MULTIPLIER)
    costs = [(functools.partial(cost, _coarse), 1.2), (functools.partial(cost, epsilon_pld), 1.003)]
    if grid == COARSE_GRID:
        costs = costs[:1]
    elif cost(_coarse, MAX_NOISE_MULTIPLIER) > target:  # a small target, where that grid is too coarse
        costs = costs[1:]
    return release(solve(costs, target, start))


def solve(costs: Sequence[tuple[Callable[[float], float], float]], target: float, start: float) -> float:
    """The smallest noise by the last of `costs`, from the safe side; each starts where the one before ended.

    Args:
      costs: (epsilon as a falling function of the noise, first step from the start), the quickest first.
    """
    for cost, step in costs:
        start = _improve(functools.cache(cost), target, start, step)
    return start


def _coarse(releases: Sequence[Release], delta: float) -> float:
    return epsilon_pld(releases, delta, COARSE_GRID)


def _improve(cost: Callable[[float], float], target: float, start: float, step: float) -> float:
    """The smallest noise multiplier, searched downwards from `start` (upwards if `start` costs too much)."""
    high = low = start
    if (1 - TOLERANCE) * target <= cost(start) <= target:
        return start
    while cost(high) > target:
        low, high, step = high, high * step, step**2
    while low == high or cost(low) <= target:
        high, low, step = low, low / step, step**2
    return _smallest(cost, target, low, high)


def _smallest(cost: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Smallest x in [low, high] with cost(x) <= target, from the safe side; cost falls with x.

    Interpolates in log-log (epsilon is nearly a power of the noise multiplier), falling back on bisection.
    """
    cost_low, cost_high = cost(low), cost(high)
    if cost_low <= target:
        return low
    for attempt in range(100):
        if cost_high >= (1 - TOLERANCE) * target or high / low < 1 + 1e-7:
            break
        x = math.sqrt(low * high)
        if math.isfinite(cost_low) and cost_high > 0 and attempt % 3 != 2:
            slope = math.log(cost_low / cost_high) / math.log(low / high)
            # Aim at the middle of the tolerance, so that the guess lands on the safe side.
            x = high * (target * (1 - TOLERANCE / 2) / cost_high) ** (1 / slope)
            x = min(max(x, low * (high / low) ** 0.01), low * (high / low) ** 0.99)
        value = cost(x)
        if value <= target:
            high, cost_high = x, value
        else:
            low, cost_low = x, value
    return high
