"""A run's status from its storage alone: local and in a bucket, whole and damaged."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from e2h.config import PRODUCTS, Config, PrivacyConfig, RunConfig
from e2h.curriculum.lease import holder
from e2h.curriculum.run import Run, open_run, witness_path
from e2h.data.filesystem import list_files
from e2h.data.remote import place
from e2h.errors import InputError
from e2h.privacy.accounting import epsilon_pld
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.ledger import Budget
from e2h.reporting.status import Status, look
from e2h.reporting.status_lines import duration, lines, to_json

RELEASES = (
    Release("central", PoissonSampledGaussian(0.5, 8.0, 5)),
    Release("finetune", PoissonSampledGaussian(0.1, 8.0, 60)),
)


@pytest.fixture(params=["folder", "bucket"])
def storage(request, tmp_path) -> str:
    return f"{request.getfixturevalue('bucket')}/runs" if request.param == "bucket" else str(tmp_path / "runs")


@contextmanager
def opened(storage: str, **settings: object) -> Iterator[Run]:
    config = replace(Config(privacy=PrivacyConfig(epsilon=2.0, test_mode=True)), **settings)
    config.run = RunConfig(storage, "one")
    with open_run(config) as run:
        yield run


def pay(run: Run, steps: int) -> None:
    run.ledger.open(Budget(2.0, 1e-4, "REPLACE_SPECIAL", RELEASES), lambda releases, delta: 1.0)
    run.ledger.spend("central", RELEASES[0].event, "aa" * 32, 0, 5)
    run.ledger.spend("finetune", RELEASES[1].event, "bb" * 32, 0, steps)


def write(run: Run, name: str, content: object = "") -> None:
    path = run.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else json.dumps(content).encode())


def mark(run: Run, stage: str) -> None:
    """What a finished stage leaves."""
    write(run, PRODUCTS[stage])
    run.mark_done(stage)


def train_until(run: Run, step: int) -> None:
    """The files of a run that is training."""
    for stage in ("prepare", "central"):
        mark(run, stage)
    pay(run, step + 4)
    write(run, "checkpoints/warmup-00000300.pt")
    write(run, "checkpoints/finetune-00000020.pt")
    write(run, "progress.json", {"stage": "finetune", "step": step, "restarts": 2})


def seen(storage: str) -> Status:
    root = place(f"{storage}/one")
    return look(root, witness_path(root), holder(root))


def states(status: Status) -> dict[str, str]:
    return {stage.name: stage.state for stage in status.stages}


def test_a_run_that_trains(storage):
    with opened(storage) as run:
        train_until(run, 24)
        before = list_files(storage)
        status = seen(storage)
        assert list_files(storage) == before
    assert states(status) == {
        "prepare": "done",
        "central": "done",
        "warmup": "done",
        "finetune": "running",
        "sample": "not begun",
        "evaluate": "not begun",
        "publish": "not begun",
    }
    assert f"pid {os.getpid()} on " in (status.holder or "")
    assert (status.checkpoint, status.worker_group_restarts, status.drivers) == (("finetune", 20), 2, 1)
    charged = [RELEASES[0], replace(RELEASES[1], event=replace(RELEASES[1].event, count=28))]
    assert status.epsilon == {"spent": epsilon_pld(charged, 1e-4), "target": 2.0, "delta": 1e-4}
    assert status.charged == {"central": 5, "finetune": 28}
    assert status.moved is not None
    assert status.moved[1] < 60
    text = "\n".join(lines(status))
    for part in (
        "digits 8x8x1, epsilon 2 at delta 1e-4, 60 DP-SGD steps of 256 images x 4 noise draws",
        "NOT PRIVATE",
        "finetune   running, step 24 of 60, 40%",
        "spent of 2 at delta 1e-4; steps charged: central 5, finetune 28",
        "checkpoint finetune step 20",
        "restarts   2 of the worker group",
        "next       wait: it goes on",
    ):
        assert part in text, text
    expected = {"name": "finetune", "state": "running", "done": 24, "total": 60}
    assert json.loads(json.dumps(to_json(status)))["stages"][3] == expected


def test_a_driver_that_died_leaves_a_run_to_go_on_with(storage):
    with opened(storage) as run:
        train_until(run, 24)
        left = (run.root / ".lock").read_bytes()
    status = seen(storage)
    assert (status.holder, states(status)["finetune"]) == (None, "stopped")
    assert lines(status)[-1].startswith("next       run the same command again: python ")
    if storage.startswith("s3://"):  # a lease that was not given back says who had it until it is stale
        place(f"{storage}/one/.lock").write_bytes(left)
        assert "seen" in (seen(storage).holder or "")


@pytest.mark.parametrize(
    ("last", "following"),
    [
        ("prepare", "sample"),
        ("train", "sample"),
        ("sample", "sample"),
        ("evaluate", "evaluate"),
        ("pipeline", "pipeline"),
    ],
)
def test_after_the_job_of_one_stage_comes_that_of_the_next(tmp_path, last, following):
    with opened(str(tmp_path)) as run:
        train_until(run, 24)
        mark(run, "train")
    status = replace(seen(str(tmp_path)), command=f"python jobs/{last}.py privacy.epsilon=2")
    assert states(status)["finetune"] == "done"
    assert f"python jobs/{following}.py privacy.epsilon=2" in lines(status)[-1]


def test_steps_that_were_paid_before_the_first_checkpoint_are_not_hidden(tmp_path):
    with opened(str(tmp_path)) as run:
        (run.root / "checkpoints").mkdir(exist_ok=True)
        pay(run, 16)
    assert "finetune   stopped before its first checkpoint" in lines(seen(str(tmp_path)))


def test_the_age_is_that_of_the_newest_file_and_the_lease_does_not_count(tmp_path):
    with opened(str(tmp_path)) as run:
        train_until(run, 24)
        for name, age in (("progress.json", 700), ("ray.log", 1), (".lock", 1)):
            (run.root / name).touch()
            os.utime(run.root / name, (time.time() - age,) * 2)
        for path in run.root.rglob("*"):
            if path.name not in ("ray.log", ".lock", "progress.json"):
                os.utime(path, (time.time() - 9000,) * 2)
        status = seen(str(tmp_path))
    assert status.moved is not None
    assert status.moved[0] == "progress.json"
    assert 700 <= status.moved[1] < 760
    assert lines(status)[-1].startswith("next       nothing was written for 11 min")


def test_ages_in_a_bucket_are_by_its_own_clock(bucket, monkeypatch):
    with opened(f"{bucket}/runs") as run:
        train_until(run, 24)
    monkeypatch.setattr("e2h.reporting.status.time", lambda: time.time() + 5000)  # this machine's is wrong
    status = seen(f"{bucket}/runs")
    assert status.moved is not None
    assert status.moved[1] < 600


def test_stages_that_are_off_done_and_counted(tmp_path):
    with opened(str(tmp_path), curriculum=[]) as run:
        for stage in ("prepare", "train"):
            mark(run, stage)
        write(run, "synthetic/part-00000.parquet")
        status = seen(str(tmp_path))
        found = states(status)
        assert {"central", "warmup"}.isdisjoint(found)
        assert (found["finetune"], found["sample"]) == ("done", "running")
        total = -(-run.config.sampling.num_images // run.config.sampling.images_per_shard)
        assert f"sample     running, shard 1 of {total}, {1 / total:.0%}" in lines(status)
        mark(run, "sample")
        # One part is not all of them.
        assert states(seen(str(tmp_path)))["sample"] == "running"
        for index in range(total):
            write(run, f"synthetic/part-{index:05d}.parquet")
        for name in ("evaluation.json", "report.html", "release/ledger.json"):
            write(run, name)
    assert set(states(seen(str(tmp_path))).values()) == {"done"}
    *before, last = lines(seen(str(tmp_path)))
    assert last == f"next       publish {run.release}; first: python -m e2h check {run.release}"
    assert "driver     none" in before


def test_a_mark_of_another_configuration_counts_for_nothing(tmp_path):
    with opened(str(tmp_path)) as run:
        write(run, "prepared/_SUCCESS.json", {"stage": "prepare", "binding": "other"})
    assert states(seen(str(tmp_path)))["prepare"] == "stopped"


def test_what_ended_the_last_call_and_what_workers_refused_is_shown(storage):
    with opened(storage) as run:
        write(run, "failure.txt", "failed: worker 1: ValueError: no\n\nTraceback ...\n")
    shown = lines(seen(storage))
    assert "ended      failed: worker 1: ValueError: no" in shown
    assert shown[-1].startswith(f"next       read {run.root}/failure.txt, then run the same command again")
    with opened(storage) as run:
        write(run, "refused-ab.json", {"kind": "budget", "message": "the budget pays for 60 steps"})
    assert "refused    the budget pays for 60 steps" in lines(seen(storage))
    assert lines(seen(storage))[-1].startswith("next       mend what was refused")


def test_no_number_of_the_private_records_is_shown(tmp_path):
    with opened(str(tmp_path)) as run:
        train_until(run, 24)
        write(run, "evaluation.json", {"downstream": {"cnn": {"accuracy": 0.87654}}})
        write(run, "metrics.jsonl", {"name": "finetune/loss", "value": 0.87654, "step": 3})
        status = seen(str(tmp_path))
    assert "8765" not in "\n".join(lines(status)) + json.dumps(to_json(status))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b""])
@pytest.mark.parametrize("name", ["progress.json", "prepared/_SUCCESS.json", "refused-ab.json"])
def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path, name, content):
    with opened(str(tmp_path)) as run:
        train_until(run, 24)
        (run.root / name).write_bytes(content)
    status = seen(str(tmp_path))
    (problem,) = status.problems
    assert name.rpartition("/")[2] in problem
    assert states(status)["central"] == "done"
    assert f"problem    {problem}" in lines(status)


def test_an_altered_ledger_is_said_and_the_rest_is_shown(storage):
    with opened(storage) as run:
        train_until(run, 24)
    path = place(f"{storage}/one/ledger.jsonl")
    last = path / "000000000003" if storage.startswith("s3://") else path
    content = last.read_bytes()
    last.write_bytes(content.replace(b'"steps":[0,28]', b'"steps":[0,20]'))
    status = seen(storage)
    assert status.altered
    assert "spent" not in status.epsilon
    assert any(line.startswith("problem    ") and "does not continue the chain" in line for line in lines(status))
    assert lines(status)[-1].startswith("next       nothing can be spent")
    assert states(status)["finetune"] == "stopped"
    last.write_bytes(content)
    last.unlink()
    assert seen(storage).altered  # the witness saw more


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"", b"data: 3", b"data: {name: x}\nprivacy: {}"])
def test_a_damaged_configuration_is_one_message(tmp_path, content):
    with opened(str(tmp_path)) as run:
        (run.root / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"one/config\.yaml: expected a run's configuration; the file is damaged"):
        seen(str(tmp_path))


def test_no_run_is_one_message(storage):
    with pytest.raises(InputError, match=r"runs/one: expected a run directory .*; found none"):
        seen(storage)
    (place(storage) / "one").mkdir(parents=True)
    (place(storage) / "one" / "plan.json").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"found a plan alone \(dry_run=true\)"):
        seen(storage)


def test_a_bucket_that_is_absent_is_one_message(bucket):
    with pytest.raises(InputError, match="NoSuchBucket"):
        seen("s3://absent/runs")


def test_looking_does_not_keep_a_driver_out(storage):
    with opened(storage):
        assert seen(storage).holder
    assert seen(storage).holder is None
    with opened(storage):
        pass


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3661, "1 h 1 min"), (180000, "2 d 2 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
