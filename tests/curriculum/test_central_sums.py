"""The sums of the central pass: exact, on any machine, in any blocks, in bounded memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from central_cases import CLASSES, KEY, QUERIES, SIDE, hostile, query, records

from e2h.curriculum import central as central_module
from e2h.curriculum.central import GRID_BITS, add_product, add_selected


@pytest.mark.parametrize("settings", [QUERIES["mean with count"], QUERIES["mode"], QUERIES["mean of all"]])
def test_sums_do_not_depend_on_blocks_or_order(settings):
    one = query(**settings)
    images, labels, ids = records(200)
    whole = one.partial_sums(images, labels, ids, KEY)
    order = np.random.default_rng(5).permutation(200)
    for cuts in ([100], [1, 2, 199], [50, 51, 120]):
        parts = [one.partial_sums(images[p], labels[p], ids[p], KEY) for p in np.split(order, cuts)]
        assert (sum(parts) == whole).all()
    assert whole.dtype == np.int64
    assert whole.shape == (4, one.num_groups, one.dimension)


def test_sums_are_exact_in_whole_numbers():
    one = query(max_norm=1e-3, q=1.0, rounds=1)  # every record at the bound: the largest sums
    images, labels, ids = records(3000)
    encoded = one.encode(images).astype(np.int64)
    expected = np.stack([encoded[labels == group].sum(axis=0) for group in range(CLASSES)])
    assert (one.partial_sums(images, labels, ids, KEY)[0] == expected).all()


ROWS = {
    "ordinary": np.random.default_rng(0).integers(-(2**14), 2**14, (1024, 40)),
    "at the bound": np.full((1024, 40), 2**GRID_BITS),
    "odd, at the bound": np.full((1024, 40), 1 - 2**GRID_BITS),
    "one large": np.where(np.arange(1024)[:, None] == 500, 2**GRID_BITS, 3),
    "rising": np.minimum(np.arange(1024)[:, None] ** 2 * [[1, -1]], 2**GRID_BITS),
    "zero": np.zeros((7, 40)),
    "one": np.ones((1, 1)),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("strip", [3, 1024])
def test_fast_sums_are_exact_up_to_the_bound(rows, strip, monkeypatch):
    monkeypatch.setattr(central_module, "STRIP", strip)
    rows = rows.astype(np.int64)
    masks = np.random.default_rng(1).random((30, len(rows))) < 0.9
    masks[0], masks[1] = True, False
    for add, dtype in ((add_product, np.float32), (add_selected, np.int32)):
        total = np.full((30, rows.shape[1]), 2**40 + 1)
        add(total, masks, rows.astype(dtype))
        assert (total == masks.astype(np.int64) @ rows + 2**40 + 1).all()


@pytest.mark.parametrize("settings", QUERIES.values(), ids=QUERIES)
def test_looking_up_records_and_the_product_give_the_same_sums(settings, monkeypatch):
    block = records(90, settings.get("channels", 1))
    product = query(**settings).partial_sums(*block, KEY)
    monkeypatch.setattr(central_module, "DENSE", 0.9)
    assert (query(**settings).partial_sums(*block, KEY) == product).all()


@pytest.mark.parametrize("settings", QUERIES.values(), ids=QUERIES)
def test_a_record_is_encoded_as_whole_number_arithmetic_says(settings):
    """No machine's order of sums can show: a reference in Python's whole numbers finds the same norm."""
    one = query(**settings)
    images = np.concatenate([records(30, one.channels)[0], hostile(one.channels)])
    encoded = one.encode(images)
    factor, weight = one.central.pool_factor, one.central.count_weight
    blocks = images.reshape(len(images), 8 // factor, factor, 8 // factor, factor, one.channels).astype(int)
    pooled, white = blocks.sum(axis=(2, 4)).reshape(len(images), -1), 255 * factor**2
    for row, pixels in zip(encoded, pooled.tolist(), strict=True):
        if one.central.query == "mode":
            bins = [min(value * one.central.num_bins // white, one.central.num_bins - 1) for value in pixels]
            assert (row.reshape(len(pixels), -1).argmax(axis=1) == bins).all()
            continue
        centred = [2 * value - round(2 * white * one.central.centre) for value in pixels]
        norm, limit = math.sqrt(sum(value * value for value in centred)), one.central.max_norm * 2 * white
        factor_of_row = 2**GRID_BITS / math.sqrt(1 + weight**2) / max(norm, limit)
        assert abs(row[:-1] - np.array(centred) * factor_of_row).max() <= 1 + 2**-9
        assert row[-1] == math.floor(weight * 2**GRID_BITS / math.sqrt(1 + weight**2) * (1 - 2**-30))


@pytest.mark.parametrize("settings", [{"max_norm": 2.0, "centre": 0.3}, QUERIES["mean around grey"], QUERIES["mode"]])
def test_the_order_of_a_records_pixels_is_nothing_to_its_bits(settings):
    one, order = query(**settings), np.random.default_rng(2).permutation(SIDE * SIDE)
    images = records(500)[0]
    shuffled = images.reshape(500, -1)[:, order].reshape(images.shape)
    width = 16 if one.central.query == "mode" else 1
    before, after = one.encode(images)[:, : 64 * width], one.encode(shuffled)[:, : 64 * width]
    assert (before.reshape(500, 64, width)[:, order] == after.reshape(500, 64, width)).all()


PRINT_DIGEST = """
import hashlib
import numpy as np
from e2h.config import CentralConfig
from e2h.curriculum.central import CentralQuery
from e2h.privacy.events import PoissonSampledGaussian
rng = np.random.default_rng(0)
images, found = rng.integers(0, 256, (400, 16, 16, 3), dtype=np.uint8), hashlib.sha256()
for centre, weight, factor in ((0.0, 0.0, 1), (0.37, 0.7, 1), (0.5, 0.0, 2)):
    settings = CentralConfig(max_norm=1.5, centre=centre, count_weight=weight, pool_factor=factor)
    query = CentralQuery(settings, PoissonSampledGaussian(0.5, 1.0, 20), 16, 3, 2, 400)
    found.update(query.encode(images).tobytes())
    found.update(query.partial_sums(images, np.arange(400) % 2, np.arange(400), bytes(range(32))).tobytes())
print(found.hexdigest())
"""


def test_a_processor_with_fewer_instructions_gives_the_same_bits():
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    used = [name for name in __cpu_dispatch__ if __cpu_features__[name]]
    if not used:
        pytest.skip("numpy uses nothing on this processor that can be switched off")
    other = {"NPY_DISABLE_CPU_FEATURES": " ".join(used), "OPENBLAS_CORETYPE": "Prescott"}
    command = [sys.executable, "-W", "ignore", "-c", PRINT_DIGEST]
    runs = [subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True) for more in ({}, other)]
    assert runs[0].stdout == runs[1].stdout != "", runs[1].stderr


def test_memory_beyond_the_sums_does_not_grow_with_the_records(monkeypatch):
    monkeypatch.setattr(central_module, "MOST_RECORDS", 100)
    one, peaks = query(rounds=2), []
    for count in (1000, 16_000):
        block, total = records(count), one.zero_sums()
        tracemalloc.start()
        one.partial_sums(*block, KEY, total)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Coins and places of a record, and not its 65 numbers of 4 bytes.
    assert peaks[1] - peaks[0] < 15_000 * 60


def test_sums_are_added_to_the_total_that_is_given():
    one, block = query(), records(50)
    total = np.full_like(one.zero_sums(), 7)
    assert one.partial_sums(*block, KEY, total) is total
    assert (total == one.partial_sums(*block, KEY) + 7).all()
