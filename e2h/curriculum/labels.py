"""Which class each synthetic image is of; a function of public settings. This module imports no torch."""

from __future__ import annotations

import numpy as np

from e2h.config import SamplingConfig, expect


def image_labels(sampling: SamplingConfig, num_classes: int) -> np.ndarray:
    """The label of each image, int64 [num_images]: uniform, or the public shares of `class_fractions`.

    Labels alternate, so that any run of images is nearly balanced.

    Raises:
      InputError: if there isn't one share a class.
    """
    fractions = sampling.class_fractions or [1 / num_classes] * num_classes
    expect(len(fractions) == num_classes, "sampling.class_fractions", fractions, f"{num_classes} shares, one a class")
    shares = np.asarray(fractions) / sum(fractions)
    # The place at which each class's k-th image falls due; sorting the places spreads every class evenly.
    due = [(np.arange(int(np.ceil(sampling.num_images * share))) + 0.5) / max(share, 1e-12) for share in shares]
    labels = np.repeat(np.arange(num_classes), [len(places) for places in due])
    order = np.argsort(np.concatenate(due), kind="stable")
    return labels[order][: sampling.num_images].astype(np.int64)
