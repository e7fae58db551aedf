"""A run with a published secret says so in every file that somebody might take for private."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors import safe_open
from test_api_run import SMALL

from e2h import run
from e2h.config import NOT_PRIVATE
from e2h.reporting.check import check

pytestmark = pytest.mark.slow
# Nothing to take for images: markers, a checksum, an array that has no place for a note.
PLAIN = ("_SUCCESS.json", "weights.sha256", "embeddings.npy")
BOTH_EASY_STAGES = {
    "curriculum": ["central", "frequency"],
    "warmup.num_steps": 2,
    "frequency.num_features": 20,
    "frequency.generator_steps": 4,
    "frequency.num_images": 20,
    "frequency.warmup.num_steps": 2,
}


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


def test_every_artefact_of_a_run_in_test_mode_is_stamped(tmp_path):
    run({**SMALL, **BOTH_EASY_STAGES, "privacy.test_mode": True, "run.storage": str(tmp_path)})
    root = tmp_path / "digits-eps1-central-frequency-seed0-NOT-PRIVATE"
    folders = [root / name for name in ("central", "frequency", "synthetic", "release")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files = [root / "plan.json", *(path for path in files if path.name not in PLAIN)]
    assert len(files) > 15
    assert [path.name for path in files if not stamped(path)] == []
    rows = [json.loads(row) for row in (root / "metrics.jsonl").read_text().splitlines()]
    assert all(row["not_private"] for row in rows)
    assert [row["name"] for row in rows if row["name"].endswith("/grid")] == [
        "central/grid",
        "frequency/grid",
        "synthetic/grid",
    ]
    assert len(check(root / "release")) >= 4
