"""`jobs/status.py`: what it prints, and its exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import status as job
from job_calls import ROOT, command

from e2h.config import Config, RunConfig
from e2h.curriculum.run import open_run
from e2h.errors import InputError


@pytest.fixture
def run(tmp_path) -> Path:
    config = Config()
    config.run = RunConfig(str(tmp_path / "runs"), "one")
    with open_run(config) as run:
        pass
    return run.root


def called(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        command("status", *arguments), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_a_run_is_shown_as_lines_and_as_one_object(run):
    before = {path: path.read_bytes() for path in run.parent.rglob("*") if path.is_file()}
    text, code = job.main([str(run)])
    assert code == 0
    assert text.startswith(f"run        {run}\n")
    found, code = job.main([str(run), "--json"])
    assert code == 0
    assert json.loads(found)["run"] == str(run)
    assert {path: path.read_bytes() for path in run.parent.rglob("*") if path.is_file()} == before


def test_the_exit_codes(run, tmp_path):
    code, out, err = called(str(run))
    assert (code, err) == (0, "")
    assert "epsilon    0 spent of 10 at delta 1e-4" in out
    (run / "ledger.jsonl").write_text("{}\n")
    code, out, err = called(str(run), "--json")
    assert (code, err, json.loads(out)["altered"]) == (3, "", True)
    code, out, err = called(str(tmp_path / "nowhere"))
    assert (code, out) == (2, "")
    assert err.startswith(f"e2h: {tmp_path / 'nowhere'}: expected a run directory")
    assert err.count("\n") == 1


@pytest.mark.parametrize("given", ["gs://bucket/run", "s3://"])
def test_other_places_are_refused_in_words(given):
    with pytest.raises(InputError, match=f"path={given}: expected"):
        job.main([given])


def test_ray_hydra_and_torch_are_not_started(run):
    script = f"import sys, status\nstatus.main([{str(run)!r}])\nprint(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "jobs", capture_output=True, text=True, timeout=120, check=True
    )
    assert "'e2h.reporting.status'" in done.stdout
    assert not {"'ray'", "'torch'", "'hydra'"} & set(re.findall(r"'\w+'", done.stdout))
