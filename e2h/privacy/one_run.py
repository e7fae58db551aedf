"""A lower bound on epsilon from one run of a mechanism with canaries.

Each of m canaries joins the data by a fair coin. From the output, an auditor guesses which did: the highest scores
"in", the lowest "out". More right guesses than a private mechanism allows refute the claim.

Two bounds. The first (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846) assumes nothing but (epsilon, delta). The
second (Mahloujifar, Melis and Chaudhuri 2024, arXiv 2410.22235) refutes a whole trade-off curve, here a Gaussian one
(Dong, Roth and Su 2019), and is tighter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import ndtr, ndtri

# Shares of the canaries to guess about; fewer guesses are surer ones. The significance is divided among them.
GUESSED_SHARES = (0.5, 0.3, 0.2, 0.1, 0.05)
MAX_EPSILON, MAX_MU = 30.0, 20.0


@dataclass(frozen=True)
class LowerBounds:
    """What one run shows, or could show at most.

    Attributes:
      epsilon: (epsilon, delta) is refuted for every smaller epsilon.
      mu: mu-Gaussian differential privacy is refuted for every smaller mu.
    """

    epsilon: float
    mu: float


def lower_bounds(scores: np.ndarray, included: np.ndarray, delta: float, significance: float) -> LowerBounds:
    """Both bounds; each is above the truth with probability at most `significance`, whatever the scores mean.

    Args:
      scores: [m], higher for canaries that seem to be in.
      included: bool [m], independent fair coins.
    """
    order = np.argsort(scores, kind="stable")
    guesses = []
    for share in GUESSED_SHARES:
        each = _guesses_a_side(len(scores), share)
        right = int(included[order[-each:]].sum()) + int((~included[order[:each]]).sum())
        guesses.append((2 * each, right))
    return _best(len(scores), guesses, delta, significance)


def ceiling(num_canaries: int, delta: float, significance: float) -> LowerBounds:
    """The bounds where every guess is right, as without any noise: a larger claim can't be refuted."""
    guesses = [2 * _guesses_a_side(num_canaries, share) for share in GUESSED_SHARES]
    return _best(num_canaries, [(num, num) for num in guesses], delta, significance)


def _guesses_a_side(num_canaries: int, share: float) -> int:
    return max(1, int(share * num_canaries / 2))


def _best(num_canaries: int, guesses: Sequence[tuple[int, int]], delta: float, significance: float) -> LowerBounds:
    each = significance / len(guesses)  # Bonferroni
    return LowerBounds(
        max(epsilon_lower_bound(num_canaries, num, right, delta, each) for num, right in guesses),
        max(mu_lower_bound(num_canaries, num, right, each) for num, right in guesses),
    )


def p_value(num_canaries: int, num_guesses: int, num_right: int, epsilon: float, delta: float) -> float:
    """Largest probability of `num_right` or more right guesses under (epsilon, delta) (Steinke et al.)."""
    right_at_most = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(num_right - 1, num_guesses, right_at_most))
    if delta == 0 or num_right == 0:
        return tail
    misses = np.arange(1, num_right + 1)
    near = stats.binom.sf(num_right - misses - 1, num_guesses, right_at_most) - tail
    return min(1.0, tail + 2 * num_canaries * delta * max(0.0, float((near / misses).max())))


def epsilon_lower_bound(
    num_canaries: int, num_guesses: int, num_right: int, delta: float, significance: float
) -> float:
    """The largest epsilon that is refuted, 0 if none is."""
    return _largest(
        lambda epsilon: p_value(num_canaries, num_guesses, num_right, epsilon, delta) < significance, MAX_EPSILON
    )


def refutes_gaussian(mu: float, num_canaries: int, num_guesses: int, num_right: int, significance: float) -> bool:
    """Whether mu-Gaussian differential privacy is refuted (Mahloujifar et al.).

    The recursion bounds from above how much probability can lie on i right guesses, given the tail above i; if the
    probabilities then can't add up, `num_right` is too many.
    """
    right = significance * num_right / num_canaries
    wrong = significance * (num_guesses - num_right) / num_canaries
    for i in range(num_right - 1, -1, -1):
        bound = max(wrong, float(ndtr(ndtri(right) - mu)))
        if bound == wrong:  # it then stays so
            break
        right = min(1.0, right + i / (num_guesses - i) * (bound - wrong))
        wrong = bound
    return right + wrong > num_guesses / num_canaries


def mu_lower_bound(num_canaries: int, num_guesses: int, num_right: int, significance: float) -> float:
    """The largest mu that is refuted, 0 if none is."""
    return _largest(lambda mu: refutes_gaussian(mu, num_canaries, num_guesses, num_right, significance), MAX_MU)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """delta(epsilon) of mu-Gaussian differential privacy (Dong et al. 2019, Corollary 2.13), mu above 0."""
    return float(ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon) * ndtr(-mu / 2 - epsilon / mu))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """epsilon(delta) of mu-Gaussian differential privacy."""
    return _largest(lambda epsilon: gaussian_delta(mu, epsilon) > delta, 500.0) if mu > 0 else 0.0


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu whose curve passes through (epsilon, delta)."""
    return _largest(lambda mu: gaussian_delta(mu, epsilon) <= delta, MAX_MU)


def _largest(holds: Callable[[float], bool], high: float) -> float:
    """The end of the interval from 0 on which `holds`; 0 if it holds nowhere."""
    low = 1e-6
    if not holds(low):
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
