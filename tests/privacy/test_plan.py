"""The plan: every release of a run before anything is spent."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from e2h.config import Config
from e2h.errors import BudgetError
from e2h.privacy.accounting import epsilon, epsilon_pld
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.plan import easy_release, make_plan, read_plan

NAMES = ["cat", "dog"]


def settings(target: float = 1.0, noise_multiplier: float | None = 8.0) -> Config:
    config = Config()
    config.privacy.epsilon = target
    config.central.noise_multiplier = noise_multiplier
    config.finetune.num_steps = 24
    config.finetune.expected_batch_size = 100
    return config


@pytest.fixture(scope="module")
def plan():
    return make_plan(settings(), 2000, NAMES)


def test_all_stages_together_spend_the_target(plan):
    assert [release.name for release in plan.releases] == ["central", "finetune"]
    assert 1 - 1e-3 < plan.bound.epsilon <= 1
    assert plan.bound == epsilon(plan.releases, 1e-4)
    assert plan.release("central").event == PoissonSampledGaussian(0.5, 8.0, 5)
    step = plan.release("finetune").event
    # The sampler's q, the accountant's q and the public denominator are one number.
    assert step.sampling_prob * plan.num_records == 100
    assert step.count == 24
    assert plan.budget.planned == plan.releases
    assert (plan.budget.epsilon, plan.budget.delta) == (1, 1e-4)


def test_the_easy_stage_takes_its_share_of_epsilon():
    config = settings(noise_multiplier=None)
    config.central.budget_share = 0.3
    release = easy_release(config, "central", target=2.0)
    assert 0.6 * (1 - 1e-3) < epsilon([release], 1e-4).epsilon <= 0.6


def test_without_the_easy_stage_all_goes_to_the_hard_one(plan):
    config = settings()
    config.curriculum = []
    config.privacy.test_mode = True
    alone = make_plan(config, 2000, NAMES)
    assert [release.name for release in alone.releases] == ["finetune"]
    assert alone.release("finetune").event.noise_multiplier < plan.release("finetune").event.noise_multiplier
    # A published secret is stamped on the plan.
    assert (plan.not_private, alone.not_private) == (False, True)
    assert any(warning.startswith("NOT PRIVATE") for warning in alone.warnings)
    assert alone.to_json()["not_private"] is True


def test_a_plan_that_the_easy_stage_exceeds_is_refused():
    with pytest.raises(
        BudgetError, match=r"privacy\.epsilon=0\.3: central alone costs epsilon 0\.4\d+ at delta 0\.0001"
    ):
        make_plan(settings(target=0.3), 2000, NAMES)


def test_the_schedule_never_promises_less_than_the_steps_cost(plan):
    *before, last = plan.releases
    schedule = plan.epsilon_schedule(4)
    assert [step for step, _ in schedule] == [6, 12, 18, 24]
    for step, shown in schedule[:-1]:
        exact = epsilon_pld(
            [*before, Release(last.name, PoissonSampledGaussian(0.05, last.event.noise_multiplier, step))], 1e-4
        )
        assert exact <= shown <= 1.05 * exact
    assert schedule[-1] == (24, plan.bound.epsilon)
    assert [shown for _, shown in schedule] == sorted(shown for _, shown in schedule)


def test_a_plan_survives_its_file(plan):
    content = json.loads(json.dumps(plan.to_json()))
    assert read_plan(content) == plan
    assert set(content) >= {
        "releases",
        "epsilon",
        "delta",
        "num_records",
        "neighbouring_relation",
        "accountant_version",
    }
    assert {"name", "sampling_prob", "num_steps", "noise_multiplier", "epsilon_alone"} <= set(content["releases"][0])
    assert content["neighbouring_relation"] == "REPLACE_SPECIAL"
    assert content["epsilon"] == plan.bound.epsilon
    assert [point[1] for point in content["epsilon_at_delta"]] == sorted(p[1] for p in content["epsilon_at_delta"])


def test_the_words_carry_the_numbers(plan):
    words = " ".join(plan.statement())
    sigma = plan.release("finetune").event.noise_multiplier
    for part in (f"({plan.bound.epsilon:.4g}, 1e-4)-differentially private", "N = 2000", "5 rounds", f"{sigma:.6g}"):
        assert part in words


def test_a_delta_of_one_over_n_is_warned_about_by_its_number(plan):
    for num_records, warned in ((9999, False), (10000, True), (20000, True)):
        warnings = replace(plan, num_records=num_records).warnings
        assert [f"1/N = 1/{num_records} = " in warning for warning in warnings] == [True] * warned
