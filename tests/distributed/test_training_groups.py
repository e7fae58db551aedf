"""How Ray Train is asked for workers, and that no fault makes it ask for ever."""

from __future__ import annotations

import os
from types import SimpleNamespace

import boto3
import pytest
import torch
from ray.train import ControllerError
from ray.train.v2._internal.execution.controller import state
from ray.train.v2._internal.execution.storage import StorageContext
from small_runs import small_config

from e2h.config import ScalingConfig
from e2h.curriculum.run import Run, open_run
from e2h.curriculum.train import forget_mapped
from e2h.curriculum.workers import Workers
from e2h.data.remote import place
from e2h.distributed import deadline, training
from e2h.distributed.deadline import StartDeadline
from e2h.errors import InputError

TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
WAITING = [
    state.InitializingState(),
    state.SchedulingState(None),
    state.ReschedulingState(None),
    state.RestartingState(None),
]


@pytest.fixture
def now(monkeypatch) -> SimpleNamespace:
    """A clock that moves only when someone sleeps, or the test says so."""
    clock = SimpleNamespace(time=100.0)
    clock.monotonic = lambda: clock.time
    clock.sleep = lambda seconds: setattr(clock, "time", clock.time + seconds)
    monkeypatch.setattr(deadline, "time", clock)
    return clock


@pytest.mark.parametrize("waiting", WAITING)
def test_a_group_that_does_not_start_in_time_ends_the_training(now, waiting):
    limit = StartDeadline(60.0, "no room")
    limit.after_controller_state_update(state.InitializingState(), waiting)
    now.time += 59.0
    limit.after_controller_state_update(state.RunningState(), waiting)
    now.time += 2.0
    with pytest.raises(InputError, match="no room"):
        limit.after_controller_state_update(state.RunningState(), waiting)


def test_the_time_begins_anew_with_each_group(now):
    limit, waiting = StartDeadline(60.0, "no room"), state.RestartingState(None)
    for _ in range(3):
        limit.after_controller_state_update(state.RunningState(), waiting)
        now.time += 50.0
        limit.after_controller_state_update(waiting, state.SchedulingState(None))
        limit.after_controller_state_update(state.SchedulingState(None), state.RunningState())


def test_the_controller_of_an_elastic_group_does_not_ask_without_a_pause(now):
    limit, waiting = StartDeadline(60.0, "no room"), state.InitializingState()
    for _ in range(100):
        limit.after_controller_state_update(waiting, waiting)
    assert now.time == 100.0 + 100 * deadline.PAUSE_S


def test_fixed_and_elastic_groups():
    fixed = training._scaling(ScalingConfig(num_workers=3))
    assert (fixed.min_workers, fixed.max_workers, fixed.elasticity_enabled) == (3, 3, False)
    elastic = training._scaling(ScalingConfig(num_workers=3, min_workers=2, use_gpu=True, cpus_per_worker=4))
    assert (elastic.min_workers, elastic.max_workers, elastic.elasticity_enabled) == (2, 3, True)
    assert elastic.resources_per_worker == {"CPU": 4, "GPU": 1}


@pytest.fixture
def fitted(tmp_path, monkeypatch):
    """fitted(errors, **scaling): trains where each attempt raises the next error.

    Returns (Ray's limit of an attempt, our limit of all together) as each attempt saw them.
    """
    monkeypatch.setenv("E2H_TEST_SECRET", bytes(range(32)).hex())

    def fit(errors, **scaling):
        seen, coming = [], iter(errors)

        def trainer(*_, run_config, **given):
            def attempt():
                assert not os.path.exists(os.path.join(run_config.storage_path, "train-1"))
                (limit,) = run_config.callbacks
                seen.append((os.environ.get(TIMEOUT), limit.limit_s))
                if (error := next(coming, None)) is not None:
                    raise error

            return SimpleNamespace(fit=attempt)

        monkeypatch.setattr(training, "TorchTrainer", trainer)
        config = small_config(tmp_path)
        for name, value in scaling.items():
            setattr(config.scaling, name, value)
        with open_run(config) as run:
            left = run.root / "ray" / "train-1"
            left.mkdir(parents=True)
            try:
                training.train_on_workers(run, None)
            finally:
                assert not left.parent.exists()
        return seen

    return fit


def test_a_worker_lost_while_its_group_starts_is_no_end(fitted):
    lost = ControllerError(RuntimeError("the worker died"))
    assert len(fitted([lost, lost], max_failures=2)) == 3
    with pytest.raises(RuntimeError, match="the worker died"):
        fitted([lost, lost, lost], max_failures=2)


def test_a_refusal_of_the_controller_is_raised_as_it_is_and_at_once(fitted):
    with pytest.raises(InputError, match="no room"):
        fitted([ControllerError(InputError("no room")), ControllerError(RuntimeError("a second attempt"))])


def test_an_elastic_group_does_not_wait_long_for_a_node_that_died(fitted, monkeypatch):
    short = f"{training.ELASTIC_ATTEMPT_S:g}"
    monkeypatch.setenv(TIMEOUT, "777")
    assert fitted([], min_workers=1) == [(short, 777.0)]
    assert os.environ[TIMEOUT] == "777"
    assert fitted([]) == [("777", 777.0)]
    monkeypatch.delenv(TIMEOUT)
    assert fitted([], min_workers=1) == [(short, 900.0)]
    assert TIMEOUT not in os.environ


@pytest.mark.parametrize("name", ["digits", "my pets", "käfer", "a#b", "a%20b?"])
def test_what_ray_keeps_in_a_bucket_lies_in_the_run_and_can_be_taken_away(bucket, monkeypatch, tmp_path, name):
    def objects() -> list[str]:
        return [one["Key"] for one in boto3.client("s3").list_objects_v2(Bucket="images").get("Contents", [])]

    def fit(run, release, until, storage):
        StorageContext(storage_path=storage, experiment_dir_name="train-1")
        assert f"runs/{name}/ray/train-1/" in objects()

    monkeypatch.setattr(training, "_fit", fit)
    monkeypatch.setattr(training, "on_each_node", lambda work: None)
    training.train_on_workers(Run(place(f"{bucket}/runs/{name}"), small_config(tmp_path), "owner"), None)
    assert not [key for key in objects() if "ray" in key]


def test_images_that_a_machine_of_an_earlier_group_unpacked_are_removed_after_training(bucket, monkeypatch, tmp_path):
    run = Run(place(f"{bucket}/runs/digits"), small_config(tmp_path), "owner")
    machines = [tmp_path / name for name in ("of the last group", "left before")]

    def on_machines(work, folders=machines) -> None:
        for folder in folders:
            monkeypatch.setattr("tempfile.tempdir", str(folder))
            work()

    def unpack() -> None:
        run.mapped.mkdir(parents=True)
        (run.mapped / "train.npy").write_bytes(b"private")

    for folder in machines:
        folder.mkdir()
    on_machines(unpack)
    monkeypatch.setattr(training, "_fit", lambda *_: on_machines(lambda: forget_mapped(run), machines[:1]))
    monkeypatch.setattr(training, "on_each_node", on_machines)
    training.train_on_workers(run, None)
    assert not list(tmp_path.rglob("*.npy"))


# Notice --------------------------------------------------------------------------------------------------------------


class Told(Workers):
    """One of several in this process; rank 0, who comes first, says what all add up to."""

    said = 0

    def sum_integers(self, values):
        if self.rank == 0:
            Told.said = int(values)
        assert int(values) in (0, Told.said)
        values.fill_(Told.said)


@pytest.fixture
def asked(monkeypatch):
    """asked(steps, given): where steps are (number, seconds on rank 0), the places of those after which three workers
    ask Ray, and of those after which they know that there is a notice, given just before the step of that place.
    """

    def ask(steps, given=1000):
        clock, place, questions = SimpleNamespace(now=0.0), 0, []
        clock.monotonic = lambda: clock.now
        info = SimpleNamespace(get_preemption_info=lambda: questions.append(place) or (place >= given or None))
        monkeypatch.setattr(training, "time", clock)
        monkeypatch.setattr(training, "ray", SimpleNamespace(train=info))
        group, told = [training._Notice(Told(rank, 3, torch.device("cpu"))) for rank in range(3)], []
        for place, (step, seconds) in enumerate(steps, 1):
            answers = []
            for notice, own in zip(group, (seconds, 7.0, -7.0), strict=True):
                clock.now += own  # of the other workers' clocks nothing may depend
                answers.append(notice(step))
            assert len(set(answers)) == 1
            told += [place] * answers[0]
        assert questions == sorted(questions[::3] * 3)  # all three, or none
        return questions[::3], told

    return ask


def stage(*seconds, first=1):
    return list(enumerate(seconds, first))


def test_long_steps_are_asked_about_each_time_and_short_ones_once_a_second(asked):
    assert asked(stage(*[2.0] * 20))[0] == list(range(1, 21))
    assert asked(stage(*[0.25] * 20))[0] == [1, 2, 6, 10, 14, 18]
    assert asked(stage(*[0.001] * 50))[0] == [1, 2, 18, 34, 50]
    assert asked(stage(*[0.25] * 8, first=501))[0] == [1, 2, 6]  # resumed


def test_steps_that_get_longer_are_asked_about_more_often_and_a_new_stage_at_once(asked):
    assert asked(stage(*[0.25] * 10, *[3.0] * 10))[0] == [1, 2, 6, 10, *range(14, 21)]
    assert asked(stage(*[0.001] * 10) + stage(*[3.0] * 5))[0] == [1, 2, *range(11, 16)]


@pytest.mark.parametrize(("seconds", "place"), [(0.25, 14), (2.0, 12), (0.001, 18)])
def test_a_notice_is_known_after_a_second_or_a_step_and_from_then_on(asked, seconds, place):
    assert asked(stage(*[seconds] * 20), given=12)[1] == list(range(place, 21))
    assert asked(stage(*[seconds] * 20))[1] == []
