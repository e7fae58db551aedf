"""What a release says of a search: a ledger that recomputes, a recipe that runs, a picture of what may be shown."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from e2h.config import Config
from e2h.curriculum.search_plan import plan_search
from e2h.reporting.check import check
from e2h.reporting.publish import publish
from e2h.reporting.recompute import recompute, stated_epsilon
from e2h.reporting.stages import stages
from e2h.reporting.status import file_ages, look
from e2h.reporting.status_lines import lines, to_json

SCORE = {"kind": "accuracy", "value": 0.5, "release": None}
VALUES = [{"warmup.num_steps": 1}, {"warmup.num_steps": 2}]
TRIALS = [{"values": values, "scores": {"1.000": 0.25 * i}} for i, values in enumerate(VALUES)]


def searching(mode: str) -> Config:
    config = Config()
    config.privacy.epsilon, config.finetune.num_steps, config.central.noise_multiplier = 1.0, 10, 20.0
    space = {"warmup.num_steps": [1, 2]}
    config.search = replace(config.search, privacy=mode, expected_trials=4.0, space=space)
    config.search.proxy.path = "/secret/public"
    return config


@functools.cache
def plan_of(mode: str) -> str:
    config = searching(mode)
    return json.dumps(plan_search(config, 1523, ("zero", "one", "two"), VALUES).to_json(config))


@pytest.fixture
def search_run(make_run):
    """search_run("selection") -> a run directory whose search has ended."""

    def make(mode: str) -> Path:
        run = make_run(mode)
        (run / "plan.json").write_text(plan_of(mode))
        (run / "config.yaml").write_text(yaml.safe_dump(asdict(searching(mode))))
        told = {"trials": TRIALS} if mode == "compose" else {}
        (run / "search.json").write_text(json.dumps({"values": VALUES[1], "score": SCORE, **told}))
        return run

    return make


def test_the_ledger_of_a_selection_recomputes_and_any_change_of_it_is_caught(search_run):
    release = publish(search_run("selection"))
    assert check(release) == []
    path = release / "ledger.json"
    ledger = json.loads(path.read_text())
    stated = stated_epsilon(ledger)
    assert recompute(ledger) == pytest.approx(stated, abs=1e-9)
    assert ledger["tuning"]["mode"] == "selection"
    changes = [
        (lambda one: one["candidates"][0][-1]["event"], "noise_multiplier", 0.9),
        (lambda one: one["law"], "expected_trials", 0.75),
        (lambda one: one["law"], "max_trials", 0.25),
    ]
    for holder, key, factor in changes:
        changed = json.loads(json.dumps(ledger))
        place = holder(changed["releases"][-1]["event"])
        place[key] = type(place[key])(factor * place[key])
        path.write_text(json.dumps(changed))
        assert any("its events give" in problem for problem in check(release)), key


@pytest.mark.parametrize("mode", ["selection", pytest.param("compose", marks=pytest.mark.long)])
def test_the_recipe_of_the_card_runs_as_printed_and_gives_at_least_the_epsilon_stated(search_run, mode):
    release = publish(search_run(mode))
    program, _ = re.findall(r"```python\n(.*?)```", (release / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=release, capture_output=True, text=True, check=True
    )
    found, stated = float(done.stdout), stated_epsilon(json.loads((release / "ledger.json").read_text()))
    assert found >= stated - 1e-6
    if mode == "compose":
        assert found == pytest.approx(stated, abs=1e-6)


@pytest.mark.long
def test_all_trials_are_drawn_where_all_are_paid_for_and_none_of_a_selection(search_run):
    pages = {mode: (publish(search_run(mode)) / "report.html").read_text() for mode in ("selection", "compose")}
    title = "Values and score of every trial"
    assert title in pages["compose"]
    assert title not in pages["selection"]
    assert all("warmup.num_steps" in page for page in pages.values())


def test_where_the_public_images_lie_is_not_released(search_run):
    release = publish(search_run("selection"))
    config = yaml.safe_load((release / "config.yaml").read_text())
    assert "path" not in config["search"]["proxy"]
    assert config["search"]["privacy"] == "selection"
    assert all(b"/secret/" not in path.read_bytes() for path in release.rglob("*") if path.is_file())


def touched(run: Path, *names: str) -> None:
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")


def test_the_status_of_a_search_tells_of_no_trial(search_run):
    run = search_run("selection")
    (run / "search.json").unlink()
    touched(run, *(f"trials/trial-{i:03d}/checkpoints/finetune-00000006.pt" for i in range(7)), "prepared/meta.json")
    status = look(run, run.parent / "head", "pid 1 on a machine")
    shown = "\n".join(lines(status)) + json.dumps(to_json(status))
    assert "trial-0" not in shown
    assert status.moved[0] in ("trials", "prepared/meta.json")
    assert [(stage.name, stage.done) for stage in status.stages if stage.name == "search"] == [("search", None)]
    (run / "search.json").write_text("{}")
    after = look(run, run.parent / "head", None)
    assert [stage.state for stage in after.stages if stage.name == "search"] == ["done"]


def test_the_search_is_a_stage_that_follows_the_preparation(search_run):
    run = search_run("selection")
    known = look(run, run.parent / "head", None).config
    ages = file_ages(run)
    finished = {"prepare": True, "central": False, "train": False, "sample": False}
    states = {stage.name: stage.state for stage in stages(known, {"trials/x": 1.0}, finished, ("", 0), True)}
    assert list(states)[:3] == ["prepare", "search", "central"]
    assert (states["prepare"], states["search"], states["central"]) == ("done", "running", "not begun")
    assert "search" in {stage.name for stage in stages(known, ages, finished, ("", 0), False)}
    plain = stages({**known, "search": None}, ages, finished, ("", 0), False)
    assert "search" not in {stage.name for stage in plain}
