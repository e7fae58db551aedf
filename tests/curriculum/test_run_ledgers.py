"""The ledgers of a run: its own, the data set's, and where they lie."""

from __future__ import annotations

import json
import pickle
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from e2h.config import Config, LedgerConfig, PrivacyConfig, RunConfig
from e2h.curriculum.run import Run, open_run
from e2h.errors import BudgetError, InputError
from e2h.privacy.accounting import Bound, epsilon
from e2h.privacy.dataset_ledger import SharedBudget
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.ledger import Budget
from e2h.privacy.plan import PrivacyPlan, read_plan
from e2h.privacy.rounding import epsilon_in_words


def settings(storage: Path, **sections) -> Config:
    return Config(run=RunConfig(storage=str(storage)), **sections)


PLANNED = (Release("finetune", PoissonSampledGaussian(0.1, 4.0, 20)),)
BUDGET = Budget(1.0, 1e-4, "REPLACE_SPECIAL", PLANNED)


def sharing(storage: Path, name: str, epsilon: float = 1.0, path: str | None = None) -> Config:
    config = settings(storage, ledger=LedgerConfig("dataset", epsilon, path), privacy=PrivacyConfig(epsilon=1.0))
    config.run.name = name
    return config


def charged(config: Config, budget: Budget = BUDGET) -> int:
    """Opens the run's budget as a job does, and charges one step."""
    with open_run(config) as run:
        run.open_budget(budget)
        run.ledger.spend("finetune", PLANNED[0].event, "ab" * 32, 0, 1)
        return len(run.dataset_ledger.chain.read()) if run.dataset_ledger else 0


def test_runs_on_one_data_set_share_a_budget_and_a_resumed_run_holds_once(tmp_path):
    limit = epsilon([*PLANNED, *PLANNED], 1e-4).epsilon
    one, two, three = (sharing(tmp_path, name, limit) for name in ("one", "two", "three"))
    assert [charged(one), charged(one), charged(two), charged(one)] == [2, 2, 3, 3]
    with pytest.raises(BudgetError, match=r"2 of them hold .* nothing was spent"):
        charged(three)
    assert Run(tmp_path / "three", three).ledger.charged() == ()
    path = tmp_path / ".ledgers" / "digits.jsonl"
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["DATASET", "HOLD", "HOLD"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert charged(settings(tmp_path, privacy=PrivacyConfig(epsilon=1.0))) == 0  # a budget of its own


def test_a_run_that_was_stopped_before_its_hold_makes_it_before_it_spends(tmp_path):
    config = sharing(tmp_path, "one")
    with open_run(config) as run:
        run.ledger.open(BUDGET, lambda releases, delta: 0.5)
    assert not (tmp_path / ".ledgers" / "digits.jsonl").exists()
    assert charged(config) == 2


@pytest.mark.parametrize("how", ["the ledger", "the folder", "a copy"])
def test_a_run_that_forgot_its_charges_holds_anew(tmp_path, how):
    limit = epsilon(PLANNED, 1e-4).epsilon
    config = sharing(tmp_path, "one", limit)
    charged(config)
    if how == "the ledger":
        (tmp_path / "one" / "ledger.jsonl").unlink()
    elif how == "the folder":
        shutil.rmtree(tmp_path / "one")
    else:
        shutil.copytree(tmp_path / "one", tmp_path / "copy")
        config = sharing(tmp_path, "copy", limit)
    with pytest.raises(BudgetError, match="1 of them hold"):
        charged(config)


def test_a_run_charged_to_its_end_holds_once_although_its_key_is_deleted(tmp_path):
    """As the guide says to, after the last call; publishing again must not cost the data set another plan."""
    config = sharing(tmp_path, "one", epsilon(PLANNED, 1e-4).epsilon)
    charged(config)
    with open_run(config) as run:
        run.ledger.spend("finetune", PLANNED[0].event, "ab" * 32, 1, 20)
        run.checkpoints.mkdir()
        run.weights.write_bytes(b"")
    (tmp_path / ".secrets" / "one.key").unlink()
    with open_run(config) as run:
        run.open_budget(BUDGET)
        assert len(run.dataset_ledger.chain.read()) == 2
        plan = PrivacyPlan(1.0, 1e-4, 100, ("a",), PLANNED, Bound(0.5, 0.6), False)
        assert run.shared_plan(plan) is plan


@pytest.mark.parametrize("scope", ["run", "dataset"])
def test_a_begun_run_whose_key_is_lost_is_refused_and_gets_no_other(tmp_path, scope):
    config = sharing(tmp_path, "one")
    config.ledger.scope = scope
    charged(config)
    key = tmp_path / ".secrets" / "one.key"
    kept = key.read_bytes()
    key.unlink()
    with pytest.raises(InputError, match=r"one\.key: expected the secret that this run began with.*run\.name=one-2"):
        charged(config)
    assert not key.exists()
    key.write_bytes(kept)
    key.chmod(0o600)
    charged(config)


def test_a_plan_says_what_all_runs_hold_and_looking_writes_nothing(tmp_path):
    limit = epsilon([*PLANNED, *PLANNED], 1e-4).epsilon
    charged(sharing(tmp_path, "one", limit))
    before = sorted(tmp_path.rglob("*"))
    looking = Run(tmp_path / "two", sharing(tmp_path, "two", limit))
    plan = PrivacyPlan(1.0, 1e-4, 100, ("a",), PLANNED, Bound(0.5, 0.6), False)
    shared = looking.shared_plan(plan)
    assert shared.shared == SharedBudget("digits", limit, limit, 2)
    assert sorted(tmp_path.rglob("*")) == before
    said = [line for line in shared.statement() if "data set digits" in line]
    assert len(said) == 1
    assert (
        f"together ({epsilon_in_words(limit)}, 1e-4)-differentially private; when this one was planned, 2 of them,"
        in said[0]
    )
    assert read_plan(shared.to_json()).shared == shared.shared
    assert "shared" not in plan.to_json()
    assert Run(tmp_path / "x", settings(tmp_path)).shared_plan(plan) is plan


def test_a_ledger_lies_where_its_path_says(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    own = settings(tmp_path / "runs", ledger=LedgerConfig(path=str(elsewhere / "own.jsonl")))
    charged(own)
    charged(sharing(tmp_path / "runs", "one", 1.0, str(elsewhere / "all.jsonl")))
    assert {path.name for path in elsewhere.iterdir()} == {"own.jsonl", "all.jsonl"}
    assert (tmp_path / "runs" / "one" / "ledger.jsonl").exists()
    assert not (tmp_path / "runs" / "digits-eps1-seed0" / "ledger.jsonl").exists()
    # Two runs can't use one ledger: the second finds another's charges, or another plan.
    other = settings(tmp_path / "runs", ledger=own.ledger, seed=1)
    with pytest.raises(InputError, match="expected the budget of this plan"):
        charged(other, replace(BUDGET, epsilon=2.0))


def test_a_driver_on_another_machine_takes_over(tmp_path):
    """Where locks don't reach: the older driver and its workers can't spend any more."""
    event = PLANNED[0].event
    with open_run(settings(tmp_path)) as older:
        older.open_budget(BUDGET)
        older.ledger.spend("finetune", event, "ab" * 32, 0, 1)
        newer = replace(older, owner="ee" * 16)
        worker = pickle.loads(pickle.dumps(older))
        newer.ledger.take_over()
        for zombie in (older, worker):
            with pytest.raises(BudgetError, match="another process took over"):
                zombie.ledger.spend("finetune", event, "ab" * 32, 1, 2)
        # Nor does what they refuse stop the newer one.
        assert older.refusal == worker.refusal != newer.refusal
        pickle.loads(pickle.dumps(newer)).ledger.spend("finetune", event, "ab" * 32, 1, 2)
        assert newer.ledger.paid("finetune", "ab" * 32) == {0, 1}
