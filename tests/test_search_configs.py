"""The settings of a search: off by default, part of what a run is bound to, each checked by name."""

from __future__ import annotations

import pytest

from e2h.binding import binding, differences
from e2h.config import Config, run_name
from e2h.errors import InputError
from e2h.validation import validate

NAN, INF = float("nan"), float("inf")


def searching(**values) -> Config:
    config = Config()
    config.search.privacy = "selection"
    for name, value in values.items():
        assert hasattr(config.search, name)
        setattr(config.search, name, value)
    return config


def test_a_search_has_no_default_is_bound_and_names_its_run():
    assert Config().search.privacy is None
    assert run_name(searching()) == "digits-eps10-selection-seed0"
    assert differences(binding(Config()), binding(searching())) == [("search.privacy", None, "selection")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("privacy", "none"),
        *(("expected_trials", value) for value in (0.0, 0.5, NAN)),
        *((name, 0) for name in ("max_trials", "score_images", "concurrent_trials")),
        *(("score_noise_multiplier", value) for value in (0.0, -1.0, NAN, INF)),
        *(("score", value) for value in ("test", "frechet")),
        ("law", "binomial"),
        ("sampler", "grid"),
        ("scheduler", "hyperband"),
        *(("space", value) for value in ({}, ["warmup.num_steps"], "warmup")),
    ],
)
def test_a_setting_of_a_search_that_cannot_work_is_refused_by_name_and_only_in_a_search(name, value):
    with pytest.raises(InputError, match=rf"^search\.{name}=") as refused:
        validate(searching(**{name: value}))
    assert "\n" not in str(refused.value)
    if name != "privacy":
        validate(searching(**{name: value, "privacy": None}))


def test_optuna_takes_one_trial_at_a_time():
    with pytest.raises(InputError, match=r"^search\.concurrent_trials=2: expected 1 with search\.sampler=optuna"):
        validate(searching(privacy="compose", sampler="optuna", concurrent_trials=2))
    validate(searching(privacy="compose", scheduler="asha", concurrent_trials=2))


@pytest.mark.parametrize("values", [[], 7, [1, 1], [1, 1.0]])
def test_a_searched_setting_has_distinct_values(values):
    with pytest.raises(InputError, match=r"^search\.space\.warmup\.num_steps=.*: expected a list of distinct values"):
        validate(searching(space={"warmup.num_steps": values}))
