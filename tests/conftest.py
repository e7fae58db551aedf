"""Shared fixtures: the real data, and jobs as a user starts them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("E2H_SHARED", ROOT.parent / "shared"))
TEST_SECRET = hashlib.sha256(b"a secret of these tests").hexdigest()
# A run of seconds: few steps, few images, one cheap classifier.
SMALL = [
    "warmup.num_steps=20",
    "finetune.num_steps=20",
    "finetune.expected_batch_size=64",
    "finetune.noise_multiplicity=2",
    "finetune.checkpoint_every=4",
    "finetune.ledger_block=4",
    "sampling.num_images=120",
    "sampling.images_per_shard=40",
    "sampling.num_steps=4",
    "evaluation.classifiers=[logistic_regression]",
    "evaluation.max_feature_records=200",
]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip(f"the real data is not at {SHARED / 'data'}")
    return SHARED / "data"


def command(name: str, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *overrides]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "E2H_TEST_SECRET": TEST_SECRET, **extra}


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
            timeout=240,
            check=False,
        )

    return run
