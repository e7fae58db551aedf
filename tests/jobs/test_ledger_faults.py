"""What can befall a ledger, through a real job: its exit code, its one line, nothing lost, nothing spent twice.

The jobs' own `main` and stages run here in this process. Only Ray is left out: no session, and the sums over the
records, for which it is there, are zeros.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import central as job
import entry
import numpy as np
import pytest

from e2h.config import Config, RunConfig
from e2h.curriculum.run import Run, open_run, run_root
from e2h.data.prepare import finish_prepared, prepare_shard
from e2h.data.sources import open_source
from e2h.distributed import datasets
from e2h.privacy import logs
from e2h.privacy.chain import next_line
from e2h.privacy.ledger import Ledger

QUICK = ["privacy.epsilon=0.5", "finetune.num_steps=4"]  # for the accountant


def settings(storage: Path, name: str, ledger: Path | None) -> Config:
    config = Config(run=RunConfig(str(storage), name))
    config.privacy.epsilon, config.finetune.num_steps = 0.5, 4
    config.ledger.path = str(ledger) if ledger else None
    return config


def prepared_run(config: Config) -> None:
    """Leaves what the first stage does."""
    with open_run(config) as run:
        source = open_source(config.data)
        stats = [prepare_shard(shard, config.data, run.prepared, index) for index, shard in enumerate(source.shards)]
        finish_prepared(run.prepared, source, config.data, stats)
        run.bind()
        run.mark_done("prepare")


@dataclass
class Place:
    """A prepared run, and the `central` job on it."""

    config: Config
    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str] | None = None

    @property
    def root(self) -> Path:
        return run_root(self.config)

    @property
    def ledger(self) -> Path:
        return Path(self.config.ledger.path or self.root / "ledger.jsonl")

    def call(self) -> tuple[int, str]:
        """Exit code and what went to stderr."""
        keys = [f"run.storage={self.root.parent}", f"run.name={self.root.name}"]
        keys += [
            f"privacy.epsilon={self.config.privacy.epsilon}",
            f"finetune.num_steps={self.config.finetune.num_steps}",
        ]
        keys += [f"ledger.path={self.config.ledger.path}"] if self.config.ledger.path else []
        self.patch.setattr(sys, "argv", ["central.py", *keys])
        with pytest.raises(SystemExit) as ended:
            entry.job(job.central)
        return int(ended.value.code or 0), self.capture.readouterr().err if self.capture else ""

    def stopped_at(self, owner: object, name: str) -> None:
        """Calls the job, and stops it where it would call `owner.name`."""

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with self.patch.context() as patched:
            patched.setattr(owner, name, stop)
            assert self.call()[0] == entry.INTERRUPTED

    def refused(self, code: int, *said: str) -> None:
        """Calls the job: one line, this code, and not a byte of the ledger is another."""
        before = self.ledger.read_bytes()
        ended, line = self.call()
        assert (ended, line.count("\n")) == (code, 1), line
        assert line.startswith("e2h: ")
        assert all(part in line for part in said), line
        assert self.ledger.read_bytes() == before
        assert not (self.root / "central").exists()

    def charged_once(self) -> None:
        """Calls the job, twice: every round of the easy stage is paid, and paid once."""
        for _ in range(2):
            assert self.call() == (0, "")
        spent = [record for record in self.records() if record["kind"] == "SPEND"]
        assert [(record["release"], record["steps"]) for record in spent] == [("central", [0, 5])]
        assert (self.root / "central" / "images.parquet").exists()

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.ledger.read_bytes().splitlines()]


def no_sums(run: Run, prepared: object, query, stage: str, domain: str, tell: object) -> np.ndarray:
    return np.zeros((query.event.count, query.num_groups, query.dimension), np.int64)


def without_ray(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(entry, "session", lambda *_: nullcontext())
    patch.setattr(datasets, "query_sums", no_sums)


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    """Storage of a run that is prepared, planned and opened: its driver was stopped before its first charge."""
    config = settings(tmp_path_factory.mktemp("planned") / "runs", "one", None)
    prepared_run(config)
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        Place(config, patch).stopped_at(Ledger, "spend")
    return run_root(config).parent


@pytest.fixture
def place(planned, tmp_path, monkeypatch, capsys) -> Place:
    shutil.copytree(planned, tmp_path / "runs")
    without_ray(monkeypatch)
    place = Place(settings(tmp_path / "runs", "one", None), monkeypatch, capsys)
    assert [record["kind"] for record in place.records()] == ["OPEN"]
    return place


def test_without_a_fault_the_job_charges_once(place):
    place.charged_once()


def test_a_flipped_byte_is_code_3(place):
    content = bytearray(place.ledger.read_bytes())
    content[40] ^= 1
    place.ledger.write_bytes(content)
    place.refused(3, "was altered, so nothing can be spent")


def test_a_missing_record_is_code_3(place):
    place.stopped_at(datasets, "query_sums")
    lines = place.ledger.read_bytes().splitlines(keepends=True)
    place.ledger.write_bytes(b"".join(lines[:-1]))
    place.refused(3, "some are missing, so nothing can be spent")
    place.ledger.write_bytes(b"".join(lines))
    place.charged_once()


@pytest.mark.parametrize("length", [1, 100, -1])
def test_a_torn_last_line_is_cut_and_charged_once(place, length):
    """As a crash in the middle of a charge leaves it: that charge was never confirmed, so nothing was drawn."""
    line = next_line(place.records(), {"kind": "SPEND", "release": "central", "steps": [0, 5]})
    place.ledger.write_bytes(place.ledger.read_bytes() + line[:length])
    place.charged_once()


def test_a_full_disk_is_code_2_and_the_same_command_goes_on(place):
    def full(file, content):
        file.write(content[:50])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place.ledger))

    with place.patch.context() as patched:
        patched.setattr(logs, "_write", full)
        place.refused(2, "ledger.jsonl: the disk is full; make room, then run the same command again")
    place.charged_once()


def test_a_second_process_on_one_run_is_code_2(place):
    with open_run(place.config):
        place.refused(2, "run.name=one: another process", "is running it")
    place.charged_once()


def test_a_driver_that_another_one_overtook_is_code_3(place):
    """As on two machines whose file system has no common lock: the newer one goes on, the older one spends nothing."""
    take_over = Ledger.take_over

    def overtaken(ledger: Ledger) -> None:
        take_over(ledger)
        take_over(Ledger(ledger.chain.log, "ee" * 16, ledger.chain.witness))

    with place.patch.context() as patched:
        patched.setattr(Ledger, "take_over", overtaken)
        code, line = place.call()
    assert (code, line.count("\n")) == (3, 1), line
    assert "another process took over this run" in line
    assert [record["kind"] for record in place.records()] == ["OPEN", "OWNER", "OWNER"]
    place.charged_once()


def test_two_runs_that_name_one_ledger_spend_its_budget_once(place):
    place.charged_once()
    other = replace(place, config=settings(place.root.parent, "two", place.ledger))
    prepared_run(other.config)
    code, line = other.call()
    assert (code, line.count("\n")) == (3, 1), line
    assert "the budget pays for 5 steps, and 10 would be needed" in line
    assert not (other.root / "central").exists()
    place.charged_once()


@pytest.mark.parametrize("years", [-10, 50])
def test_a_clock_that_jumps_changes_nothing(place, years):
    now = time.time
    with place.patch.context() as patched:
        patched.setattr("e2h.privacy.chain.time.time", lambda: now() + years * 365 * 86400)
        place.stopped_at(datasets, "query_sums")
    assert abs(place.records()[-1]["time"] - place.records()[0]["time"]) > 9 * 365 * 86400
    place.charged_once()
