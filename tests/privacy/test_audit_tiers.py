"""The tiers on made-up evidence: what is right passes, each fault is named. False alarms: one in a million."""

from __future__ import annotations

import numpy as np
import pytest

from e2h.privacy.accounting import calibrate
from e2h.privacy.audit import coupled_tier, noise_tier, one_run_tier, sampler_tier
from e2h.privacy.events import PoissonSampledGaussian

STEPS, COORDINATES = 40, 20_000
Q = 0.1


def noise(scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((STEPS, COORDINATES))


def judged(values: np.ndarray, releases_agree: bool = True):
    return noise_tier((values**2).sum(axis=0), values[:, ::3], releases_agree)


def without(values: np.ndarray, place: tuple) -> np.ndarray:
    values[place] = 0
    return values


def test_accounted_noise_passes():
    for seed in range(20):
        tier = judged(noise(seed=seed))
        assert tier.faults == ()
        assert tier.figures["standard_deviation"] == pytest.approx(1, abs=0.01)


NOISE_FAULTS = {
    "one per cent short": (noise(0.99), "standard deviation"),
    "too much": (noise(1.05), "1.050"),
    "none": (np.zeros((STEPS, COORDINATES)), "0.0000 times"),
    "a coordinate without": (without(noise(), (slice(None), 7)), "single coordinates"),
    "the same in two steps": (np.concatenate([noise()[:-1], noise()[:1]]), "two steps"),
    "the same and turned": (np.concatenate([noise()[:-1], -noise()[3:4]]), "two steps"),
    "uniform": (np.random.default_rng(0).uniform(-(3**0.5), 3**0.5, (STEPS, COORDINATES)), "not Gaussian"),
    "not a number": (np.full((STEPS, COORDINATES), np.nan), "standard deviation"),
}


@pytest.mark.parametrize(("values", "named"), NOISE_FAULTS.values(), ids=NOISE_FAULTS)
def test_other_noise_is_named(values, named):
    tier = judged(values)
    assert not tier.passed
    assert any(named in fault for fault in tier.faults)


def test_workers_that_hold_different_releases_are_named():
    assert judged(noise(), releases_agree=False).faults == ("workers hold different releases",)


def coins(num_steps: int = 400, num_records: int = 2000, q: float = Q, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((num_steps, num_records)) < q


@pytest.mark.parametrize("q", [0.02, 0.1, 0.5, 0.9])
def test_independent_coins_pass(q):
    for seed in range(5):
        assert sampler_tier(coins(q=q, seed=seed), q, True, True).faults == ()


def of_fixed_size() -> np.ndarray:
    rng, draws = np.random.default_rng(0), np.zeros((400, 2000), bool)
    for draw in draws:
        draw[rng.choice(2000, 200, replace=False)] = True
    return draws


def shuffled() -> np.ndarray:
    """Ten steps an epoch, each record once."""
    rng, draws = np.random.default_rng(0), np.zeros((400, 2000), bool)
    for epoch in range(40):
        for part, places in enumerate(np.split(rng.permutation(2000), 10)):
            draws[10 * epoch + part, places] = True
    return draws


def never(place: int) -> np.ndarray:
    draws = coins()
    draws[:, place] = False
    return draws


SAMPLER_FAULTS = {
    "rate": (coins(q=0.103), "instead of 0.1"),
    "fixed size": (of_fixed_size(), "batch sizes"),
    "shuffling": (shuffled(), "neighbouring steps"),
    "a draw twice": (np.concatenate([coins()[:-1], coins()[:1]]), "two steps"),
    "two blocks with the same coins": (np.tile(coins(num_records=1000), 2), "two workers"),
    "two stripes with the same coins": (np.repeat(coins(num_records=1000), 2, axis=1), "two workers"),
    "a record that never joins": (never(5), "some records"),
}


@pytest.mark.parametrize(("draws", "named"), SAMPLER_FAULTS.values(), ids=SAMPLER_FAULTS)
def test_other_draws_are_named(draws, named):
    tier = sampler_tier(draws, Q, True, True)
    assert any(named in fault for fault in tier.faults), tier.faults


def test_draws_that_differ_between_workers_or_from_what_entered_are_named():
    assert sampler_tier(coins(), Q, False, True).faults == ("workers make different draws",)
    assert sampler_tier(coins(), Q, True, False).faults == ("other records entered than were drawn",)


def test_with_probability_one_all_must_join():
    assert sampler_tier(np.ones((5, 100), bool), 1.0, True, True).passed
    draws = np.ones((5, 100), bool)
    draws[3, 3] = False
    assert not sampler_tier(draws, 1.0, True, True).passed


def test_a_record_may_move_a_release_by_its_sensitivity_and_not_further():
    assert coupled_tier({"black image": 0.0, "canary": 1.0}).passed
    for distance in (1.0001, np.inf, np.nan):
        tier = coupled_tier({"black image": 0.0, "canary": distance})
        assert any("canary" in fault for fault in tier.faults)
    assert "nothing was tested" in coupled_tier({"black image": 0.0}).faults[0]


def test_one_run_passes_at_the_accounted_noise_and_fails_without():
    release = calibrate([], "finetune", PoissonSampledGaussian(Q, 1.0, 50), 1.0, 1e-5)
    rng = np.random.default_rng(2)
    included = rng.random(2000) < 0.5
    signal = included * rng.binomial(50, Q, 2000)
    noise = rng.standard_normal(2000) * release.event.noise_multiplier * 50**0.5
    tier = one_run_tier(signal + noise, included, release, 1e-5, 0.95)
    assert tier.passed
    assert 0 < tier.figures["epsilon_lower_bound"] < tier.figures["epsilon_claimed"] <= 1
    assert tier.figures["mu_lower_bound"] < tier.figures["mu_claimed"]
    for share in (0.0, 0.25):
        tier = one_run_tier(signal + share * noise, included, release, 1e-5, 0.95)
        assert len(tier.faults) == 2
        assert tier.figures["epsilon_lower_bound"] <= tier.figures["ceiling"]
