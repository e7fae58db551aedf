"""What a search costs: the noise of every trial, so that all that is released, the choice included, meets the target.

selection: the best of a secret random number of trials is one release (`selection_profile`). compose: every trial
is a release, whatever comes of it. proxy: trials read no private image and cost nothing; the run that follows is
planned as any other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from e2h.config import MAX_NOISE_MULTIPLIER, Config
from e2h.curriculum.search import (
    RUNGS,
    Values,
    accounted,
    candidates,
    score_kind,
    shared_stages,
    space,
    trial_law,
    value,
    with_values,
)
from e2h.errors import BudgetError, InputError
from e2h.privacy.accounting import COARSE_GRID, FINE_GRID, Bound, calibrate, epsilon_pld, solve
from e2h.privacy.events import Charge, Choice, PoissonSampledGaussian, Release, Selection
from e2h.privacy.ledger import releases_from, releases_json
from e2h.privacy.plan import PrivacyPlan, check_batch, easy_release, plan_of, read_plan
from e2h.privacy.scores import score_release

# By default a score deviates by half a percent, and costs little beside the training of a trial.
SCORE_DEVIATION, LEAST_SCORE_NOISE = 0.005, 25.0

Accounted = tuple[tuple[str, Any], ...]
Trials = dict[Accounted, tuple[Release, ...]]

# Of the search's target: at that of a single run, stages and candidates have the ratios of noise that they keep.
GUESS = 0.6


@dataclass(frozen=True)
class SearchPlan:
    """A search before anything is spent.

    Attributes:
      whole: what its ledger is opened with: everything that is released, by what all of it costs.
      shared: releases made once, outside the trials, that all learn from.
      trials: of each combination of accounted values, what one trial releases besides.
      epsilon_per_trial: what one trial costs at most, at the search's delta.
    """

    whole: PrivacyPlan
    shared: tuple[Charge, ...]
    trials: Mapping[Accounted, PrivacyPlan]
    epsilon_per_trial: float

    def trial(self, values: Values) -> PrivacyPlan:
        return self.trials[accounted(values)]

    def trials_json(self) -> dict[str, Any]:
        """What `read` needs beside `plan.json`."""
        trials = [
            {"values": dict(key), "releases": releases_json(plan.releases), "bound": asdict(plan.bound)}
            for key, plan in self.trials.items()
        ]
        return {"shared": [one.name for one in self.shared], "trials": trials}

    @staticmethod
    def read(whole: dict[str, Any], trials: dict[str, Any]) -> SearchPlan:
        """The plan that `to_json` and `trials_json` wrote."""
        plan = read_plan(whole)
        read = {}
        for one in trials["trials"]:
            releases, bound = releases_from(one["releases"]), Bound(**one["bound"])
            trial = replace(plan, releases=releases, bound=bound, target_epsilon=bound.epsilon, shared=None)
            read[tuple(one["values"].items())] = trial
        shared = tuple(one for one in plan.releases if one.name in trials["shared"])
        return SearchPlan(plan, shared, read, whole["search"]["epsilon_per_trial"])

    def to_json(self, config: Config) -> dict[str, Any]:
        """plan.json of the search's directory."""
        search = config.search
        noise = sorted({plan.release("finetune").event.noise_multiplier for plan in self.trials.values()})
        facts = {
            "mode": search.privacy,
            "expected_trials": search.expected_trials,
            "max_trials": search.max_trials if search.privacy == "selection" else int(search.expected_trials),
            "noise_multiplier_per_trial": noise[0] if len(noise) == 1 else noise,
            "epsilon_per_trial": self.epsilon_per_trial,
        }
        return {**self.whole.to_json(), "search": facts}


def plan_search(config: Config, num_records: int, class_names: Sequence[str], drawn: Sequence[Values]) -> SearchPlan:
    """Solves the noise of every trial for (privacy.epsilon, privacy.delta).

    All trials' noise multipliers are those of single runs with a smaller target, times one common factor, the smallest
    with which everything together meets the target; those that the configuration gives stay as they are.

    Args:
      config: validated, with search.privacy selection or compose.
      num_records: public N of the training split.
      class_names: public class list.
      drawn: compose: the values of every trial, in order; under selection their number and values stay out of the plan.

    Raises:
      InputError: if a candidate's expected batch is larger than N.
      BudgetError: if what is released besides leaves nothing for the trials.
    """
    shared, releases, whole = solve_search(config, num_records, drawn)
    trials = {key: plan_of(one, config, num_records, class_names, part=True) for key, one in releases.items()}
    per_trial = max(one.bound.epsilon for one in trials.values())
    return SearchPlan(plan_of(whole, config, num_records, class_names), shared, trials, per_trial)


def solve_search(
    config: Config, num_records: int, drawn: Sequence[Values], grid: float = FINE_GRID
) -> tuple[tuple[Charge, ...], Trials, tuple[Charge, ...]]:
    """Of `plan_search`: what is released once, by each kind of trial, and all together; at a coarse grid quickly."""
    target, delta, mode = config.privacy.epsilon, config.privacy.delta, config.search.privacy
    outside = shared_stages(config)
    shared = tuple(easy_release(config, stage, grid=grid) for stage in outside)
    first = {accounted(values): with_values(config, values) for values in candidates(config)}
    given = {key: _given(one, num_records, outside) for key, one in first.items()}
    single = {key: _solved(one, num_records, GUESS * target, outside) for key, one in first.items()}

    def at(factor: float) -> Trials:
        return {key: (*given[key], *_scaled(releases, factor)) for key, releases in single.items()}

    def released(factor: float) -> tuple[Charge, ...]:
        trials = at(factor)
        if mode == "selection":
            return (*shared, Choice("search", Selection(trial_law(config), tuple(trials.values()))))
        return (*shared, *merged([release for values in drawn for release in trials[accounted(values)]]))

    _check_room(config, released(1e4))
    costs = [(lambda factor: epsilon_pld(released(factor), delta, COARSE_GRID), 1.2)]
    costs.append((lambda factor: epsilon_pld(released(factor), delta), 1.003))
    factor = solve(costs[:1] if grid == COARSE_GRID else costs, target, 1.0)
    return shared, at(factor), released(factor)


def _given(config: Config, num_records: int, outside: Sequence[str]) -> tuple[Release, ...]:
    """What one trial releases with noise that the configuration gives: its score, perhaps an easy stage."""
    search = config.search
    asked = RUNGS[search.scheduler] if score_kind(search) == "accuracy" else ()
    noise = search.score_noise_multiplier or max(LEAST_SCORE_NOISE, SCORE_DEVIATION * num_records)
    noise = min(noise, MAX_NOISE_MULTIPLIER)
    scores = [score_release(noise, share) for share in asked]
    fixed = [stage for stage in _inside(config, outside) if getattr(config, stage).noise_multiplier is not None]
    return (*(easy_release(config, stage) for stage in fixed), *scores)


def _inside(config: Config, outside: Sequence[str]) -> list[str]:
    """Easy stages that each trial makes for itself."""
    return [stage for stage in config.curriculum if stage not in outside]


def _solved(config: Config, num_records: int, target: float, outside: Sequence[str]) -> tuple[Release, ...]:
    """What one trial releases besides, with the noise of a single run with this target: DP-SGD last, as in any plan."""
    check_batch(config, num_records)
    free = [stage for stage in _inside(config, outside) if getattr(config, stage).noise_multiplier is None]
    before = [easy_release(config, stage, target, COARSE_GRID) for stage in free]
    step = PoissonSampledGaussian(config.finetune.expected_batch_size / num_records, 1.0, config.finetune.num_steps)
    return (*before, _calibrated(tuple(before), step, target, config.privacy.delta))


@functools.cache
def _calibrated(before: tuple[Release, ...], step: PoissonSampledGaussian, target: float, delta: float) -> Release:
    return calibrate(before, "finetune", step, target, delta, COARSE_GRID)


def _scaled(releases: Sequence[Release], factor: float) -> list[Release]:
    """With more noise in all of them, up to the most that a release may have."""
    noise = [min(one.event.noise_multiplier * factor, MAX_NOISE_MULTIPLIER) for one in releases]
    events = [replace(one.event, noise_multiplier=most) for one, most in zip(releases, noise, strict=True)]
    return [replace(one, event=event) for one, event in zip(releases, events, strict=True)]


def merged(releases: Sequence[Release]) -> tuple[Release, ...]:
    """Equal mechanisms of one name as one release of all their steps, in the order of their first."""
    counts: dict[tuple[str, Any], int] = {}
    for release in releases:
        unit = (release.name, replace(release.event, count=1))
        counts[unit] = counts.get(unit, 0) + release.event.count
    return tuple(Release(name, replace(event, count=count)) for (name, event), count in counts.items())


def _check_room(config: Config, with_least: Sequence[Charge]) -> None:
    """Refuses a target that no noise of the trials can meet."""
    cost = epsilon_pld(with_least, config.privacy.delta, COARSE_GRID)
    if cost > config.privacy.epsilon:
        raise BudgetError(
            f"privacy.epsilon={config.privacy.epsilon:g}: easy stages and scores alone, with "
            f"search.expected_trials={config.search.expected_trials:g}, cost epsilon {cost:.4g} and leave nothing for "
            "the trials; give them more noise (search.score_noise_multiplier, central.budget_share), or expect fewer"
        )


def price_list(config: Config, num_records: int, numbers: Sequence[int] = (4, 8, 16, 32)) -> list[dict[str, Any]]:
    """The noise of one trial, by way of searching and expected number of trials; the first row is a single run's.

    For the configuration itself, whatever is searched. Where the target does not reach, or no law of the number of
    trials has that mean below `search.max_trials`, the noise is None.
    """
    easy = [easy_release(config, stage, grid=_price_grid(config)) for stage in config.curriculum]
    step = PoissonSampledGaussian(config.finetune.expected_batch_size / num_records, 1.0, config.finetune.num_steps)
    target = config.privacy.epsilon, config.privacy.delta
    single = calibrate(easy, "finetune", step, *target, _price_grid(config))
    alone = single.event.noise_multiplier
    rows: list[dict[str, Any]] = [{"mode": "proxy", "expected_trials": 1, "noise_multiplier": alone, "factor": 1.0}]
    for mode, number in ((mode, number) for mode in ("selection", "compose") for number in numbers):
        rows.append({"mode": mode, "expected_trials": number, **_price(config, num_records, mode, number, alone)})
    return rows


def _price_grid(config: Config) -> float:
    """A step of many loses less than the coarse grid where epsilon is small: its figures are some per cent too high."""
    return COARSE_GRID if config.privacy.epsilon >= 3 else FINE_GRID


def _price(config: Config, num_records: int, mode: str, number: int, alone: float) -> dict[str, Any]:
    values = {name: value(config, name) for name in space(config)}
    only = {name: [one] for name, one in values.items()}
    most = max(config.search.max_trials, 4 * number)
    search = replace(config.search, privacy=mode, expected_trials=float(number), max_trials=most)
    search = replace(search, space=only, score=None)
    try:
        _, trials, _ = solve_search(replace(config, search=search), num_records, [values] * number, _price_grid(config))
    except (BudgetError, InputError):
        return {"noise_multiplier": None, "factor": None, "epsilon_per_trial": None}
    (trial,) = trials.values()
    noise, cost = trial[-1].event.noise_multiplier, epsilon_pld(trial, config.privacy.delta, _price_grid(config))
    return {"noise_multiplier": noise, "factor": noise / alone, "epsilon_per_trial": cost}
