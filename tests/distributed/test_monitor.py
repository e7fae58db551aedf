"""What a run shows while it goes: the progress file, and gauges that a real Ray exports."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from urllib.request import urlopen

import pytest
import ray
from ray import cloudpickle

from e2h.config import Config
from e2h.distributed import monitor
from e2h.distributed.failures import summary
from e2h.distributed.monitor import GAUGES, Monitor, epsilon_after
from e2h.distributed.progress import PROGRESS_FILE, Progress, read_progress
from e2h.distributed.session import QUIET

SCHEDULE = [[10, 1.5], [30, 2.5], [60, 4.0]]
PLAN = {"epsilon_schedule": SCHEDULE, "releases": [{"name": "central", "epsilon_alone": 1.0}, {"name": "finetune"}]}


class Gauge:
    """In the place of Ray's: keeps what was set last."""

    values: ClassVar[dict[tuple[str, str], float]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name = name

    def set_default_tags(self, tags: dict[str, str]) -> None:
        assert tags == {"run": "one"}

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[self.name.removeprefix("e2h_"), tags["stage"]] = value


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "one"
    root.mkdir()
    (root / "plan.json").write_text(json.dumps(PLAN))
    return root


@pytest.fixture
def values(monkeypatch) -> dict[tuple[str, str], float]:
    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    monkeypatch.setattr(Gauge, "values", {})
    return Gauge.values


@pytest.mark.parametrize(("step", "epsilon"), [(0, 1.5), (10, 1.5), (11, 2.5), (60, 4.0), (99, 4.0)])
def test_epsilon_is_never_below_that_of_the_steps(step, epsilon):
    assert epsilon_after(SCHEDULE, step) == epsilon


def test_epsilon_covers_the_block_that_is_paid_ahead(root, values):
    block = Config().finetune.ledger_block
    Monitor(root, Config(), 0).update("warmup", 7)
    assert values["epsilon_spent", "warmup"] == 1.0
    Monitor(root, Config(), 0).update("finetune", 31 - block)
    assert values["epsilon_spent", "finetune"] == 4.0


def test_throughput_is_the_expected_batch_over_some_seconds_of_one_stage(root, values, monkeypatch):
    now = iter([100.0, 102.0, 105.0, 106.0, 116.0])
    monkeypatch.setattr(monitor.time, "monotonic", lambda: next(now))
    one, batch = Monitor(root, Config(), 3), Config()
    one.update("warmup", 1)
    one.update("warmup", 2)
    assert ("images_per_second", "warmup") not in values
    one.update("warmup", 11)
    assert values["images_per_second", "warmup"] == pytest.approx(batch.warmup.batch_size * 2)
    one.update("finetune", 1)
    assert ("images_per_second", "finetune") not in values
    one.update("finetune", 6)
    assert values["images_per_second", "finetune"] == pytest.approx(batch.finetune.expected_batch_size / 2)
    assert values["steps_done", "finetune"] == 6
    assert values["worker_group_restarts", "finetune"] == 3


def test_a_run_without_a_plan_is_watched_but_for_epsilon(root, values):
    (root / "plan.json").unlink()
    Monitor(root, Config(), 0).update("finetune", 1)
    assert ("steps_done", "finetune") in values
    assert ("epsilon_spent", "finetune") not in values


def test_a_group_that_finds_a_progress_file_was_started_anew(root, values):
    path = root / PROGRESS_FILE
    Progress(path, Config()).update("finetune", 5)
    assert read_progress(path) == ("finetune", 5, 0)
    Progress(path, Config())
    assert read_progress(path) == ("", 0, 1)
    Progress(path, Config()).update("finetune", 6)
    assert read_progress(path) == ("finetune", 6, 2)
    path.unlink()  # as the driver does
    Progress(path, Config())
    assert read_progress(path) == ("", 0, 0)


def test_a_trial_of_a_search_has_no_gauge(root, values):
    Progress(root / PROGRESS_FILE, None).update("finetune", 5)
    assert read_progress(root / PROGRESS_FILE) == ("finetune", 5, 0)
    assert values == {}


@pytest.mark.parametrize("content", ["", "[]", '{"stage": "warmup"}', '{"stage": "warmup", "step": null}'])
def test_a_progress_file_that_can_t_be_read_tells_nothing(tmp_path, content):
    (tmp_path / PROGRESS_FILE).write_text(content)
    assert read_progress(tmp_path / PROGRESS_FILE) is None
    assert read_progress(tmp_path / "absent") is None


def test_progress_that_can_t_be_written_does_not_end_a_run(root, values, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("e2h.distributed.progress.write_bytes", full)
    Progress(root / PROGRESS_FILE, Config()).update("warmup", 1)


@pytest.fixture(scope="module")
def real_ray() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # As on a cluster; a session of one machine exports nothing.
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def exported(timeout_s: float) -> dict[tuple[str, str, str], float]:
    """Gauges of ours on this node's metrics port by (name, run, stage), as soon as there are any."""
    node = ray.nodes()[0]
    url, end = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", time.monotonic() + timeout_s
    while time.monotonic() < end:
        lines = urlopen(url, timeout=30).read().decode().splitlines()
        found = {}
        for line in lines:
            if line.startswith("ray_e2h_"):
                run, stage = (re.search(rf'[{{,]{tag}="([^"]*)"', line)[1] for tag in ("run", "stage"))
                found[line.partition("{")[0], run, stage] = float(line.rpartition(" ")[2])
        if found:
            return found
        time.sleep(0.5)
    raise AssertionError(f"no gauge of ours among {len(lines)} lines")


class Trains:
    """Rank 0 of a run."""

    def step(self, root: Path) -> None:
        monitor.RATE_OVER_S = 0.0
        self.progress = Progress(root / PROGRESS_FILE, Config())
        for step in (21, 22):
            self.progress.update("finetune", step)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_exports_the_gauges(root, real_ray):
    actor = ray.remote(num_cpus=0.1)(Trains).remote()
    ray.get(actor.step.remote(root))
    found = exported(timeout_s=120)
    assert found.keys() == {(f"ray_{name}", "one", "finetune") for name in GAUGES}
    assert found["ray_e2h_steps_done", "one", "finetune"] == 22
    assert found["ray_e2h_epsilon_spent", "one", "finetune"] == epsilon_after(
        SCHEDULE, 22 + Config().finetune.ledger_block
    )


def fails(config: dict[str, str]) -> None:
    import ray.train

    raise ValueError(f"an image of shape (3, {ray.train.get_context().get_world_rank() + 8})")


@pytest.mark.ray
@pytest.mark.long
def test_workers_that_fail_are_told_of_once(tmp_path, real_ray):
    from ray.train import FailureConfig, RunConfig, WorkerGroupError
    from ray.train import ScalingConfig as Workers
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        fails,
        train_loop_config={},
        scaling_config=Workers(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name="x", storage_path=str(tmp_path), failure_config=FailureConfig(max_failures=0)),
    )
    with pytest.raises(WorkerGroupError) as raised:
        trainer.fit()
    # Ray may end the group before the second worker's error arrives.
    assert re.fullmatch(r"workers? [01](, 1)?: ValueError: an image of shape \(3, [89]\)", summary(raised.value))
