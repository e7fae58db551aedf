"""jobs/plan.py: advice that a run then takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


@pytest.mark.slow
def test_advice_is_a_plan_of_its_own_that_spends_nothing(run_job, tmp_path: Path):
    settings = ["privacy.epsilon=1", "curriculum=[]", "scaling.hours=0.01", "finetune.noise_multiplicity=1"]
    done = run_job("plan", *settings)
    assert (done.returncode, done.stderr) == (0, "")
    speed, gradients = (
        float(re.search(rf"([\d.e+]+) {word}", done.stdout)[1]) for word in ("gradients/s", "gradients\n")
    )
    assert gradients == pytest.approx(speed * 36, rel=0.05)
    *_, advised, times = done.stdout.splitlines()
    assert re.match(r"time +roughly warm-up 0.0 min, DP-SGD 0\.6 min, sampling \d+\.\d min; preparing, ", times)
    overrides = advised.split()
    assert [one.split("=")[0] for one in overrides] == ["finetune.expected_batch_size", "finetune.num_steps"]
    assert not (tmp_path / "runs").exists()
    planned = run_job("pipeline", *settings[:2], *overrides, "dry_run=true")
    marked = next(line for line in done.stdout.splitlines() if line.endswith("*")).split()
    row = next(line for line in planned.stdout.splitlines() if line.strip().startswith("finetune")).split()
    assert row[2] == marked[1]
    assert float(row[3]) == pytest.approx(float(marked[2]), rel=0.02)


def test_hours_that_are_none_are_refused(run_job):
    done = run_job("plan", "scaling.hours=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "e2h: scaling.hours=0.0: expected a finite number above 0\n"
