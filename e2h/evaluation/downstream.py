"""Train on synthetic, test on real: what the synthetic images are worth to someone who trains a classifier on them.

The architectures are those of the published tables (DPImageBench, Gong et al. 2025): logistic regression, a perceptron
with 100 hidden units, and a small CNN. They are trained for less: the CNN by Adam at 1e-3 for `evaluation.cnn_epochs`
(published: 3e-4, 50 epochs), the other two within `MAX_WORK`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from e2h.evaluation.networks import as_tensor, batches, predict, train_cnn

Images = NDArray[np.uint8]
Labels = NDArray[np.integer]
Classifier = Callable[[Images], Labels]  # uint8 [M, H, W, C] -> labels [M]

# Above this side, pixel classifiers see the image averaged down: memory and time stay bounded at any resolution.
MAX_PIXEL_SIDE = 32
# Multiply-adds that the optimiser of one pixel classifier may spend: well under a minute on one core.
MAX_WORK = 5e11


def pixels(images: Images) -> NDArray[np.float32]:
    """Flat pixels in [0, 1], float32 [N, D], of `images` uint8 [N, H, W, C]; at most 32 pixels a side."""
    side = min(images.shape[1], MAX_PIXEL_SIDE)
    flat = np.empty((len(images), side * side * images.shape[3]), np.float32)
    start = 0
    for part in batches(images):  # beside the result, memory for one part
        flat[start : start + len(part)] = _pooled(part) if side < images.shape[1] else _shares(part)
        start += len(part)
    return flat


def _shares(images: Images) -> NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)


def _pooled(images: Images) -> NDArray[np.float32]:
    return torch.nn.functional.adaptive_avg_pool2d(as_tensor(images) / 2 + 0.5, MAX_PIXEL_SIDE).flatten(1).numpy()


def _iterations(inputs: NDArray[np.float32], width: int, most: int) -> int:
    """How many passes over the data fit into `MAX_WORK`, between 10 and `most`."""
    return int(np.clip(MAX_WORK / (4 * inputs.size * width), 10, most))


def fit(name: str, images: Images, labels: Labels, num_classes: int, cnn_epochs: int, seed: int) -> Classifier:
    """Trains one classifier, in the memory of its set and one float32 copy of the set's pixels.

    Args:
      name: "logistic_regression", "mlp" or "cnn".
      images: uint8 [N, H, W, C], square; the synthetic set.
      labels: integers [N] in [0, num_classes), of at least two classes.
      cnn_epochs: passes of the CNN over the training set.
      seed: the same seed (and thread count) gives the same classifier.
    """
    if name == "cnn":
        return partial(predict, train_cnn(images, labels, num_classes, cnn_epochs, seed))
    inputs = pixels(images)
    if name == "mlp":
        model = MLPClassifier((100,), max_iter=_iterations(inputs, 100, 300), random_state=seed)
    else:
        model = LogisticRegression(max_iter=_iterations(inputs, num_classes, 300), random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(inputs, labels)
    return lambda others: model.predict(pixels(others))


def fit_all(
    names: Sequence[str], images: Images, labels: Labels, num_classes: int, cnn_epochs: int, seeds: Sequence[int]
) -> dict[str, list[Classifier]]:
    """The classifiers by their names, one a seed, see `fit`; none where the set holds fewer than two classes.

    Logistic regression is trained once: its optimum is unique, and no seed has a part in it.
    """
    if len(np.unique(labels)) < 2:
        return {}
    used = {name: seeds[:1] if name == "logistic_regression" else seeds for name in names}
    return {name: [fit(name, images, labels, num_classes, cnn_epochs, seed) for seed in used[name]] for name in names}


def right_answers(
    classifiers: Mapping[str, Sequence[Classifier]], blocks: Iterable[tuple[Images, Labels]], num_classes: int
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]:
    """Images of each class that each classifier tells right, and images of each class.

    Args:
      classifiers: by name, one a seed.
      blocks: the test set in parts, images uint8 [M, H, W, C] and labels [M]; one part is in memory at a time.

    Returns:
      int64 [seeds, num_classes] by name, int64 [num_classes].
    """
    total = np.zeros(num_classes, np.int64)
    right = {name: np.zeros((len(seeds), num_classes), np.int64) for name, seeds in classifiers.items()}
    for images, labels in blocks:
        total += np.bincount(labels, minlength=num_classes)
        for name, seeds in classifiers.items():
            for row, classify in zip(right[name], seeds, strict=True):
                row += np.bincount(labels[classify(images) == labels], minlength=num_classes)
    return right, total
