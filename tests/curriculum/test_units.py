"""Work units that fit the memory, the same for every worker and after every restart."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from e2h.config import FinetuneConfig
from e2h.curriculum import finetune, units
from e2h.curriculum.units import free_bytes, largest_that_fits, unit_size
from e2h.curriculum.workers import Workers
from e2h.diffusion.networks import UNet
from e2h.errors import InputError
from e2h.privacy.dpsgd import ClippedSum

CPU = torch.device("cpu")
ALONE = Workers(0, 1, CPU)


def network() -> UNet:
    return UNet(8, 1, 3, 8, [1], [], 1, 8)


def chosen(monkeypatch, used=lambda size: 0, memory=2**40, batch=1000, workers=ALONE) -> tuple[int, list[int]]:
    """The size chosen and those tried, where a unit of n images uses used(n) bytes."""
    tried = []
    monkeypatch.setattr(units, "private_micro_batch", lambda network, settings, size, *shape: tried.append(size))
    monkeypatch.setattr(units, "in_use", lambda device: 1000)
    monkeypatch.setattr(units, "height_of", lambda work, device: (work(), 1000 + used(tried[-1]))[1])
    monkeypatch.setattr(units, "free_bytes", lambda device: memory)
    return largest_that_fits(network(), FinetuneConfig(expected_batch_size=batch), 8, 1, workers), tried


def test_sizes_double_up_to_the_largest_or_a_fourth_of_the_batch(monkeypatch):
    assert chosen(monkeypatch) == (64, [1, 2, 4, 8, 16, 32, 64])
    assert chosen(monkeypatch, batch=80) == (16, [1, 2, 4, 8, 16])


@pytest.mark.parametrize(
    ("batch", "workers", "size"),
    [(4000, 1, 64), (4000, 15, 64), (4000, 16, 32), (4000, 64, 8), (1000, 8, 16), (1023, 8, 16), (1024, 8, 32)],
)
def test_every_worker_gets_about_four_units_of_a_batch(monkeypatch, batch, workers, size):
    assert chosen(monkeypatch, batch=batch, workers=Workers(0, workers, CPU))[0] == size


@pytest.mark.parametrize("workers", [1, 2, 100])
def test_a_unit_has_an_image_however_few_there_are_for_each_worker(monkeypatch, workers):
    assert chosen(monkeypatch, batch=3, workers=Workers(0, workers, CPU)) == (1, [1])


def test_memory_ends_the_search(monkeypatch):
    # Half of 800 bytes may be used: at 4 images 200 are, so that 8 fit, and 16 would not.
    assert chosen(monkeypatch, used=lambda size: 50 * size, memory=800) == (8, [1, 2, 4, 8])
    assert chosen(monkeypatch, used=lambda size: 50 * size, memory=800, workers=Workers(0, 2, CPU)) == (4, [1, 2, 4])


def test_out_of_memory_leaves_the_size_below(monkeypatch):
    def used(size):
        if size >= limit:
            raise torch.OutOfMemoryError
        return 0

    limit = 8
    assert chosen(monkeypatch, used) == (4, [1, 2, 4, 8])
    limit = 1
    with pytest.raises(InputError, match=r"finetune\.noise_multiplicity=4: expected one image .* to fit the memory"):
        chosen(monkeypatch, used)


def test_a_real_choice_leaves_the_network_as_it_is():
    net = network()
    before = [parameter.clone() for parameter in net.parameters()]
    settings = FinetuneConfig(expected_batch_size=16, noise_multiplicity=2)
    assert largest_that_fits(net, settings, 8, 1, ALONE) == 4
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())


# In a process of its own: a system that takes back memory which a large process has long not touched would be measured.
MEASURED = """
import numpy as np, torch
from e2h.curriculum.units import height_of, in_use
cpu = torch.device("cpu")
for size in (200, 100):
    before = in_use(cpu)
    print((height_of(lambda: np.ones(size * 2**20, np.uint8).sum(), cpu) - before) / 2**20)
"""


def test_memory_is_measured():
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    first, second = map(float, done.stdout.split())
    assert 190 < first < 260
    assert 90 < second < 160  # what was used before and given back does not hide what is used now
    assert free_bytes(CPU) > 2**20


@pytest.mark.parametrize(
    ("limit", "used", "files"),
    [("memory.max", "memory.current", "inactive_file"), ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")],
)
def test_files_that_a_container_has_read_do_not_fill_its_memory(tmp_path, monkeypatch, limit, used, files):
    monkeypatch.setattr(units, "CONTROL_GROUPS", ((str(tmp_path), limit, used, files),))
    most = 2**24  # less than any machine has free
    for name, content in ((limit, most), (used, most - 1000), ("memory.stat", f"anon 900\n{files} 700\nother 1")):
        (tmp_path / name).write_text(f"{content}\n")
    assert free_bytes(CPU) == 1700
    (tmp_path / limit).write_text("max\n")
    assert free_bytes(CPU) > most


def test_no_sum_over_all_parameters_outlives_its_unit(monkeypatch):
    alive: list[int] = []
    vectors: list[weakref.ref[torch.Tensor]] = []

    class Summed:
        def accumulate(self, batch, weights):
            vector = torch.zeros(1000, dtype=torch.int64)
            vectors.append(weakref.ref(vector))
            return ClippedSum(vector, 1, torch.zeros(4), torch.zeros(4))

    monkeypatch.setattr(finetune, "_micro_batch", lambda *_: ({}, torch.ones(4)))
    told = finetune.sum_units(
        Summed(),
        lambda clipped: alive.append(sum(one() is not None for one in vectors)),
        *(network(), None, np.arange(40), FinetuneConfig(), 0, 0, 4, ALONE),
    )
    assert alive == [1] * 10
    assert [(len(losses), len(norms)) for losses, norms in told] == [(1, 1)] * 10


def test_the_size_is_chosen_once_in_the_life_of_a_run(tmp_path):
    path, calls = tmp_path / "units.json", []

    def choose():
        calls.append(1)
        return 16

    assert [unit_size(path, ALONE, choose) for _ in range(2)] == [16, 16]
    assert len(calls) == 1
    assert json.loads(path.read_text()) == {"physical_batch_size": 16}


def test_every_worker_learns_what_rank_0_chose_or_that_it_failed(tmp_path, monkeypatch):
    def never():
        raise AssertionError("only rank 0 chooses")

    def received(value):
        def add(self, values):
            values += value

        monkeypatch.setattr(Workers, "sum_integers", add)
        return unit_size(tmp_path / "units.json", Workers(1, 2, CPU), never)

    assert received(16) == 16
    with pytest.raises(RuntimeError, match="rank 0 says why"):
        received(0)


def test_a_failed_choice_leaves_no_file(tmp_path):
    def fails():
        raise InputError("no memory")

    with pytest.raises(InputError, match="no memory"):
        unit_size(tmp_path / "units.json", ALONE, fails)
    assert list(tmp_path.iterdir()) == []


DAMAGED = {
    "empty": b"",
    "cut": b'{"physical_batch_si',
    "not text": b"\xff\xfe",
    "a list": b"[8]",
    "another key": b'{"size": 8}',
    "nothing": b'{"physical_batch_size": null}',
    "true": b'{"physical_batch_size": true}',
    "a fraction": b'{"physical_batch_size": 8.0}',
    "text": b'{"physical_batch_size": "8"}',
    "zero": b'{"physical_batch_size": 0}',
    "negative": b'{"physical_batch_size": -8}',
    "no power of two": b'{"physical_batch_size": 12}',
    "too large": b'{"physical_batch_size": 2048}',
    "beyond 64 bits": b'{"physical_batch_size": 1e400}',
}


class Together(Workers):
    """One of two workers in threads: what is summed meets at a barrier."""

    barrier, total = threading.Barrier(2, timeout=30), 0

    def sum_integers(self, values):
        if self.rank == 0:
            Together.total = 0
        self.barrier.wait()
        if self.rank == 0:
            Together.total = int(values)
        self.barrier.wait()
        values.fill_(Together.total)  # the other worker adds 0


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_line_and_ends_the_whole_group(tmp_path, content):
    path = tmp_path / "units.json"
    path.write_bytes(content)

    def outcome(rank):
        try:
            return unit_size(path, Together(rank, 2, CPU), lambda: 8)
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(outcome, range(2))
    assert type(first) is InputError
    assert str(first).startswith(f'{path}: expected {{"physical_batch_size": n}} with n a power of two from 1 to 1024')
    assert "\n" not in str(first)
    assert type(second) is RuntimeError
    assert "rank 0 says why" in str(second)
    assert path.read_bytes() == content


def test_a_folder_in_place_of_the_file_is_one_line_and_its_removal_chooses_anew(tmp_path):
    path = tmp_path / "units.json"
    path.mkdir()
    with pytest.raises(InputError, match="remove the file, and the size is chosen anew"):
        unit_size(path, ALONE, lambda: 8)
    path.rmdir()
    assert unit_size(path, ALONE, lambda: 8) == 8


def test_every_size_that_can_be_chosen_can_be_read(tmp_path):
    for largest in units.LARGEST.values():
        assert largest in units.SIZES
    for size in units.SIZES:
        assert unit_size(tmp_path / f"{size}.json", ALONE, lambda size=size: size) == size
