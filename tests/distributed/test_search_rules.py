"""What a search on Ray refuses to do: choose among fewer trials, run more than were paid for, or pay once for two.

And what does not end one that is paid for: a damaged plan, a torn row, a signal.
"""

from __future__ import annotations

import json
import signal
from importlib import import_module
from types import SimpleNamespace

import pytest
from pyarrow.fs import FileSystem

from e2h.config import Config, RunConfig, SearchConfig
from e2h.curriculum.run import Run, open_run
from e2h.curriculum.search import score_path, store, trial_config, write_score
from e2h.curriculum.stages import calibrate, prepare, read_or_make_plan
from e2h.data.filesystem import remove
from e2h.data.remote import place
from e2h.data.storage import open_prepared
from e2h.distributed import search as search_module
from e2h.distributed.search import _fit, _open_budget, _run_adaptive, _run_fixed, search_trials
from e2h.distributed.trials import RESULT, _take_rows
from e2h.errors import BudgetError, InputError
from e2h.privacy.scores import Score
from e2h.reporting.metrics import MetricWriter
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
    one = Run(store(run.root) / "trial-000", trial_config(run, {}, "trial-000"), "owner", run.root)
    for folder in (one.root, store(run.root) / ".secrets"):
        folder.mkdir()
    one.ledger.open(run.ledger.budget(), lambda *_: 1.0)
    _open_budget(run, open_prepared(run.prepared))  # begun, and still there
    remove(one.root)
    with pytest.raises(BudgetError, match=r"were paid for, and .*trial-000 is gone"):
        _open_budget(run, open_prepared(run.prepared))
    remove(store(run.root))
    with pytest.raises(BudgetError, match=r"were paid for, and .*trials is gone"):
        _open_budget(run, open_prepared(run.prepared))


def planned(opened, mode: str) -> tuple[Run, dict[str, bytes]]:
    """A search whose trials are charged, and its two files of the plan."""
    run = opened(privacy=mode, expected_trials=2)
    run.config.curriculum, run.config.privacy.epsilon = [], 0.3
    _open_budget(run, open_prepared(run.prepared))
    return run, {name: (run.root / name).read_bytes() for name in ("plan.json", "trials/plan.json")}


@pytest.mark.parametrize(
    ("mode", "name", "content"), [("selection", "plan.json", b"{}"), ("compose", "trials/plan.json", b"[")]
)
def test_a_damaged_plan_is_made_again_and_nothing_is_charged_twice(opened, mode, name, content):
    run, files = planned(opened, mode)
    head = run.ledger.head()
    (run.root / name).write_bytes(content)
    _open_budget(run, open_prepared(run.prepared))
    assert {name: (run.root / name).read_bytes() for name in files} == files
    assert run.ledger.head() == head


def test_a_finished_search_whose_plan_is_damaged_goes_on(opened):
    run, files = planned(opened, "selection")
    prepared, path = open_prepared(run.prepared), run.root / "plan.json"
    score = Score("accuracy", 0.5).to_json()
    (run.root / RESULT).write_text(json.dumps({"values": {"finetune.learning_rate": 0.1}, "score": score}))
    remove(store(run.root))
    for damage in (lambda: path.write_bytes(b"{"), path.unlink):
        damage()
        with pytest.raises(InputError, match=r"plan\.json: .* jobs/search\.py with the same settings makes it again"):
            read_or_make_plan(run, prepared)  # a single run's would be another budget's
    assert not path.exists()
    winner = search_trials(run, prepared)
    assert path.read_bytes() == files["plan.json"]
    assert not store(run.root).exists()
    assert [one.name for one in calibrate(winner, prepared).releases] == ["search"]


def test_a_row_that_a_full_disk_tore_is_left_out(tmp_path):
    trial, run = tmp_path / "trial", Run(tmp_path / "r", Config())
    for folder in (trial, run.root):
        folder.mkdir()
    with MetricWriter(trial) as metrics:
        for step in range(2):
            metrics.scalar("warmup/loss", 0.5, step)
        metrics.scalar("finetune/loss", 0.5, 0)
    rows = (trial / "metrics.jsonl").read_bytes().splitlines()
    for torn in (rows[1][:20], b"7", b"[]", b"{}", b"\xff"):
        (trial / "metrics.jsonl").write_bytes(rows[0] + b"\n" + torn)
        with MetricWriter(trial) as metrics:  # closes the torn line
            metrics.scalar("warmup/loss", 0.25, 2)
        (run.root / "metrics.jsonl").unlink(missing_ok=True)
        _take_rows(trial, run)
        kept = [json.loads(row) for row in (run.root / "metrics.jsonl").read_bytes().splitlines()]
        assert [(row["value"], row["step"]) for row in kept] == [(0.5, 0), (0.25, 2)], torn


def test_tune_keeps_no_signal_for_itself(opened, monkeypatch):
    run = opened(privacy="compose", expected_trials=2, scheduler="asha")
    taken = (signal.SIGINT, signal.SIGUSR1)
    before, during = [signal.getsignal(one) for one in taken], []

    def tuner(*_, run_config, **__) -> object:
        def fit() -> object:  # as Ray's own, but for the trials
            import_module("ray.tune.tune")._setup_signal_catching()
            for callback in run_config.callbacks or []:
                callback.setup(stop=None, num_samples=1, total_num_samples=1)
            during.extend(signal.getsignal(one) for one in taken)
            return SimpleNamespace(errors=[])

        return SimpleNamespace(fit=fit)

    monkeypatch.setattr(search_module.tune, "Tuner", tuner)
    try:
        _fit(run, lambda point: None, {}, 1, None)
    finally:
        for one, handler in zip(taken, before, strict=True):
            signal.signal(one, handler)
    assert during == before


def test_what_tune_keeps_in_a_bucket_lies_where_the_search_takes_it_away(bucket, monkeypatch):
    """Tune reads its folder as a URL, in which a name with a space or '#' is another, or none."""
    seen, removed = [], []
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    monkeypatch.setenv("TUNE_DISABLE_SIGINT_HANDLER", "1")
    monkeypatch.setattr(search_module, "remove", lambda storage: removed.append(str(storage).removeprefix("s3://")))

    class Tuner:
        def __init__(self, *_, run_config, **__):
            seen.append(FileSystem.from_uri(run_config.storage_path)[1])

        def fit(self):
            return SimpleNamespace(errors=[])

    monkeypatch.setattr(search_module.tune, "Tuner", Tuner)
    _fit(Run(place(f"{bucket}/runs/käfer, rot #2"), Config(), "owner"), lambda point: None, {}, 1, None)
    assert removed == seen * 2
