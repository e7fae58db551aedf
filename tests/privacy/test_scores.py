"""Scores: the noise that is charged, no less; a record's influence; what is free; what travels with a score."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
from scipy.stats import kstest

from e2h.privacy.events import PoissonSampledGaussian
from e2h.privacy.scores import Score, central_distance, noisy_accuracy, score_release, stand_in_accuracy

NOISE = 25.0
RELEASE = score_release(NOISE)


def keys(count: int) -> list[bytes]:
    return [hashlib.sha256(index.to_bytes(4, "big")).digest() for index in range(count)]


def blocks(labels: np.ndarray, size: int = 7) -> list[tuple[np.ndarray, np.ndarray]]:
    """Records whose only pixel is their label."""
    images = labels.astype(np.uint8).reshape(-1, 1, 1, 1)
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, len(labels), size)]


def first_pixel(images: np.ndarray) -> np.ndarray:
    return images[:, 0, 0, 0].astype(np.int64)


def one_class(images: np.ndarray) -> np.ndarray:
    return np.zeros(len(images), np.int64)


def as_charged(noise: np.ndarray) -> bool:
    """Whether the noise on the number of records may be what the event says; wrongly denied once in 10^4 times."""
    return bool(kstest(noise / NOISE, "norm").pvalue > 1e-4)


def test_the_noise_is_that_of_the_event_and_half_or_twice_of_it_is_noticed():
    labels = np.arange(40) % 10
    found = [noisy_accuracy(first_pixel, blocks(labels), 40, RELEASE, key).value for key in keys(3000)]
    noise = np.array(found) * 40 - 40
    assert as_charged(noise)
    assert not as_charged(noise / 2)
    assert not as_charged(noise * 2)
    assert not as_charged(noise + NOISE / 5)


def test_a_key_gives_one_score_and_another_key_another():
    labels = np.arange(40) % 10
    one, two = keys(2)
    scores = [noisy_accuracy(first_pixel, blocks(labels), 40, RELEASE, key) for key in (one, one, two)]
    assert scores[0] == scores[1]
    assert scores[0].value != scores[2].value


@pytest.mark.parametrize("predict", [first_pixel, one_class])
def test_a_record_moves_the_number_by_at_most_one(predict):
    """At one key, whatever the classifier: the event's sensitivity is 1."""
    labels, key = np.arange(30) % 10, keys(1)[0]
    whole = noisy_accuracy(predict, blocks(labels), 30, RELEASE, key).value
    moves = [
        30 * abs(whole - noisy_accuracy(predict, blocks(np.delete(labels, i)), 30, RELEASE, key).value)
        for i in range(30)
    ]
    assert max(moves) == pytest.approx(1.0)
    assert all(move == pytest.approx(0.0, abs=1e-9) or move == pytest.approx(1.0) for move in moves)


def test_the_event_of_a_score_is_one_full_gaussian_query_and_each_asking_another():
    assert RELEASE.event == PoissonSampledGaussian(1.0, NOISE, 1)
    names = {score_release(NOISE, share).name for share in (1 / 9, 1 / 3, 1.0)}
    assert names == {"score after 0.111", "score after 0.333", "score"}


def test_a_score_keeps_its_event_on_disk():
    for score in (Score("accuracy", 0.5, RELEASE), Score("central", -0.25)):
        assert Score.from_json(json.loads(json.dumps(score.to_json()))) == score


def test_the_distance_tells_a_collapsed_model_from_a_good_one():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    centres = np.array([40.0, 200.0])
    good = np.clip(centres[labels][:, None, None, None] + rng.normal(0, 30, (200, 4, 4, 1)), 0, 255).astype(np.uint8)
    central = good[:20], labels[:20]
    collapsed = np.full_like(good, 120)
    lost = good.copy()
    lost[labels == 1] = good[labels == 0]
    scores = [central_distance((images, labels), central) for images in (good, lost, collapsed)]
    assert all(score.kind == "central" and score.release is None for score in scores)
    assert scores[0].value > max(scores[1].value, scores[2].value) + 0.2
    assert scores[0].value <= 0
    # A class of which there is no image at all.
    missing = central_distance((good[labels == 0], labels[labels == 0]), central)
    assert missing.value < scores[0].value - 0.2


def test_without_classes_all_images_are_compared():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)
    central = images.mean(axis=0, keepdims=True).astype(np.uint8), np.array([-1])
    assert central_distance((images, np.arange(50) % 5), central).value == pytest.approx(0, abs=0.005)
    assert central_distance((images // 4, np.arange(50) % 5), central).value < -0.2


def test_accuracy_on_public_images_is_exact_and_free():
    labels = np.arange(20) % 10
    assert stand_in_accuracy(one_class, blocks(labels)) == Score("test", 0.1)
    assert stand_in_accuracy(first_pixel, blocks(labels)) == Score("test", 1.0)
    assert math.isnan(stand_in_accuracy(first_pixel, []).value)
