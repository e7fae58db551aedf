"""Epsilon of composed releases and the noise that spends a target: published figures, closed forms, other libraries."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import dp_accounting
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from e2h.config import MAX_NOISE_MULTIPLIER
from e2h.errors import BudgetError
from e2h.privacy.accounting import (
    COARSE_GRID,
    MIN_DELTA,
    NEIGHBOURING_RELATION,
    TOLERANCE,
    _improve,
    calibrate,
    epsilon,
    epsilon_curve,
    epsilon_pld,
    epsilon_rdp,
)
from e2h.privacy.events import PoissonSampledGaussian, Release


def central(sampling_prob: float, noise_multiplier: float, num_rounds: int) -> Release:
    return Release("central", PoissonSampledGaussian(sampling_prob, noise_multiplier, num_rounds))


def finetune(sampling_prob: float, noise_multiplier: float, num_steps: int) -> Release:
    return Release("finetune", PoissonSampledGaussian(sampling_prob, noise_multiplier, num_steps))


MNIST = (central(0.1, 5.0, 5), finetune(1 / 15, 1.0, 2250), 1e-5)
CELEBA = (central(0.0657, 10.0, 250), finetune(1 / 90, 1.0, 13500), 1e-6)
CAMELYON = (central(0.04, 10.0, 250), finetune(1 / 148, 1.0, 2960), 1e-6)
DEMO = [central(0.5, 12.0, 5), finetune(256 / 1497, 4.0, 60)]
SMALL = [central(0.5, 20.0, 3), finetune(0.1, 4.0, 20)]


def with_noise(release: Release, noise_multiplier: float) -> Release:
    return Release(release.name, replace(release.event, noise_multiplier=noise_multiplier))


# The published settings; sigma by PLD, computed for METHOD.md's table by another program.
@pytest.mark.parametrize(
    ("setting", "target", "sigma"),
    [
        pytest.param(MNIST, 1.0, 12.03, id="mnist-1"),
        pytest.param(CELEBA, 1.0, 6.14, id="celeba-1"),
        pytest.param(CELEBA, 10.0, 0.962, id="celeba-10"),
        pytest.param(CAMELYON, 1.0, 1.789, id="camelyon-1"),
        pytest.param(CAMELYON, 10.0, 0.590, id="camelyon-10"),
    ],
)
def test_the_noise_of_the_published_settings_lies_within_one_per_cent(setting, target, sigma):
    easy, hard, delta = setting
    assert epsilon_pld([easy, with_noise(hard, 1.01 * sigma)], delta) < target
    assert epsilon_pld([easy, with_noise(hard, 0.99 * sigma)], delta) > target


@pytest.mark.slow
def test_calibration_finds_the_published_noise_and_stays_below_the_target():
    easy, hard, delta = MNIST
    found = calibrate([easy], "finetune", hard.event, 10.0, delta)
    assert found.event.noise_multiplier == pytest.approx(1.743, rel=0.01)
    assert (found.name, found.event.sampling_prob, found.event.count) == ("finetune", 1 / 15, 2250)
    assert 10 * (1 - TOLERANCE) <= epsilon([easy, found], delta).epsilon <= 10


@pytest.mark.parametrize(("target", "sigma"), [(1.0, 13.09), (10.0, 1.837)])
def test_renyi_accounting_gives_the_noise_that_the_paper_used(target, sigma):
    easy, hard, delta = MNIST
    assert epsilon_rdp([easy, with_noise(hard, 1.01 * sigma)], delta) < target
    assert epsilon_rdp([easy, with_noise(hard, 0.99 * sigma)], delta) > target


@pytest.mark.parametrize(
    ("target", "spent", "event"),
    [
        (0.05, [], PoissonSampledGaussian(1.0, 1.0, 1)),
        (0.5, [central(0.5, 30.0, 5)], PoissonSampledGaussian(0.05, 1.0, 100)),
        (3.0, [central(1.0, 5.0, 1)], PoissonSampledGaussian(0.05, 1.0, 100)),
    ],
)
def test_calibration_spends_the_target_within_one_per_mille_and_never_more(target, spent, event):
    found = calibrate(spent, "finetune", event, target, 1e-5)
    total = epsilon([*spent, found], 1e-5).epsilon
    assert (1 - 1e-3) * target < total <= target
    # An independent accountant of the same kind agrees that the target is met.
    accountant = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    for release in (*spent, found):
        accountant.compose(release.event.dp_event())
    assert accountant.get_epsilon(1e-5) <= target * (1 + 1e-9)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("step", [0.0, 1e-3])
def test_the_search_ends_on_the_safe_side_of_any_falling_cost(power, step):
    """Also of a cost with jumps, as a discretised accountant has, and wherever the search begins."""

    def cost(x: float) -> float:
        exact = x**-power * (1 + 0.1 * math.sin(power * math.log(x)))
        return math.ceil(exact / step) * step if step else exact

    for target in (0.05, 0.5, 3.0):
        for start in (0.01, 0.5, 1.0, 20.0, 1e3):
            found = _improve(cost, target, start, 1.2)
            assert cost(found) <= target
            assert cost(found) >= (1 - TOLERANCE) * target or cost(found / (1 + 1e-6)) > target


def test_less_budget_more_steps_and_a_louder_easy_stage_take_more_noise():
    def noise(target=1.0, num_steps=10, easy=12.0):
        event = PoissonSampledGaussian(0.1, 1.0, num_steps)
        return calibrate([central(0.5, easy, 2)], "finetune", event, target, 1e-4).event.noise_multiplier

    usual = noise()
    for more in (noise(target=0.8), noise(num_steps=20), noise(easy=5.0)):
        assert more > 1.01 * usual


def test_equal_phases_may_be_merged_or_split():
    for count in (1, 7, 19):
        parts = [SMALL[0], finetune(0.1, 4.0, count), finetune(0.1, 4.0, 20 - count)]
        assert epsilon(parts, 1e-5).epsilon == pytest.approx(epsilon(SMALL, 1e-5).epsilon, rel=2e-3)


def test_a_target_that_needs_most_of_the_noise_there_is_can_be_calibrated():
    found = calibrate([], "finetune", PoissonSampledGaussian(0.5, 1.0, 100), 0.001, 1e-6)
    assert 10_000 < found.event.noise_multiplier < MAX_NOISE_MULTIPLIER
    assert 0.999 * 0.001 < epsilon([found], 1e-6).epsilon <= 0.001
    with pytest.raises(BudgetError, match=r"^privacy.epsilon=1e-06"):
        calibrate([], "finetune", PoissonSampledGaussian(0.5, 1.0, 100), 1e-6, 1e-6)


def test_one_gaussian_query_is_calibrated_as_its_closed_form_says():
    # Balle and Wang 2018, Eq. 6: the exact delta of the Gaussian mechanism.
    def delta(sigma):
        return norm.cdf(0.5 / sigma - sigma) - math.e * norm.cdf(-0.5 / sigma - sigma)

    exact = brentq(lambda sigma: delta(sigma) - 1e-5, 1, 10)
    found = calibrate([], "finetune", PoissonSampledGaussian(1.0, 1.0, 1), 1.0, 1e-5)
    assert exact <= found.event.noise_multiplier < exact * 1.001


def test_a_target_that_the_easy_stage_uses_up_is_refused_with_the_numbers():
    expensive = central(0.5, 1.0, 5)
    alone = epsilon([expensive], 1e-5).epsilon
    with pytest.raises(BudgetError) as refused:
        calibrate([expensive], "finetune", PoissonSampledGaussian(0.1, 1.0, 40), 1.0, 1e-5)
    message = str(refused.value)
    for part in ("privacy.epsilon=1:", "central alone", f"{alone:.4g}", "delta 1e-05", "leaves nothing for finetune"):
        assert part in message


def test_an_easy_stage_that_uses_exactly_the_target_is_refused():
    spent = central(0.5, 8.0, 3)
    with pytest.raises(BudgetError):
        calibrate([spent], "finetune", PoissonSampledGaussian(0.1, 1.0, 40), epsilon([spent], 1e-5).epsilon, 1e-5)


@pytest.mark.parametrize(("releases", "delta"), [(SMALL, 1e-5), (DEMO, 1e-4), ([finetune(1.0, 4.0, 1)], 1e-6)])
def test_epsilon_equals_five_lines_of_dp_accounting(releases, delta):
    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    accountant = dp_accounting.pld.PLDAccountant(neighboring_relation=relation)
    for release in releases:
        gaussian = dp_accounting.GaussianDpEvent(release.event.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(release.event.sampling_prob, gaussian)
        accountant.compose(sampled, release.event.count)
    assert [epsilon(releases, delta).epsilon for _ in range(2)] == [accountant.get_epsilon(delta)] * 2
    more = [replace(one, event=replace(one.event, count=2 * one.event.count)) for one in releases]  # of the same rounds
    accountant.compose(accountant.ledger)
    assert epsilon(more, delta).epsilon == pytest.approx(accountant.get_epsilon(delta), rel=1e-4)


def test_zero_out_costs_what_add_or_remove_costs():
    assert NEIGHBOURING_RELATION.name == "REPLACE_SPECIAL"
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = dp_accounting.pld.PLDAccountant(neighboring_relation=relation)
    for release in SMALL:
        accountant.compose(release.event.dp_event())
    assert epsilon_pld(SMALL, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-9)


@pytest.mark.parametrize(("releases", "delta"), [(SMALL, 1e-5), (DEMO, 1e-4), ([finetune(1.0, 4.0, 1)], 1e-5)])
def test_three_accountants_agree(releases, delta):
    """PLD lies within the stated error of PRV (Gopi et al. 2021), and RDP at most 35 % above: never below."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(r.event.noise_multiplier, r.event.sampling_prob, r.event.count) for r in releases]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a logarithm of zero in Opacus
        upper = accountant.get_epsilon(delta, eps_error=0.01)
    bound = epsilon(releases, delta)
    assert upper - 0.02 <= bound.epsilon <= upper
    assert bound.epsilon <= bound.epsilon_rdp <= 1.35 * bound.epsilon


def test_the_claim_is_what_anyone_recomputes_even_where_renyi_accounting_is_tighter():
    # A million tiny steps: the discretisation of PLD rounds each of them up.
    bound = epsilon([finetune(1e-4, 20.0, 1_000_000)], 1e-5)
    assert bound.epsilon_rdp < bound.epsilon == epsilon_pld([finetune(1e-4, 20.0, 1_000_000)], 1e-5)


def test_the_order_of_releases_does_not_matter():
    assert epsilon(SMALL, 1e-5).epsilon == pytest.approx(epsilon(SMALL[::-1], 1e-5).epsilon, abs=1e-9)


def test_epsilon_grows_with_steps_and_sampling_and_falls_with_noise_and_delta():
    def cost(sampling_prob=0.1, noise_multiplier=2.0, num_steps=40, delta=1e-5):
        return epsilon([finetune(sampling_prob, noise_multiplier, num_steps)], delta).epsilon

    assert 0 < cost(num_steps=20) < cost() < cost(num_steps=80)
    assert cost(sampling_prob=0.05) < cost() < cost(sampling_prob=0.2)
    assert cost(noise_multiplier=4.0) < cost() < cost(noise_multiplier=1.0)
    assert cost(delta=1e-3) < cost() < cost(delta=1e-7)
    curve = epsilon_curve(SMALL, [1e-3, 1e-5, 1e-7])
    assert curve == sorted(curve)
    assert curve[1] == pytest.approx(epsilon_pld(SMALL, 1e-5), abs=1e-12)


def test_two_releases_cost_more_than_one_and_less_than_their_sum():
    first, second = (epsilon([release], 1e-5).epsilon for release in SMALL)
    assert max(first, second) < epsilon(SMALL, 1e-5).epsilon < first + second


def test_what_does_not_happen_costs_nothing():
    assert epsilon([], 1e-5).epsilon == 0
    assert epsilon([finetune(0.1, 2.0, 0)], 1e-5).epsilon == 0
    assert epsilon([*SMALL, finetune(0.3, 0.5, 0)], 1e-5) == epsilon(SMALL, 1e-5)


def test_a_coarser_grid_is_never_below_the_fine_one():
    assert epsilon_pld(SMALL, 1e-5) <= epsilon_pld(SMALL, 1e-5, COARSE_GRID) <= 1.02 * epsilon_pld(SMALL, 1e-5)


def test_a_delta_at_which_the_accountant_is_not_sound_is_refused():
    assert epsilon_pld(SMALL, MIN_DELTA) > 0
    for delta in (0.99e-10, 0.0):
        with pytest.raises(ValueError, match="expected at least 1e-10"):
            epsilon_pld(SMALL, delta)
        with pytest.raises(ValueError, match="expected at least 1e-10"):
            epsilon_curve(SMALL, [1e-5, delta])


@pytest.mark.parametrize(
    ("sampling_prob", "noise_multiplier", "count"),
    [
        (0.0, 1.0, 1),
        (1.1, 1.0, 1),
        (0.5, 0.0, 1),
        (0.5, -1.0, 1),
        (0.5, math.nan, 1),
        (0.5, math.inf, 1),
        (0.5, 1.01e5, 1),
        (0.5, 1.0, -1),
    ],
)
def test_what_is_no_mechanism_is_refused(sampling_prob, noise_multiplier, count):
    with pytest.raises(ValueError, match="not a mechanism"):
        PoissonSampledGaussian(sampling_prob, noise_multiplier, count)


def test_an_event_survives_json_and_another_type_is_refused():
    event = PoissonSampledGaussian(1 / 15, 1.743, 2250)
    assert PoissonSampledGaussian.from_json(event.to_json()) == event
    with pytest.raises(ValueError, match="unknown event type"):
        PoissonSampledGaussian.from_json({**event.to_json(), "type": "laplace"})
