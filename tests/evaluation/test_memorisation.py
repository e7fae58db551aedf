from __future__ import annotations

import numpy as np
import pytest
import torch

from e2h.evaluation.memorisation import Sample, memorisation
from e2h.evaluation.neighbours import distances, nearest


def natural(count: int, seed: int, side: int = 8) -> np.ndarray:
    """Images of one distribution: smooth shapes with noise."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((count, 1, 4, 4)))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").permute(0, 2, 3, 1).numpy()
    return np.clip(255 * smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def train() -> np.ndarray:
    return natural(2000, 0)


def test_an_honest_generator_passes(train):
    found = memorisation(natural(400, 1), natural(400, 2), [train])
    assert found["ratio"] == pytest.approx(1, abs=0.05)
    assert found["share_below_first_percentile"] < 0.04
    assert found["nearest_train"] == sorted(found["nearest_train"])


@pytest.mark.parametrize("change", [0, 3])
def test_a_generator_that_copies_is_found(train, change):
    """Every fourth image is a training image, exactly or with a little noise."""
    synthetic, rng = natural(400, 1), np.random.default_rng(3)
    copies = train[1900:].astype(int) + rng.integers(-change, change + 1, train[1900:].shape)
    synthetic[::4] = np.clip(copies, 0, 255)
    found = memorisation(synthetic, natural(400, 2), [train])
    assert 0.25 <= found["share_below_first_percentile"] < 0.29
    assert found["nearest_train"][0] < 0.2 * found["nearest_train_of_test"][0]
    everything = memorisation(train[:400], natural(400, 2), [train])
    assert everything["ratio"] == 0
    assert everything["share_below_first_percentile"] == 1


@pytest.mark.parametrize("num_test", [10, 45])
def test_with_few_test_images_chance_says_more_than_one_per_cent(train, num_test):
    found = [memorisation(natural(200, seed), natural(num_test, 100 + seed), [train]) for seed in range(20)]
    shares, chance = [one["share_below_first_percentile"] for one in found], found[0]["share_by_chance"]
    assert chance > 0.025
    assert np.mean(shares) == pytest.approx(chance, abs=4 * np.std(shares) / np.sqrt(len(shares)))


def test_copies_are_found_where_real_images_repeat_too(train):
    """Of the test images 2 % are training images, so that their first quantile is 0."""
    test = np.concatenate([natural(392, 2), train[:8]])
    assert memorisation(train[:100], test, [train])["share_below_first_percentile"] == 1
    honest = memorisation(natural(400, 1), test, [train])
    assert honest["nearest_train_of_test"][0] == 0
    assert honest["share_below_first_percentile"] == 0
    assert memorisation(test, train[:400], [train])["ratio"] is None


def test_blocks_of_training_images_do_not_matter_and_large_images_are_averaged_down(train):
    whole = memorisation(train[:50] // 2, natural(40, 2), [train])
    assert memorisation(train[:50] // 2, natural(40, 2), np.split(train, [1, 700, 700])) == whole
    large = [natural(20, seed, 64) for seed in (0, 1, 2)]
    small = [images.reshape(20, 32, 2, 32, 2, 1).mean((2, 4)).reshape(20, -1) / 255 for images in large]
    found = memorisation(large[0], large[1], [large[2]])
    expected = [float(np.median(distances(small[k], small[2]).min(axis=1))) for k in (0, 1)]
    assert [found[name][-1] for name in ("nearest_train", "nearest_train_of_test")] == pytest.approx(expected, abs=1e-4)


def test_nearest_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    queries, rows = rng.normal(size=(30, 7)), rng.normal(size=(1300, 7)).astype(np.float32)
    pairs = np.linalg.norm(queries[:, None] - rows.astype(np.float64), axis=2)
    np.testing.assert_allclose(distances(queries, rows), pairs, atol=1e-9)
    for cuts in ([], [3], [400, 1299]):
        np.testing.assert_allclose(nearest(queries, np.split(rows, cuts)), pairs.min(axis=1), atol=1e-9)


def test_a_sample_is_random_and_that_of_any_blocks():
    images, labels = np.arange(2000).reshape(-1, 1, 1, 1), np.arange(2000) // 1000  # sorted by class
    kept = []
    for size in (1, 300, 2000):
        sample = Sample(100, seed=4)
        watched = list(sample.watch((images[i : i + size], labels[i : i + size]) for i in range(0, 2000, size)))
        np.testing.assert_array_equal(np.concatenate([block for block, _ in watched]), images)
        np.testing.assert_array_equal(np.concatenate([block for _, block in watched]), labels)
        kept.append(sorted(sample.images.ravel()))
    assert kept[0] == kept[1] == kept[2]
    assert len(set(kept[0])) == 100
    assert 30 < np.mean(np.array(kept[0]) < 1000) * 100 < 70
    few = Sample(100, seed=4)
    list(few.watch([(images[:7], labels[:7])]))
    assert sorted(few.images.ravel()) == list(range(7))
