"""What a search costs: the published table, the whole target and no more, every trial within what is charged."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest

from e2h.config import Config
from e2h.curriculum.central import planned_pixel_noise
from e2h.curriculum.search import candidates, with_values
from e2h.curriculum.search_plan import SearchPlan, Trials, merged, plan_search, price_list, solve_search
from e2h.distributed.console import show_plan
from e2h.errors import BudgetError, InputError
from e2h.privacy import selection_profile
from e2h.privacy.accounting import COARSE_GRID, epsilon_pld, privacy_loss
from e2h.privacy.events import Charge, Choice, PoissonSampledGaussian, Release
from e2h.privacy.plan import make_plan

N, NAMES = 1523, ("a", "b")
TWO_SIZES = {"finetune.expected_batch_size": [64, 256]}
SPLITS = {"central.budget_share": [0.2, 0.6], "finetune.num_steps": [5, 10]}


def searching(mode: str = "selection", epsilon: float = 1.0, **settings: object) -> Config:
    config = Config()
    config.privacy.epsilon = epsilon
    config.finetune.num_steps = 10
    config.central.noise_multiplier = 20.0  # given: the accountant has less to do
    config.search = replace(config.search, privacy=mode, **settings)
    return config


@functools.cache
def planned(mode: str, split: bool) -> tuple[Config, SearchPlan]:
    """A search over two batch sizes, or over splits of the noise; under compose with two trials."""
    config = searching(mode, space=SPLITS if split else TWO_SIZES)
    if split:
        config.central.noise_multiplier = None
    return config, plan_search(config, N, NAMES, candidates(config)[:2])


def test_a_search_has_no_central_image_whose_noise_could_be_told():
    for mode, split in (("selection", True), ("compose", True)):
        config, plan = planned(mode, split)
        assert planned_pixel_noise(config, plan.whole) is None
        show_plan(plan.whole, [1.0] * len(plan.whole.releases), config)


def solved(config: Config, drawn=()) -> tuple[Trials, dict[str, Charge]]:
    """What each kind of trial releases, and all together by name; on the coarse grid, which is quick."""
    _, trials, whole = solve_search(config, N, drawn, COARSE_GRID)
    return trials, {one.name: one for one in whole}


# Noise multipliers of MNIST's schedule at delta 1e-5, by another program: a single run, then of one trial by the number
# of trials expected. Its laws have no limit on K, and its trials no score.
NUMBERS = (4, 8, 16, 32)
MNIST = {
    (1.0, "single"): (12.0,) * 4,
    (1.0, "0"): (15.2, 16.6, 17.9, 19.2),
    (1.0, "1"): (15.6, 17.4, 19.3, 21.1),
    (1.0, "poisson"): (16.6, 20.8, 28.5, 41.7),
    (1.0, "compose"): (23.9, 33.8, 47.8, 67.7),
    (10.0, "single"): (1.76,) * 4,
    (10.0, "0"): (2.03, 2.15, 2.26, 2.37),
    (10.0, "1"): (2.07, 2.23, 2.39, 2.55),
    (10.0, "poisson"): (2.17, 2.56, 3.34, 4.84),
    (10.0, "compose"): (3.29, 4.59, 6.45, 9.08),
}


def mnist(epsilon: float, law: str) -> Config:
    shape = {"0": 0.0, "1": 1.0}.get(law, 3.0)
    kind = "poisson" if law == "poisson" else "negative_binomial"
    most = 128 if law == "poisson" else 1000
    config = searching(epsilon=epsilon, law=kind, shape=shape, max_trials=most, score_noise_multiplier=1e5)
    config.privacy.delta, config.curriculum = 1e-5, []
    config.finetune.expected_batch_size, config.finetune.num_steps = 4096, 2197
    config.search.space = {"warmup.num_steps": [1, 2]}
    return config


@pytest.mark.parametrize(
    ("epsilon", "law", "numbers"),
    [
        (10.0, "1", (8,)),
        *(
            pytest.param(epsilon, law, NUMBERS, marks=pytest.mark.long)
            for epsilon in (1.0, 10.0)
            for law in ("0", "1", "poisson")
        ),
    ],
)
def test_the_prices_of_the_mnist_settings_lie_within_two_per_cent_of_the_table(epsilon, law, numbers):
    rows = price_list(mnist(epsilon, law), 60000, numbers)
    assert rows[0]["noise_multiplier"] == pytest.approx(MNIST[epsilon, "single"][0], rel=0.02)
    found = {(row["mode"], row["expected_trials"]): row["noise_multiplier"] for row in rows[1:]}
    for number in numbers:
        place = NUMBERS.index(number)
        assert found["selection", number] == pytest.approx(MNIST[epsilon, law][place], rel=0.02), number
        assert found["compose", number] == pytest.approx(MNIST[epsilon, "compose"][place], rel=0.02), number


@pytest.mark.parametrize(
    ("mode", "split"),
    [
        ("compose", False),
        pytest.param("selection", False, marks=pytest.mark.long),
        pytest.param("selection", True, marks=pytest.mark.long),
        pytest.param("compose", True, marks=pytest.mark.long),
    ],
)
def test_all_that_is_released_meets_the_target_and_little_less(mode, split):
    config, plan = planned(mode, split)
    cost = epsilon_pld(plan.whole.releases, config.privacy.delta)
    assert plan.whole.bound.epsilon == cost
    assert (1 - 1e-3) * config.privacy.epsilon <= cost <= config.privacy.epsilon
    assert plan.whole.target_epsilon == config.privacy.epsilon
    each = [epsilon_pld(plan.trial(values).releases, config.privacy.delta) for values in candidates(config)]
    assert plan.epsilon_per_trial == max(each) < cost
    assert [plan.trial(values).target_epsilon for values in candidates(config)] == each


def test_every_candidate_is_dominated_by_what_is_charged_and_one_with_less_noise_is_not():
    config = searching(space={"central.budget_share": [0.2, 0.6]})
    config.central.noise_multiplier = None
    trials, whole = solved(config)
    assert isinstance(whole["search"], Choice)
    charged = [privacy_loss(one, COARSE_GRID) for one in whole["search"].event.candidates]
    assert len(trials) == len(charged) == 2
    for releases in trials.values():
        assert selection_profile.dominated(privacy_loss(releases, COARSE_GRID), charged)
        *rest, last = releases
        louder = replace(last, event=replace(last.event, noise_multiplier=0.7 * last.event.noise_multiplier))
        assert not selection_profile.dominated(privacy_loss([*rest, louder], COARSE_GRID), charged)


ONE = {"warmup.num_steps": [1, 2]}


def test_selection_tells_nothing_of_the_number_of_trials_and_charges_its_law():
    config = searching(space=ONE, shape=1.0, expected_trials=5.0, max_trials=16)
    none, some = solved(config), solved(config, candidates(config))
    assert none == some
    law = none[1]["search"].event.law
    assert (law.shape, law.expected_trials, law.max_trials) == (1.0, 5.0, 16)


def test_central_images_that_all_trials_share_are_charged_once():
    trials, whole = solved(searching("compose", space=ONE), [{"warmup.num_steps": 1}] * 4)
    assert {name: one.event.count for name, one in whole.items()} == {"central": 5, "score": 4, "finetune": 40}
    assert [[one.name for one in trial] for trial in trials.values()] == [["score", "finetune"]]
    other = searching("compose", space={"central.max_norm": [1.0, 2.0]})
    trials, whole = solved(other, [{"central.max_norm": 1.0}] * 4)
    assert {name: one.event.count for name, one in whole.items()} == {"central": 20, "score": 4, "finetune": 40}
    assert [[one.name for one in trial] for trial in trials.values()] == [["central", "score", "finetune"]]


def test_equal_mechanisms_are_merged_and_different_ones_are_not():
    one, two = (Release("finetune", PoissonSampledGaussian(0.1, noise, 60)) for noise in (4.0, 5.0))
    score = Release("score", PoissonSampledGaussian(1.0, 25.0, 1))
    found = merged([score, one, score, two, score, one])
    assert [(release.name, release.event.count) for release in found] == [
        ("score", 3),
        ("finetune", 120),
        ("finetune", 60),
    ]
    assert epsilon_pld(found, 1e-5) == pytest.approx(epsilon_pld([score, one, score, two, score, one], 1e-5), rel=1e-3)


def test_asha_asks_three_times_and_each_asking_is_charged():
    config = searching("compose", scheduler="asha", space=ONE)
    _, whole = solved(config, candidates(config))
    counts = {name: one.event.count for name, one in whole.items()}
    assert counts == {"central": 5, "score after 0.111": 2, "score after 0.333": 2, "score": 2, "finetune": 20}
    _, free = solved(replace(config, search=replace(config.search, score="central")), candidates(config))
    assert list(free) == ["central", "finetune"]


@pytest.mark.parametrize("space", [ONE, {"central.max_norm": [1.0, 2.0]}])
def test_noise_that_the_configuration_gives_stays(space):
    trials, whole = solved(searching(space=space, score_noise_multiplier=30.0))
    noise = {one.name: one.event.noise_multiplier for one in (*whole.values(), *trials[()]) if isinstance(one, Release)}
    assert (noise["central"], noise["score"]) == (20.0, 30.0)


def test_what_was_written_is_read_back():
    config, plan = planned("compose", False)
    whole, trials = json.loads(json.dumps([plan.to_json(config), plan.trials_json()]))
    again = SearchPlan.read(whole, trials)
    assert again.whole == plan.whole
    assert (again.shared, again.epsilon_per_trial) == (plan.shared, plan.epsilon_per_trial)
    assert all(again.trial(values) == plan.trial(values) for values in candidates(config))
    assert again.shared == plan.whole.releases[:1]
    assert whole["tuning"]["mode"] == "compose"


def test_a_budget_that_scores_alone_exceed_is_refused_with_the_way_out():
    config = searching("compose", epsilon=0.5, expected_trials=36.0)
    with pytest.raises(BudgetError, match=r"privacy\.epsilon=0\.5: easy stages and scores alone") as refusal:
        solved(config, candidates(config) * 12)
    assert "search.score_noise_multiplier" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(InputError, match="expected_batch_size=2000"):
        solved(searching(space={"finetune.expected_batch_size": [64, 2000]}))


def test_prices_that_there_are_not_leave_the_others():
    """A compose search of 32 trials can't be paid for, and no logarithmic law up to 32 has a mean of 8."""
    config = searching(epsilon=0.5, shape=0.0, expected_trials=4.0, score_noise_multiplier=25.0)
    rows = {(row["mode"], row["expected_trials"]): row["noise_multiplier"] for row in price_list(config, N, (4, 32))}
    assert rows["compose", 32] is None
    assert rows["selection", 32] is None
    assert rows["proxy", 1] < rows["selection", 4] < rows["compose", 4]


@pytest.mark.long
def test_a_single_run_is_the_first_price():
    config = searching(space=ONE)
    rows = price_list(config, N, ())
    alone = make_plan(config, N, NAMES).release("finetune").event.noise_multiplier
    assert [(row["mode"], row["factor"]) for row in rows] == [("proxy", 1.0)]
    assert rows[0]["noise_multiplier"] == pytest.approx(alone, rel=0.005)
    assert with_values(config, {"warmup.num_steps": 1}).finetune == config.finetune
