"""Each bad input: one clear line, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from job_calls import SMALL, TEST_SECRET
from PIL import Image

Job = Callable[..., "subprocess.CompletedProcess[str]"]


def png(size: int = 16, value: int = 100) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def folder(root: Path, per_class: int = 20, size: int = 16) -> Path:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{i:03d}.png").write_bytes(png(size, i))
    return root


def idx(root: Path, count: int = 40, label: int = 1, cut: int = 0) -> Path:
    root.mkdir()
    for stem in ("train", "t10k"):
        pixels = struct.pack(">IIII", 0x803, count, 28, 28) + bytes(count * 784 - cut)
        (root / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pixels))
        labels = struct.pack(">II", 0x801, count) + bytes([i % 10 for i in range(count - 1)] + [label])
        (root / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return root


def bomb_png() -> bytes:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def refused(result: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    assert result.returncode == code, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("e2h: ")
    for part in parts:
        assert part in lines[0], lines[0]
    assert "Traceback" not in result.stdout + result.stderr


def left(tmp_path: Path) -> list[Path]:
    """Files that a refused run left, but for what describes the call itself."""
    known = {".lock", "config.yaml", "command.txt", "environment.json", "ray.log", "prepared.rejected.jsonl"}
    known |= {"failure.txt"}
    found = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    return [path for path in found if path.name not in known and path.parent.name != ".secrets"]


VALUES = [
    ("privacy.epsilon=0", "privacy.epsilon=0.0"),
    ("privacy.epsilon=-1", "privacy.epsilon=-1.0"),
    ("privacy.epsilon=nan", "privacy.epsilon=nan"),
    ("privacy.delta=0", "privacy.delta=0.0"),
    ("privacy.delta=1.5", "privacy.delta=1.5"),
    ("finetune.expected_batch_size=5000", "finetune.expected_batch_size=5000"),
    ("sampling.class_fractions=[0.5,0.5]", "sampling.class_fractions"),
    ("evaluation.inception_weights=/nowhere.pth", "evaluation.inception_weights=/nowhere.pth"),
    ("curriculum=[central,central]", "curriculum=['central', 'central']"),
    ("curriculum=[easy]", "curriculum=easy"),
    ("sampling.ema_widths=[0.1]", "sampling.ema_widths=[0.1]"),
    ("modle=px8", "modle"),
    ("+data.pathh=/x", "data.pathh"),
    ("run.storage=gs://bucket/x", "run.storage=gs://bucket/x"),
]


@pytest.mark.parametrize(("override", "named"), VALUES)
def test_bad_value_is_named(run_job: Job, tmp_path: Path, override: str, named: str) -> None:
    refused(run_job("pipeline", override), named)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dry_run", ["true", "false"])
@pytest.mark.parametrize("storage", ["/proc/nothing", "file", "file/below", "others"])
def test_storage_that_can_t_be_used_is_named(refused_here, tmp_path: Path, storage: str, dry_run: str) -> None:
    (tmp_path / "file").touch()
    # For what is somebody else's: root may read that.
    (tmp_path / "others" / "one" / "binding.json").mkdir(parents=True)
    place = tmp_path / storage
    line = refused_here(f"run.storage={place}", "run.name=one", f"dry_run={dry_run}")
    assert line.startswith(f"e2h: run.storage={place}: expected a folder to write to (")
    assert line.endswith("; choose another, or another run.name)\n")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["binding.json", "file", "one", "others"]


def test_a_dry_run_beside_secrets_of_others_is_refused_and_leaves_nothing(refused_here, tmp_path: Path) -> None:
    (tmp_path / ".secrets" / "one.head").mkdir(parents=True)
    line = refused_here(f"run.storage={tmp_path}", "run.name=one", "dry_run=true")
    assert ".secrets/one.head; choose another, or another run.name)" in line
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_a_store_that_refuses_is_named(refused_here, denying_store: str, monkeypatch, dry_run: str) -> None:
    monkeypatch.setenv("E2H_TEST_SECRET", TEST_SECRET)
    storage = f"run.storage={denying_store}/runs"
    line = refused_here(storage, "privacy.secret=env:E2H_TEST_SECRET", f"dry_run={dry_run}")
    assert line.startswith(f"e2h: {storage}: the store refuses (ACCESS_DENIED during HeadObject operation")
    assert line.endswith("; check your keys and rights, then run the same command again\n")


def test_missing_path_and_empty_folder(run_job: Job, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, place in (
        ("mnist", "nowhere"),
        ("image_folder", "nowhere"),
        ("image_folder", "empty"),
        ("mnist", "empty"),
    ):
        refused(run_job("prepare", f"data={source}", f"data.path={tmp_path / place}"), "data.path=")
    assert not (tmp_path / "runs").exists()


def test_truncated_idx_and_leaving_zip_and_lone_image(run_job: Job, tmp_path: Path) -> None:
    truncated = idx(tmp_path / "truncated", cut=100)
    refused(run_job("prepare", "data=mnist", f"data.path={truncated}"), "train-images-idx3-ubyte")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        for name in ("cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png", "../dog/c.png"):
            archive.writestr(name, png())
    refused(run_job("prepare", "data=image_folder", f"data.path={tmp_path / 'evil.zip'}"), "../dog/c.png")
    lone = folder(tmp_path / "lone")
    for path in sorted((lone / "dog").iterdir())[1:]:
        path.unlink()
    refused(run_job("prepare", "data=image_folder", f"data.path={lone}"), "dog")
    assert not (tmp_path / "runs").exists()


SIZE = (
    "data=image_folder",
    "data.image_size=16",
    "model=px8",
    "model.attention_resolutions=[]",
    "finetune.expected_batch_size=4",
)


@pytest.mark.ray
@pytest.mark.chaos
def test_what_only_reading_shows(run_job: Job, tmp_path: Path) -> None:
    place = folder(tmp_path / "bomb")
    (place / "cat" / "odd.png").write_bytes(bomb_png())
    refused(run_job("prepare", *SIZE, f"data.path={place}"), "odd.png", "60000")
    labels = idx(tmp_path / "labels", label=77)
    refused(run_job("prepare", "data=mnist", f"data.path={labels}", "finetune.expected_batch_size=8"), "77")
    assert left(tmp_path) == []


@pytest.mark.ray
@pytest.mark.slow
def test_corrupt_share_below_the_limit_is_counted_named_and_skipped(run_job: Job, tmp_path: Path) -> None:
    place = folder(tmp_path / "images")
    (place / "cat" / "odd.png").write_bytes(png()[:60])
    settings = (*SIZE, f"data.path={place}", "run.name=r")
    refused(run_job("prepare", *settings, "data.max_rejected_fraction=0.0"), "data.max_rejected_fraction")
    # A corrected configuration is not held to one that never finished a stage.
    result = run_job("prepare", *settings, "data.max_rejected_fraction=0.1")
    assert result.returncode == 0, result.stderr
    assert "1 rejected" in result.stdout
    assert "cat/odd.png" in (tmp_path / "runs" / "r" / "prepared" / "rejected.jsonl").read_text()


@pytest.mark.ray
@pytest.mark.chaos
def test_full_disk_is_one_line_and_the_same_command_goes_on(run_job: Job, tmp_path: Path) -> None:
    small_disk = tmp_path / "disk"
    small_disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small_disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a small file system can't be mounted here: not root")
    try:
        arguments = (*SMALL, f"run.storage={small_disk}", "run.name=r", "scaling.max_failures=0")
        refused(run_job("pipeline", *arguments), "full")
        subprocess.run(["mount", "-o", "remount,size=200M", str(small_disk)], check=True)
        again = run_job("pipeline", *arguments)
        assert again.returncode == 0, again.stderr
    finally:
        subprocess.run(["umount", "-l", str(small_disk)], check=True)


def test_budget_that_the_easy_stage_exceeds_is_exit_code_3_with_the_numbers(run_job: Job) -> None:
    refused(
        run_job("pipeline", "privacy.epsilon=0.5", "central.noise_multiplier=4", "dry_run=true"),
        "central",
        "0.96",
        "0.5",
        code=3,
    )


def test_large_delta_runs_with_a_warning_that_names_1_over_n(run_job: Job, tmp_path: Path) -> None:
    result = run_job("pipeline", "privacy.delta=0.01", "dry_run=true", "run.name=r")
    assert result.returncode == 0
    assert "1/N = 1/1523" in result.stdout
    assert "1/N" in (tmp_path / "runs" / "r" / "plan.json").read_text()


def test_dry_run_prints_the_plan_and_spends_nothing(run_job: Job, tmp_path: Path) -> None:
    result = run_job("pipeline", "dry_run=true", "run.name=r")
    assert result.returncode == 0
    assert result.stderr == ""
    for part in ("N 1523", "central", "finetune", "0.1681"):
        assert part in result.stdout
    assert {path.name for path in (tmp_path / "runs" / "r").iterdir()} == {"plan.json"}
