"""When a checkpoint is written, by whom, and that a group starts from one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from small_runs import FINETUNE, STEPS, Training, new_ledger, new_network, parameters, warmed

from e2h.curriculum import checkpoint as checkpoint_module
from e2h.curriculum.checkpoint import Checkpoints
from e2h.curriculum.workers import Workers
from e2h.privacy.optimizer import SecureDPOptimizer

RARELY = replace(FINETUNE, checkpoint_every=1000)


@pytest.fixture
def saves(monkeypatch, quick_store):
    """The steps that are saved while each step takes twenty seconds of the clock."""
    now, saved, save, due = [0.0], [], Checkpoints.save, Checkpoints.due

    def a_step_later(checkpoints, *arguments):
        now[0] += 20.0
        return due(checkpoints, *arguments)

    def watched(checkpoints, stage, step, state):
        saved.append((stage, step))
        save(checkpoints, stage, step, state)

    monkeypatch.setattr(checkpoint_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Checkpoints, "due", a_step_later)
    monkeypatch.setattr(Checkpoints, "save", watched)
    return saved


def test_no_more_than_a_minute_of_work_is_without_a_checkpoint(tmp_path, saves):
    network = warmed(tmp_path)
    Training(tmp_path, network=network, settings=RARELY).run()
    expected = [*range(3, STEPS, 3), STEPS]
    assert saves == [*(("warmup", step) for step in expected), *(("finetune", step) for step in expected)]


def test_every_step_has_a_checkpoint_once_a_machine_must_leave(tmp_path, saves):
    training = Training(tmp_path, settings=RARELY)
    training.leaving = lambda step: step > 10
    training.run()
    assert saves == [("finetune", step) for step in (3, 6, 9, *range(11, STEPS + 1))]


@dataclass(frozen=True)
class Second(Workers):
    """The second of two workers, the first being made up: it pays for all steps and contributes what this one does."""

    states: int = 1

    def sum_integers(self, values: torch.Tensor) -> None:
        if values.numel() == 1:
            values.fill_(STEPS)
        else:
            values *= 2

    def distinct(self, digest: str) -> list[str]:
        return ["0" * len(digest)] * (self.states - 1) + [digest]


def test_all_workers_ask_for_notice_and_the_first_alone_writes(tmp_path, saves, monkeypatch):
    asked = []
    # It would count the records twice.
    monkeypatch.setattr(SecureDPOptimizer, "step_private", lambda *_: None)
    training = Training(tmp_path, settings=RARELY, leaving=lambda step: bool(asked.append(step)))
    training.run(Second(1, 2, torch.device("cpu")))
    assert (asked, saves) == ([*range(1, STEPS + 1)], [])


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_that_read_different_checkpoints_make_no_step(tmp_path, rank):
    training, before = Training(tmp_path), parameters(new_network())
    with pytest.raises(RuntimeError, match="hold different checkpoints or domains"):
        training.run(Second(rank, 2, torch.device("cpu"), states=2))
    with pytest.raises(RuntimeError, match="hold different checkpoints"):
        warmed(tmp_path, Second(rank, 2, torch.device("cpu"), states=2))
    assert torch.equal(parameters(training.network), before)
    assert new_ledger(tmp_path).charged() == ()
