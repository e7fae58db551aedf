"""What a clipped record may contribute, for rows as hostile as floating point allows."""

from __future__ import annotations

import numpy as np
import pytest

from e2h.privacy.clipping import clip_to_grid

BITS = 20
HOSTILE = {
    "ordinary": np.random.default_rng(0).standard_normal((50, 30)),
    "on the bound": np.eye(30) * 2.5,
    "just above": np.full((5, 30), 2.5 / np.sqrt(30)) * (1 + 2.0**-45),
    "huge": np.full((3, 30), 1e200),
    "largest": np.full((3, 30), np.finfo(float).max),
    "tiny": np.full((3, 30), 1e-320),
    "zero": np.zeros((3, 30)),
    "mixed": np.array([[1e300] + [1e-300] * 29, [-1e8] + [1.0] * 29]),
    "not a number": np.where(np.eye(30) > 0, np.nan, 1.0),
    "infinite": np.where(np.eye(30) > 0, -np.inf, 1.0),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("max_norm", [1e-3, 2.5, 1e6])
@pytest.mark.parametrize("rows", HOSTILE.values(), ids=HOSTILE)
def test_a_clipped_row_stays_within_its_norm_exactly(rows, max_norm):
    clipped = clip_to_grid(rows, max_norm, 2.0**BITS)
    assert (clipped == np.trunc(clipped)).all()
    for row in clipped.astype(np.int64).tolist():
        assert sum(value * value for value in row) <= 4**BITS  # in whole numbers: no rounding of the check
    bad = ~np.isfinite(rows).all(axis=1)
    assert (clipped[bad] == 0).all()


def test_clipping_keeps_what_is_small_and_the_direction_of_what_is_large():
    rows = HOSTILE["ordinary"]
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    expected = rows * np.minimum(1, 5.5 / norms)
    assert (norms < 5.5).any()
    assert (norms > 5.5).any()
    clipped = clip_to_grid(rows, 5.5, 2.0**BITS) * 5.5 * 2.0**-BITS
    assert np.abs(clipped - expected).max() <= 5.5 * 2.0**-BITS * (1 + 1e-6)
    huge = clip_to_grid(np.array([[3e200, -4e200]]), 1.0, 2.0**BITS)
    assert np.abs(huge - [[0.6 * 2**BITS, -0.8 * 2**BITS]]).max() <= 1


def test_a_bad_row_changes_no_other():
    rows = HOSTILE["ordinary"].copy()
    expected = clip_to_grid(rows, 2.5, 2.0**BITS)
    rows[7, 3] = np.nan
    clipped = clip_to_grid(rows, 2.5, 2.0**BITS)
    expected[7] = 0
    assert (clipped == expected).all()


def test_neighbouring_sums_differ_by_at_most_the_norm():
    rows = np.concatenate([*HOSTILE.values()])
    total = clip_to_grid(rows, 2.5, 2.0**BITS).sum(axis=0)
    lengths = []
    for missing in range(len(rows)):
        other = clip_to_grid(np.delete(rows, missing, axis=0), 2.5, 2.0**BITS).sum(axis=0)
        lengths.append(np.linalg.norm(total - other) * 2.0**-BITS)
    assert max(lengths) <= 1
    assert max(lengths) > 0.999


def test_sums_do_not_depend_on_the_order():
    rows = clip_to_grid(np.random.default_rng(2).standard_normal((5000, 8)) * 100, 3.0, 2.0**BITS)
    assert (rows.sum(axis=0) == rows[::-1].cumsum(axis=0)[-1]).all()


def test_whole_numbers_are_clipped_to_the_same_bits_in_any_order():
    """Each grid puts the first entry on a step: the last bit of the norm decides whether it is reached."""
    rng = np.random.default_rng(4)
    for _ in range(300):
        row = rng.integers(-510, 511, 400).astype(float)
        row[0] = row[0] or 7.0
        num_steps = 1000 * np.sqrt((row**2).sum()) / abs(row[0]) / (1 - 2.0**-30)
        orders = np.stack([np.arange(400), *(rng.permutation(400) for _ in range(4))])
        clipped = clip_to_grid(row[orders], 1.0, num_steps)
        back = np.take_along_axis(clipped, orders.argsort(axis=1), axis=1)
        assert (back == back[0]).all()
