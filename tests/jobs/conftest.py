"""Runs jobs in an empty folder."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from job_calls import command, environment


@pytest.fixture
def run_job(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_job("pipeline", "data=mnist", ...) in an empty folder; storage is `tmp_path / "runs"`."""

    def run(name: str, *overrides: str, **extra: str) -> subprocess.CompletedProcess[str]:
        where = [] if any(one.startswith("run.storage=") for one in overrides) else [f"run.storage={tmp_path / 'runs'}"]
        return subprocess.run(
            command(name, *where, *overrides),
            cwd=tmp_path,
            env=environment(**extra),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    return run
