"""What a search on Ray refuses to do: choose among fewer trials, run more than were paid for, or pay once for two."""

from __future__ import annotations

import pytest

from e2h.config import Config, RunConfig, SearchConfig
from e2h.curriculum.run import Run, open_run
from e2h.curriculum.search import score_path, store, write_score
from e2h.curriculum.stages import prepare
from e2h.data.storage import open_prepared
from e2h.distributed import search as search_module
from e2h.distributed.search import _open_budget, _run_adaptive, _run_fixed
from e2h.errors import BudgetError
from e2h.privacy.scores import Score
from e2h.validation import validate

SPACE = {"finetune.learning_rate": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}


@pytest.fixture
def opened(tmp_path):
    """opened(mode=...): a search on the digits with its data prepared."""
    runs = []

    def make(name: str = "r", **settings: object) -> Run:
        config = Config(run=RunConfig(str(tmp_path), name), search=SearchConfig(space=SPACE, **settings))
        config.privacy.epsilon, config.finetune.num_steps, config.privacy.test_mode = 1.0, 4, True
        context = open_run(validate(config))
        run = context.__enter__()
        runs.append(context)
        prepare(run)
        return run

    yield make
    for context in runs:
        context.__exit__(None, None, None)


def trial(name: str, values: dict) -> object:
    return type("Trial", (), {"name": name, "values": values})()


def finish(run: Run, name: str) -> None:
    (store(run.root) / name).mkdir(parents=True, exist_ok=True)
    (store(run.root) / name / "binding.json").write_text("{}")
    write_score(score_path(store(run.root) / name), Score("accuracy", 0.5))


def test_a_search_that_a_signal_stopped_chooses_nothing(opened, monkeypatch):
    run = opened(privacy="selection")
    law = type("Law", (), {"draw": lambda self, randomness: 4})()
    monkeypatch.setattr(search_module, "trial_law", lambda config: law)
    names = [f"trial-{number:03d}" for number in range(4)]
    monkeypatch.setattr(search_module, "_fit", lambda *_: [finish(run, name) for name in names[:3]])
    with pytest.raises(RuntimeError, match="stopped before every trial had its score"):
        _run_fixed(run, trial)
    monkeypatch.setattr(search_module, "_fit", lambda *_: finish(run, names[3]))
    assert [one.name for one in _run_fixed(run, trial)] == names


def test_trials_that_had_begun_before_a_kill_count_among_those_that_were_paid_for(opened, monkeypatch):
    run = opened(privacy="compose", expected_trials=4, sampler="optuna")
    names, asked = [f"trial-{search_module.digest({'finetune.learning_rate': v})[:12]}" for v in (0.1, 0.2, 0.3)], []
    for name in names:
        finish(run, name)
    score_path(store(run.root) / names[2]).unlink()  # killed
    monkeypatch.setattr(search_module, "_fit", lambda run, train, choices, number, _: asked.append((choices, number)))
    assert [one.name for one in _run_adaptive(run, trial)] == names[:2]
    (first, _), (_, left) = asked
    assert first["trial"]["grid_search"] == names
    assert left == 1


def test_trials_whose_folder_is_gone_are_not_run_again_for_nothing(opened):
    run = opened(privacy="compose", expected_trials=2)
    run.config.curriculum = []
    _open_budget(run, open_prepared(run.prepared))
    _open_budget(run, open_prepared(run.prepared))  # a replay
    (store(run.root) / "plan.json").unlink()
    with pytest.raises(BudgetError, match=r"were paid for, and .*trials is gone"):
        _open_budget(run, open_prepared(run.prepared))
