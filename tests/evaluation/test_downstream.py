from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from e2h.evaluation.downstream import fit, fit_all, pixels, right_answers
from e2h.evaluation.networks import SmallCNN, as_tensor

CLASSIFIERS = ["logistic_regression", "mlp", "cnn"]


def score(images, labels, test_images, test_labels, classifiers=CLASSIFIERS, epochs=6, seed=0):
    right, total = right_answers(
        fit_all(classifiers, images, labels, 10, epochs, [seed]), [(test_images, test_labels)], 10
    )
    return {name: found.sum() / total.sum() for name, found in right.items()}


def test_real_images_teach_every_classifier(digits):
    images, labels = digits
    found = score(images[:1300], labels[:1300], images[1300:], labels[1300:])
    assert list(found) == CLASSIFIERS
    assert all(0.92 < accuracy <= 1 for accuracy in found.values())


def test_shuffled_labels_teach_nothing(digits):
    images, labels = digits
    shuffled = np.random.default_rng(1).permutation(labels[:1000])
    found = score(images[:1000], shuffled, images[1000:], labels[1000:])
    assert all(accuracy < 0.25 for accuracy in found.values())


def test_same_seed_same_result_silent_and_global_random_state_untouched(digits, capfd):
    images, labels = digits
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (score(images[:200], labels[:200], images[900:], labels[900:], epochs=2) for _ in range(2))
    other = score(images[:200], labels[:200], images[900:], labels[900:], ["mlp", "cnn"], epochs=2, seed=1)
    assert first == second
    assert other["mlp"] != first["mlp"]
    assert other["cnn"] != first["cnn"]
    assert torch.equal(before, torch.random.get_rng_state())
    assert capfd.readouterr() == ("", "")


def test_one_class_has_nothing_to_learn(digits):
    images, _ = digits
    assert score(images[:20], np.zeros(20, int), images[20:30], np.zeros(10, int)) == {}


def test_right_answers_of_any_blocks_and_seeds_are_those_of_the_whole(digits):
    images, labels = digits
    trained = fit_all(CLASSIFIERS, images[:200], labels[:200], 10, 1, [3, 4])
    alone = [fit("cnn", images[:200], labels[:200], 10, 1, seed) for seed in (3, 4)]
    images, labels = images[1100:], labels[1100:]
    assert [len(seeds) for seeds in trained.values()] == [1, 2, 2]  # logistic regression has nothing to draw
    for one, other in zip(trained["cnn"], alone, strict=True):
        np.testing.assert_array_equal(one(images), other(images))
    found = [[classify(images) == labels for classify in seeds] for seeds in trained.values()]
    expected = [[[int(right[labels == k].sum()) for k in range(10)] for right in seeds] for seeds in found]
    for size in (7, 600, 5000):
        blocks = ((images[start : start + size], labels[start : start + size]) for start in range(0, len(images), size))
        right, total = right_answers(trained, blocks, 10)
        assert [right[name].tolist() for name in CLASSIFIERS] == expected
        assert total.tolist() == np.bincount(labels, minlength=10).tolist()


@pytest.mark.parametrize(("size", "channels"), [(4, 1), (8, 1), (28, 1), (32, 3), (50, 3), (128, 3)])
def test_one_network_serves_all_sizes(size, channels):
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, channels), dtype=np.uint8)
    model = SmallCNN(channels, size, 7).eval()
    assert model.features(as_tensor(images)).shape == (2, 128)
    assert model(as_tensor(images)).shape == (2, 7)


def test_pixels_are_shares_and_large_images_are_averaged_down():
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    small, large = pixels(images[:, :32, :32]), pixels(images)
    assert small.shape == large.shape == (3, 32 * 32 * 3)
    np.testing.assert_array_equal(small, (images[:, :32, :32].reshape(3, -1) / 255).astype(np.float32))
    average = images.reshape(3, 32, 2, 32, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(3, -1)
    np.testing.assert_allclose(large, average / 255, atol=1e-6)
