"""A picture has one column for each class that there is an image of."""

from __future__ import annotations

import numpy as np
import pytest

from e2h.curriculum.pictures import SHOWN, by_class


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
