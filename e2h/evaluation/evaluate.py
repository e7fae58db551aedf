"""All measurements of one synthetic set, as the contents of `evaluation.json` (sensitive)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from e2h.config import EvaluationConfig
from e2h.errors import InputError
from e2h.evaluation.downstream import downstream_predictions
from e2h.evaluation.features import extract, train_extractor
from e2h.evaluation.frechet import FeatureStatistics, frechet_distance

LabelledImages = tuple[NDArray[np.uint8], NDArray[np.integer]]  # uint8 [N, H, W, C], integers [N]


def evaluate(
    synthetic: LabelledImages,
    real_train: LabelledImages,
    real_test: LabelledImages,
    config: EvaluationConfig,
    seed: int,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Measures the synthetic set against real images; the result is sensitive.

    Args:
      synthetic: images uint8 [N, H, W, C] and labels [N]; all of them train the classifiers.
      real_train: real training images and labels; the first `config.max_feature_records` of them train the feature
        extractor and stand for the real side of the Frechet distance.
      real_test: real test images and labels.
      class_names: public names, one a label.

    Returns:
      {"class": "sensitive", "downstream": {name: {"accuracy"}}, "per_class_accuracy": {class name: accuracy of the
      logistic regression, classes without a test image left out}, "frechet": {"extractor", "distance"},
      "num_synthetic", "num_real_test"}.

    Raises:
      InputError: if a set holds fewer than two images.
    """
    for name, (images, _) in (("synthetic", synthetic), ("real_train", real_train), ("real_test", real_test)):
        if len(images) < 2:
            raise InputError(f"{name}={len(images)} images: expected at least 2; evaluate a larger set")
    predictions = downstream_predictions(
        *synthetic, real_test[0], config.classifiers, len(class_names), config.cnn_epochs, seed
    )
    labels = real_test[1]
    downstream = {name: {"accuracy": float(np.mean(found == labels))} for name, found in predictions.items()}
    return {
        "class": "sensitive",
        "downstream": downstream,
        "per_class_accuracy": _per_class(predictions.get("logistic_regression"), labels, class_names),
        "frechet": _frechet(synthetic[0], real_train, config.max_feature_records, len(class_names)),
        "num_synthetic": len(synthetic[0]),
        "num_real_test": len(real_test[0]),
    }


def _per_class(
    predictions: NDArray[np.integer] | None, labels: NDArray[np.integer], class_names: Sequence[str]
) -> dict[str, float]:
    if predictions is None:
        return {}
    right = predictions == labels
    present = [(label, name) for label, name in enumerate(class_names) if np.any(labels == label)]
    return {name: float(np.mean(right[labels == label])) for label, name in present}


def _frechet(
    synthetic: NDArray[np.uint8], real_train: LabelledImages, max_records: int, num_classes: int
) -> dict[str, Any]:
    images, labels = real_train[0][:max_records], real_train[1][:max_records]
    extractor, model = train_extractor(images, labels, num_classes)
    real, fake = (FeatureStatistics.of(extract(model, part)) for part in (images, synthetic))
    return {"extractor": extractor, "distance": frechet_distance(real, fake)}
