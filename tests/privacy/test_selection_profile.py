"""The bound on the best of K against brute force, and each rule it rests on, broken: then it must be false."""

from __future__ import annotations

import numpy as np
import pytest
from selection_cases import (
    GRID,
    best_of,
    binned_gaussian,
    every_order,
    exact_delta,
    exact_epsilon,
    fixed,
    hockey_stick,
    loss_of,
    random_pairs,
    rotations,
)

from e2h.privacy import selection_profile
from e2h.privacy.selection_profile import dominated, select
from e2h.privacy.trial_law import POISSON, TrialLaw

LAWS = {
    "one": fixed(1),
    "five": fixed(5),
    "logarithmic": TrialLaw(0.0, 4.0, 32).probabilities,
    "geometric": TrialLaw(1.0, 4.0, 32).probabilities,
    "default": TrialLaw().probabilities,
    "poisson": TrialLaw(POISSON, 3.0, 32).probabilities,
    "binomial": np.array([1, 6, 15, 20, 15, 6, 1]) / 64,
}
EPSILONS = (0.0, 0.3, 1.0, 2.0)
ORDERS = every_order(5)
DELTA = 1e-5
BINS = 4000
CUTS = rotations(BINS, np.linspace(0, BINS - 1, 60).astype(int))


def claim(loss, probabilities, delta=DELTA) -> float:
    return select([loss], probabilities).get_epsilon_for_delta(delta)


def both_ways(exact, first, second, *rest) -> float:
    return max(exact(first, second, *rest), exact(second, first, *rest))


@pytest.mark.parametrize("law", LAWS)
def test_no_order_of_the_outcomes_breaks_the_bound_and_some_come_close(law):
    probabilities, reached = LAWS[law], []
    for first, second in random_pairs(seed=1, count=12, num_outcomes=5):
        best = select([loss_of(first, second)], probabilities)
        for epsilon in EPSILONS:
            exact = both_ways(exact_delta, first, second, ORDERS, probabilities, epsilon)
            # The profile is given on the grid; beside round-off nothing may exceed it.
            bound = best.get_delta_for_epsilon(epsilon)
            assert exact <= bound + 1e-9
            reached += [exact / bound] if exact > 1e-3 else []
    assert max(reached) > 0.85


@pytest.mark.parametrize("law", ["one", "logarithmic", "geometric", "default", "poisson"])
def test_the_bound_is_reached_within_four_per_cent_by_an_attack_on_a_gaussian(law):
    first, second = binned_gaussian(4.0)
    claimed = claim(loss_of(first, second), LAWS[law])
    attacked = both_ways(exact_epsilon, first, second, CUTS, LAWS[law], DELTA)
    assert 0.96 * claimed < attacked <= claimed


def test_one_trial_costs_what_it_costs_alone():
    loss = loss_of(*binned_gaussian(2.0, sampling_prob=0.3))
    for delta in (1e-2, 1e-5, 1e-8):
        assert claim(loss, fixed(1), delta) == pytest.approx(loss.get_epsilon_for_delta(delta), rel=2e-4)


def test_the_selected_loss_composes_as_two_selections_made_after_each_other():
    """All pairs of orders of two independent selections on small laws, against the composed distributions."""
    probabilities = LAWS["geometric"]
    for first, second in random_pairs(seed=2, count=6, num_outcomes=3):
        best = select([loss_of(first, second)], probabilities)
        twice = best.compose(best)
        sides = [best_of(side[every_order(3)], probabilities) for side in (first, second)]
        pairs = [np.einsum("ai,bj->abij", side, side).reshape(36, 9) for side in sides]
        for epsilon in EPSILONS:
            exact = max(hockey_stick(*pairs, epsilon), hockey_stick(*pairs[::-1], epsilon))
            assert exact <= twice.get_delta_for_epsilon(epsilon) + 1e-9


def test_rule_1_the_trade_off_curve_of_the_same_direction_is_not_a_bound():
    """T must come from the opposite direction; with the wrong one some order exceeds the figure."""
    broken = kept = 0
    probabilities = LAWS["geometric"]
    for first, second in random_pairs(seed=3, count=30, num_outcomes=5):
        loss, opposite = (
            selection_profile._padded(side) for side in selection_profile._directions(loss_of(first, second))
        )
        right, wrong = (selection_profile.selected_profile(loss, other, probabilities) for other in (opposite, loss))
        for epsilon in EPSILONS:
            exact = exact_delta(first, second, ORDERS, probabilities, epsilon)
            at = round(epsilon / GRID)
            kept += exact <= right[min(at, len(right) - 1)] + 1e-9
            broken += exact > wrong[min(at, len(wrong) - 1)] + 1e-6
    assert kept == 30 * len(EPSILONS)
    assert broken > 0


def test_rule_2_the_least_of_k_and_a_limit_costs_more_than_k_below_the_limit():
    law = TrialLaw(0.0, 6.0, 32)
    ratio = law.probabilities[2] / law.probabilities[1] * 2
    without_limit = ratio ** np.arange(1, 4000) / np.arange(1, 4000)
    without_limit /= without_limit.sum()
    cut = np.concatenate([[0.0], without_limit[:31], [without_limit[31:].sum()]])
    first, second = binned_gaussian(4.0)
    claimed = claim(loss_of(first, second), law.probabilities)
    assert both_ways(exact_epsilon, first, second, CUTS, law.probabilities, DELTA) <= claimed
    assert both_ways(exact_epsilon, first, second, CUTS, cut, DELTA) > 1.02 * claimed


def test_rule_3_a_common_point_of_the_profiles_is_not_enough():
    """A candidate with the charged trial's epsilon at delta, but a heavier tail: a leak of everything, once in 10^5."""
    probabilities = LAWS["default"]
    charged = loss_of(*binned_gaussian(4.0))
    rest = 1.0 - DELTA
    leaking = np.array([DELTA, 0.5 * rest, 0.5 * rest]), np.array([0.0, 0.5, 0.5])
    candidate = loss_of(*leaking)
    assert candidate.get_epsilon_for_delta(DELTA * 1.0001) < charged.get_epsilon_for_delta(DELTA)
    claimed = claim(charged, probabilities)
    assert exact_delta(*leaking, every_order(3), probabilities, claimed) > 5 * DELTA
    assert not dominated(candidate, [charged])
    # Charged with it, the bound holds.
    assert dominated(candidate, [charged, candidate])
    bound = select([charged, candidate], probabilities).get_delta_for_epsilon(claimed)
    assert exact_delta(*leaking, every_order(3), probabilities, claimed) <= bound + 1e-9


def test_rule_3_a_mixture_of_candidates_stays_below_the_envelope():
    """The candidate itself is part of the outcome, and a choice may prefer the one that leaks more."""
    probabilities = LAWS["geometric"]
    pairs = list(random_pairs(seed=4, count=20, num_outcomes=3))
    for one, two in zip(pairs[::2], pairs[1::2], strict=True):
        first, second = (np.concatenate([0.3 * a, 0.7 * b]) for a, b in zip(one, two, strict=True))
        best = select([loss_of(*one), loss_of(*two)], probabilities)
        for epsilon in EPSILONS:
            exact = both_ways(exact_delta, first, second, every_order(6), probabilities, epsilon)
            assert exact <= best.get_delta_for_epsilon(epsilon) + 1e-9


def test_rule_5_a_known_number_of_trials_costs_more_than_the_law_is_charged():
    first, second = binned_gaussian(4.0)
    law = TrialLaw(0.0, 6.0, 32)
    claimed = claim(loss_of(first, second), law.probabilities)
    assert both_ways(exact_epsilon, first, second, CUTS, fixed(32), DELTA) > 1.5 * claimed
    # Charged as what it is, it is bounded.
    assert both_ways(exact_epsilon, first, second, CUTS, fixed(32), DELTA) <= claim(loss_of(first, second), fixed(32))


def test_rule_6_no_finite_epsilon_is_found_where_none_reaches_delta():
    leaking = loss_of(np.array([1e-3, 0.999]), np.array([0.0, 1.0]))
    assert claim(leaking, LAWS["default"], delta=7e-3) == np.inf
    assert claim(leaking, LAWS["default"], delta=9e-3) < np.inf


def test_a_profile_dominates_itself_and_a_weaker_one_but_not_a_stronger_one():
    weak, strong = (loss_of(*binned_gaussian(noise)) for noise in (8.0, 4.0))
    assert dominated(weak, [strong])
    assert dominated(strong, [strong])
    assert not dominated(strong, [weak])
    # In one direction alone is not enough.
    first, second = np.array([0.2, 0.8]), np.array([0.1, 0.9])
    assert not dominated(loss_of(second, first), [loss_of(first, second)])
