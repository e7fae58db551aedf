"""A picture has one column for each class that there is an image of, and no more than can be read again."""

from __future__ import annotations

import numpy as np
import pytest

from e2h.curriculum.pictures import GRID_SIDE, MAX_COLUMNS, MAX_ROWS, SHOWN, by_class, by_round
from e2h.data.images import MAX_PIXELS, decode, encode_png, grid, upscale


def images(labels: list[int]) -> np.ndarray:
    """Each shows its label."""
    return np.array(labels, np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)


@pytest.mark.parametrize(
    ("labels", "shown", "columns"),
    [
        ([0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2], 3),
        ([0, 2, 2, 0], [0, 2, 0, 2], 2),  # a class without an image
        ([1, 1, 1], [1, 1, 1], 1),
        ([0, 1, 1, 1], [0, 1], 2),
        ([0] * 20 + [1] * 20, [0, 1] * SHOWN, 2),
    ],
)
def test_classes_stand_side_by_side(labels, shown, columns):
    found, width = by_class(images(labels), np.array(labels), 3)
    assert (found[:, 0, 0, 0].tolist(), width) == (shown, columns)


@pytest.mark.parametrize(
    ("rounds", "groups", "shown", "columns"),
    [
        (2, 3, [0, 1, 2, 3, 4, 5], 3),
        (3, 1, [0, 1, 2], 1),
        (2, MAX_COLUMNS + 1, [*range(MAX_COLUMNS), *range(MAX_COLUMNS + 1, 2 * MAX_COLUMNS + 1)], MAX_COLUMNS),
        (MAX_ROWS + 5, 2, list(range(2 * MAX_ROWS)), 2),
    ],
)
def test_rounds_stand_below_each_other(rounds, groups, shown, columns):
    found, width = by_round(images(list(range(rounds * groups))), groups)
    assert (found[:, 0, 0, 0].tolist(), width) == (shown, columns)


def test_a_picture_of_a_thousand_classes_can_be_read_again():
    labels = np.arange(5000) % 1000
    many = np.zeros((len(labels), 128, 128, 3), np.uint8)
    for shown in (by_class(many[:500], labels[:500], 1000), by_class(many, labels, 1000), by_round(many, 1000)):
        height, width, _ = decode(encode_png(upscale(grid(*shown), GRID_SIDE))).shape
        assert min(height, width) >= GRID_SIDE
        assert width * height < MAX_PIXELS / 4
