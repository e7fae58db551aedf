"""Private selection without any bound: the exact law of the best of K, for a given order of the outcomes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from scipy.stats import norm

from e2h.privacy.accounting import FINE_GRID, epsilon_pld
from e2h.privacy.events import Choice, PoissonSampledGaussian, Release, Selection

GRID = 1e-3


def gaussian(noise_multiplier: float, sampling_prob: float = 1.0, count: int = 1, name: str = "finetune") -> Release:
    return Release(name, PoissonSampledGaussian(sampling_prob, noise_multiplier, count))


def selected_epsilon(
    selection: Selection, delta: float, outside: Sequence[Release] = (), grid: float = FINE_GRID
) -> float:
    """Epsilon of the selected output together with the releases made once, outside the selection."""
    return epsilon_pld([*outside, Choice("search", selection)], delta, grid)


def fixed(num_trials: int) -> np.ndarray:
    """K known."""
    return np.eye(num_trials + 1)[num_trials]


def loss_of(first: np.ndarray, second: np.ndarray) -> privacy_loss_distribution.PrivacyLossDistribution:
    """The privacy loss distribution of two discrete laws, rounded up to `GRID`, in both directions."""
    upper, lower = ({i: math.log(p) if p else -math.inf for i, p in enumerate(law.tolist())} for law in (first, second))
    return privacy_loss_distribution.from_two_probability_mass_functions(
        lower, upper, value_discretization_interval=GRID, symmetric=False
    )


def best_of(masses: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Law of the best of K draws from `masses`, outcomes (last axis) sorted from the worst to the best."""
    reached = np.cumsum(masses, axis=-1).clip(0.0, 1.0)
    # E[x^K] in Horner's form.
    powers = np.zeros_like(reached)
    for p in probabilities[::-1]:
        powers = powers * reached + p
    return np.diff(powers, axis=-1, prepend=probabilities[0])


def hockey_stick(first: np.ndarray, second: np.ndarray, epsilon: float) -> float:
    """The largest sum over outcomes of (first - exp(epsilon) second)+, over all orders (leading axes)."""
    return float(np.maximum(first - math.exp(epsilon) * second, 0.0).sum(axis=-1).max())


def every_order(num_outcomes: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(num_outcomes))))


def exact_delta(
    first: np.ndarray, second: np.ndarray, orders: np.ndarray, probabilities: np.ndarray, epsilon: float
) -> float:
    """delta of the best of K under the worst of the given orders."""
    return hockey_stick(best_of(first[orders], probabilities), best_of(second[orders], probabilities), epsilon)


def exact_epsilon(
    first: np.ndarray, second: np.ndarray, orders: np.ndarray, probabilities: np.ndarray, delta: float
) -> float:
    """Epsilon of the best of K under the worst of the given orders, by bisection from below: never more than true."""
    laws = best_of(first[orders], probabilities), best_of(second[orders], probabilities)
    low, high = 0.0, 100.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if hockey_stick(*laws, middle) > delta else (low, middle)
    return low


def random_pairs(seed: int, count: int, num_outcomes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Unrelated, sparse and close pairs of discrete laws."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        concentration = np.full(num_outcomes, rng.choice([0.3, 1.0, 5.0]))
        first = rng.dirichlet(concentration)
        second = rng.dirichlet(concentration) if i % 2 else first * np.exp(rng.normal(0, 0.5, num_outcomes))
        yield first, second / second.sum()


def binned_gaussian(noise_multiplier: float, sampling_prob: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A Poisson-sampled Gaussian with and without the record, in 4000 bins: a post-processing of it."""
    edges = np.linspace(-9 * noise_multiplier, 9 * noise_multiplier + 1, 3999)
    without, with_it = (
        np.diff(norm.cdf(edges, mean, noise_multiplier), prepend=0.0, append=1.0) for mean in (0.0, 1.0)
    )
    # Above the middle, by the other tail: a difference of numbers near 1 would lose the small masses.
    survival = [-np.diff(norm.sf(edges, mean, noise_multiplier), prepend=1.0, append=0.0) for mean in (0.0, 1.0)]
    upper = np.arange(len(without)) > len(without) // 2
    without, with_it = np.where(upper, survival[0], without), np.where(upper, survival[1], with_it)
    return sampling_prob * with_it + (1 - sampling_prob) * without, without


def rotations(num_outcomes: int, cuts: Iterable[int]) -> np.ndarray:
    """Score orders from an attack: outcomes below a cut are the best, then those above it, each ascending."""
    ascending = np.arange(num_outcomes)
    return np.array([np.concatenate([ascending[cut:], ascending[:cut]]) for cut in cuts])
