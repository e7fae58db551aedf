from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from e2h.data import filesystem
from e2h.data.remote import S3Path, place
from e2h.reporting import metrics as metrics_module
from e2h.reporting.metrics import METRICS, MetricWriter, ReleaseClass, read_curves, tag

SCALARS = [name for name, metric in METRICS.items() if metric.unit != "image"]
IMAGES = [name for name in METRICS if name not in SCALARS]


def events(folder: Path) -> dict[str, list]:
    """Scalar and image events of a TensorBoard directory by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    log.Reload()
    tags = log.Tags()
    found = {tag: log.Scalars(tag) for tag in tags["scalars"]}
    return found | {tag: log.Images(tag) for tag in tags["images"]}


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_name_lands_in_the_directory_of_its_class_and_nowhere_else(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for name in SCALARS:
            writer.scalar(name, 1.5, 3)
        for name in IMAGES:
            writer.image(name, np.zeros((4, 6, 1), np.uint8), 3)
    for kind in ReleaseClass:
        declared = {tag(name) for name, metric in METRICS.items() if metric.release_class is kind}
        assert set(events(tmp_path / "tb" / kind)) == declared
    assert {row["name"]: row["class"] for row in rows(tmp_path)} == {
        name: metric.release_class.value for name, metric in METRICS.items()
    }


def test_tags_say_their_units():
    assert tag("finetune/batch_size") == "finetune/batch_size (records)"
    assert tag("warmup/loss") == "warmup/loss"
    assert tag("central/grid") == "central/grid"


def test_private_measurements_are_declared_sensitive():
    names = ["loss", "clipped_fraction", "mean_norm", "batch_size"]
    names = [f"finetune/{name}" for name in names] + [name for name in METRICS if name.startswith("evaluation/")]
    assert len(names) > 5
    assert all(METRICS[name].release_class is ReleaseClass.SENSITIVE for name in names)


@pytest.mark.parametrize("name", ["finetune/secret", "loss", "", "central/grid"])
def test_undeclared_scalars_are_refused_and_leave_no_row(tmp_path, name):
    with MetricWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match=f"metric={name}: expected one of"):
            writer.scalar(name, 1.0, 0)
        with pytest.raises(ValueError, match="expected one of central/grid"):
            writer.image("finetune/loss", np.zeros((2, 2, 1), np.uint8), 0)
    assert rows(tmp_path) == []


def test_sensitive_files_are_for_their_owner_only(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.scalar("finetune/loss", 1.0, 0)
    assert (tmp_path / "metrics.jsonl").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "tb" / "sensitive").stat().st_mode & 0o777 == 0o700


def test_releasable_events_hide_how_long_a_step_took(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(3):
            writer.scalar("warmup/loss", 0.1 * step, step)
    times = {event.wall_time for event in events(tmp_path / "tb" / "releasable")["warmup/loss"]}
    assert all(moment % 3600 == 0 for moment in times)


def test_resumed_run_appends_after_a_torn_line_and_the_last_value_of_a_step_counts(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.scalar("warmup/loss", 3.0, 0)
        writer.scalar("warmup/loss", 2.0, 10)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"name": "warmup/lo')
    with MetricWriter(tmp_path) as writer:
        writer.scalar("warmup/loss", 1.5, 10)
        writer.scalar("warmup/loss", 1.0, 20)
        writer.image("central/grid", np.zeros((4, 6, 3), np.uint8), 0)
    assert read_curves(tmp_path) == {"warmup/loss": [(0, 3.0), (10, 1.5), (20, 1.0)]}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.scalar("finetune/loss", float("nan"), 0)
        writer.scalar("finetune/loss", float("inf"), 1)
        writer.scalar("finetune/loss", np.float32(0.5), np.int64(2))
    assert [row["value"] for row in rows(tmp_path)] == [None, None, 0.5]
    assert read_curves(tmp_path)["finetune/loss"] == [(2, 0.5)]


def test_run_without_metrics_has_no_curves(tmp_path):
    assert read_curves(tmp_path) == {}


def test_run_that_is_not_private_is_stamped(tmp_path):
    with MetricWriter(tmp_path, not_private=True) as writer:
        writer.scalar("warmup/loss", 1.0, 0)
    assert rows(tmp_path)[0]["not_private"] is True
    for kind in ReleaseClass:
        written = b"".join(path.read_bytes() for path in (tmp_path / "tb" / kind).iterdir())
        assert b"NOT PRIVATE" in written


def test_what_may_be_released_tells_neither_time_nor_machine(tmp_path):
    for _ in range(2):
        with MetricWriter(tmp_path) as writer:
            writer.scalar("warmup/loss", 1.0, 0)
            writer.trial("best", {"warmup.num_steps": 3}, 0.5)
    files = sorted((tmp_path / "tb" / "releasable").rglob("*tfevents*"))
    assert [path.name[-14:] for path in files] == ["0000000000.e2h", "0000000001.e2h"] * 2
    found = [event for path in files for event in EventFileLoader(str(path)).Load()]
    assert len(found) > 8
    assert all(event.wall_time % 3600 == 0 for event in found)


def test_tensorboard_and_torch_are_imported_only_by_a_writer():
    code = "import sys, e2h.reporting.metrics, e2h.reporting.check; print({'torch', 'tensorboard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_a_killed_writer_leaves_lies_where_its_owner_is_told_to_look(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for killed in (True, False):
        metrics = MetricWriter(f"{bucket}/run")
        metrics.scalar("finetune/loss", 1.0, 1)
        if not killed:
            metrics.close()
        (left,) = tmp_path.iterdir()
        assert left.name == f"e2h-{os.getuid()}"
        assert left.stat().st_mode & 0o777 == 0o700
        assert len(list(left.glob("*/metrics-*"))) == 1


def test_a_run_in_a_bucket_gets_the_same_rows_and_curves(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_module, "COPY_EVERY_S", 0.0)
    for root in (tmp_path, place(f"{bucket}/run")):
        for start in (1, 3):  # a second writer goes on where the first one stopped
            with MetricWriter(root) as metrics:
                for step in (start, start + 1):
                    metrics.scalar("warmup/loss", 1 / step, step)
                if isinstance(root, S3Path):
                    assert (root / "metrics.jsonl").read_text().count("\n") == start + 1
    copied = tmp_path / "copied"
    names = [name for name, _ in filesystem.list_files(f"{bucket}/run")]
    filesystem.copy_files(f"{bucket}/run", copied, names)
    assert read_curves(copied) == read_curves(tmp_path) == {"warmup/loss": [(s, 1 / s) for s in (1, 2, 3, 4)]}
    assert sum(name.startswith("tb/releasable/") for name in names) == 2
