"""The central pass on Ray: whatever the tasks, what becomes of them, and the order of their answers, the same sums."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray
from ray import cloudpickle

from e2h.config import CentralConfig, Config, DataConfig, PrivacyConfig, ScalingConfig
from e2h.curriculum.central import CentralQuery
from e2h.curriculum.run import Run
from e2h.data.prepare import finish_prepared, prepare_shard
from e2h.data.sources import open_source
from e2h.data.storage import Prepared, load_split, open_prepared, read_ids
from e2h.distributed import datasets
from e2h.distributed.session import session
from e2h.errors import InputError
from e2h.privacy.events import PoissonSampledGaussian
from e2h.privacy.keys import derive_key

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CONFIG = Config(data=DataConfig(records_per_shard=128), privacy=PrivacyConfig(test_mode=True))


@pytest.fixture(scope="module", autouse=True)
def two_processors(tmp_path_factory) -> Iterator[None]:
    # Workers need not find this file.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with session(ScalingConfig(), tmp_path_factory.mktemp("ray") / "log"):
        yield


def test_one_machine_s_ray_shows_nothing_to_the_network():
    (node,) = ray.nodes()
    assert node["MetricsExportPort"] <= 0


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("run"), CONFIG)


@pytest.fixture(scope="module")
def prepared(run: Run) -> Prepared:
    """The digits in 15 files."""
    source = open_source(CONFIG.data)
    stats = [prepare_shard(shard, CONFIG.data, run.prepared, index) for index, shard in enumerate(source.shards)]
    finish_prepared(run.prepared, source, CONFIG.data, stats)
    return open_prepared(run.prepared)


def query(kind: type[CentralQuery] = CentralQuery, **more: object) -> CentralQuery:
    return kind(CentralConfig(count_weight=0.5), PoissonSampledGaussian(0.5, 1.0, 7), 8, 1, 10, 1500, **more)


def in_this_process(run: Run, prepared: Prepared) -> np.ndarray:
    key, whole = derive_key(run.secret(), "central/sampling", "d"), load_split(prepared, "train")
    return query().partial_sums(whole.images, whole.labels, whole.ids, key)


@pytest.mark.parametrize("num_tasks", [1, 2, 15])
def test_any_split_into_tasks_gives_the_same_sums(run, prepared, monkeypatch, num_tasks):
    shares = [list(share) for share in np.array_split(np.array(prepared.files("train"), object), num_tasks)]
    monkeypatch.setattr(datasets, "_shares", lambda prepared: shares)
    assert (datasets.query_sums(run, prepared, query(), "central", "d") == in_this_process(run, prepared)).all()
    assert (datasets.query_sums(run, prepared, query(), "central", "e") != in_this_process(run, prepared)).any()


@pytest.mark.parametrize(("num_cpus", "task_records", "num_tasks"), [(1, 65536, 4), (100, 65536, 15), (1, 250, 6)])
def test_every_file_is_in_one_task(prepared, monkeypatch, num_cpus, task_records, num_tasks):
    monkeypatch.setattr(datasets, "_num_cpus", lambda: num_cpus)
    monkeypatch.setattr(datasets, "TASK_RECORDS", task_records)
    shares = datasets._shares(prepared)
    assert len(shares) == num_tasks
    assert [file for share in shares for file in share] == prepared.files("train")


@dataclass(frozen=True)
class Dying(CentralQuery):
    """Kills its process at the given records, the first time."""

    folder: str = ""
    at: tuple[int, ...] = ()

    def partial_sums(self, images, labels, record_ids, key, total=None):
        found = super().partial_sums(images, labels, record_ids, key, total)
        marker = Path(self.folder) / str(record_ids[0])
        if record_ids[0] in self.at and not marker.exists():
            marker.touch()
            os._exit(1)
        return found


def test_tasks_that_die_run_again_and_count_once(run, prepared, tmp_path, monkeypatch):
    files = prepared.files("train")
    monkeypatch.setattr(datasets, "_shares", lambda prepared: [files[:8], files[8:]])
    at = tuple(
        int(read_ids(files[index].name)[0]) for index in (5, 14)
    )  # in the middle of one, at the end of the other
    found = datasets.query_sums(run, prepared, query(Dying, folder=str(tmp_path), at=at), "central", "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, at))
    assert (found == in_this_process(run, prepared)).all()


@dataclass(frozen=True)
class Late(CentralQuery):
    """Answers of later shares come first."""

    last: int = 0

    def partial_sums(self, images, labels, record_ids, key, total=None):
        time.sleep(0.5 if record_ids[0] == self.last else 0.0)
        return super().partial_sums(images, labels, record_ids, key, total)


def test_the_order_of_answers_does_not_matter(run, prepared):
    first = int(load_split(prepared, "train").ids[0])
    found = datasets.query_sums(run, prepared, query(Late, last=first), "central", "d")
    assert (found == in_this_process(run, prepared)).all()


def test_few_answers_wait(monkeypatch):
    """Each of 40 tasks notes that it began; no more begin than the answers that were taken and the bound."""
    ray = datasets.ray
    task, taken, most = ray.remote(num_cpus=0.01)(lambda index: {"value": index, "refused": ""}), [], 0
    started = []
    submit = task.remote
    monkeypatch.setattr(task, "remote", lambda index: started.append(index) or submit(index))
    for value in datasets._answers(task, list(range(40))):
        most = max(most, len(started) - len(taken))
        taken.append(value)
    assert sorted(taken) == list(range(40))
    assert most <= 2 * max(datasets._num_cpus(), 4)


def test_a_pass_that_saw_other_records_releases_nothing(run, prepared):
    manifest = replace(prepared.manifest, num_train=prepared.manifest.num_train + 1)
    with pytest.raises(RuntimeError, match=f"saw {prepared.manifest.num_train} records of {manifest.num_train}"):
        datasets.query_sums(run, Prepared(prepared.folder, manifest), query(), "central", "d")


def test_a_node_without_the_secret_is_one_line(run, prepared):
    private = Run(run.root, replace(CONFIG, privacy=PrivacyConfig(secret="env:ABSENT_ON_EVERY_NODE")))
    with pytest.raises(InputError, match=r"^privacy\.secret=env:ABSENT_ON_EVERY_NODE: .*set ABSENT_ON_EVERY_NODE$"):
        datasets.query_sums(private, prepared, query(), "central", "d")
