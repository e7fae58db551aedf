from __future__ import annotations

import json

import pytest
import torch

from e2h.config import FinetuneConfig
from e2h.curriculum import units
from e2h.curriculum.units import fastest, free_bytes, measure_units, unit_size
from e2h.curriculum.workers import Workers
from e2h.diffusion.networks import UNet
from e2h.errors import InputError

ALONE = Workers(0, 1, torch.device("cpu"))
ROWS = [{"size": 1, "seconds": 1.0}, {"size": 4, "seconds": 3.0}, {"size": 16, "seconds": 11.0}]


def network() -> UNet:
    return UNet(8, 1, 3, 8, [1], [], 1, 8)


def measured(monkeypatch, seconds, settings=None, memory=2**40, used=None) -> list[int]:
    """The sizes tried, where a unit of n images takes seconds(n) and has used up used(n) bytes."""
    tried = []

    def run(engine, network, settings, shape, device):
        tried.append(shape[0])
        return seconds(shape[0])

    monkeypatch.setattr(units, "_seconds", run)
    monkeypatch.setattr(units, "free_bytes", lambda device: memory)
    monkeypatch.setattr(units, "peak_bytes", lambda device: used(max(tried, default=0)) if used else 0)
    rows = measure_units(network(), settings or FinetuneConfig(expected_batch_size=64), 8, 1, ALONE)
    assert [row["size"] for row in rows] == tried[: len(rows)]
    return tried


def test_padding_and_the_busiest_worker_count():
    assert fastest(ROWS, 64, 1) == 16  # 4 units of 11 s, 16 of 3 s, 64 of 1 s
    assert fastest(ROWS, 17, 1) == 4  # 2 x 11 s, 5 x 3 s, 17 x 1 s
    assert fastest(ROWS, 16, 4) == 4  # 11 s by one of four, 3 s, 4 s
    assert fastest(ROWS, 2, 2) == 1


def test_sizes_are_doubled_while_that_is_faster(monkeypatch):
    assert measured(monkeypatch, lambda n: 1.0 + 0.1 * n) == [1, 2, 4, 8, 16, 32, 64]
    assert measured(monkeypatch, lambda n: n * (1.0 if n < 8 else 2.0)) == [1, 2]
    assert measured(monkeypatch, lambda n: 1.0 + (n if n > 4 else 0)) == [1, 2, 4, 8]


def test_memory_ends_the_search(monkeypatch):
    # Half of 800 bytes may be used: 200 are, so that 400 could be, and then no more.
    assert measured(monkeypatch, lambda n: 1.0, memory=800, used=lambda n: 50 * n) == [1, 2, 4, 8]


def test_out_of_memory_leaves_the_sizes_below(monkeypatch):
    def seconds(size):
        if size >= 8:
            raise torch.OutOfMemoryError
        return 1.0

    assert measured(monkeypatch, seconds) == [1, 2, 4, 8]
    with pytest.raises(InputError, match=r"finetune\.noise_multiplicity=4 to fit the memory"):
        measured(monkeypatch, lambda size: seconds(size + 8))


def test_a_real_measurement():
    net = network()
    before = [parameter.clone() for parameter in net.parameters()]
    rows = measure_units(net, FinetuneConfig(expected_batch_size=4, noise_multiplicity=2), 8, 1, ALONE)
    assert [row["size"] for row in rows] == [1, 2, 4][: len(rows)]
    assert all(row["seconds"] > 0 and row["peak_mib"] >= 0 for row in rows)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert free_bytes(torch.device("cpu")) > 2**20


def test_the_size_is_measured_once_in_the_life_of_a_run(tmp_path):
    path, calls = tmp_path / "engine.json", []

    def measure():
        calls.append(1)
        return ROWS

    assert unit_size(path, ALONE, measure, 64) == 16
    assert unit_size(path, ALONE, measure, 2) == 16
    assert len(calls) == 1
    assert json.loads(path.read_text()) == {"physical_batch_size": 16, "measured": ROWS}


def test_every_worker_learns_what_rank_0_chose_or_that_it_failed(tmp_path, monkeypatch):
    def never():
        raise AssertionError("only rank 0 measures")

    def received(value):
        def add(self, values):
            values += value

        monkeypatch.setattr(Workers, "sum_integers", add)
        return unit_size(tmp_path / "engine.json", Workers(1, 2, torch.device("cpu")), never, 64)

    assert received(16) == 16
    with pytest.raises(RuntimeError, match="rank 0 says why"):
        received(0)


def test_a_failed_measurement_leaves_no_file(tmp_path):
    def fails():
        raise InputError("no memory")

    with pytest.raises(InputError, match="no memory"):
        unit_size(tmp_path / "engine.json", ALONE, fails, 64)
    assert list(tmp_path.iterdir()) == []
