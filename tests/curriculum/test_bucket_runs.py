"""A run in a bucket: the same bits as in a folder, one driver at a time, and a secret that lies elsewhere."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import boto3
import pytest
from small_runs import Killed, prepare, small_config

from e2h.curriculum import lease
from e2h.curriculum.run import open_run
from e2h.curriculum.synthesis import Synthesizer, shard_path
from e2h.curriculum.train import train
from e2h.curriculum.workers import Workers
from e2h.data.filesystem import list_files
from e2h.data.remote import place
from e2h.errors import BudgetError, InputError


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("E2H_TEST_SECRET", bytes(range(32)).hex())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def trained(storage: str, stop_at: int | None = None) -> tuple[bytes, bytes, tuple]:
    """Weights, a shard of images, and what the ledger charged."""

    def progress(stage: str, step: int) -> None:
        if (stage, step) == ("finetune", stop_at):
            raise Killed

    with open_run(small_config(storage)) as run:
        release = run.ledger.budget().planned[0] if run.prepared.exists() else prepare(run)
        train(run, release, Workers.current(), lambda *_: None, progress)
        run.synthetic.mkdir()
        Synthesizer(run).write_shard(0)
        return run.weights.read_bytes(), shard_path(run.synthetic, 0).read_bytes(), run.ledger.charged()


def test_a_run_in_a_bucket_is_the_run_in_a_folder(bucket, tmp_path):
    with pytest.raises(Killed):
        trained(f"{bucket}/runs", stop_at=3)
    assert list(tmp_path.glob("e2h-*/*/prepared/*.npy"))
    assert trained(f"{bucket}/runs") == trained(str(tmp_path / "runs"))
    assert not list(tmp_path.glob("e2h-*/*/prepared"))  # nothing private stays on the machine
    names = [name for name, _ in list_files(f"{bucket}/runs")]
    for expected in (
        "config.yaml",
        "prepared/meta.json",
        "checkpoints/finetune-00000006.pt",
        "synthetic/part-00000.parquet",
    ):
        assert f"digits-eps10-seed0/{expected}" in names
    # One object a record of the ledger; what it saw lies apart.
    assert "digits-eps10-seed0/ledger.jsonl/000000000000" in names
    objects = boto3.client("s3").list_objects_v2(Bucket="images", Prefix="runs/.secrets/")["Contents"]
    assert [one["Key"] for one in objects if one["Size"]] == ["runs/.secrets/digits-eps10-seed0.head"]


def test_a_ledger_in_a_bucket_that_lost_its_tail_is_refused(bucket):
    trained(f"{bucket}/runs")
    folder = place(f"{bucket}/runs/digits-eps10-seed0")
    last = sorted(path.name for path in (folder / "ledger.jsonl").glob("0*"))[-1]
    (folder / "ledger.jsonl" / last).unlink()
    with open_run(small_config(f"{bucket}/runs")) as run, pytest.raises(BudgetError, match="some are missing"):
        run.ledger.charged()


def test_one_driver_at_a_time_and_the_next_after_its_end(bucket):
    config = small_config(f"{bucket}/runs")
    holder = r"another process \(pid \d+ on .*, seen \d+ s ago\) is running it"
    with open_run(config), pytest.raises(InputError, match=holder):
        open_run(config).__enter__()
    with open_run(config):
        pass


def test_a_driver_that_vanished_is_followed_and_one_that_renews_is_not(bucket, monkeypatch):
    config = small_config(f"{bucket}/runs")
    monkeypatch.setattr(lease, "STALE_AFTER_S", 1.0)
    with open_run(config) as run:
        path = run.root / lease.NAME
        left = path.read_bytes()
    path.write_bytes(left)  # as after a kill: nobody renews it
    deadline = time.monotonic() + 30
    while True:
        try:
            with open_run(config):
                assert path.read_bytes() != left
            break
        except InputError:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.1)
    monkeypatch.setattr(lease, "STALE_AFTER_S", 2.0)
    with open_run(config):
        time.sleep(2.5)
        with pytest.raises(InputError, match="another process"):
            open_run(config).__enter__()


def test_a_trial_whose_driver_was_killed_waits_until_its_lease_is_stale_and_a_run_does_not(bucket, monkeypatch):
    monkeypatch.setattr(lease, "ASK_EVERY_S", 0.2)
    config, common = small_config(f"{bucket}/runs"), place(f"{bucket}/search")
    with open_run(config) as run:
        path = run.root / lease.NAME
        left = path.read_bytes()
    path.write_bytes(left)  # as after a kill: nobody renews it
    with pytest.raises(InputError, match="another process"):
        open_run(config).__enter__()
    monkeypatch.setattr(lease, "STALE_AFTER_S", 2.0)
    with open_run(config, common):
        assert path.read_bytes() != left


def test_a_driver_that_was_followed_does_not_take_the_lease_back(bucket):
    path = place(f"{bucket}/runs/.lock")
    first = lease._Lease(path)
    first.take()
    path.write_bytes(b"somebody else x")
    first.give_up()
    assert path.read_bytes() == b"somebody else x"


def test_a_secret_in_a_bucket_is_made_once_and_lies_apart(bucket):
    boto3.client("s3").create_bucket(Bucket="keys")
    config = small_config(f"{bucket}/runs")
    config.privacy = replace(config.privacy, secret="s3://keys/run")
    with open_run(config) as run:
        first = run.secret()
    with open_run(config) as run:
        assert run.secret() == first
    kept = boto3.client("s3").get_object(Bucket="keys", Key="run")["Body"].read().decode()
    assert bytes.fromhex(kept) == first
    everything = b"".join(place(f"{bucket}/{name}").read_bytes() for name, _ in list_files(bucket))
    assert kept.encode() not in everything
    assert first not in everything


@pytest.mark.parametrize("secret", [None, "s3://images/runs/key"])
def test_a_run_in_a_bucket_needs_a_secret_that_lies_apart(bucket, secret):
    config = small_config(f"{bucket}/runs")
    config.privacy.secret = secret
    with pytest.raises(InputError, match=r"privacy.secret=.*lies apart from run.storage"):
        open_run(config).__enter__()
    assert list_files(bucket) == []


def test_what_can_t_be_used_is_refused_in_words(bucket):
    config = small_config("s3://absent/runs")
    with pytest.raises(InputError, match=r"s3://absent/runs.*NoSuchBucket"):
        open_run(config).__enter__()
    config.run.storage = "gs://bucket/runs"
    with pytest.raises(InputError, match=r"run.storage=gs://bucket/runs: expected a folder, or s3://"):
        open_run(config).__enter__()


def test_a_damaged_binding_is_refused_in_words(bucket):
    config = small_config(f"{bucket}/runs")
    with open_run(config) as run:
        run.bind()
    for content in (b"{", b"[]", json.dumps({"data": 1}).encode()):
        (run.root / "binding.json").write_bytes(content)
        with pytest.raises(InputError, match=r"run\.name=digits"):
            open_run(config).__enter__()
