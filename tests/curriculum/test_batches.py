"""Public randomness of training belongs to a record, not to its place in a batch."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import CLASSES, FINETUNE, NUM_RECORDS, WARMUP, new_network, records

from e2h.curriculum import warmup
from e2h.curriculum.batches import addressed_seeds, make_batch, one_ahead, work_units
from e2h.curriculum.finetune import _micro_batch
from e2h.curriculum.warmup import shift
from e2h.curriculum.workers import Workers
from e2h.diffusion.losses import micro_batch_loss


def test_every_address_has_its_own_seed():
    ids = records().ids
    seeds = [
        addressed_seeds(seed, stage, step, ids)
        for seed in (0, 1)
        for stage in ("warmup", "finetune")
        for step in (0, 1)
    ]
    assert len({one for part in seeds for one in part}) == 8 * NUM_RECORDS
    assert seeds[0] == addressed_seeds(0, "warmup", 0, ids)
    assert addressed_seeds(0, "warmup", 0, ids[5:7]) == seeds[0][5:7]
    assert all(0 <= one < 2**63 for one in seeds[0])


def test_removing_a_record_leaves_the_random_numbers_of_the_others():
    network, images = new_network(), records()
    with_it, without = np.array([3, 7, 9, 11]), np.array([3, 9, 11])
    settings = replace(FINETUNE, label_dropout=0.5)
    for step in range(5):
        whole, _ = _micro_batch(network, images, with_it, settings, 0, step, 4)
        rest, weights = _micro_batch(network, images, without, settings, 0, step, 4)
        assert weights.tolist() == [1, 1, 1, 0]
        for name in ("images", "labels", "sigma", "noise"):
            assert torch.equal(whole[name][[0, 2, 3]], rest[name][:3])
        assert torch.equal(rest["noise"][3], rest["noise"][0])  # the padding, a copy of the first


def test_warm_up_and_dp_sgd_draw_the_noise_levels_that_the_network_asks_for():
    network, images = new_network(), records()
    network.log_sigma = (3.0, 0.01)
    private, _ = _micro_batch(network, images, np.arange(4), FINETUNE, 0, 0, 4)
    units = warmup._units(network, images.images, images.labels, WARMUP, 0, Workers.current(), "warmup", 0)
    for batch in (private, *units):
        assert torch.allclose(batch["sigma"].log(), torch.tensor(3.0), atol=0.06)


def test_a_batch_is_scaled_and_drops_labels_at_the_given_rate():
    images = np.zeros((4000, 8, 8, 1), np.uint8)
    images[0], images[1] = 0, 255
    seeds = addressed_seeds(0, "finetune", 0, np.arange(4000))
    batch = make_batch(images, np.full(4000, 2), seeds, 3, 0.25, CLASSES)
    assert batch["images"].shape == (4000, 1, 8, 8)
    assert (batch["images"][0] == -1).all()
    assert (batch["images"][1] == 1).all()
    assert (batch["sigma"].shape, batch["noise"].shape) == ((4000, 3), (4000, 3, 1, 8, 8))
    assert set(batch["labels"].tolist()) == {2, CLASSES}
    assert float((batch["labels"] == CLASSES).float().mean()) == pytest.approx(0.25, abs=0.035)
    assert float(batch["noise"].std()) == pytest.approx(1, abs=0.005)
    unlabelled = make_batch(images[:9], np.full(9, -1), seeds[:9], 1, 0.0, CLASSES)
    assert set(unlabelled["labels"].tolist()) == {CLASSES}


@pytest.mark.parametrize(("num_items", "size"), [(0, 4), (1, 4), (12, 4), (13, 4), (30, 7)])
def test_units_are_the_same_for_any_number_of_workers(num_items, size):
    alone = list(work_units(num_items, size, 0, 1))
    assert [i for unit in alone for i in range(unit.start, unit.stop)] == list(range(num_items))
    for num_workers in (2, 3, 9):
        shared = [list(work_units(num_items, size, rank, num_workers)) for rank in range(num_workers)]
        assert sorted((u for part in shared for u in part), key=lambda u: u.start) == alone


def test_a_shift_repeats_the_border():
    image = np.arange(16).reshape(4, 4, 1)
    assert (shift(image, 0, 0) == image).all()
    assert (shift(image, 1, 0)[:, :, 0] == image[[0, 0, 1, 2]][:, :, 0]).all()
    assert (shift(image, 0, -2)[:, :, 0] == image[:, [2, 3, 3, 3]][:, :, 0]).all()


def test_each_draw_of_a_record_has_its_own_augmentation():
    images = np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8, 1)
    seeds = addressed_seeds(0, "finetune", 0, np.arange(2))
    plain = make_batch(images, np.zeros(2), seeds, 40, 0.1, CLASSES)
    batch = make_batch(images, np.zeros(2), seeds, 40, 0.1, CLASSES, max_shift=1, flip=True)
    assert batch["images"].shape == (2, 40, 1, 8, 8)
    for name in ("labels", "sigma", "noise"):  # what was drawn without augmentation stays
        assert torch.equal(plain[name], batch[name])
    for image, draws in zip(plain["images"], batch["images"], strict=True):
        seen = {tuple(draw.flatten().tolist()) for draw in draws}
        moved = {
            tuple(torch.as_tensor(one[:, :, ::-1].copy() if mirror else one).flatten().tolist())
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            for one in [shift(image.permute(1, 2, 0).numpy(), down, right).transpose(2, 0, 1)]
            for mirror in (False, True)
        }
        assert seen <= moved
        assert len(seen) > 10
    network = new_network()
    same = {**plain, "images": plain["images"][:, None].expand(-1, 40, -1, -1, -1)}
    assert torch.allclose(micro_batch_loss(network, same), micro_batch_loss(network, plain))


def test_a_thread_makes_one_ahead_in_order_and_its_failure_is_that_of_the_loop():
    made, used = [], []

    def make(item):
        made.append(item)
        if item == 4:
            raise ValueError("no fourth")
        return item * 10

    def use_all() -> None:
        for value in one_ahead(make, iter(range(1, 9))):
            used.append(value)
            assert len(made) <= len(used) + 1

    with pytest.raises(ValueError, match="no fourth"):
        use_all()
    assert used == [10, 20, 30]
    assert made[:4] == [1, 2, 3, 4]
    assert len(made) <= 5
    assert list(one_ahead(make, [])) == []
    assert list(one_ahead(make, [7])) == [70]
    made.clear()
    values = one_ahead(make, [7, 8, 9])
    next(values)
    until = time.monotonic() + 10
    while len(made) < 2:  # the second is made although nobody has asked for it
        assert time.monotonic() < until
    values.close()
    assert made == [7, 8]
    assert not any(one.name.startswith("ahead") for one in threading.enumerate())
