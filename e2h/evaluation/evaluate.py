"""All measurements of one synthetic set, as the contents of `evaluation.json` (sensitive)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from e2h.config import EvaluationConfig
from e2h.errors import InputError
from e2h.evaluation.downstream import fit_all, right_answers
from e2h.evaluation.features import feature_statistics, train_extractor
from e2h.evaluation.frechet import frechet_distance

LabelledImages = tuple[NDArray[np.uint8], NDArray[np.integer]]  # uint8 [N, H, W, C], integers [N]


def evaluate(
    synthetic: LabelledImages,
    real_train: LabelledImages,
    real_test: Iterable[LabelledImages],
    config: EvaluationConfig,
    seed: int,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Measures the synthetic set against real images; the result is sensitive.

    In the memory of the two sets, one float32 copy of the synthetic pixels (at most 32 a side) and one block.

    Args:
      synthetic: images uint8 [N, H, W, C] and labels [N]; all of them train the classifiers.
      real_train: real training images and labels; they train the feature extractor and stand for the real side of the
        Frechet distance. The caller reads no more than `config.max_feature_records`.
      real_test: real test images and labels, in blocks of any size; gone through once.
      class_names: public names, one a label.

    Returns:
      {"class": "sensitive", "downstream": {name: {"accuracy"}}, "per_class_accuracy": {class name: accuracy of the
      logistic regression, classes without a test image left out}, "frechet": {"extractor", "distance"},
      "num_synthetic", "num_real_test"}.

    Raises:
      InputError: if a set holds fewer than two images.
    """
    _expect_images("synthetic", len(synthetic[0]))
    _expect_images("real_train", len(real_train[0]))
    num_classes = len(class_names)
    classifiers = fit_all(config.classifiers, *synthetic, num_classes, config.cnn_epochs, seed)
    right, total = right_answers(classifiers, real_test, num_classes)
    _expect_images("real_test", int(total.sum()))
    return {
        "class": "sensitive",
        "downstream": {name: {"accuracy": float(found.sum() / total.sum())} for name, found in right.items()},
        "per_class_accuracy": _per_class(right.get("logistic_regression"), total, class_names),
        "frechet": _frechet(synthetic[0], real_train, num_classes),
        "num_synthetic": len(synthetic[0]),
        "num_real_test": int(total.sum()),
    }


def _expect_images(name: str, count: int) -> None:
    if count < 2:
        raise InputError(f"{name}={count} images: expected at least 2; evaluate a larger set")


def _per_class(
    right: NDArray[np.int64] | None, total: NDArray[np.int64], class_names: Sequence[str]
) -> dict[str, float]:
    if right is None:
        return {}
    return {name: float(right[k] / total[k]) for k, name in enumerate(class_names) if total[k]}


def _frechet(synthetic: NDArray[np.uint8], real_train: LabelledImages, num_classes: int) -> dict[str, Any]:
    extractor, model = train_extractor(*real_train, num_classes)
    real, fake = (feature_statistics(model, images) for images in (real_train[0], synthetic))
    return {"extractor": extractor, "distance": frechet_distance(real, fake)}
