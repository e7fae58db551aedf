"""Train on synthetic, test on real: what the synthetic images are worth to someone who trains a classifier on them.

The three classifiers are those of the published tables (DPImageBench, Gong et al. 2025): logistic regression, a
perceptron with 100 hidden units, and a small CNN.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from e2h.evaluation.networks import as_tensor, predict, train_cnn
from e2h.evaluation.networks import batches as image_batches

Images = NDArray[np.uint8]
Labels = NDArray[np.integer]

# Above this side, pixel classifiers see the image averaged down: memory and time stay bounded at any resolution.
MAX_PIXEL_SIDE = 32
# Multiply-adds that the optimiser of one pixel classifier may spend: well under a minute on one core.
MAX_WORK = 5e11


def pixels(images: Images) -> NDArray[np.float32]:
    """Flat pixels in [0, 1], float32 [N, D], of `images` uint8 [N, H, W, C]; at most 32 pixels a side."""
    if images.shape[1] <= MAX_PIXEL_SIDE:
        return (images.reshape(len(images), -1) / 255).astype(np.float32)
    parts = (as_tensor(part) / 2 + 0.5 for part in image_batches(images))
    pooled = [torch.nn.functional.adaptive_avg_pool2d(part, MAX_PIXEL_SIDE).flatten(1) for part in parts]
    return torch.cat(pooled).numpy()


def _iterations(inputs: NDArray[np.float32], width: int, most: int) -> int:
    """How many passes over the data fit into `MAX_WORK`, between 10 and `most`."""
    return int(np.clip(MAX_WORK / (4 * inputs.size * width), 10, most))


def _logistic_regression(
    train_images: Images, labels: Labels, test_images: Images, num_classes: int, seed: int
) -> Labels:
    inputs = pixels(train_images)
    model = LogisticRegression(max_iter=_iterations(inputs, num_classes, 300), random_state=seed)
    return model.fit(inputs, labels).predict(pixels(test_images))


def _mlp(train_images: Images, labels: Labels, test_images: Images, seed: int) -> Labels:
    inputs = pixels(train_images)
    model = MLPClassifier((100,), max_iter=_iterations(inputs, 100, 300), random_state=seed)
    return model.fit(inputs, labels).predict(pixels(test_images))


def downstream_predictions(
    train_images: Images,
    train_labels: Labels,
    test_images: Images,
    classifiers: Sequence[str],
    num_classes: int,
    cnn_epochs: int,
    seed: int,
) -> dict[str, Labels]:
    """Trains each classifier on the first set and returns its labels for the test images.

    Args:
      train_images: uint8 [N, H, W, C], square; the synthetic set.
      train_labels: integers [N] in [0, num_classes).
      test_images: uint8 [M, H, W, C]; the real test set.
      classifiers: any of "logistic_regression", "mlp", "cnn".
      cnn_epochs: passes of the CNN over the training set.
      seed: the same seed (and thread count) gives the same predictions.

    Returns:
      Labels [M] by classifier; nothing where the training set holds fewer than two classes.
    """
    if len(np.unique(train_labels)) < 2:
        return {}
    found: dict[str, Labels] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name in classifiers:
            if name == "cnn":
                found[name] = predict(train_cnn(train_images, train_labels, num_classes, cnn_epochs, seed), test_images)
            elif name == "mlp":
                found[name] = _mlp(train_images, train_labels, test_images, seed)
            else:
                found[name] = _logistic_regression(train_images, train_labels, test_images, num_classes, seed)
    return found


def downstream_accuracy(
    train_images: Images,
    train_labels: Labels,
    test_images: Images,
    test_labels: Labels,
    classifiers: Sequence[str],
    num_classes: int,
    cnn_epochs: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Accuracy in [0, 1] on the test set of each classifier, as `{"cnn": {"accuracy": 0.97}, ...}`.

    Arguments are those of `downstream_predictions`; `test_labels` are integers [M].
    """
    found = downstream_predictions(train_images, train_labels, test_images, classifiers, num_classes, cnn_epochs, seed)
    return {name: {"accuracy": float(np.mean(labels == test_labels))} for name, labels in found.items()}
