"""Pictures of releasable images: what an easy stage gave, and synthetic ones."""

from __future__ import annotations

import numpy as np

from e2h.config import stamp
from e2h.curriculum.run import Run
from e2h.data.images import grid, upscale, write_png
from e2h.data.remote import Place

GRID_SIDE = 320  # pixels
SHOWN = 8  # images of each class


def by_class(images: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, int]:
    """For a picture: equally many images of each class there is, at most SHOWN, one class a column; and the columns."""
    places = [np.flatnonzero(labels == label)[:SHOWN] for label in range(num_classes)]
    places = [found for found in places if len(found)]
    rows = min(len(found) for found in places)
    return images[np.stack([found[:rows] for found in places], axis=1).reshape(-1)], len(places)


def write_grid(run: Run, path: Place, images: np.ndarray, columns: int) -> None:
    """A picture of releasable images."""
    write_png(path, upscale(grid(images, columns), GRID_SIDE), stamp(run.config))
