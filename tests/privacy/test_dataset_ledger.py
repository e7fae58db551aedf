"""One budget for several runs: what fits is held, once and for good; what doesn't is refused with what is left."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from ledger_cases import FORK

from e2h.errors import BudgetError, InputError
from e2h.privacy.accounting import NEIGHBOURING_RELATION, calibrate, epsilon_pld
from e2h.privacy.dataset_ledger import DatasetLedger
from e2h.privacy.events import PoissonSampledGaussian, Release, compose
from e2h.privacy.ledger import Ledger
from e2h.privacy.logs import FileLog, open_log

DELTA = 1e-5
STEP = PoissonSampledGaussian(0.1, 1.0, 20)
CENTRAL = Release("central", PoissonSampledGaussian(0.1, 10.0, 3))


def plan(target: float) -> tuple[Release, ...]:
    """Central images and DP-SGD that spend the target."""
    return CENTRAL, calibrate([CENTRAL], "finetune", STEP, target, DELTA)


ONE = plan(1.0)


def of_pets(folder, total: float = 2.0) -> DatasetLedger:
    return DatasetLedger(FileLog(folder / "pets.jsonl"), folder, "pets", total, DELTA)


def kinds(folder) -> list[str]:
    return [json.loads(line)["kind"] for line in (folder / "pets.jsonl").read_text().splitlines()]


def test_a_second_run_with_the_rest_fits_and_a_third_is_refused_with_what_is_left(tmp_path):
    pets = of_pets(tmp_path, 1.7)
    pets.hold("1", "first", ONE)
    pets.hold("2", "second", plan(1.2))
    with pytest.raises(BudgetError) as refused:
        pets.hold("3", "third", ONE)
    message = str(refused.value)
    held = epsilon_pld([*ONE, *plan(1.2)], DELTA)
    assert message.startswith("ledger.epsilon=1.7: with this run, all runs on data set pets would cost epsilon ")
    assert f"2 of them hold {held:.4g} already" in message
    assert kinds(tmp_path) == ["DATASET", "HOLD", "HOLD"]
    # What the message says is left does fit, and clearly more does not.
    left = float(re.search(r"privacy\.epsilon=([\d.]+) for another run", message).group(1))
    assert 0.2 < left < 1
    with pytest.raises(BudgetError):
        of_pets(tmp_path, 1.7).check("3", "third", plan(1.4 * left))
    of_pets(tmp_path, 1.7).hold("3", "third", plan(left))


def test_what_is_held_is_composed_with_dp_accounting_over_all_releases(tmp_path):
    pets = of_pets(tmp_path)
    pets.hold("1", "first", ONE)
    shared = pets.check("2", "second", plan(1.2))
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(compose([*ONE, *plan(1.2)]))
    assert shared.epsilon_held == pytest.approx(accountant.get_epsilon(DELTA), abs=1e-9)
    assert 1.2 < shared.epsilon_held < 2.2  # dearer than one of them, cheaper than their sum
    assert (shared.name, shared.epsilon, shared.num_runs) == ("pets", 2.0, 2)
    assert kinds(tmp_path) == ["DATASET", "HOLD"]  # a check writes nothing


def test_a_resumed_run_holds_once(tmp_path):
    for _ in range(3):
        of_pets(tmp_path, 1.0).hold("1", "first", ONE)
        assert of_pets(tmp_path, 1.0).check("1", "first", ONE).num_runs == 1
    assert kinds(tmp_path) == ["DATASET", "HOLD"]
    with pytest.raises(BudgetError, match="expected the plan that this run holds"):
        of_pets(tmp_path, 1.0).hold("1", "first", plan(0.5))


@pytest.mark.parametrize("key", [("2", "first"), ("1", "copy")], ids=["ledger deleted", "folder copied"])
def test_another_ledger_or_another_name_is_another_run(tmp_path, key):
    pets = of_pets(tmp_path, 1.0)
    pets.hold("1", "first", ONE)
    with pytest.raises(BudgetError, match=r"1 of them hold 0\.99"):
        pets.hold(*key, ONE)


def test_the_budget_is_one_for_all_runs(tmp_path):
    of_pets(tmp_path).hold("1", "first", ONE)
    with pytest.raises(InputError, match=r"^ledger\.epsilon=3: expected 2, with which the data set's ledger"):
        of_pets(tmp_path, 3.0).check("2", "second", ONE)
    other = DatasetLedger(FileLog(tmp_path / "pets.jsonl"), tmp_path, "pets", 2.0, 1e-6)
    with pytest.raises(InputError, match=r"^privacy\.delta=1e-06: expected 1e-05"):
        other.hold("2", "second", ONE)


def test_a_deleted_or_cut_ledger_is_refused(tmp_path):
    pets = of_pets(tmp_path)
    pets.hold("1", "first", ONE)
    path = tmp_path / "pets.jsonl"
    whole = path.read_bytes()
    for content in (whole.splitlines(keepends=True)[0], b""):
        path.write_bytes(content)
        with pytest.raises(BudgetError, match=r"expected the 2 records that .*head saw"):
            pets.hold("2", "second", ONE)
    path.unlink()
    with pytest.raises(BudgetError, match=r"expected the 2 records that .*head saw"):
        pets.check("2", "second", ONE)
    path.write_bytes(whole)
    pets.check("2", "second", ONE)


def test_a_ledger_of_the_other_kind_is_refused(tmp_path):
    pets = of_pets(tmp_path)
    pets.hold("1", "first", ONE)
    with pytest.raises(BudgetError, match=r"record 0 \(DATASET\) can't stand in a run's ledger"):
        Ledger(FileLog(tmp_path / "pets.jsonl")).charged()
    pets.chain.append(lambda records: {"kind": "RELEASE_HOLD", "ledger": "1", "run": "first"})
    with pytest.raises(BudgetError, match=r"record 2 \(RELEASE_HOLD\) can't stand in a data set's ledger"):
        pets.check("2", "second", ONE)


def try_to_hold(location, number: int, answers) -> None:
    try:
        DatasetLedger(open_log(location), None, "pets", 1.5, DELTA).hold(str(number), f"run-{number}", ONE)
        answers.put(1)
    except BudgetError:
        answers.put(0)


@pytest.mark.parametrize("place", ["file", "bucket"])
def test_of_runs_that_race_for_the_last_of_a_budget_as_many_win_as_fit(tmp_path, store, place):
    location = str(tmp_path / "pets.jsonl") if place == "file" else "s3://bucket/pets"
    assert epsilon_pld([*ONE, *ONE], DELTA) <= 1.5 < epsilon_pld([*ONE, *ONE, *ONE], DELTA)
    answers = FORK.Queue()
    racers = [FORK.Process(target=try_to_hold, args=(location, number, answers)) for number in range(3)]
    for racer in racers:
        racer.start()
    assert sum(answers.get(timeout=100) for _ in racers) == 2
    for racer in racers:
        racer.join(timeout=30)


def test_a_plan_with_nothing_in_it_holds_nothing(tmp_path):
    pets = of_pets(tmp_path)
    nothing = (Release("finetune", replace(STEP, count=0)),)
    assert pets.check("1", "first", nothing).epsilon_held == 0
    assert NEIGHBOURING_RELATION.name == "REPLACE_SPECIAL"
