"""The rarer kinds of a search, whole: on the central images, with a Poisson number of trials, in a bucket, stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import boto3
import pytest
from job_calls import command, environment
from test_pipeline import _training_workers, charged_steps
from test_search_job import OUTSIDE, PASSING, TINY, Search, secret_of

from e2h.curriculum.lease import RENEWED_EVERY_S, STALE_AFTER_S
from e2h.data.remote import place
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


def test_a_trial_in_a_bucket_whose_driver_is_killed_goes_on_when_its_lease_is_stale(
    tmp_path: Path, bucket: str
) -> None:
    settings = [*TINY, "search.privacy=compose", "search.expected_trials=1", f"run.storage={bucket}/runs", "run.name=r"]
    with subprocess.Popen(
        command("search", *settings),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        begun = place(f"{bucket}/runs/r/trials/trial-000/.lock")
        while process.poll() is None and not begun.exists():
            time.sleep(0.5)
        (driver,) = _training_workers(process.pid, "ImplicitFunc")
        os.kill(driver, signal.SIGKILL)
        killed = time.monotonic()
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    assert time.monotonic() - killed > STALE_AFTER_S - RENEWED_EVERY_S
    assert place(f"{bucket}/runs/r/release/README.md").exists()


def test_a_signal_ends_a_search_that_asha_cuts_short_and_the_same_command_goes_on(tmp_path: Path) -> None:
    settings = [*TINY, "search.privacy=compose", "search.scheduler=asha", "search.expected_trials=2"]
    search = Search(tmp_path / "runs", *settings, "finetune.num_steps=9")

    def scored() -> int:
        return len(list(search.root.glob("trials/trial-*/score-*.json")))

    stopped = "e2h: stopped; the same command goes on\n"
    for sent, expected in ((signal.SIGINT, (130, stopped)), (signal.SIGUSR1, (-signal.SIGUSR1, ""))):
        process, before = search.start(), scored()
        search.until(process, lambda before=before: scored() > before)
        os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)  # as a terminal does
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == expected
        assert not (search.root / "search.json").exists()
    process = search.start()
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    assert ["0.111" in one["scores"] for one in search.result()["trials"]] == [True, True]
    assert charged_steps(search.root, "finetune") == list(range(2 * 9))
