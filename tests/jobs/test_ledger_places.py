"""Jobs whose budget is shared by several runs, or kept in a bucket."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from job_calls import SMALL
from moto.server import ThreadedMotoServer

Job = Callable[..., "subprocess.CompletedProcess[str]"]


def refused(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert result.returncode == code, result.stdout + result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert all(part in line for part in ("e2h: ", *parts)), line


SHARED = (*SMALL, "ledger.scope=dataset", "ledger.epsilon=1.2")


@pytest.mark.ray
@pytest.mark.long
def test_a_second_run_that_fits_is_planned_and_one_that_does_not_is_refused(run_job: Job, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for _ in range(2):  # the second call resumes: it holds nothing more
        assert run_job("central", *SHARED, "run.name=one").returncode == 0
    lines = (runs / ".ledgers" / "digits.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["DATASET", "HOLD"]
    plan = json.loads((runs / "one" / "plan.json").read_text())
    assert plan["shared"] == {"name": "digits", "epsilon": 1.2, "epsilon_held": plan["epsilon"], "num_runs": 1}

    said = "ledger.epsilon=1.2: with this run, all runs on data set digits would cost epsilon 1.", "1 of them hold 0.99"
    refused(run_job("central", *SHARED, "run.name=two", "dry_run=true"), 3, *said)
    assert not (runs / "two").exists()
    refused(run_job("central", *SHARED, "run.name=two"), 3, *said)
    assert not (runs / "two" / "ledger.jsonl").exists()
    assert not (runs / "two" / "central").exists()
    refused(run_job("central", *SHARED, "ledger.epsilon=3", "run.name=three", "dry_run=true"), 2, "ledger.epsilon=3")

    rest = run_job("central", *SHARED, "privacy.epsilon=0.4", "run.name=rest", "dry_run=true")
    assert rest.returncode == 0, rest.stderr
    assert json.loads((runs / "rest" / "plan.json").read_text())["shared"]["num_runs"] == 2
    assert (runs / ".ledgers" / "digits.jsonl").read_text().splitlines() == lines


@pytest.mark.ray
@pytest.mark.long
def test_a_run_whose_ledger_is_a_bucket_trains_and_verifies(run_job: Job, tmp_path: Path) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        place = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "key",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        with pytest.MonkeyPatch.context() as patched:
            for name, value in place.items():
                patched.setenv(name, value)
            client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        arguments = (*SMALL, "ledger.path=s3://bucket/one", "run.name=one")
        done = run_job("train", *arguments, **place)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "runs" / "one" / "ledger.jsonl").exists()
        # OPEN; one owner, although a driver and a worker charged; the central images; 20 steps in blocks of 4.
        listed = client.list_objects_v2(Bucket="bucket", Prefix="one/0")["Contents"]
        bodies = [client.get_object(Bucket="bucket", Key=entry["Key"])["Body"].read() for entry in listed]
        assert [json.loads(body)["kind"] for body in bodies] == ["OPEN", "OWNER", *["SPEND"] * 6]

        client.delete_object(Bucket="bucket", Key=listed[-1]["Key"])
        refused(run_job("train", *arguments, **place), 3, "some are missing")
        refused(run_job("train", *SMALL, "ledger.path=s3://absent/one", "run.name=two", **place), 2, "NoSuchBucket")
    finally:
        server.stop()
