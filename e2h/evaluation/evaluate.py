"""All measurements of one synthetic set, as the contents of `evaluation.json` (sensitive)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from e2h.config import EvaluationConfig, expect
from e2h.evaluation.downstream import fit_all, right_answers
from e2h.evaluation.features import feature_statistics, train_extractor
from e2h.evaluation.fid import inception_metrics
from e2h.evaluation.frechet import frechet_distance
from e2h.evaluation.inception import WEIGHTS_SHA256, InceptionV3, load_inception
from e2h.evaluation.memorisation import Sample, memorisation
from e2h.evaluation.neighbours import NUM_NEIGHBOURS

LabelledImages = tuple[NDArray[np.uint8], NDArray[np.integer]]  # uint8 [N, H, W, C], integers [N]


def evaluate(
    synthetic: LabelledImages,
    real_train: LabelledImages,
    real_test: Iterable[LabelledImages],
    config: EvaluationConfig,
    seed: int,
    class_names: Sequence[str],
    all_train: Iterable[LabelledImages] | None = None,
) -> dict[str, Any]:
    """Measures the synthetic set against real images; the result is sensitive.

    In the memory of the two sets, one float32 copy of the synthetic pixels (at most 32 a side) and one block; with
    Inception weights, of features of at most 10,000 images a side too.

    Args:
      synthetic: images uint8 [N, H, W, C] and labels [N]; all of them train the classifiers.
      real_train: real training images and labels; they train the feature extractor and stand for the real side of FID,
        KID, precision and recall and the Frechet distance. The caller reads no more than `config.max_feature_records`.
      real_test: real test images and labels, in blocks of any size; gone through once.
      seed: of the first classifier of each kind, and of the sample of test images; further seeds follow it.
      class_names: public names, one a label.
      all_train: all real training images and labels, in blocks of any size, among which memorised ones are looked for;
        gone through once, if at all. None: `real_train` alone.

    Returns:
      {"class": "sensitive",
       "downstream": {classifier: {"accuracy": mean over seeds, "std": their sample deviation, 0.0 for one value,
         "accuracies": one a seed (logistic regression: one), "per_class": {class name: mean accuracy; classes without
         a test image are left out}}},
       "frechet": {"extractor", "distance"}: on a small network that real images trained, no FID,
       "inception": None without weights, else see `inception_metrics`, and "weights_sha256",
       "memorisation": None if switched off, else see `memorisation`,
       "num_synthetic", "num_real_test"}.

    Raises:
      InputError: if a set holds too few images, or the Inception weights are not the standard ones.
    """
    model = load_inception(config.inception_weights) if config.inception_weights else None
    for name, (images, _) in (("synthetic", synthetic), ("real_train", real_train)):
        _expect_images(name, len(images), 2 if model is None else NUM_NEIGHBOURS + 1)
    num_classes, seeds = len(class_names), range(seed, seed + config.num_seeds)
    classifiers = fit_all(config.classifiers, *synthetic, num_classes, config.cnn_epochs, seeds)
    sample = Sample(config.memorisation_images, seed)
    right, total = right_answers(classifiers, sample.watch(real_test), num_classes)
    _expect_images("real_test", int(total.sum()), 2)
    return {
        "class": "sensitive",
        "downstream": {name: _accuracy(found, total, class_names) for name, found in right.items()},
        "frechet": _frechet(synthetic[0], real_train, num_classes),
        "inception": None if model is None else _inception(model, synthetic[0], real_train[0]),
        "memorisation": _memorisation(synthetic[0], sample, [real_train] if all_train is None else all_train),
        "num_synthetic": len(synthetic[0]),
        "num_real_test": int(total.sum()),
    }


def _expect_images(name: str, count: int, least: int) -> None:
    expect(count >= least, name, f"{count} images", f"at least {least}", "evaluate a larger set")


def _accuracy(right: NDArray[np.int64], total: NDArray[np.int64], class_names: Sequence[str]) -> dict[str, Any]:
    values, by_class = right.sum(axis=1) / total.sum(), right.mean(axis=0)
    return {
        "accuracy": float(values.mean()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "accuracies": values.tolist(),
        "per_class": {name: float(by_class[k] / total[k]) for k, name in enumerate(class_names) if total[k]},
    }


def _frechet(synthetic: NDArray[np.uint8], real_train: LabelledImages, num_classes: int) -> dict[str, Any]:
    extractor, model = train_extractor(*real_train, num_classes)
    real, fake = (feature_statistics(model, images) for images in (real_train[0], synthetic))
    return {"extractor": extractor, "distance": frechet_distance(real, fake)}


def _inception(model: InceptionV3, synthetic: NDArray[np.uint8], real: NDArray[np.uint8]) -> dict[str, Any]:
    return {**inception_metrics(model, synthetic, real), "weights_sha256": WEIGHTS_SHA256}


def _memorisation(synthetic: NDArray[np.uint8], test: Sample, train: Iterable[LabelledImages]) -> dict[str, Any] | None:
    if not test.size:
        return None
    return memorisation(synthetic[: test.size], test.images, (images for images, _ in train))
