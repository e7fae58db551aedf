"""A run with a published secret says so in every file that somebody might take for private."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from job_calls import SMALL
from PIL import Image
from safetensors import safe_open

from e2h.config import NOT_PRIVATE
from e2h.reporting.check import check

pytestmark = [pytest.mark.ray, pytest.mark.long]


def stamped(path: Path) -> bool:
    if path.suffix == ".parquet":
        return (pq.read_schema(path).metadata or {}).get(b"not_private") == NOT_PRIVATE.encode()
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return picture.info.get("not_private") == NOT_PRIVATE
    if path.suffix == ".safetensors":
        with safe_open(str(path), "numpy") as weights:
            return (weights.metadata() or {}).get("not_private") == NOT_PRIVATE
    text = path.read_bytes()
    return any(mark in text for mark in (b"NOT PRIVATE", b'"not_private": true', b"test_mode: true"))


def test_every_artefact_of_a_run_in_test_mode_is_stamped(run_job, tmp_path):
    result = run_job("pipeline", *SMALL, "privacy.test_mode=true")
    assert result.returncode == 0, result.stderr
    assert "NOT PRIVATE" in result.stdout
    root = tmp_path / "runs" / "digits-eps1-seed0-NOT-PRIVATE"
    releasable = [*root.glob("central/*"), *root.glob("synthetic/*"), *root.glob("release/**/*"), root / "plan.json"]
    files = [path for path in releasable if path.is_file() and path.name not in ("_SUCCESS.json", "weights.sha256")]
    assert len(files) > 15
    assert [path.name for path in files if not stamped(path)] == []
    assert all(json.loads(row)["not_private"] for row in (root / "metrics.jsonl").read_text().splitlines())
    assert len(check(root / "release")) >= 4
