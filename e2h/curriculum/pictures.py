"""Pictures of releasable images: what an easy stage gave, and synthetic ones."""

from __future__ import annotations

import numpy as np

from e2h.config import stamp
from e2h.curriculum.run import Run
from e2h.data.images import grid, upscale, write_png
from e2h.data.remote import Place

GRID_SIDE = 320  # pixels
SHOWN = 8  # images of each class
# Whatever the classes and rounds, or a picture gets too large to be read again.
MAX_COLUMNS, MAX_ROWS = 20, 20


def by_class(images: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, int]:
    """For a picture: equally many images of each class there is, at most SHOWN, one class a column; and the columns.

    Of more than MAX_COLUMNS classes the first are shown.
    """
    places = [np.flatnonzero(labels == label)[:SHOWN] for label in range(num_classes)]
    places = [found for found in places if len(found)][:MAX_COLUMNS]
    rows = min(len(found) for found in places)
    return images[np.stack([found[:rows] for found in places], axis=1).reshape(-1)], len(places)


def by_round(images: np.ndarray, num_groups: int) -> tuple[np.ndarray, int]:
    """For a picture: the first of these images, which come round by round, one group a column; and the columns."""
    shown = images.reshape(-1, num_groups, *images.shape[1:])[:MAX_ROWS, :MAX_COLUMNS]
    return shown.reshape(-1, *images.shape[1:]), shown.shape[1]


def write_grid(run: Run, path: Place, images: np.ndarray, columns: int) -> None:
    """A picture of releasable images."""
    write_png(path, upscale(grid(images, columns), GRID_SIDE), stamp(run.config))
