"""A search on Ray Tune: trials, each with Ray Train workers of its own, the choice among them, and what may be told.

A killed search goes on with the same trials: how many there are and what each tries follows from the run's secret, and
a trial that finished keeps its score.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from e2h.binding import digest
from e2h.curriculum.run import Run, witnessed
from e2h.curriculum.search import (
    Trial,
    Values,
    accounted,
    best,
    candidates,
    draw_candidates,
    read_score,
    score_kind,
    score_path,
    search_address,
    search_binding,
    space,
    store,
    trial_config,
    trial_law,
    with_values,
)
from e2h.curriculum.search_plan import SearchPlan, plan_search
from e2h.data.filesystem import remove, write_bytes
from e2h.data.remote import escaped
from e2h.data.storage import Prepared
from e2h.distributed.capacity import check_capacity
from e2h.distributed.console import say, show_plan, working
from e2h.distributed.easy import release_easy_stage
from e2h.distributed.stages import calibrate
from e2h.distributed.stand_in import as_on, prepare_stand_in, stand_in_data
from e2h.distributed.trials import RESULT, adopt, adopt_settings, adopted, run_trial, values_and_scores
from e2h.errors import BudgetError, InputError
from e2h.privacy.keys import derive_key
from e2h.privacy.plan import PrivacyPlan, make_plan
from e2h.reporting.facts import read_json
from e2h.reporting.metrics import MetricWriter

NINTHS = 9  # of a trial's steps: the unit in which ASHA counts


def search_trials(run: Run, prepared: Prepared) -> Run:
    """Plans a search, runs its trials, and returns the run that the best of them has become.

    Under `proxy` that run has its settings alone: it has read no private image yet, and goes on as any other.

    Raises:
      BudgetError: if the budget does not reach, or the secret number of trials is 0 (Poisson).
    """
    search = run.config.search
    if search.privacy != "proxy" and (run.root / RESULT).exists():
        _read_or_make_plan(run, prepared)  # the stages that follow read it
    if (known := adopted(run)) is not None:
        _say_best(known)
        return known
    check_capacity(replace(run.config.scaling, num_workers=search.concurrent_trials * run.config.scaling.num_workers))
    plan_of_trial = (_open_proxy if search.privacy == "proxy" else _open_budget)(run, prepared)
    make_trial = _trial_maker(run, plan_of_trial)
    trials = _run_adaptive(run, make_trial) if search.sampler == "optuna" else _run_fixed(run, make_trial)
    scores = [(trial, score) for trial in trials if (score := read_score(score_path(store(run.root) / trial.name)))]
    trial, score = best(scores, score_kind(search))
    told = {} if search.privacy == "selection" else {"trials": [values_and_scores(run, one) for one in trials]}
    winner = adopt(run, trial, score, told) if search.privacy != "proxy" else adopt_settings(run, trial, score, told)
    _show(winner, told)
    _say_best(winner)
    return adopted(run) or winner


def _open_budget(run: Run, prepared: Prepared) -> Callable[[Values], PrivacyPlan]:
    """Plans all trials, opens the budget, and charges all of it before the first trial reads an image."""
    _refuse_lost_trials(run)
    plan = _read_or_make_plan(run, prepared)
    show_plan(plan.whole, [one["epsilon_alone"] for one in read_json(run.root / "plan.json")["releases"]])
    run.open_budget(plan.whole.budget)
    for release in plan.shared:
        release_easy_stage(run, prepared, plan.whole, release.name)
    for release in (one for one in plan.whole.releases if one not in plan.shared):
        bound = digest(search_binding(run.config))
        domain = run.domain(release.name, release.event.to_json(), prepared.manifest.digest, bound)
        run.ledger.spend(release.name, release.event, domain, 0, release.event.count)
    return plan.trial


def _refuse_lost_trials(run: Run) -> None:
    """Trials that were paid for keep their own ledgers: without those they would be run again, with other noise."""
    paid, trials = {one.name for one in run.ledger.charged()} - set(run.config.curriculum), store(run.root)
    needed = [trials / "plan.json", *(root / "ledger.jsonl" for root in witnessed(trials))]
    gone = [path.parent for path in needed if not path.exists()]
    if paid and gone:
        raise BudgetError(
            f"{run.ledger.location}: the trials of this search were paid for, and {gone[0]} is gone; running "
            "them again would be another search: begin it under another run.name, with a budget of its own"
        )


def _read_or_make_plan(run: Run, prepared: Prepared) -> SearchPlan:
    """The plan of a search; where it can't be read any more it is made again, the same one, as the ledger checks."""
    if run.ledger.budget() is not None:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            return _read_plan(run)
    facts = prepared.manifest
    drawn = [] if run.config.search.privacy == "selection" else _drawn(run, int(run.config.search.expected_trials))
    made = plan_search(run.config, facts.num_listed_train, facts.class_names, drawn)
    whole = replace(made, whole=run.shared_plan(made.whole))
    store(run.root).mkdir(exist_ok=True, mode=0o700)
    write_bytes(run.root / "plan.json", json.dumps(whole.to_json(run.config), indent=2).encode())
    write_bytes(store(run.root) / "plan.json", json.dumps(whole.trials_json(), indent=2).encode())
    return _read_plan(run)


def _read_plan(run: Run) -> SearchPlan:
    finished = (run.root / RESULT).exists()  # then nobody asks for the trials, and they may be gone
    trials = {"shared": [], "trials": []} if finished else read_json(store(run.root) / "plan.json")
    return SearchPlan.read(read_json(run.root / "plan.json"), trials)


def _open_proxy(run: Run, prepared: Prepared) -> Callable[[Values], PrivacyPlan]:
    """Prepares the stand-in; a trial on it has the noise, batch and steps that a run on the private set would have."""
    if run.config.search.proxy.source == "central":
        release_easy_stage(run, prepared, calibrate(run, prepared), "central")
    stand_in, facts = prepare_stand_in(run, prepared).manifest, prepared.manifest
    known: dict[tuple[tuple[str, Any], ...], PrivacyPlan] = {}  # not a cached function: it travels to the trials

    def planned(values: Values) -> PrivacyPlan:
        if (key := accounted(values)) not in known:
            config = with_values(run.config, dict(key))
            plan = make_plan(config, facts.num_listed_train, facts.class_names)
            known[key] = as_on(plan, stand_in.num_listed_train, stand_in.class_names, config)
        return known[key]

    return planned


def _trial_maker(run: Run, plan_of_trial: Callable[[Values], PrivacyPlan]) -> Callable[[str, Values], Trial]:
    data = stand_in_data(run) if run.config.search.privacy == "proxy" else run.config.data

    def make(name: str, values: Values) -> Trial:
        return Trial(name, values, replace(trial_config(run, values, name), data=data), plan_of_trial(values))

    return make


def _drawn(run: Run, number: int) -> list[Values]:
    """The values of trials that are drawn beforehand: independent ones for a selection, else different ones."""
    choices = candidates(run.config)
    if run.config.search.privacy == "selection":
        key = derive_key(run.secret(), "search/candidates", search_address(run))
        return [choices[choice] for choice in draw_candidates(key, number, len(choices))]
    key = derive_key(run.secret(), "search/order", search_address(run))
    order = np.argsort([derive_key(key, "place", place) for place in range(len(choices))])
    return [choices[int(order[place % len(choices)])] for place in range(number)]


def _run_fixed(run: Run, make_trial: Callable[[str, Values], Trial]) -> list[Trial]:
    """Runs trials that were all drawn beforehand; under `selection` their number is drawn too, and stays secret."""
    search = run.config.search
    number = int(search.expected_trials)
    if search.privacy == "selection":
        number = trial_law(run.config).draw(derive_key(run.secret(), "search/number", search_address(run)))
        say("search", "trials run in private; their number is a secret, which the choice rests on")
    if number == 0:
        raise BudgetError("search.law=poisson: the secret number of trials is 0, so nothing may be released")
    drawn = enumerate(_drawn(run, number))
    trials = [make_trial(f"trial-{place:03d}", values) for place, values in drawn]

    def train(point: dict[str, Any]) -> None:
        run_trial(run, trials[point["trial"]], _report if search.scheduler == "asha" else lambda share, score: None)

    _fit(run, train, {"trial": tune.grid_search(list(range(number)))}, 1, None)
    # The best of those that had finished by then is another mechanism than the one that was paid for. (ASHA, which
    # stops trials too, is for searches that pay for each of them.)
    if search.scheduler == "fifo" and not all(score_path(store(run.root) / one.name).exists() for one in trials):
        raise RuntimeError("the search was stopped before every trial had its score; the same command goes on")
    return trials


def _run_adaptive(run: Run, make_trial: Callable[[str, Values], Trial]) -> list[Trial]:
    """Trials that Optuna suggests after those before; values that were tried keep their score.

    A trial that has begun is one of those that were paid for, whether it was finished or not.
    """
    named = {f"trial-{digest(values)[:12]}": values for values in candidates(run.config)}
    begun = [name for name in named if (store(run.root) / name / "binding.json").exists()]
    left = int(run.config.search.expected_trials) - len(begun)

    def train(point: dict[str, Any]) -> None:
        name = point.get("trial", f"trial-{digest(point)[:12]}")
        run_trial(run, make_trial(name, named[name]), _report)

    if begun:
        _fit(run, train, {"trial": tune.grid_search(begun)}, 1, None)
    known = {name: one for name in begun if (one := read_score(score_path(store(run.root) / name))) is not None}
    if left > 0:
        choices = {name: tune.choice(values) for name, values in space(run.config).items()}
        _fit(run, train, choices, left, _optuna([named[name] for name in known], [one.value for one in known.values()]))
    finished = [name for name in named if score_path(store(run.root) / name).exists()]
    return [make_trial(name, named[name]) for name in finished]


def _optuna(points: list[Values], rewards: list[float]) -> Any:
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise InputError("search.sampler=optuna: expected the package optuna; pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    known: dict[str, Any] = {"points_to_evaluate": points, "evaluated_rewards": rewards} if points else {}
    return OptunaSearch(metric="score", mode="max", **known)


def _report(share: float, score: float) -> None:
    """Tells Tune a score that is public or paid for: `selection` allows no scheduler or sampler that would ask."""
    tune.report({"score": score, "ninths": round(share * NINTHS)})


class _EndAtSignal(tune.Callback):
    """At SIGUSR1 Tune returns as if all trials had run; so it ends the process, and the same command goes on."""

    def setup(self, *_: Any, **__: Any) -> None:
        """Tune calls it once it has taken the signal for itself."""
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def _fit(
    run: Run, train: Callable[[dict[str, Any]], None], choices: dict[str, Any], number: int, algorithm: Any
) -> None:
    """Runs the trials; one that fails is replayed with its own keys, and one that can't end the search fails it."""
    search, storage = run.config.search, store(run.root) / "tune"
    asha = search.scheduler == "asha"
    scheduler = ASHAScheduler("ninths", "score", "max", max_t=NINTHS, grace_period=1, reduction_factor=3)
    # Tune's own notes tell every trial's values and score.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends a search as it ends any job
    remove(storage)
    tuner = tune.Tuner(
        # Drivers wait for their workers: with a share of a processor, they would keep one of these from starting.
        tune.with_resources(train, {"CPU": 0, "memory": 1}),
        param_space=choices,
        tune_config=tune.TuneConfig(
            num_samples=number,
            max_concurrent_trials=search.concurrent_trials,
            search_alg=algorithm,
            scheduler=scheduler if asha else FIFOScheduler(),
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=escaped(storage),
            failure_config=tune.FailureConfig(max_failures=run.config.scaling.max_failures),
            callbacks=[_EndAtSignal()],
            verbose=0,
        ),
    )
    try:
        # Boxes and paths, however quiet it is told to be.
        with working("search", "trials"), contextlib.redirect_stdout(io.StringIO()):
            results = tuner.fit()
    finally:
        remove(storage)
    for error in results.errors:
        raise error


def _show(run: Run, told: dict[str, Any]) -> None:
    """TensorBoard's HParams view: of all trials, or under `selection` of the best."""
    result = read_json(run.root / RESULT)
    rows = [(one["values"], list(one["scores"].values())[-1]) for one in told.get("trials", []) if one["scores"]]
    with MetricWriter(run.root, run.config.privacy.test_mode) as metrics:
        for place, (values, score) in enumerate(rows or [(result["values"], result["score"]["value"])]):
            metrics.trial(f"trial-{place:03d}" if rows else "best", values, score)


def _say_best(run: Run) -> None:
    result = read_json(run.root / RESULT)
    values = [f"{name}={json.dumps(value)}" for name, value in result["values"].items()]
    say("search", f"best of the trials, score {result['score']['value']:.4f}: {' '.join(values)}")
    kept = [one for one in sys.argv[1:] if not one.startswith(("search.", "run.name="))]
    say("", f"the same settings alone: {shlex.join(['python', 'jobs/pipeline.py', *kept, *values])}")
