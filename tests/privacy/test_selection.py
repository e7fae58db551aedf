"""The cost of the best of K: Papernot and Steinke's bound, composition, candidates, a whole search."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import beta
from selection_cases import gaussian, selected_epsilon

from e2h.privacy import selection_profile
from e2h.privacy.accounting import COARSE_GRID, epsilon_pld, epsilon_rdp, privacy_loss
from e2h.privacy.events import Choice, Release, Selection, event_from_json
from e2h.privacy.trial_law import POISSON, TrialLaw

DELTA = 1e-5
CENTRAL = gaussian(5.0, 0.1, 5, name="central")


def dominated(candidate: Sequence[Release], charged: Sequence[Sequence[Release]]) -> bool:
    return selection_profile.dominated(privacy_loss(candidate), [privacy_loss(trial) for trial in charged])


def one(law: TrialLaw, *trial: Release) -> Selection:
    return Selection(law, (trial,))


def renyi(law: TrialLaw, trial: tuple[Release, ...], delta: float, *outside: Release) -> float:
    return epsilon_rdp([*outside, Choice("search", one(law, *trial))], delta)


@pytest.mark.parametrize("trial", [(gaussian(2.0),), (gaussian(1.5, 0.05, 100),), (CENTRAL, gaussian(4.0, 0.2, 50))])
@pytest.mark.parametrize(
    "law",
    [TrialLaw(shape, mean, 400) for shape in (0.0, 1.0, 3.0) for mean in (2.0, 8.0)] + [TrialLaw(POISSON, 8.0, 60)],
    ids=lambda law: f"{law.shape:g}-{law.expected_trials:g}",
)
def test_the_bound_is_never_looser_than_papernot_and_steinkes(trial, law):
    for delta in (1e-3, 1e-5, 1e-8):
        assert selected_epsilon(one(law, *trial), delta, grid=COARSE_GRID) < renyi(law, trial, delta)


def test_a_release_outside_composes_with_the_selection_below_the_renyi_bound_and_above_each_part():
    law, trial = TrialLaw(3.0, 4.0, 200), gaussian(4.0, 0.2, 50)
    together = selected_epsilon(one(law, trial), DELTA, [CENTRAL])
    assert together < renyi(law, (trial,), DELTA, CENTRAL)
    assert together > max(selected_epsilon(one(law, trial), DELTA), epsilon_pld([CENTRAL], DELTA))
    # Epsilons don't add up, and a part released in every trial costs more than once.
    assert together < selected_epsilon(one(law, trial), DELTA) + epsilon_pld([CENTRAL], DELTA)
    assert together < selected_epsilon(one(law, CENTRAL, trial), DELTA)


def test_one_trial_is_charged_as_a_single_run():
    only = TrialLaw(3.0, 1.0, 32)
    for delta in (1e-3, 1e-8):
        alone = selected_epsilon(one(only, gaussian(4.0, 0.2, 50)), delta)
        assert alone == pytest.approx(epsilon_pld([gaussian(4.0, 0.2, 50)], delta), rel=2e-4)
        with_central = selected_epsilon(one(only, gaussian(4.0, 0.2, 50)), delta, [CENTRAL])
        assert with_central == pytest.approx(epsilon_pld([gaussian(4.0, 0.2, 50), CENTRAL], delta), rel=2e-4)


def test_more_trials_less_noise_and_smaller_deltas_cost_more():
    def cost(mean=4.0, noise=4.0, delta=DELTA):
        return selected_epsilon(one(TrialLaw(3.0, mean, 32), gaussian(noise, 0.2, 50)), delta, grid=COARSE_GRID)

    assert cost() < min(cost(mean=8.0), cost(noise=3.0), cost(delta=1e-6))


def test_candidates_are_charged_with_their_envelope():
    """Several splits of the noise: the charge is at least each one's and does not depend on their order or number."""
    law = TrialLaw()
    splits = tuple((gaussian(noise, 0.1, 5, name="central"), gaussian(4.0, 0.1, 60)) for noise in (6.0, 3.0))
    other = (gaussian(5.0, 0.1, 5, name="central"), gaussian(5.9, 0.2, 30))
    alone = [selected_epsilon(one(law, *trial), DELTA) for trial in (*splits, other)]
    together = selected_epsilon(Selection(law, (*splits, other)), DELTA)
    assert max(alone) * (1 - 1e-6) <= together < 1.05 * max(alone)
    assert selected_epsilon(Selection(law, (other, *splits[::-1], other)), DELTA) == pytest.approx(together, rel=1e-9)
    assert dominated(splits[0], splits[1:])
    assert not dominated(splits[1], splits[:1])
    assert dominated(splits[1], splits)


def test_domination_is_of_the_whole_profile():
    charged = gaussian(4.0)
    assert dominated([gaussian(4.1)], [[charged]])
    assert not dominated([gaussian(3.9)], [[charged]])
    # The same epsilon at delta, by a rare and loud round: cheaper near it, dearer in the tail.
    rare = gaussian(0.68621, 0.01)
    assert epsilon_pld([rare], DELTA) == pytest.approx(epsilon_pld([charged], DELTA), rel=1e-3)
    assert not dominated([rare], [[charged]])
    law = TrialLaw()
    assert selected_epsilon(one(law, rare), DELTA) > 1.02 * selected_epsilon(one(law, charged), DELTA)


def test_a_third_party_recomputes_the_claim_from_json():
    selection = Selection(TrialLaw(), ((gaussian(25.0, name="score"), gaussian(4.0, 0.1, 60)), (gaussian(5.0),)))
    value = json.loads(json.dumps(selection.to_json(), allow_nan=False))
    again = event_from_json(value)
    assert again == selection
    assert selected_epsilon(again, DELTA, [CENTRAL]) == selected_epsilon(selection, DELTA, [CENTRAL])
    with pytest.raises(ValueError, match="unknown event type 'gaussian'"):
        Selection.from_json({**value, "type": "gaussian"})


def test_deltas_below_what_double_precision_carries_and_empty_lists_are_refused():
    with pytest.raises(ValueError, match="expected at least 1e-10"):
        selected_epsilon(one(TrialLaw(), gaussian(4.0)), 1e-11)
    with pytest.raises(ValueError, match="at least one candidate"):
        Selection(TrialLaw(), ())


def search(rng: np.random.Generator, law: TrialLaw, noise: float, contribution: float, runs: int) -> np.ndarray:
    """What `runs` searches release: of K noisy sums the best one, by a score that gives the record away.

    Sums below a threshold are preferred to all others, and larger ones among equals.
    """
    num_trials = rng.choice(law.max_trials + 1, runs, p=law.probabilities)
    released, best = np.zeros(runs), np.full(runs, -np.inf)
    for trial in range(law.max_trials):
        running = np.flatnonzero(trial < num_trials)
        sums = contribution + noise * rng.standard_normal(len(running))
        score = sums + 1e3 * (sums < -0.6 * noise)
        better = score > best[running]
        released[running[better]], best[running[better]] = sums[better], score[better]
    return released


def certainly_violated(claimed: float, delta: float, with_record: np.ndarray, without: np.ndarray) -> bool:
    """Whether samples show P(E) > exp(claimed) P'(E) + delta for one event E, but for once in 10^4 times.

    The event is chosen on one half of the samples and counted on the other (Clopper and Pearson 1934).
    """
    half = len(with_record) // 2
    thresholds = np.quantile(with_record[:half], np.linspace(0.5, 0.999, 200))
    above, above_without = ((x[:half, None] > thresholds).mean(axis=0) for x in (with_record, without))
    threshold = thresholds[np.argmax(above - math.exp(claimed) * above_without)]
    hits, hits_without = (int((x[half:] > threshold).sum()) for x in (with_record, without))
    n = len(with_record) - half
    at_least = beta.ppf(5e-5, hits, n - hits + 1)
    at_most = beta.ppf(1 - 5e-5, hits_without + 1, n - hits_without)
    return at_least - math.exp(claimed) * at_most > delta


def test_a_whole_search_stays_within_its_claim_and_a_smaller_claim_is_caught():
    law, trial, delta = TrialLaw(3.0, 8.0, 32), gaussian(2.0), 1e-2
    rng = np.random.default_rng(0)
    with_record, without = (search(rng, law, 2.0, contribution, 1_000_000) for contribution in (1.0, 0.0))
    claimed = selected_epsilon(one(law, trial), delta)
    assert not certainly_violated(claimed, delta, with_record, without)
    # As if choosing were free, or nearly.
    assert certainly_violated(epsilon_pld([trial], delta), delta, with_record, without)
    assert certainly_violated(0.85 * claimed, delta, with_record, without)
