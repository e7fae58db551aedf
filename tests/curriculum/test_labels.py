"""Labels of synthetic images: in public shares, and alternating."""

from __future__ import annotations

import numpy as np
import pytest

from e2h.config import SamplingConfig
from e2h.curriculum.labels import image_labels
from e2h.errors import InputError


@pytest.mark.parametrize(("num_images", "num_classes"), [(2000, 10), (7, 3), (1, 10), (10, 1), (9, 10)])
def test_labels_are_uniform_to_within_one(num_images, num_classes):
    labels = image_labels(SamplingConfig(num_images=num_images), num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    assert labels.dtype == np.int64
    assert counts.sum() == num_images
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    "fractions", [[0.5, 0.25, 0.25], [0.9, 0.1, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.3333335] * 3]
)
def test_labels_follow_the_given_shares(fractions):
    for num_images in (1, 10, 999, 1000):
        labels = image_labels(SamplingConfig(num_images=num_images, class_fractions=fractions), 3)
        assert len(labels) == num_images
        assert abs(np.bincount(labels, minlength=3) - np.array(fractions) * num_images).max() <= 1


def test_any_stretch_of_labels_is_nearly_balanced():
    labels = image_labels(SamplingConfig(num_images=1000, class_fractions=[0.6, 0.3, 0.1]), 3)
    for start in range(0, 1000, 100):
        counts = np.bincount(labels[start : start + 100], minlength=3)
        assert abs(counts - [60, 30, 10]).max() <= 1


def test_shares_that_are_not_one_a_class_are_refused():
    with pytest.raises(InputError, match=r"^sampling\.class_fractions=\[0\.5, 0\.5\]: expected 3 shares, one a class"):
        image_labels(SamplingConfig(class_fractions=[0.5, 0.5]), 3)
