"""Jobs whose budget is shared by several runs, or kept in a bucket."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from job_calls import SMALL

Job = Callable[..., "subprocess.CompletedProcess[str]"]


def refused(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert result.returncode == code, result.stdout + result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert all(part in line for part in ("e2h: ", *parts)), line


SHARED = (*SMALL, "ledger.scope=dataset", "ledger.epsilon=1.2")


@pytest.mark.ray
@pytest.mark.chaos
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


def test_a_bucket_that_is_not_there_is_refused(run_job: Job, bucket: str) -> None:
    secret = "privacy.secret=env:E2H_TEST_SECRET"
    refused(run_job("train", *SMALL, "ledger.path=s3://absent/one"), 2, "s3://absent/one", "NoSuchBucket")
    refused(run_job("train", *SMALL, "run.storage=s3://absent/runs", secret), 2, "s3://absent/runs", "NoSuchBucket")
    refused(run_job("train", *SMALL, f"run.storage={bucket}/runs"), 2, "privacy.secret=null")
