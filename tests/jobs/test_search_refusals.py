"""Searches that may not be: each refused in one line, before Ray starts, with the exit code that is due.

The job's own `main` runs here in this process, without a Ray session.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import entry
import pipeline
import pytest
import search as job

from e2h.config import Config, LedgerConfig, RunConfig
from e2h.curriculum.run import open_run
from e2h.data.prepare import finish_prepared, prepare_shard
from e2h.data.sources import open_source
from e2h.privacy.plan import make_plan

ONE = "search.space={warmup.num_steps:[1,2]}"


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused("a=b", ...) -> exit code and the one line; nothing is left of it."""

    def call(*overrides: str, searching: bool = True) -> tuple[int, str]:
        storage = tmp_path / "refused"
        where = [] if any(one.startswith("run.storage=") for one in overrides) else [f"run.storage={storage}"]
        monkeypatch.setattr(sys, "argv", ["search.py", *where, *overrides])
        with pytest.raises(SystemExit) as ended:
            entry.job(job.search if searching else pipeline.pipeline, searches=searching)
        line = capsys.readouterr().err
        assert line.startswith("e2h: ")
        assert line.count("\n") == 1, line
        assert not storage.exists()
        return int(ended.value.code or 0), line

    return call


INDEPENDENT = "trials must be independent: one that depends on another's score breaks the bound"
CASES = {
    "no mode": ([], "search.privacy=null: expected proxy, selection or compose"),
    "unknown mode": (["search.privacy=free"], "search.privacy=free: expected one of proxy, selection, compose"),
    "asha": (["search.privacy=selection", "search.scheduler=asha"], INDEPENDENT),
    "optuna": (["search.privacy=selection", "search.sampler=optuna"], INDEPENDENT),
    "test score of selection": (
        ["search.privacy=selection", "search.score=test"],
        "search.score=test: expected accuracy or central; a score from the real test set is accounted nowhere",
    ),
    "test score of compose": (["search.privacy=compose", "search.score=test"], "search.score=test: expected"),
    "noisy score of public images": (
        ["search.privacy=proxy", "search.proxy.source=idx", "search.proxy.path=/public", "search.score=accuracy"],
        "search.score=accuracy: expected test or central",
    ),
    "no stand-in": (["search.privacy=proxy"], "search.proxy.source=null: expected public images to search on"),
    "the private set as stand-in": (
        ["search.privacy=proxy", "search.proxy.source=digits"],
        "search.proxy.source=digits: expected public or synthetic images; these are the private images themselves",
    ),
    "a stand-in that is not read": (
        ["search.privacy=compose", "search.proxy.source=idx"],
        "search.proxy.source=idx: expected none with search.privacy=compose",
    ),
    "adaptive costs": (
        ["search.privacy=compose", "search.sampler=optuna", "search.space={finetune.num_steps:[6,8]}"],
        "search.sampler=optuna: expected no setting in search.space that the accounting depends on",
    ),
    "central images that a trial changes": (
        ["search.privacy=proxy", "search.proxy.source=central", "search.space={central.max_norm:[1.0,2.0]}"],
        "search.proxy.source=central: expected no setting in search.space",
    ),
    "central images that the plan of a trial changes": (
        ["search.privacy=proxy", "search.proxy.source=central", "search.space={finetune.num_steps:[6,8]}"],
        "search.proxy.source=central: expected no setting in search.space that the accounting uses",
    ),
    "distances to different images": (
        ["search.privacy=selection", "search.score=central", "search.space={central.max_norm:[1.0,2.0]}"],
        "search.score=central: expected central images, and no setting of them in search.space",
    ),
    "half a trial": (
        ["search.privacy=compose", "search.expected_trials=2.5"],
        "search.expected_trials=2.5: expected a whole number of at least 1",
    ),
    "no law": (["search.privacy=selection", "search.max_trials=4"], "raise search.max_trials"),
    "a private setting": (
        ["search.privacy=selection", "search.space={privacy.epsilon:[1,2]}"],
        "search.space=privacy.epsilon: expected a setting of model, central, warmup, frequency, finetune, sampling",
    ),
    "the same twice": (
        ["search.privacy=selection", "search.space={warmup.num_steps:[7,7]}"],
        "search.space.warmup.num_steps=[7, 7]: expected a list of distinct values",
    ),
    "a typo": (
        ["search.privacy=selection", "search.space={warmup.num_step:[7]}"],
        "warmup.num_step: expected the dotted",
    ),
    "a type": (
        ["search.privacy=selection", "search.space={model.width_multipliers:[[wide]]}"],
        "search.space.model.width_multipliers=['wide']: expected values of type list[int]",
    ),
    "a candidate that can't be": (
        ["search.privacy=selection", "search.space={central.budget_share:[0.5,1.5]}"],
        "central.budget_share=1.5: expected a share in (0, 1)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_search_that_may_not_be_is_refused_in_one_line(refused, case):
    overrides, said = CASES[case]
    code, line = refused(*overrides)
    assert code == 2
    assert said in line


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(config: Config) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["pipeline.py"])
    with pytest.raises(SystemExit) as ended:
        entry.configured(interrupted)
    assert (ended.value.code, capsys.readouterr().err) == (130, "e2h: stopped; the same command goes on\n")


def test_the_pipeline_does_not_search(refused):
    code, line = refused("search.privacy=selection", searching=False)
    assert code == 2
    assert "search.privacy=selection: expected no value here; run jobs/search.py with it" in line


@pytest.mark.long
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_search_on_an_exhausted_budget_of_the_data_set_is_code_3(refused, tmp_path, monkeypatch, dry_run):
    """The second one: a run holds all of it."""
    config = Config(run=RunConfig(str(tmp_path / "runs"), "first"), ledger=LedgerConfig("dataset", 1.0))
    config.privacy.epsilon, config.finetune.num_steps, config.central.noise_multiplier = 1.0, 4, 20.0
    with open_run(config) as run:
        run.open_budget(make_plan(config, 1523, tuple(map(str, range(10)))).budget)
    second = replace(config, run=RunConfig(str(tmp_path / "runs"), "second"))
    second.search = replace(second.search, privacy="selection", space={"warmup.num_steps": [1, 2]})
    with open_run(second) as run:  # leaves what the first stage does
        source = open_source(second.data)
        stats = [prepare_shard(shard, second.data, run.prepared, index) for index, shard in enumerate(source.shards)]
        finish_prepared(run.prepared, source, second.data, stats)
        run.bind()
        run.mark_done("prepare")
    monkeypatch.setattr(entry, "session", lambda *_: nullcontext())
    monkeypatch.setattr("e2h.distributed.search.check_capacity", lambda *_: None)
    settings = ["privacy.epsilon=1", "finetune.num_steps=4", "central.noise_multiplier=20"]
    settings += ["ledger.scope=dataset", "ledger.epsilon=1"]
    settings += [f"run.storage={tmp_path / 'runs'}", "run.name=second", "search.privacy=selection", ONE]
    code, line = refused(*settings, f"dry_run={dry_run}")
    assert code == 3
    assert "digits" in line
    assert not Path(run.root / "ledger.jsonl").exists()
    assert not Path(run.root / "trials").exists()
