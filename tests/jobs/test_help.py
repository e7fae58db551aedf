"""`--help` of each job is written for its user."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from job_calls import ROOT, command

from e2h.binding import binding
from e2h.config import Config

JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.stem not in ("entry", "usage", "words"))
OWN_WORDS = {"ledger", "status"}  # they take a path and no settings


@pytest.mark.parametrize("name", JOBS)
def test_help_says_what_the_job_does(name: str, tmp_path: Path):
    done = subprocess.run(
        [*command(name), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "ydra" not in done.stdout
    first = (ROOT / "jobs" / f"{name}.py").read_text().split('"""')[1].strip().splitlines()[0]
    assert first in done.stdout
    if name not in OWN_WORDS:
        for dotted in ("seed", "privacy.epsilon", "frequency.warmup.num_steps", "search.proxy.source"):
            assert f"  {dotted}=" in done.stdout
        for section in (key for key, value in binding(Config()).items() if isinstance(value, dict)):
            assert f"\n{section}: " in done.stdout
        assert "privacy.delta=0.0001" in done.stdout
        assert "experiment=" in done.stdout
    assert list(tmp_path.iterdir()) == []
