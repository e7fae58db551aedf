"""The one-run bounds: never above the truth, against exact probabilities; as sharp as the published ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from e2h.privacy.one_run import (
    LowerBounds,
    ceiling,
    epsilon_lower_bound,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    lower_bounds,
    mu_lower_bound,
    p_value,
    refutes_gaussian,
)

DELTA = 1e-5


def rate(epsilon: float) -> float:
    return float(1 / (1 + np.exp(-epsilon)))


@pytest.mark.parametrize(("epsilon", "num"), [(0.0, 12), (0.5, 30), (2.0, 9)])
def test_pure_p_value_is_that_of_randomised_response(epsilon, num):
    """Counted out: every canary's bit comes out right with probability e^eps / (1 + e^eps)."""
    q = rate(epsilon)
    for right in range(num + 1):
        exact = sum(stats.binom.pmf(k, num, q) for k in range(right, num + 1))
        assert p_value(50, num, right, epsilon, 0.0) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize(("epsilon", "delta", "num"), [(0.5, 0.01, 40), (1.0, 1e-3, 25), (0.0, 0.02, 60)])
def test_p_value_holds_for_mechanisms_that_use_their_delta(epsilon, delta, num):
    """Randomised response that shows each bit, or all bits together, with probability delta."""
    q, counts = rate(epsilon), np.arange(num + 1)
    each = stats.binom.sf(counts - 1, num, delta + (1 - delta) * q)
    together = delta + (1 - delta) * stats.binom.sf(counts - 1, num, q)
    bound = [p_value(num, num, right, epsilon, delta) for right in counts]
    assert (np.array(bound) >= each - 1e-12).all()
    assert (np.array(bound) >= together - 1e-12).all()
    assert np.mean([p_value(num, num, right, epsilon, 0.0) < each[right] for right in counts]) > 0.5  # delta is needed


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("num", [1, 5, 60, 400])
def test_a_gaussian_mechanism_is_refuted_as_rarely_as_stated(mu, num):
    """Exact: with one Gaussian coordinate a canary, a guess is right with probability Phi(mu / 2)."""
    for significance in (0.05, 0.3):
        refuted = [v for v in range(num + 1) if refutes_gaussian(mu, num, num, v, significance)]
        if refuted:  # all right is too few of one canary
            assert refuted == list(range(min(refuted), num + 1))
            assert stats.binom.sf(min(refuted) - 1, num, stats.norm.cdf(mu / 2)) <= significance


def test_bounds_hold_as_often_as_stated_when_guessing_some():
    """100 runs of a Gaussian mechanism at significance 0.3. A false alarm: once in a million seeds."""
    rng, mu, above = np.random.default_rng(0), 1.0, np.zeros(2)
    truth = gaussian_epsilon(mu, DELTA)
    for _ in range(100):
        included = rng.random(200) < 0.5
        found = lower_bounds(mu * included + rng.standard_normal(200), included, DELTA, 0.3)
        above += [found.epsilon > truth, found.mu > mu]
        assert found.epsilon <= gaussian_epsilon(max(found.mu, 1e-6), DELTA) + 1e-6  # the first bound is the weaker
    assert (above <= stats.binom.isf(1e-6, 100, 0.3)).all()


def test_an_unprotected_output_is_found_and_a_constant_one_is_not():
    included = np.random.default_rng(1).random(2000) < 0.5
    assert lower_bounds(included.astype(float), included, DELTA, 0.05) == ceiling(2000, DELTA, 0.05)
    assert lower_bounds(np.zeros(2000), included, DELTA, 0.05) == LowerBounds(0.0, 0.0)
    assert lower_bounds(-included.astype(float), included, DELTA, 0.05) == LowerBounds(0.0, 0.0)


def test_the_ceiling_at_two_thousand_canaries():
    highest = ceiling(2000, DELTA, 0.05)
    assert highest.epsilon == pytest.approx(5.25, abs=0.01)
    assert gaussian_epsilon(highest.mu, DELTA) == pytest.approx(8.98, abs=0.01)


def test_the_gaussian_bound_is_the_tighter():
    for right in (320, 400, 480):
        one = epsilon_lower_bound(2000, 500, right, DELTA, 0.05)
        assert one < gaussian_epsilon(mu_lower_bound(2000, 500, right, 0.05), DELTA) < 2.5 * one


def test_bounds_are_the_ends_of_what_is_refuted():
    found = epsilon_lower_bound(1000, 500, 400, DELTA, 0.05)
    assert p_value(1000, 500, 400, found - 1e-4, DELTA) < 0.05 < p_value(1000, 500, 400, found + 1e-4, DELTA)
    mu = mu_lower_bound(1000, 500, 400, 0.05)
    assert refutes_gaussian(mu - 1e-4, 1000, 500, 400, 0.05)
    assert not refutes_gaussian(mu + 1e-4, 1000, 500, 400, 0.05)


def test_bounds_grow_with_right_guesses_and_significance_and_fall_with_delta():
    by_right = [epsilon_lower_bound(1000, 500, right, DELTA, 0.05) for right in range(240, 501, 20)]
    assert all(a <= b for a, b in itertools.pairwise(by_right))
    assert by_right[0] == 0 < by_right[-1]
    mus = [mu_lower_bound(1000, 500, right, 0.05) for right in range(240, 501, 20)]
    assert all(a <= b for a, b in itertools.pairwise(mus))
    assert epsilon_lower_bound(1000, 500, 400, DELTA, 0.01) < epsilon_lower_bound(1000, 500, 400, DELTA, 0.1)
    deltas = [epsilon_lower_bound(1000, 500, 400, delta, 0.05) for delta in (0.0, 1e-6, 1e-5, 1e-4, 1e-3)]
    assert all(a >= b for a, b in itertools.pairwise(deltas))


def test_gaussian_curves():
    assert gaussian_delta(1.0, 1.0) == pytest.approx(stats.norm.cdf(-0.5) - np.e * stats.norm.cdf(-1.5))
    for mu in (0.05, 0.3, 1.0, 4.0):
        for delta in (1e-8, 1e-5, 1e-2):
            epsilon = gaussian_epsilon(mu, delta)
            if epsilon > 0:
                assert gaussian_mu(epsilon, delta) == pytest.approx(mu, rel=1e-4)
    # The Gaussian mechanism's exact value at sigma = 1 / mu.
    assert gaussian_epsilon(0.26805, 1e-5) == pytest.approx(1.0, abs=1e-4)
