"""The network, its weights file, and what is computed with it: beside torch-fidelity and beside definitions."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from scipy.special import softmax

from e2h.config import EvaluationConfig
from e2h.errors import InputError
from e2h.evaluation import evaluate, fid, inception
from e2h.evaluation.fid import FeatureSums, InceptionScore, kernel_distances
from e2h.evaluation.frechet import FeatureStatistics, frechet_distance
from e2h.evaluation.inception import InceptionV3, inception_features, load_inception
from e2h.evaluation.neighbours import precision_recall

PUBLISHED_BYTES = 95_628_359  # size of the standard file


@pytest.fixture(scope="module")
def fidelity():
    """Imports a module of torch-fidelity beside a stand-in for torchvision, which only its data sets use."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed: pip install --no-deps torch-fidelity==0.4.0")
    torchvision = ("torchvision", *(f"torchvision.{n}" for n in ("datasets", "transforms", "transforms.functional")))
    with pytest.MonkeyPatch.context() as patch:
        for name in torchvision:
            patch.setitem(sys.modules, name, MagicMock())
        yield lambda name: importlib.import_module(f"torch_fidelity.{name}")
        for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def model(random_weights) -> InceptionV3:
    return load_inception(*random_weights)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Colour images uint8 [8, 32, 32, 3] of coarse patches with noise, so that pooling and resizing matter."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (8, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    return np.clip(coarse + rng.normal(0, 25, coarse.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def reference(fidelity, random_weights, images) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [8, 2048] and logits [8, 1008] by torch-fidelity, which reads the same file."""
    extractor = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    return extractor("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=random_weights[0])(
        torch.from_numpy(images).permute(0, 3, 1, 2)
    )


def features_of(model, images):
    parts = list(inception_features(model, images))
    return tuple(np.concatenate([part[k] for part in parts]) for k in (0, 1))


def vectors(count: int, seed: int, width: int = 16) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, width)) @ np.diag(np.linspace(0.2, 2, width)) + 0.1 * seed).astype(np.float32)


def test_same_features_as_torch_fidelity(model, images, reference, monkeypatch):
    monkeypatch.setattr(inception, "AT_ONCE", 3)
    for found, expected in zip(features_of(model, images), reference, strict=True):
        differences = np.abs(found - expected.numpy()) / expected.std(0).mean().item()  # between images
        assert differences.max() < 1e-3


def test_evaluation_gives_the_numbers_of_torch_fidelity(fidelity, images, reference, random_weights, monkeypatch):
    monkeypatch.setattr(evaluate, "load_inception", lambda path: load_inception(path, random_weights[1]))
    config = EvaluationConfig(classifiers=[], memorisation_images=0, inception_weights=random_weights[0])
    labels = np.zeros(4, int)
    synthetic, real = (images[:4], labels), (images[4:], labels)
    found = evaluate.evaluate(synthetic, real, [real], config, 0, ["all"])["inception"]
    fake, true = (side.double().numpy() for side in reference[0].split(4))
    # The cross term is the sum of singular values: nothing of 2048 x 2048 values has to be decomposed.
    a, b = ((side - side.mean(0)) / 3**0.5 for side in (fake, true))
    expected = ((fake.mean(0) - true.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum()
    expected -= 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    assert found["fid"] == pytest.approx(expected, rel=1e-3)
    kid = fidelity("metric_kid").kid_features_to_metric(*reference[0].split(4), kid_subset_size=4)
    assert found["kid"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-3)
    scores = fidelity("metric_isc").isc_features_to_metric(reference[1][:4], splits=4)
    assert found["inception_score"] == pytest.approx(scores["inception_score_mean"], rel=1e-3)
    ratio = fidelity("metric_prc").prc_features_to_metric(*reference[0].split(4))
    assert (found["precision"], found["recall"]) == pytest.approx((ratio["precision"], ratio["recall"]))
    assert found["weights_sha256"] == inception.WEIGHTS_SHA256


def test_same_formulas_as_torch_fidelity(fidelity, monkeypatch):
    a, b = 0.5 * vectors(230, 0) + 0.1, vectors(180, 1)
    module = fidelity("metric_fid")
    expected = module.fid_statistics_to_metric(
        *(module.fid_features_to_statistics(torch.from_numpy(side)) for side in (a, b)), False
    )
    found = frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    monkeypatch.setattr(fid, "SUBSET_SIZE", 60)
    values = kernel_distances(a, b)
    kid = fidelity("metric_kid").kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subset_size=60)
    assert values.mean() == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-3)
    assert values.std() == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-3)
    ratio = fidelity("metric_prc").prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b))
    assert precision_recall(a, b) == pytest.approx((ratio["precision"], ratio["recall"]), abs=1e-3)
    assert 0 < ratio["recall"] < ratio["precision"] - 0.1 < 1
    logits = 3 * vectors(203, 2, inception.NUM_LOGITS)
    expected = fidelity("metric_isc").isc_features_to_metric(torch.from_numpy(logits))
    score = InceptionScore(203)
    for part in np.split(logits, [1, 90]):
        score.add(part)
    assert score.scores.mean() == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert score.scores.std() == pytest.approx(expected["inception_score_std"], rel=1e-6)


def test_kid_is_the_unbiased_estimate_and_zero_between_halves_of_one_set(monkeypatch):
    a, b = vectors(40, 0).astype(np.float64), vectors(40, 1).astype(np.float64)
    kernel = lambda x, y: (x @ y / len(x) + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(40) for j in range(40)]
    within = [kernel(x[i], x[j]) for x in (a, b) for i, j in pairs if i != j]
    expected = 2 * np.mean(within) - 2 * np.mean([kernel(a[i], b[j]) for i, j in pairs])
    np.testing.assert_allclose(kernel_distances(a, b), expected)  # each subset is the whole
    monkeypatch.setattr(fid, "SUBSET_SIZE", 100)
    halves = kernel_distances(vectors(3000, 3)[::2], vectors(3000, 3)[1::2])
    assert abs(halves.mean()) < 4 * halves.std() / 10
    assert halves.min() < 0 < halves.max()


@pytest.mark.parametrize("block", [4, 500])
def test_precision_and_recall_by_brute_force(monkeypatch, block):
    monkeypatch.setattr("e2h.evaluation.neighbours.BLOCK", block)
    synthetic, real = vectors(20, 1, 3), vectors(30, 0, 3)

    def within(point, centres):
        for i, centre in enumerate(centres):
            others = sorted(np.linalg.norm(other - centre) for j, other in enumerate(centres) if j != i)
            if np.linalg.norm(point - centre) <= others[2]:
                return True
        return False

    expected = np.mean([within(x, real) for x in synthetic]), np.mean([within(x, synthetic) for x in real])
    assert precision_recall(synthetic, real) == pytest.approx(expected)
    assert expected[0] != expected[1]
    one_mode = real[:1] + 0.01 * vectors(20, 2, 3)  # precise, and nearly nothing is recalled
    precision, recall = precision_recall(one_mode, real)
    assert precision == 1
    assert recall < 0.1
    assert precision_recall(real, real) == (1, 1)


def test_inception_score_knows_one_class_from_many():
    certain = np.full((100, inception.NUM_LOGITS), -50.0)
    many, one = certain.copy(), certain.copy()
    many[np.arange(100), np.arange(100)] = 50
    one[:, 3] = 50
    for logits, expected in ((many, 10), (one, 1)):  # ten images a split, each of its own class
        score = InceptionScore(100)
        score.add(logits)
        assert score.scores == pytest.approx(expected)
    assert softmax(many[0])[0] == pytest.approx(1)


@pytest.mark.parametrize("most", [25, 40])
def test_features_kept_are_of_the_whole_set_and_statistics_those_of_all(most, monkeypatch):
    monkeypatch.setattr(fid, "MAX_COMPARED", most)
    monkeypatch.setattr(fid, "FEATURE_WIDTH", 16)
    features, sums = vectors(40, 0), FeatureSums(40)
    for part in np.split(features, [10, 20, 30]):
        sums.add(part)
    [places] = np.nonzero((features[:, None] == sums.kept).all(axis=2).any(axis=1))
    np.testing.assert_array_equal(sums.kept, features[places])  # in their order
    assert len(places) == most
    assert np.histogram(places, [0, 20, 40])[0].min() >= 8  # of a set that is sorted by class, from every class
    assert sums.statistics.count == 40
    np.testing.assert_allclose(sums.statistics.covariance, np.cov(features.astype(np.float64), rowvar=False))


def test_grey_images_are_colour_images_without_colour(model, images):
    grey = images[:1, :28, :28, :1]
    for found, expected in zip(features_of(model, grey), features_of(model, grey.repeat(3, axis=3)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_resizing_follows_tensorflow_1():
    row = torch.tensor([0.0, 100.0, 50.0, 250.0])
    found = inception._resized(row.repeat(1, 1, 4, 1))[0, 0, 17]
    places = np.arange(299) * 4 / 299  # no half-pixel shift; beyond the last centre its value is repeated
    np.testing.assert_allclose(found.numpy(), np.interp(places, range(4), row.numpy()), atol=1e-3)


def test_the_network_has_the_published_file_s_size():
    values = sum(value.numel() for value in InceptionV3().state_dict().values() if value.is_floating_point())
    assert 0 < PUBLISHED_BYTES - 4 * values < 100_000  # names and shapes


def test_another_file_is_refused(random_weights, tmp_path):
    path, sha256 = random_weights
    with pytest.raises(InputError, match=rf"expected a file of SHA-256 6726825d\w+, found {sha256}; the standard"):
        load_inception(path)
    altered = tmp_path / "altered.pth"
    altered.write_bytes(Path(path).read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match=rf"^evaluation.inception_weights={altered}: expected a file of SHA-256"):
        load_inception(str(altered), sha256)
    for missing in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(
            InputError, match=rf"{missing}: expected a readable file \(.*\); the standard FID weights are"
        ):
            load_inception(str(missing))


def test_weights_are_refused_before_anything_is_trained(random_weights, images, monkeypatch):
    monkeypatch.setattr(evaluate, "fit_all", lambda *call: pytest.fail("trained"))
    labelled = (images, np.arange(8) % 2)
    run = partial(evaluate.evaluate, real_test=[labelled], seed=0, class_names=["even", "odd"])
    config = EvaluationConfig(inception_weights=random_weights[0])
    with pytest.raises(InputError, match="expected a file of SHA-256"):
        run(labelled, labelled, config=config)
    monkeypatch.setattr(evaluate, "load_inception", lambda path: MagicMock())
    with pytest.raises(InputError, match="synthetic=3 images: expected at least 4"):
        run((images[:3], labelled[1][:3]), labelled, config=config)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_features_of_a_cpu(model, images):
    assert model.fc.weight.is_cuda
    on_gpu = features_of(model, images)
    on_cpu = features_of(model.cpu(), images)
    for found, expected in zip(on_gpu, on_cpu, strict=True):
        assert np.abs(found - expected).max() < 1e-3 * expected.std(0).mean()
