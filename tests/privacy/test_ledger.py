"""The ledger: what it charges, what it refuses, and what it says."""

from __future__ import annotations

import json
import stat

import pytest
from ledger_cases import EVENT, PLAN, one_per_cent_a_step, spend, steps

from e2h.errors import BudgetError, InputError
from e2h.privacy.accounting import epsilon
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.ledger import Budget, Ledger


def test_a_spend_is_in_the_file_when_it_returns(ledger):
    assert spend(ledger, 0, 16)
    record = json.loads(ledger.path.read_text().splitlines()[-1])
    assert (record["kind"], record["release"], record["domain"], record["steps"]) == ("SPEND", "finetune", "a", [0, 16])
    assert record["event"] == {
        "type": "poisson_sampled_gaussian",
        "sampling_prob": 0.1,
        "noise_multiplier": 2.0,
        "count": 1,
    }
    assert ledger.charged() == (Release("finetune", PoissonSampledGaussian(0.1, 2.0, 16)),)
    assert ledger.paid("finetune", "a") == set(range(16))


def test_nothing_can_be_spent_before_a_budget_is_opened(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", one_per_cent_a_step)
    assert ledger.budget() is None
    assert ledger.charged() == ()
    with pytest.raises(BudgetError, match="no budget was opened"):
        spend(ledger, 0, 1)
    assert ledger.path.read_bytes() == b""


def test_a_plan_above_its_budget_is_refused_before_anything_is_spent(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", one_per_cent_a_step)
    with pytest.raises(BudgetError, match=r"privacy\.epsilon=0\.99: the plan costs 1; nothing was spent"):
        ledger.open(Budget(0.99, 1e-5, "REPLACE_SPECIAL", PLAN.planned))
    assert ledger.budget() is None


def test_a_replay_is_free(ledger):
    assert spend(ledger, 0, 16)
    before = ledger.path.read_bytes()
    assert not spend(ledger, 0, 16)
    assert not spend(ledger, 3, 7)
    assert ledger.path.read_bytes() == before
    assert spend(ledger, 8, 24)  # the overlap counts once
    assert steps(ledger) == 24


def test_another_domain_is_paid_again_and_refused_beyond_the_budget(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", one_per_cent_a_step)
    ledger.open(Budget(1.5, 1e-5, "REPLACE_SPECIAL", PLAN.planned))  # 50 spare steps
    spend(ledger, 0, 50)
    assert spend(ledger, 0, 16, "b")
    assert steps(ledger) == 66
    before = ledger.path.read_bytes()
    # A third domain could not be finished: 50 + 16 + 100 steps.
    with pytest.raises(
        BudgetError, match=r"privacy\.epsilon=1\.5: charging finetune steps \[0, 100\].* epsilon to 1\.66"
    ):
        spend(ledger, 0, 16, "c")
    assert ledger.path.read_bytes() == before
    assert spend(ledger, 16, 32, "b")  # begun, and 50 + 100 is within


def test_a_real_accountant_decides_what_is_too_much(tmp_path):
    event = PoissonSampledGaussian(0.1, 4.0, 20)
    plan = (Release("finetune", event),)
    limit = epsilon(plan, 1e-5).epsilon
    ledger = Ledger(tmp_path / "ledger.jsonl", lambda releases, delta: epsilon(releases, delta).epsilon)
    ledger.open(Budget(limit, 1e-5, "REPLACE_SPECIAL", plan))
    assert ledger.spend("finetune", event, "a", 0, 20)
    assert ledger.cost(ledger.charged(), 1e-5) == limit
    with pytest.raises(BudgetError):
        ledger.spend("finetune", event, "b", 0, 1)
    with pytest.raises(BudgetError):
        ledger.spend("finetune", PoissonSampledGaussian(0.1, 3.9, 20), "c", 0, 1)


def test_two_mechanisms_in_one_domain_are_refused(ledger):
    spend(ledger, 0, 16)
    with pytest.raises(BudgetError, match="expected one release and event"):
        ledger.spend("finetune", PoissonSampledGaussian(0.1, 2.1, 100), "a", 16, 32)
    with pytest.raises(BudgetError, match="expected one release and event"):
        ledger.spend("central", EVENT, "a", 16, 32)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (5, 4), (90, 101)])
def test_steps_that_are_not_planned_are_refused(ledger, start, stop):
    with pytest.raises(ValueError, match="expected steps of the 100"):
        spend(ledger, start, stop)


def test_the_budget_can_be_opened_again_but_not_changed(ledger):
    ledger.open(PLAN)
    assert ledger.budget() == PLAN
    others = [
        Budget(2.0, 1e-5, "REPLACE_SPECIAL", PLAN.planned),
        Budget(1.0, 1e-6, "REPLACE_SPECIAL", PLAN.planned),
        Budget(1.0, 1e-5, "ADD_OR_REMOVE_ONE", PLAN.planned),
        Budget(1.0, 1e-5, "REPLACE_SPECIAL", (Release("finetune", PoissonSampledGaussian(0.1, 2.0, 99)),)),
    ]
    for other in others:
        with pytest.raises(InputError, match=r"expected the budget of this plan, found Budget\(epsilon=1\.0"):
            ledger.open(other)
    assert len(ledger.path.read_text().splitlines()) == 1


def test_the_file_is_its_owners(ledger):
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600


def test_the_content_does_not_depend_on_data(ledger):
    spend(ledger, 0, 16)
    opened, spent = map(json.loads, ledger.path.read_text().splitlines())
    assert set(opened) == {
        *("v", "seq", "prev", "sha256", "time", "kind"),
        *("epsilon", "delta", "neighbouring_relation", "planned"),
    }
    # `domain` is a keyed digest (Run.domain): without the secret it is 64 random hex digits.
    assert set(spent) == {"v", "seq", "prev", "sha256", "time", "kind", "release", "event", "domain", "steps"}


def test_the_head_names_the_newest_record(ledger):
    first = ledger.head()
    spend(ledger, 0, 16)
    second = ledger.head()
    assert (first[0], second[0]) == (1, 2)
    assert first[1] != second[1]
    assert json.loads(ledger.witness.read_text()) == list(second)
