"""The generator shows what the embeddings say, class by class, and nothing where they say nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from central_cases import CLASSES, KEY, SIDE

from e2h.config import FrequencyConfig
from e2h.curriculum.central import GRID_BITS
from e2h.curriculum.frequency import FrequencyQuery
from e2h.curriculum.generator import feature_map, fit_generator, generate, squared_distances
from e2h.privacy.events import PoissonSampledGaussian

COUNT = 300


def query(size=SIDE, channels=1, num_classes=CLASSES, steps=80, num_features=400, bandwidth=0.25) -> FrequencyQuery:
    settings = FrequencyConfig(num_features=num_features, bandwidth=bandwidth, generator_steps=steps)
    return FrequencyQuery(settings, PoissonSampledGaussian(1.0, 1.0, 1), size, channels, num_classes, COUNT, 0)


def bars() -> tuple[np.ndarray, np.ndarray]:
    """An easy set: a bright bar, 2 pixels wide, of one of two brightnesses, across the top, the middle or the left."""
    rng, labels = np.random.default_rng(0), np.arange(COUNT) % CLASSES
    images = rng.integers(0, 30, (COUNT, SIDE, SIDE, 1))
    for image, label, light in zip(images, labels, rng.choice([120, 220], COUNT), strict=True):
        place = [np.s_[0:2], np.s_[4:6], np.s_[:, 0:2]][label]
        image[place] += light
    return images.astype(np.uint8), labels


def embeddings(one: FrequencyQuery) -> np.ndarray:
    """Without noise."""
    return one.embeddings(one.partial_sums(*bars(), np.arange(COUNT), KEY))


def told(images: np.ndarray) -> np.ndarray:
    """The class of each image by where it is brightest."""
    rows, columns = images.mean(axis=(2, 3)), images.mean(axis=(1, 3))
    return np.stack([rows[:, 0:2].mean(1), rows[:, 4:6].mean(1), columns[:, 0:2].mean(1)], axis=1).argmax(axis=1)


@pytest.fixture(scope="module")
def fitted() -> tuple[np.ndarray, np.ndarray]:
    one = query()
    return generate(fit_generator(embeddings(one), one, 0), COUNT, 0, CLASSES)


def test_images_show_their_class(fitted):
    images, labels = fitted
    assert images.dtype == np.uint8
    assert images.shape == (COUNT, SIDE, SIDE, 1)
    assert (np.bincount(labels) == COUNT // CLASSES).all()
    assert (told(bars()[0]) == bars()[1]).all()
    assert (told(images) == labels).mean() > 0.95


def test_images_of_a_class_are_as_bright_and_as_varied_as_the_real_ones(fitted):
    images, labels = fitted
    real = bars()[0][bars()[1] == 0][:, 0:2].mean(axis=(1, 2, 3))
    made = images[labels == 0][:, 0:2].mean(axis=(1, 2, 3))
    assert made.mean() == pytest.approx(real.mean(), abs=25)
    assert made.std() > real.std() / 2  # bars of two brightnesses, and no grey in between


def test_shuffled_embeddings_show_nothing():
    one, order = query(), np.random.default_rng(1).permutation(400)
    images, labels = generate(fit_generator(embeddings(one)[:, order], one, 0), COUNT, 0, CLASSES)
    assert (told(images) == labels).mean() < 0.7


def test_exchanged_embeddings_exchange_the_classes():
    one = query(steps=50)
    images, labels = generate(fit_generator(np.roll(embeddings(one), 1, axis=0), one, 0), COUNT, 0, CLASSES)
    assert ((told(images) + 1) % CLASSES == labels).mean() > 0.95


def test_a_seed_gives_one_generator_and_one_set():
    one = query(steps=3)
    state = torch.random.get_rng_state()
    first = generate(fit_generator(embeddings(one), one, 5), 60, 7, CLASSES)[0]
    assert (first == generate(fit_generator(embeddings(one), one, 5), 60, 7, CLASSES)[0]).all()
    assert (first != generate(fit_generator(embeddings(one), one, 6), 60, 7, CLASSES)[0]).any()
    assert (first != generate(fit_generator(embeddings(one), one, 5), 60, 8, CLASSES)[0]).any()
    assert (torch.random.get_rng_state() == state).all()


@pytest.mark.parametrize(("size", "channels"), [(4, 1), (8, 3), (28, 1), (30, 3), (64, 3)])
def test_images_have_the_size_of_the_private_ones(size, channels):
    one = query(size, channels, num_classes=12, steps=2, num_features=20, bandwidth=0.25)
    target = np.zeros((12, 20))
    images, labels = generate(fit_generator(target, one, 0), 25, 0, 12)
    assert images.shape == (25, size, size, channels)
    assert (labels == np.arange(25) % 12).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_the_querys(channels):
    one = query(channels=channels)
    images = np.random.default_rng(0).integers(0, 256, (50, SIDE, SIDE, channels), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    features = feature_map(one)(pixels).numpy()
    assert features == pytest.approx(one.encode(images) * 2.0**-GRID_BITS, abs=3e-5)
    assert np.linalg.norm(features, axis=1) == pytest.approx(1)


def test_the_distance_of_a_batch_is_unbiased():
    one, images = query(), bars()[0]
    features = torch.from_numpy(one.encode(images) * 2.0**-GRID_BITS)
    target = torch.from_numpy(embeddings(one))
    true = (features.mean(0) - target[0]).square().sum() - target[0].square().sum()
    batches = np.random.default_rng(0).integers(0, COUNT, (4000, 4))
    means = features[batches].mean(dim=1)
    found = squared_distances(means, target[:1], 4).mean()
    # The mean of a batch of four is further off by a quarter of the spread.
    plain = (means - target[0]).square().sum(dim=1).mean() - target[0].square().sum()
    assert abs(found - true) < 0.01
    assert plain - true > 0.05


@pytest.mark.parametrize(("level", "bright"), [(12, False), (243, True)])
def test_an_untrained_generator_starts_near_the_private_images(level, bright):
    one = query(steps=1, bandwidth=0.125)
    images = np.full((COUNT, SIDE, SIDE, 1), level, np.uint8)
    target = one.embeddings(one.partial_sums(images, np.arange(COUNT) % CLASSES, np.arange(COUNT), KEY))
    made = generate(fit_generator(target, one, 0), 60, 0, CLASSES)[0].mean()
    assert made > 200 if bright else made < 55
