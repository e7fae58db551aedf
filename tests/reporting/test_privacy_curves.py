"""Curves of a plan, against what is known in closed form and against the accountant itself."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from finished_run import EVENTS, plan_of, reference_epsilon

from e2h.privacy.accounting import epsilon_pld
from e2h.privacy.events import charge, event_from_json
from e2h.reporting import privacy_curves

NORMAL = NormalDist()


def gaussian(sigma: float, delta: float = 1e-5) -> dict:
    event = {"type": "poisson_sampled_gaussian", "sampling_prob": 1.0, "noise_multiplier": sigma, "count": 1}
    epsilon = epsilon_pld([charge("central", event_from_json(event))], delta)
    return {"releases": [{"name": "central", "event": event}], "epsilon": epsilon, "delta": delta}


@pytest.mark.parametrize("sigma", [0.5, 2.0, 20.0])
def test_guess_and_errors_are_those_of_the_likelihood_ratio_test_between_two_gaussians(sigma):
    plan = gaussian(sigma)
    right = NORMAL.cdf(1 / (2 * sigma))
    assert right - 1e-9 <= privacy_curves.best_guess(plan) < right + 1e-3
    for alarms, misses in privacy_curves.trade_off(plan)[1:-1]:
        exact = NORMAL.cdf(NORMAL.inv_cdf(1 - alarms) - 1 / sigma)
        assert exact - 0.01 < misses <= exact + 1e-9


@pytest.mark.parametrize("sigma", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("alarms", [0.001, 0.01, 0.2])
def test_hits_at_few_false_alarms_are_those_of_the_likelihood_ratio_test(sigma, alarms):
    exact = NORMAL.cdf(NORMAL.inv_cdf(alarms) + 1 / sigma)
    assert exact - 1e-9 <= privacy_curves.hit_rate(gaussian(sigma), alarms) < exact + 0.01


def test_spending_goes_up_to_the_plans_epsilon(epsilons):
    spent = privacy_curves.spent_after(plan_of(epsilons))
    assert spent == [pytest.approx(epsilons["central"], rel=0.01), epsilons["pld"]]


def test_every_split_costs_the_plans_epsilon_and_the_runs_own_is_among_them(epsilons, monkeypatch):
    plan = plan_of(epsilons)
    shares = privacy_curves.noise_by_share(plan)
    assert len(shares["central"]) == len(shares["finetune"]) > 5
    for (share, easy), (same, hard) in list(zip(shares["central"], shares["finetune"], strict=True))[::4]:
        for name, noise in (("central", easy), ("finetune", hard)):
            monkeypatch.setitem(EVENTS, name, EVENTS[name] | {"noise_multiplier": noise})
        assert share == same == pytest.approx(reference_epsilon(["central"]) / epsilons["pld"], rel=0.02)
        assert reference_epsilon(["central", "finetune"]) == pytest.approx(epsilons["pld"], rel=0.02)
    own = epsilons["central"] / epsilons["pld"]
    for name, points in shares.items():
        noise = plan["releases"][name == "finetune"]["event"]["noise_multiplier"]
        assert np.interp(own, *zip(*points, strict=True)) == pytest.approx(noise, rel=0.05)


def test_without_an_easy_stage_there_is_nothing_to_split(epsilons):
    plan = plan_of(epsilons)
    assert privacy_curves.noise_by_share(plan | {"releases": plan["releases"][1:]}) is None


@pytest.mark.parametrize("count", [1, 400])
def test_the_grid_becomes_finer_where_steps_are_many_and_small(count):
    event = {"type": "poisson_sampled_gaussian", "sampling_prob": 0.02, "noise_multiplier": 2.0, "count": count}
    epsilon = epsilon_pld([charge("finetune", event_from_json(event))], 1e-5)
    plan = {"releases": [{"name": "finetune", "event": event}], "epsilon": epsilon, "delta": 1e-5}
    grid, loss = privacy_curves._whole(*privacy_curves._key(plan))
    assert epsilon - 1e-6 <= loss.get_epsilon_for_delta(1e-5) <= 1.005 * epsilon or grid == privacy_curves.GRIDS[-1]
    assert grid < privacy_curves.GRIDS[0]
