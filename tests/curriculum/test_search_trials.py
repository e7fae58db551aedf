"""What each trial of a search is: its settings, its draw, its secret, its score; and which of them is the best."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from shutil import copytree

import numpy as np
import pytest
from scipy.stats import chisquare

from e2h.config import Config, RunConfig
from e2h.curriculum.run import Run
from e2h.curriculum.search import (
    Trial,
    best,
    candidates,
    check_search,
    draw_candidates,
    read_score,
    same_accounting,
    score_path,
    search_address,
    shared_stages,
    space,
    store,
    trial_config,
    with_values,
    write_score,
)
from e2h.curriculum.stages import prepare
from e2h.errors import InputError
from e2h.privacy.accounting import Bound
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.plan import PrivacyPlan
from e2h.privacy.scores import Score, score_release


def searching(mode: str = "selection", **settings: object) -> Config:
    config = Config()
    config.search = replace(config.search, privacy=mode, **settings)
    return config


def a_run(folder, name="search", secret=None, **settings) -> Run:
    config = searching(**settings)
    config.run = RunConfig(str(folder), name)
    config.privacy.secret = secret
    config.privacy.test_mode = secret is None
    return Run(folder / name, config)


def test_other_values_are_set_in_a_copy():
    config = Config()
    values = {"warmup.num_steps": 7, "central.budget_share": 1, "model.width_multipliers": [1, 2]}
    found = with_values(config, values | {"central.noise_multiplier": None, "finetune.compile": True})
    assert (found.warmup.num_steps, found.central.budget_share) == (7, 1.0)
    assert isinstance(found.central.budget_share, float)  # a whole number serves as one
    assert (found.model.width_multipliers, found.finetune.compile) == ([1, 2], True)
    assert config == Config()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("warmup.num_step", 7, "search.space=warmup.num_step: expected the dotted key of a setting"),
        ("warmpu.num_steps", 7, "e.g. warmup.num_steps; did you mean warmup.num_steps?"),
        ("warmup", {}, "search.space=warmup"),
        ("warmup.num_steps.x", 7, "search.space=warmup.num_steps.x"),
        ("warmup.num_steps", 7.5, "search.space.warmup.num_steps=7.5: expected values of type int"),
        ("warmup.num_steps", True, "search.space.warmup.num_steps=True"),
        ("warmup.num_steps", None, "search.space.warmup.num_steps=None"),
        ("warmup.num_steps", "7", "search.space.warmup.num_steps='7': expected values of type int"),
        ("central.noise_multiplier", "loud", "expected values of type float | None"),
        ("model.width_multipliers", ["a"], "expected values of type list[int]"),
        ("sampling.sampler", 3, "expected values of type str"),
    ],
)
def test_keys_and_values_that_the_schema_does_not_know_are_refused(name, value, said):
    with pytest.raises(InputError) as refusal:
        with_values(Config(), {name: value})
    assert said in str(refusal.value)


def test_candidates_are_all_combinations_in_a_fixed_order():
    config = searching(space={"warmup.num_steps": [1, 2], "sampling.guidance": [0, 0.5]})
    names, rows = ("warmup.num_steps", "sampling.guidance"), [(1, 0), (1, 0.5), (2, 0), (2, 0.5)]
    assert candidates(config) == [dict(zip(names, row, strict=True)) for row in rows]
    assert len(candidates(searching())) == 9  # without a space: the curriculum's length and its share


@pytest.mark.parametrize(
    ("tried", "said"),
    [
        ({"warmup.num_steps": list(range(1, 102)), "warmup.batch_size": list(range(1, 101))}, "10100 combinations"),
        ({"central.budget_share": [0.5, 1.5]}, "central.budget_share=1.5: expected a share in (0, 1)"),
        ({"model.width_multipliers": [[1], [1] * 6]}, "data.image_size=8: expected a multiple of 32"),
        ({"model.patch_size": [2, 3]}, "data.image_size=8: expected a multiple of 6"),
    ],
)
def test_too_many_candidates_and_invalid_ones_are_refused(tried, said):
    with pytest.raises(InputError) as refusal:
        candidates(searching(space=tried))
    assert said in str(refusal.value)


def test_a_law_that_does_not_exist_is_refused_before_anything_is_read():
    with pytest.raises(InputError, match=r"expected_trials=8\.0: expected a number from 1 to"):
        check_search(searching(max_trials=4))
    check_search(searching("compose", max_trials=4))


def test_central_images_and_costs_are_common_where_no_searched_setting_touches_them():
    for name, values, central, accounting in (
        ("warmup.num_steps", [1, 2], True, True),
        ("central.max_norm", [1.0, 2.0], False, True),
        ("central.num_rounds", [1, 2], False, False),
        ("finetune.num_steps", [1, 2], True, False),
        ("finetune.learning_rate", [0.1, 0.2], True, True),
    ):
        config = searching(space={name: values})
        assert ("central" in shared_stages(config), same_accounting(config)) == (central, accounting), name
    off = searching(space={"warmup.num_steps": [1, 2]})
    off.curriculum = []
    assert not shared_stages(off)


def test_draws_are_uniform_repeatable_and_another_keys_are_others():
    one, two = (hashlib.sha256(name).digest() for name in (b"one", b"two"))
    drawn = draw_candidates(one, 6000, 9)
    assert drawn == draw_candidates(one, 6000, 9)
    assert drawn[:100] == draw_candidates(one, 100, 9)
    assert chisquare(np.bincount(drawn, minlength=9)).pvalue > 1e-4
    other = draw_candidates(two, 6000, 9)
    agreements = np.mean(np.array(drawn) == np.array(other))
    assert 1 / 9 - 0.02 < agreements < 1 / 9 + 0.02
    # Neither do two trials of one search go together.
    pairs = np.bincount(9 * np.array(drawn[::2]) + np.array(drawn[1::2]), minlength=81)
    assert chisquare(pairs).pvalue > 1e-4


def test_other_settings_and_other_data_are_other_draws(tmp_path):
    searches = {
        "same": a_run(tmp_path / "a"),
        "again": a_run(tmp_path / "b"),
        "search": a_run(tmp_path / "c", expected_trials=4.0),
        "model": a_run(tmp_path / "d"),
        "data": a_run(tmp_path / "e"),
        "guidance": a_run(tmp_path / "f"),
    }
    searches["guidance"].config.sampling.guidance = 1.0  # free, but what a trial is judged by
    searches["model"].config.model.base_width = 8
    searches["data"].config.data.test_fraction = 0.3
    found = {}
    for name, run in searches.items():
        run.root.mkdir(parents=True)
        prepare(run)
        found[name] = search_address(run)
        if name == "same":
            renamed = replace(run, root=run.root.with_name("other"), config=run.config)
            copytree(run.root, renamed.root)
            found["name"] = search_address(renamed)
    assert found.pop("again") == found["same"]
    assert len(set(found.values())) == len(found)


def test_trials_have_secrets_of_their_own_and_share_the_prepared_set(tmp_path):
    search = a_run(tmp_path)
    runs = []
    for name in ("trial-000", "trial-001"):
        config = trial_config(search, {"warmup.num_steps": 3}, name)
        runs.append(Run(store(search.root) / name, config, common=search.root))
    assert len({run.secret() for run in (search, *runs)}) == 3
    assert {run.prepared for run in runs} == {search.prepared}
    assert len({run.ledger.location for run in (search, *runs)}) == 3
    # Under one secret, trials of the same name in two searches don't share their noise either.
    twin = replace(runs[0], common=search.root.with_name("another"))
    assert len({run.domain("finetune", {}, "data", "here") for run in (*runs, twin)}) == 3
    config = runs[0].config
    assert (config.warmup.num_steps, config.sampling.num_images) == (3, search.config.search.score_images)
    assert (config.evaluation.enabled, config.search.privacy, config.ledger.scope) == (False, None, "run")


RELEASES = (score_release(25.0), Release("finetune", PoissonSampledGaussian(0.1, 4.0, 60)))


def trial(name: str) -> Trial:
    plan = PrivacyPlan(1.0, 1e-5, 1000, ("a",), RELEASES, Bound(1.0, 1.1), False)
    return Trial(name, {}, Config(), plan)


def accuracies(*values: float) -> list[tuple[Trial, Score]]:
    return [(trial(f"trial-{i:03d}"), Score("accuracy", value, RELEASES[0])) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ((0.1, 0.3, 0.2), 1),
        ((0.3, 0.3, 0.2), 0),
        ((math.nan, -5.0), 1),
        ((math.nan, -math.inf, -5.0), 2),
        ((math.nan, math.nan), 0),
        ((0.1,), 0),
    ],
)
def test_the_best_is_the_highest_score_the_first_of_equals_and_nan_is_the_worst(values, place):
    found, score = best(accuracies(*values), "accuracy")
    assert found.name == f"trial-{place:03d}"
    assert repr(score.value) == repr(values[place])


def test_without_a_finished_trial_there_is_none():
    with pytest.raises(InputError, match="at least one finished trial"):
        best([], "accuracy")


@pytest.mark.parametrize(
    "score",
    [
        Score("test", 0.9),
        Score("central", -0.1),
        Score("accuracy", 0.9, score_release(5.0)),
        Score("accuracy", 0.9, score_release(25.0, 1 / 3)),
        Score("accuracy", 0.9, Release("score", PoissonSampledGaussian(1.0, 25.0, 2))),
    ],
)
def test_a_score_that_is_not_charged_chooses_nothing(score):
    with pytest.raises(ValueError, match="trial-009: a score of kind"):
        best([*accuracies(0.1), (trial("trial-009"), score)], "accuracy")


def test_a_free_score_of_the_right_kind_needs_no_release():
    scored = [(trial("a"), Score("central", -0.2)), (trial("b"), Score("central", -0.1))]
    assert best(scored, "central")[0].name == "b"


def test_scores_lie_in_the_trials_folder_one_for_each_share(tmp_path):
    score = Score("accuracy", 0.25, RELEASES[0])
    assert read_score(score_path(tmp_path)) is None
    write_score(score_path(tmp_path), score)
    assert read_score(score_path(tmp_path)) == score
    assert len({score_path(tmp_path, share).name for share in (1 / 9, 1 / 3, 1.0)}) == 3


def test_the_default_space_leaves_out_the_share_where_the_noise_is_given():
    config = searching()
    config.central.noise_multiplier = 5.0
    assert list(space(config)) == ["warmup.num_steps"]
    config.warmup.num_steps = 0
    assert space(config) == {"warmup.num_steps": [0, 1]}
