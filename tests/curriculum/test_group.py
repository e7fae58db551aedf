"""Two real processes with gloo between them do what one does, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_runs
import torch
from small_runs import STEPS, Killed, Training, averaged, parameters, refused_run, warmed, watch_units

from e2h.config import expect
from e2h.curriculum.workers import Workers
from e2h.errors import InputError

pytestmark = pytest.mark.slow


def checked(workers: Workers) -> str:
    """What each worker makes of a check that fails on the second."""
    workers.all_or_none(lambda: None)
    try:
        workers.all_or_none(lambda: expect(workers.rank == 0, "rank", workers.rank, "0"))
    except (InputError, RuntimeError) as error:
        return str(error)
    return "went on"


def group_run(workers: Workers, folder: Path) -> dict:
    """The whole run, the rest of a run that another number of workers began, and a refusal."""
    with pytest.MonkeyPatch.context() as patched:
        seen = watch_units(patched.setattr)
        whole = folder / "whole"
        whole.mkdir(exist_ok=True)
        training = Training(whole, network=warmed(whole, workers))
        start = parameters(training.network).clone()
        ema = training.run(workers)
    rest = Training(folder / "begun alone")
    rest_ema = rest.run(workers)
    return {
        "start": start,
        "end": parameters(training.network).clone(),
        "ema": averaged(ema),
        "seen": dict(seen),
        "reported": len(training.reported),
        "checked": checked(workers),
        "distinct": workers.distinct(f"{workers.rank:02x}" * 32),
        "rest": averaged(rest_ema),
        "rest steps": rest.progressed,
        "refused": refused_run(workers, folder / "refused"),
    }


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    begun = folder / "begun alone"
    begun.mkdir()
    with pytest.raises(Killed):
        Training(begun, network=warmed(begun), stop_after=11).run()
    return small_runs.spawn(2, group_run, folder)


def test_two_workers_make_the_bits_of_one(alone, together):
    for answer in together:
        assert torch.equal(answer["start"], alone["start"])  # the warm-up
        assert torch.equal(answer["end"], parameters(alone["training"].network))
        assert torch.equal(answer["ema"], alone["ema"])


def test_a_check_that_fails_on_one_worker_ends_all(together):
    assert [answer["checked"] for answer in together] == [
        "a check failed on another worker, which says why",
        "rank=1: expected 0",
    ]


def test_two_workers_share_the_same_draws(alone, together):
    first, second = (answer["seen"] for answer in together)
    for step in range(STEPS):
        assert sorted(first.get(step, []) + second.get(step, [])) == alone["seen"].get(step, [])
    assert all(sum(len(draw) for draw in part.values()) > 50 for part in (first, second))
    assert [answer["reported"] > 0 for answer in together] == [True, False]


def test_a_run_that_one_worker_began_is_finished_by_two(alone, together):
    for answer in together:
        assert answer["rest steps"] == list(range(11, STEPS + 1))
        assert torch.equal(answer["rest"], alone["ema"])


def test_a_step_that_cannot_be_paid_happens_on_no_worker(together):
    first, second = (answer["refused"] for answer in together)
    assert first["message"] == "step 8 is too much"
    assert second["message"] == "step 8 was not paid for; the ledger's writer says why"
    for outcome in (first, second):
        assert len(outcome["states"]) == 8
        assert torch.equal(outcome["end"], first["states"][-1])


def test_workers_agree_on_what_differs_between_them(together):
    assert [answer["distinct"] for answer in together] == [["00" * 32, "01" * 32]] * 2
    assert Workers.current().distinct("ab" * 32) == ["ab" * 32]
