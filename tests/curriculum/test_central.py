"""The easy stage: what one record can move, and that the released images show the classes."""

from __future__ import annotations

import numpy as np
import pytest
from central_cases import CLASSES, KEY, NOISE_KEY, QUERIES, SIDE, hostile, query, records
from scipy import stats

from e2h.curriculum.central import GRID_BITS, CentralQuery, pool
from e2h.privacy.noise import gaussian_noise
from e2h.privacy.sampling import poisson_mask


@pytest.mark.parametrize("settings", QUERIES.values(), ids=QUERIES)
def test_one_record_moves_no_round_by_more_than_the_sensitivity(settings):
    one, channels = query(**settings), settings.get("channels", 1)
    images, labels, ids = records(40, channels)
    images = np.concatenate([images, hostile(channels)])
    labels = np.concatenate([labels, np.arange(len(images) - 40) % CLASSES])
    ids = np.concatenate([ids, np.arange(len(images) - 40)])
    total = one.partial_sums(images, labels, ids, KEY)
    longest = 0
    for missing in range(len(images)):
        kept = np.arange(len(images)) != missing
        moved = total - one.partial_sums(images[kept], labels[kept], ids[kept], KEY)
        # In Python's whole numbers, so that the check itself rounds nothing.
        squares = [sum(value * value for value in row) for row in moved.reshape(len(moved), -1).tolist()]
        assert max(squares) <= 4**GRID_BITS
        longest = max(longest, *squares)
        # The coins of the other records stay: a round that the record did not join is the same to the last bit.
        joined = [bool(poisson_mask(KEY, t, ids[missing : missing + 1], one.event.sampling_prob)[0]) for t in range(4)]
        assert [square > 0 for square in squares] == [
            hit and bool(one.encode(images[missing : missing + 1]).any()) for hit in joined
        ]
    if settings.get("max_norm") != 50.0:
        assert longest > 0.99 * 4**GRID_BITS  # the bound is met, so the test could have failed


def test_the_sensitivity_is_what_the_paper_page_says():
    assert query(max_norm=3.0).sensitivity == 3.0
    assert query(max_norm=3.0, count_weight=0.75).sensitivity == 3.75
    assert query(query="mode", pool_factor=2, channels=3).sensitivity == pytest.approx(np.sqrt(3 * 16))


def test_a_round_touches_one_class():
    images, _, ids = records(1)
    sums = query(q=1.0).partial_sums(images, np.array([2]), ids, KEY)
    assert (sums[:, :2] == 0).all()
    assert (sums[:, 2] != 0).any()


def test_rounds_draw_different_records_at_the_accounted_rate():
    one = query(q=0.3, max_norm=1.0, count_weight=1.0, rounds=20, class_conditional=False)
    images, labels, ids = records(500)
    sums = one.partial_sums(images, labels, ids, KEY)[:, 0, -1]
    counts = np.rint(sums / one.encode(images)[0, -1]).astype(int)
    assert len(set(counts)) > 5
    assert stats.binomtest(int(counts.sum()), 20 * 500, 0.3).pvalue > 1e-6


def test_running_it_again_gives_the_same_bits():
    images, labels, ids = records(100)
    first, second = (one.release(one.partial_sums(images, labels, ids, KEY), NOISE_KEY) for one in (query(), query()))
    assert (first == second).all()
    assert (query().decode(first) == query().decode(second)).all()


@pytest.mark.parametrize("settings", [{"max_norm": 6.0}, {"query": "mode"}])
def test_every_coordinate_gets_noise_of_the_accounted_size_once(settings):
    """Kolmogorov and Smirnov; false alarm once in a million keys."""
    one = query(rounds=400, sigma=3.0, **settings)
    zero = np.zeros((400, CLASSES, one.dimension), np.int64)
    noise = one.release(zero, NOISE_KEY) / (3.0 * 2.0**GRID_BITS)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-6
    assert stats.kstest(1.05 * noise.ravel(), "norm").pvalue < 1e-6
    # No two rounds, classes or coordinates share a draw (a few fall on the same point of the grid).
    assert len(np.unique(noise)) > 0.9 * noise.size
    # It doesn't depend on what it is added to.
    assert (one.release(zero + 12345, NOISE_KEY) - one.release(zero, NOISE_KEY) == 12345).all()


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_noise_of_a_pixel_is_what_the_plan_says(weight):
    one = query(rounds=9, sigma=0.5, count_weight=weight, num_records=3000)
    sums, step = one.zero_sums(), one.sensitivity * 2.0**-GRID_BITS
    sums[..., -1] = one.expected_count * weight * one.central.max_norm / step  # black images, as many as expected
    noise = one.means(one.release(sums, NOISE_KEY)).mean(axis=0) - one.central.centre
    assert noise.std() == pytest.approx(one.pixel_noise, rel=0.2)


def test_noise_of_the_whole_is_one_vector():
    one = query(count_weight=1.0)
    noise = gaussian_noise(NOISE_KEY, 0, one.zero_sums().size, 5.0 * 2.0**GRID_BITS)
    assert (one.release(one.zero_sums(), NOISE_KEY).ravel() == noise).all()


def a_set(sizes: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One pattern a class, with noise around it; also the patterns, [CLASSES, 8, 8, 1] in [0, 1]."""
    rng = np.random.default_rng(3)
    patterns = rng.integers(30, 150, (CLASSES, SIDE, SIDE, 1))
    labels = np.repeat(np.arange(CLASSES), sizes)
    images = (patterns[labels] + rng.integers(-20, 21, (len(labels), SIDE, SIDE, 1))).astype(np.uint8)
    return images, labels, np.arange(len(labels)), patterns / 255


def released(one: CentralQuery, images: np.ndarray, labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Decoded central images, averaged over the rounds: float [groups, 8, 8, C] in [0, 1]."""
    decoded = one.decode(one.release(one.partial_sums(images, labels, ids, KEY), NOISE_KEY))
    assert decoded.dtype == np.uint8
    return decoded.mean(axis=0) / 255


@pytest.mark.parametrize("centre", [0.0, 0.5])
def test_balanced_classes_are_decoded_without_bias(centre):
    images, labels, ids, patterns = a_set([2000] * CLASSES)
    one = query(rounds=30, q=0.5, sigma=2.0, num_records=6000, max_norm=8.0, centre=centre)
    error = released(one, images, labels, ids) - patterns
    # 30 rounds of 1000 records a class: noise of 2 * 8 / 1000 a pixel and round, counts that vary by 1.6 % a round.
    assert abs(error.mean()) < 0.004
    assert abs(error).max() < 0.02


def test_a_clipped_set_is_darker_by_the_public_factor():
    images, labels, ids, patterns = a_set([2000] * CLASSES)
    norms = np.linalg.norm(images.reshape(len(images), -1) / 255, axis=1)
    half = query(rounds=30, sigma=0.5, num_records=6000, max_norm=float(norms.mean() / 2))
    ratio = released(half, images, labels, ids) / patterns
    assert ratio.mean() == pytest.approx(0.5, rel=0.02)


def test_the_noisy_count_mends_an_imbalanced_class():
    images, labels, ids, patterns = a_set([4000, 1000, 1000])
    plain = query(rounds=30, sigma=2.0, num_records=6000, max_norm=8.0)
    counted = query(rounds=30, sigma=2.0, num_records=6000, max_norm=8.0, count_weight=1.0)
    # Divided by the expected third, the large class is twice as bright as it is, the small ones half as bright.
    ratio = (released(plain, images, labels, ids) / patterns).mean(axis=(1, 2, 3))
    assert ratio == pytest.approx([2.0, 0.5, 0.5], rel=0.03)
    assert abs(released(counted, images, labels, ids) - patterns).max() < 0.05


def test_a_count_below_its_own_noise_is_floored():
    one = query(rounds=4, sigma=10.0, max_norm=8.0, count_weight=0.5)
    step = one.sensitivity * 2.0**-GRID_BITS
    floor = 2 * 10.0 * one.sensitivity / (0.5 * 8.0 * np.sqrt(4))  # two standard deviations of the noise on the count
    for count in (-1000.0, 0.0, 0.9 * floor):
        sums = np.full((4, CLASSES, one.dimension), 0.5 * floor / step)
        sums[..., -1] = count * 0.5 * 8.0 / step
        # A negative count would show the negative, and one near 0 only black and white.
        assert abs(one.decode(sums.astype(np.int64)) / 255 - 0.5).max() < 0.01


def test_unconditional_images_show_the_whole_set():
    images, labels, ids, patterns = a_set([2000] * CLASSES)
    one = query(rounds=10, sigma=2.0, num_records=6000, max_norm=8.0, class_conditional=False)
    found = released(one, images, labels, ids)
    assert found.shape == (1, SIDE, SIDE, 1)
    assert abs(found - patterns.mean(axis=0)).max() < 0.02


def test_the_mode_is_the_most_frequent_level():
    rng = np.random.default_rng(4)
    levels = rng.integers(0, 4, (CLASSES, SIDE, SIDE, 1))
    labels = np.repeat(np.arange(CLASSES), 500)
    images = levels[labels] * 85
    other = rng.random(images.shape) < 0.3
    images = np.where(other, rng.integers(0, 4, images.shape) * 85, images).astype(np.uint8)
    one = query(rounds=3, sigma=2.0, num_records=1500, query="mode", num_bins=4)
    decoded = one.decode(one.release(one.partial_sums(images, labels, np.arange(1500), KEY), NOISE_KEY))
    assert (decoded == levels * 85).mean() > 0.99


def test_pooling_is_the_sum_of_an_area_and_decoding_gives_full_size():
    images = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    assert pool(images, 2)[0, 0, 0, 0] == 0 + 1 + 8 + 9
    assert (pool(images, 1) == images).all()
    half = query(rounds=20, sigma=0.5, num_records=6000, max_norm=8.0, pool_factor=2)
    assert half.dimension == 17
    images, labels, ids = np.full((6000, 8, 8, 1), 77, np.uint8), np.arange(6000) % CLASSES, np.arange(6000)
    found = released(half, images, labels, ids)
    assert found.shape == (CLASSES, 8, 8, 1)
    assert abs(found - 77 / 255).max() < 0.02


@pytest.mark.parametrize("settings", QUERIES.values(), ids=QUERIES)
@pytest.mark.parametrize("polish", [{}, {"median_filter": True, "sharpen": True}])
def test_decoding_stays_in_range_whatever_the_noise(settings, polish):
    one = query(sigma=1e4, **settings, **polish)
    channels = settings.get("channels", 1)
    decoded = one.decode(one.release(np.zeros((4, one.num_groups, one.dimension), np.int64), NOISE_KEY))
    assert decoded.dtype == np.uint8
    assert decoded.shape == (4, one.num_groups, SIDE, SIDE, channels)
    assert decoded.std() > 0


def test_the_filters_do_what_their_names_say():
    one = query(rounds=1, q=1.0, sigma=1e-6, num_records=CLASSES, max_norm=50.0)
    image = np.full((CLASSES, 8, 8, 1), 100, np.uint8)
    image[:, 4, 4] = 120
    sums = one.partial_sums(image, np.arange(CLASSES), np.arange(CLASSES), KEY)

    def shown(**polish):
        return query(rounds=1, q=1.0, sigma=1e-6, num_records=CLASSES, max_norm=50.0, **polish).decode(sums)[0, 0]

    assert shown()[4, 4, 0] == pytest.approx(120, abs=1)
    assert shown(median_filter=True)[4, 4, 0] == pytest.approx(100, abs=1)
    assert shown(sharpen=True)[4, 4, 0] == pytest.approx(5 * 120 - 4 * 100, abs=6)
    assert shown(sharpen=True)[1, 1, 0] == pytest.approx(100, abs=6)
