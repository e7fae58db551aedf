"""A private run that is killed again and again: benchmarks/chaos.py with a few kills."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.chaos
def test_kills_cost_neither_privacy_nor_bits():
    run = subprocess.run(
        [sys.executable, str(CHAOS), "--kills", "3", "--json"], capture_output=True, text=True, timeout=800, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    outcome = json.loads(run.stdout.splitlines()[-1])
    assert outcome["kills"] == 3
    assert outcome["problems"] == []
    assert outcome["releases"] >= 61 * outcome["runs"]  # the central images and 60 steps
