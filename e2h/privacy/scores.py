"""Scores by which a search may choose: each carries the event that pays for it, or is free.

There are three, and no other way to make one: a noisy count of training records (its own release), a distance to
central images that are released already (free), and an accuracy on public stand-in images (they are nobody's secret).
The real test set is none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.noise import gaussian_noise

Images = NDArray[np.uint8]
Labels = NDArray[np.integer]
Predict = Callable[[Images], Labels]  # uint8 [B, H, W, C] -> labels [B]

GRID = 2.0**20  # of noise, in parts of one record


@dataclass(frozen=True)
class Score:
    """A number by which trials are compared, higher is better.

    Attributes:
      kind: `accuracy`, `central` or `test`, as `search.score`.
      release: the event that pays for it; None: computed from released or public images alone.
    """

    kind: str
    value: float
    release: Release | None = None

    def to_json(self) -> dict[str, Any]:
        release = {"name": self.release.name, "event": self.release.event.to_json()} if self.release else None
        return {"kind": self.kind, "value": self.value, "release": release}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Score:
        paid = value["release"]
        release = Release(paid["name"], PoissonSampledGaussian.from_json(paid["event"])) if paid else None
        return Score(value["kind"], value["value"], release)


def score_name(share: float) -> str:
    """The score's release after a share of the trial's DP-SGD steps; each asking is a release of its own."""
    return "score" if share == 1 else f"score after {share:.3f}"


def score_release(noise_multiplier: float, share: float = 1.0) -> Release:
    """The event of `noisy_accuracy`: one Gaussian query over all records, of sensitivity 1.

    Args:
      noise_multiplier: of the noise on a number of records.
      share: of the trial's DP-SGD steps, after which it is asked.
    """
    return Release(score_name(share), PoissonSampledGaussian(1.0, noise_multiplier, 1))


def noisy_accuracy(
    predict: Predict, records: Iterable[tuple[Images, Labels]], num_records: int, release: Release, key: bytes
) -> Score:
    """The share of training records that a classifier tells right, with noise on their number.

    Removing a record changes the number by at most 1, whatever the classifier was trained on: it saw synthetic images
    alone, which the trial's other releases pay for. The denominator is the public N.

    Args:
      predict: a classifier trained on the trial's synthetic images.
      records: blocks of images and labels of the training split.
      num_records: public N.
      release: from `score_release`.
      key: 32 secret bytes, used for this one score.
    """
    right = sum(int(np.sum(predict(images) == labels)) for images, labels in records)
    noise = gaussian_noise(key, 0, 1, release.event.noise_multiplier * GRID)[0] / GRID
    return Score("accuracy", float((right + noise) / num_records), release)


def central_distance(synthetic: tuple[Images, Labels], central: tuple[Images, Labels]) -> Score:
    """Minus the distance of each class's mean synthetic image to its mean central image, in grey values of 0 to 1.

    Free: both are released. It tells a model that has lost a class, and little more: blur costs nothing here.
    """
    (images, labels), (targets, classes) = synthetic, central
    errors = []
    for label in np.unique(classes):
        chosen = images if label < 0 else images[labels == label]
        target = targets[classes == label].mean(axis=0)
        mean = chosen.mean(axis=0) if len(chosen) else np.zeros_like(target)
        errors.append(float(np.sqrt(np.mean((mean - target) ** 2)) / 255))
    return Score("central", -float(np.mean(errors)))


def stand_in_accuracy(predict: Predict, records: Iterable[tuple[Images, Labels]]) -> Score:
    """The share of a public stand-in's test images that a classifier tells right."""
    right, count = 0, 0
    for images, labels in records:
        right, count = right + int(np.sum(predict(images) == labels)), count + len(labels)
    return Score("test", right / count if count else float("nan"))
