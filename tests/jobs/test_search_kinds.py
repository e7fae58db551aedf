"""The rarer kinds of a search, whole: on the central images, with a Poisson number of trials, in a bucket."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import boto3
import pytest
from job_calls import command, environment
from test_pipeline import charged_steps
from test_search_job import OUTSIDE, PASSING, TINY, Search, secret_of

from e2h.reporting.check import check

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(2400)]

POISSON = [*TINY, "search.privacy=selection", "search.law=poisson", "search.expected_trials=2", "search.max_trials=3"]


def test_a_search_on_the_central_images_pays_for_them_once(tmp_path: Path) -> None:
    settings = ["search.privacy=proxy", "search.proxy.source=central", "search.expected_trials=2"]
    search = Search(tmp_path / "runs", *TINY, *settings)
    search.finish(search.start())
    assert charged_steps(search.root, "central") == list(range(5))
    assert charged_steps(search.root, "finetune") == list(range(6))
    ledger = json.loads((search.root / "release" / "ledger.json").read_text())
    assert [one["name"] for one in ledger["releases"]] == ["central", "finetune"]
    assert check(search.root / "release") == []


def test_no_trial_at_all_ends_with_one_line_and_charges_what_was_planned(tmp_path: Path) -> None:
    search = Search(tmp_path / "runs", *POISSON, secret=secret_of(0, *POISSON))
    process = search.start()
    search.until(process, lambda: False)
    _, err = process.communicate()
    assert process.returncode == 3
    assert len(err.strip().splitlines()) == 1
    assert charged_steps(search.root, "search") == [0]
    assert not search.trials
    assert not (search.root / "release").exists()


def test_a_search_in_a_bucket_leaves_nothing_there_but_the_best_trial(tmp_path: Path, bucket: str) -> None:
    secret = secret_of(2, *POISSON)
    done = subprocess.run(
        command("search", *POISSON, f"run.storage={bucket}/runs", "run.name=r"),
        cwd=tmp_path,
        env=environment(E2H_TEST_SECRET=secret),
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    listed = boto3.client("s3").list_objects_v2(Bucket="images", Prefix="runs/r/")["Contents"]
    names = {one["Key"].removeprefix("runs/r/") for one in listed} - {""}
    assert {"release/README.md", "release/ledger.json", "checkpoints/model.safetensors", "search.json"} <= names
    assert not [name for name in names if name.startswith("trials/")]
    told = {name for name in names if not PASSING.fullmatch(name) and not name.startswith("ledger")}
    assert told <= OUTSIDE
