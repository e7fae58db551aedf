from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from e2h.evaluation.features import feature_statistics, train_extractor
from e2h.evaluation.frechet import FeatureStatistics, frechet_distance
from e2h.evaluation.networks import as_tensor


def reference(a: np.ndarray, b: np.ndarray) -> float:
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = sqrtm(first @ second).real
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first + second - 2 * cross))


def gaussian(seed: int, count: int, width: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def test_equals_the_definition_by_scipy():
    a, b = gaussian(0, 300), gaussian(1, 200)
    assert frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b)) == pytest.approx(reference(a, b))


def test_closed_form_of_shifted_and_scaled_features():
    a = gaussian(0, 500)
    shifted = FeatureStatistics.of(a + 2)
    assert frechet_distance(FeatureStatistics.of(a), shifted) == pytest.approx(4 * a.shape[1])
    wide = FeatureStatistics.of(a.mean(0) + 3 * (a - a.mean(0)))
    # Standard deviations s and 3 s: (3 - 1)^2 times the total variance.
    assert frechet_distance(FeatureStatistics.of(a), wide) == pytest.approx(4 * np.trace(np.cov(a, rowvar=False)))


@pytest.mark.parametrize("cuts", [[100], [1, 2, 250], [0, 0, 299], [50, 100, 150, 200]])
def test_statistics_of_any_split_add_up_to_the_whole(cuts):
    features = gaussian(2, 300).astype(np.float32)
    whole = FeatureStatistics.of(features)
    parts = [FeatureStatistics.of(part) for part in np.split(features, cuts)]
    merged = sum(parts[1:], parts[0])
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean)
    np.testing.assert_allclose(merged.covariance, whole.covariance, atol=1e-10)
    np.testing.assert_allclose(whole.covariance, np.cov(features.astype(np.float64), rowvar=False), atol=1e-10)
    assert frechet_distance(merged, whole) == pytest.approx(0, abs=1e-6)


def test_fewer_features_than_dimensions_and_too_few():
    few = FeatureStatistics.of(gaussian(3, 5))
    many = FeatureStatistics.of(gaussian(3, 400))
    assert frechet_distance(few, many) == pytest.approx(frechet_distance(many, few), rel=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(FeatureStatistics.of(gaussian(3, 1)), many)


def test_named_features_order_sets_as_eyes_do(digits):
    images, labels = digits
    name, model = train_extractor(images[:600], labels[:600], 10)
    real, other = (feature_statistics(model, part) for part in (images[:600], images[600:1200]))
    rng = np.random.default_rng(0)
    blurred = np.clip(images[:600] + rng.normal(0, 60, images[:600].shape), 0, 255).astype(np.uint8)
    noise = rng.integers(0, 256, images[:600].shape, dtype=np.uint8)
    distances = [frechet_distance(real, feature_statistics(model, part)) for part in (images[:600], blurred, noise)]
    assert name == "small_cnn_v1"
    assert distances[0] == pytest.approx(0, abs=1e-4)
    assert distances[0] < frechet_distance(real, other) < distances[1] < distances[2]


def test_statistics_are_those_of_all_features_at_once(digits):
    images, labels = digits
    model = train_extractor(images[:100], labels[:100], 10)[1]
    with torch.no_grad():
        whole = FeatureStatistics.of(model.features(as_tensor(images)).numpy())
    found = feature_statistics(model, images)  # more than one batch
    assert found.count == whole.count == len(images) > 1000
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.covariance, whole.covariance, rtol=1e-4, atol=1e-5)


def test_extractor_is_reproducible_and_says_when_it_is_untrained(digits):
    images, labels = digits
    first, second = (
        feature_statistics(train_extractor(images[:100], labels[:100], 10)[1], images[:9]) for _ in range(2)
    )
    np.testing.assert_array_equal(first.outer, second.outer)
    assert train_extractor(images[:100], np.zeros(100, int), 1)[0] == "small_cnn_random_v1"
