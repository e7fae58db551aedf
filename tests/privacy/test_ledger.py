"""The ledger: what it charges, what it refuses, and what it says."""

from __future__ import annotations

import json
import stat
import time

import pytest
from ledger_cases import EVENT, OWNER, PLAN, file_ledger, one_per_cent_a_step, spend, steps

from e2h.errors import BudgetError, InputError
from e2h.privacy.accounting import epsilon
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.ledger import Budget, Ledger


def lines(ledger: Ledger) -> list[dict]:
    return [json.loads(line) for line in ledger.chain.log.path.read_text().splitlines()]


def test_a_spend_is_in_the_file_when_it_returns(ledger):
    assert spend(ledger, 0, 16)
    record = lines(ledger)[-1]
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
    ledger = file_ledger(tmp_path / "ledger.jsonl")
    assert ledger.budget() is None
    assert ledger.charged() == ()
    with pytest.raises(BudgetError, match="no budget was opened"):
        spend(ledger, 0, 1)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_plan_above_its_budget_is_refused_before_anything_is_spent(tmp_path):
    ledger = file_ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(BudgetError, match=r"privacy\.epsilon=0\.99: the plan costs 1; nothing was spent"):
        ledger.open(Budget(0.99, 1e-5, "REPLACE_SPECIAL", PLAN.planned), one_per_cent_a_step)
    assert ledger.budget() is None


def test_a_replay_is_free(ledger):
    assert spend(ledger, 0, 16)
    before = lines(ledger)
    assert not spend(ledger, 0, 16)
    assert not spend(ledger, 3, 7)
    assert lines(ledger) == before
    assert spend(ledger, 8, 24)  # the overlap counts once
    assert steps(ledger) == 24


def test_another_domain_is_paid_again_and_refused_beyond_the_plan(ledger):
    """However cheap the steps are: the plan is what the budget was opened for."""
    spend(ledger, 0, 1)
    before = lines(ledger)
    with pytest.raises(BudgetError, match=r"pays for 100 steps, and 101 would be needed: 1 were released in another"):
        spend(ledger, 1, 2, "b")
    assert lines(ledger) == before
    assert spend(ledger, 1, 100)
    assert steps(ledger) == 100


def test_a_release_in_two_domains_of_a_plan_that_has_room_for_both(tmp_path):
    ledger = file_ledger(tmp_path / "ledger.jsonl")
    ledger.open(Budget(1.0, 1e-5, "REPLACE_SPECIAL", PLAN.planned), one_per_cent_a_step)
    short = PoissonSampledGaussian(0.1, 2.0, 40)
    for domain in ("a", "b"):
        assert ledger.spend("finetune", short, domain, 0, 40)
    with pytest.raises(BudgetError, match="pays for 100 steps, and 120 would be needed: 80 were"):
        ledger.spend("finetune", short, "c", 0, 1)
    assert steps(ledger) == 80


@pytest.mark.parametrize(
    ("name", "event"),
    [
        ("finetune", PoissonSampledGaussian(0.1, 3.0, 100)),  # more noise, and still not what was planned
        ("finetune", PoissonSampledGaussian(0.05, 2.0, 100)),
        ("central", EVENT),
    ],
)
def test_a_release_that_is_not_planned_is_refused(ledger, name, event):
    with pytest.raises(BudgetError, match="expected a release of the plan; nothing was charged"):
        ledger.spend(name, event, "a", 0, 1)
    with pytest.raises(BudgetError, match=r"pays for 100 steps, and 101 would be needed$"):
        ledger.spend("finetune", PoissonSampledGaussian(0.1, 2.0, 101), "a", 0, 1)
    assert steps(ledger) == 0


def test_a_real_accountant_decides_what_a_plan_costs(tmp_path):
    plan = (Release("finetune", PoissonSampledGaussian(0.1, 4.0, 20)),)
    limit = epsilon(plan, 1e-5).epsilon
    ledger = file_ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(BudgetError, match="the plan costs"):
        ledger.open(Budget(limit * (1 - 1e-9), 1e-5, "REPLACE_SPECIAL", plan), lambda r, d: epsilon(r, d).epsilon)
    ledger.open(Budget(limit, 1e-5, "REPLACE_SPECIAL", plan), lambda r, d: epsilon(r, d).epsilon)
    assert ledger.spend("finetune", plan[0].event, "a", 0, 20)
    assert epsilon(ledger.charged(), 1e-5).epsilon == limit


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
    ledger.open(PLAN, one_per_cent_a_step)
    assert ledger.budget() == PLAN
    others = [
        Budget(2.0, 1e-5, "REPLACE_SPECIAL", PLAN.planned),
        Budget(1.0, 1e-6, "REPLACE_SPECIAL", PLAN.planned),
        Budget(1.0, 1e-5, "ADD_OR_REMOVE_ONE", PLAN.planned),
        Budget(1.0, 1e-5, "REPLACE_SPECIAL", (Release("finetune", PoissonSampledGaussian(0.1, 2.0, 99)),)),
    ]
    for other in others:
        with pytest.raises(InputError, match=r"expected the budget of this plan, found Budget\(epsilon=1\.0"):
            ledger.open(other, one_per_cent_a_step)
    assert len(lines(ledger)) == 1


# Owners ---------------------------------------------------------------------------------------------------------------


def test_the_newest_owner_alone_may_spend(tmp_path, ledger):
    path = ledger.chain.log.path
    spend(ledger, 0, 16)
    newer = file_ledger(path, "aa" * 16)
    newer.take_over()
    before = lines(ledger)
    # The older one knows nothing of it, and neither do its workers, restarted or not.
    for zombie in (ledger, file_ledger(path, OWNER)):
        for start in (0, 16):
            with pytest.raises(BudgetError, match=r"another process took over this run at 20\d\d-.* UTC \(pid \d+ on "):
                spend(zombie, start, start + 16)
        with pytest.raises(BudgetError, match="another process took over"):
            zombie.take_over()
    assert lines(ledger) == before
    assert spend(newer, 16, 32)
    assert steps(ledger) == 32


def test_the_workers_of_one_driver_share_its_token_and_take_over_once(ledger):
    ledger.take_over()
    path = ledger.chain.log.path
    for worker in range(3):
        assert spend(file_ledger(path, OWNER), 16 * worker, 16 * worker + 16)
    assert [record["kind"] for record in lines(ledger)] == ["OPEN", "OWNER", "SPEND", "SPEND", "SPEND"]


def test_reading_takes_nothing_over(ledger):
    spend(ledger, 0, 16)
    before = ledger.chain.log.path.read_bytes()
    reader = file_ledger(ledger.chain.log.path, "aa" * 16)
    reader.open(PLAN, one_per_cent_a_step)
    reader.charged(), reader.paid("finetune", "a"), reader.head(), reader.budget(), reader.state()
    assert ledger.chain.log.path.read_bytes() == before
    assert spend(ledger, 16, 32)


# What it says ---------------------------------------------------------------------------------------------------------


def test_the_file_is_its_owners(ledger):
    assert stat.S_IMODE(ledger.chain.log.path.stat().st_mode) == 0o600


def test_the_content_does_not_depend_on_data(ledger):
    spend(ledger, 0, 16)
    opened, owner, spent = lines(ledger)
    chain = {"v", "seq", "prev", "sha256", "time", "nonce", "kind"}
    assert set(opened) == chain | {"epsilon", "delta", "neighbouring_relation", "planned"}
    assert set(owner) == chain | {"owner", "host", "pid"}
    # `domain` is a keyed digest (Run.domain): without the secret it is 64 random hex digits.
    assert set(spent) == chain | {"owner", "release", "event", "domain", "steps"}


def test_the_head_names_the_newest_record(ledger):
    first = ledger.head()
    spend(ledger, 0, 16)
    second = ledger.head()
    assert (first[0], second[0]) == (1, 3)
    assert first[1] != second[1]
    assert json.loads(ledger.chain.witness.read_text()) == list(second)


@pytest.mark.parametrize("jump", [-10 * 365 * 86400, 50 * 365 * 86400], ids=["back", "forth"])
def test_a_clock_that_jumps_changes_nothing(ledger, monkeypatch, jump):
    spend(ledger, 0, 16)
    later = time.time() + jump
    monkeypatch.setattr(time, "time", lambda: later)
    assert spend(ledger, 16, 32)
    assert not spend(ledger, 0, 32)
    newer = file_ledger(ledger.chain.log.path, "aa" * 16)
    assert spend(newer, 32, 48)
    monkeypatch.undo()
    with pytest.raises(BudgetError, match="another process took over"):
        spend(ledger, 48, 64)
    assert spend(newer, 48, 64)
    assert steps(ledger) == 64
