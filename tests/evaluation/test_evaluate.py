from __future__ import annotations

import json

import numpy as np
import pytest

from e2h.config import EvaluationConfig
from e2h.errors import InputError
from e2h.evaluation.evaluate import evaluate

NAMES = [f"digit {k}" for k in range(10)]


def blocks_of(images, labels, size):
    return ((images[start : start + size], labels[start : start + size]) for start in range(0, len(images), size))


def test_evaluation_holds_the_contract_and_is_sensitive(digits):
    images, labels = digits
    config = EvaluationConfig(classifiers=["logistic_regression"], memorisation_images=40)
    synthetic, train, test = ((images[a:b], labels[a:b]) for a, b in ((0, 300), (500, 800), (1000, 1797)))
    found = evaluate(synthetic, train, [test], config, 0, NAMES)
    assert json.loads(json.dumps(found)) == found
    assert evaluate(synthetic, train, blocks_of(*test, 90), config, 0, NAMES, blocks_of(*train, 70)) == found
    assert found["class"] == "sensitive"
    assert found["frechet"]["extractor"] == "small_cnn_v1"
    assert found["frechet"]["distance"] > 0
    assert found["inception"] is None
    assert found["memorisation"]["num_images"] == 40
    assert (found["num_synthetic"], found["num_real_test"]) == (300, 797)


def test_each_classifier_has_its_seeds_their_spread_and_every_class(digits):
    images, labels = digits
    config = EvaluationConfig(classifiers=["logistic_regression", "mlp"], num_seeds=3, memorisation_images=0)
    kept = labels[1000:] != 4  # a class without test images
    test = images[1000:][kept], labels[1000:][kept]
    found = evaluate((images[:200], labels[:200]), (images[:50], labels[:50]), [test], config, 5, NAMES)
    assert found["memorisation"] is None
    shares = np.bincount(test[1], minlength=10) / len(test[1])
    for entry in found["downstream"].values():
        assert list(entry["per_class"]) == [name for name in NAMES if name != "digit 4"]
        mean = sum(entry["per_class"][name] * shares[k] for k, name in enumerate(NAMES) if k != 4)
        assert mean == pytest.approx(entry["accuracy"])
        assert entry["accuracy"] == pytest.approx(np.mean(entry["accuracies"]))
    logistic, perceptron = found["downstream"]["logistic_regression"], found["downstream"]["mlp"]
    assert (len(logistic["accuracies"]), logistic["std"]) == (1, 0.0)
    assert len(set(perceptron["accuracies"])) > 1
    assert perceptron["std"] == pytest.approx(np.std(perceptron["accuracies"], ddof=1))
    one = EvaluationConfig(classifiers=["mlp"], memorisation_images=0)
    for seed, accuracy in zip((5, 6, 7), perceptron["accuracies"], strict=True):
        alone = evaluate((images[:200], labels[:200]), (images[:50], labels[:50]), [test], one, seed, NAMES)
        assert alone["downstream"]["mlp"]["accuracies"] == [accuracy]


def test_empty_sets_are_refused_by_name(digits):
    images, labels = digits
    good, empty = (images[:50], labels[:50]), (images[:0], labels[:0])
    with pytest.raises(InputError, match="real_test=0 images: expected at least 2"):
        evaluate(good, good, [empty], EvaluationConfig(classifiers=[]), 0, NAMES)
    with pytest.raises(InputError, match="real_train=0 images: expected at least 2"):
        evaluate(good, empty, [good], EvaluationConfig(), 0, NAMES)
