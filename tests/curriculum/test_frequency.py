"""The frequency stage's query: what one record can move, on any machine, in any blocks, and its noise."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from central_cases import CLASSES, KEY, NOISE_KEY, SIDE, hostile, records
from scipy import stats

from e2h.config import FrequencyConfig
from e2h.curriculum import frequency as frequency_module
from e2h.curriculum.central import GRID_BITS
from e2h.curriculum.frequency import ANGLE_BITS, TURN_BITS, FrequencyQuery, waves
from e2h.errors import InputError
from e2h.privacy.events import PoissonSampledGaussian


def query(sigma=5.0, num_records=300, channels=1, seed=0, **settings) -> FrequencyQuery:
    frequency = FrequencyConfig(**{"num_features": 60, "bandwidth": 0.25, **settings})
    return FrequencyQuery(frequency, PoissonSampledGaussian(1.0, sigma, 1), SIDE, channels, CLASSES, num_records, seed)


def squares_moved(one: FrequencyQuery, images: np.ndarray, labels: np.ndarray, ids: np.ndarray) -> list[int]:
    """Squared norm by which the sums move without each record, in Python's whole numbers: the check rounds nothing."""
    total, squares = one.partial_sums(images, labels, ids, KEY), []
    for missing in range(len(images)):
        kept = np.arange(len(images)) != missing
        moved = total - one.partial_sums(images[kept], labels[kept], ids[kept], KEY)
        squares.append(sum(value * value for value in moved.ravel().tolist()))
    return squares


@pytest.mark.parametrize(
    "settings", [{}, {"channels": 3}, {"num_features": 2}, {"bandwidth": 0.001}, {"bandwidth": 1e6}]
)
def test_one_record_moves_the_sums_by_at_most_the_sensitivity(settings):
    one, channels = query(**settings), settings.get("channels", 1)
    images = np.concatenate([records(20, channels)[0], hostile(channels)])
    squares = squares_moved(one, images, np.arange(len(images)) % CLASSES, np.arange(len(images)))
    assert one.sensitivity == 1.0
    assert max(squares) <= 4**GRID_BITS
    assert min(squares) > 0.999 * 4**GRID_BITS  # every record counts in full, so the test could have failed


@pytest.mark.parametrize("num_pairs", [1, 2, 3, 500, 1000, 5000])
def test_no_angle_has_a_pair_above_its_share_of_the_bound(num_pairs):
    """All angles there are: the bound holds for images that no test thinks of."""
    cosines, sines = (wave.astype(np.int64) for wave in waves(num_pairs))
    assert int((cosines**2 + sines**2).max()) * num_pairs <= 4**GRID_BITS


def test_a_record_that_counts_twice_is_found(monkeypatch):
    real = FrequencyQuery.encode

    def doubled(self, images):
        rows = real(self, images)
        rows[images.reshape(len(images), -1).all(axis=1)] *= 2  # only of images without a black pixel
        return rows

    monkeypatch.setattr(FrequencyQuery, "encode", doubled)
    images = np.concatenate([records(20)[0], hostile()])
    assert max(squares_moved(query(), images, np.arange(len(images)) % CLASSES, np.arange(27))) > 3 * 4**GRID_BITS


def test_a_record_touches_its_own_class():
    images, _, ids = records(1)
    sums = query().partial_sums(images, np.array([2]), ids, KEY)
    assert (sums[:2] == 0).all()
    assert (sums[2] == query().encode(images)[0]).all()


def test_sums_do_not_depend_on_blocks_or_order(monkeypatch):
    one, (images, labels, ids) = query(), records(200)
    whole = one.partial_sums(images, labels, ids, KEY)
    order = np.random.default_rng(5).permutation(200)
    for cuts, slice_numbers in (([100], 60 * 7), ([1, 2, 199], 1), ([50, 51, 120], 10**6)):
        monkeypatch.setattr(frequency_module, "SLICE_NUMBERS", slice_numbers)
        parts = [one.partial_sums(images[p], labels[p], ids[p], KEY) for p in np.split(order, cuts)]
        assert (sum(parts) == whole).all()
    assert whole.dtype == np.int64
    assert whole.shape == one.zero_sums().shape == (CLASSES, 60)


@pytest.mark.parametrize("settings", [{}, {"channels": 3, "bandwidth": 0.005}])
def test_a_record_is_encoded_as_whole_number_arithmetic_says(settings):
    """A reference in Python's whole numbers: no order of sums, and so no block or processor, can show."""
    one = query(**settings)
    images = np.concatenate([records(20, one.channels)[0], hostile(one.channels)])
    frequencies = [[int(value) for value in row] for row in one.frequencies()]
    encoded = one.encode(images)
    cosines, sines = waves(30)
    for row, image in zip(encoded, images.reshape(len(images), -1).tolist(), strict=True):
        phases = [sum(w * x for w, x in zip(frequency, image, strict=True)) for frequency in frequencies]
        angles = [(phase % 2**TURN_BITS) >> (TURN_BITS - ANGLE_BITS) for phase in phases]
        assert (row == np.concatenate([cosines[angles], sines[angles]])).all()


def test_a_record_has_the_same_bits_in_any_block():
    one, images = query(num_features=1000), records(300)[0]
    whole = one.encode(images)
    for size in (1, 2, 7, 128):
        assert (one.encode(images[:size]) == whole[:size]).all()


PRINT_DIGEST = """
import hashlib
import numpy as np
from e2h.config import FrequencyConfig
from e2h.curriculum.frequency import FrequencyQuery
from e2h.privacy.events import PoissonSampledGaussian
images, found = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8), hashlib.sha256()
for bandwidth in (0.06, 0.5):
    settings = FrequencyConfig(num_features=300, bandwidth=bandwidth)
    query = FrequencyQuery(settings, PoissonSampledGaussian(1.0, 1.0, 1), 16, 3, 2, 50, 7)
    found.update(query.encode(images).tobytes())
print(found.hexdigest())
"""


def test_a_processor_with_fewer_instructions_gives_the_same_bits():
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    used = [name for name in __cpu_dispatch__ if __cpu_features__[name]]
    if not used:
        pytest.skip("numpy uses nothing on this processor that can be switched off")
    other = {"NPY_DISABLE_CPU_FEATURES": " ".join(used), "OPENBLAS_CORETYPE": "Prescott"}
    command = [sys.executable, "-W", "ignore", "-c", PRINT_DIGEST]
    runs = [subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True) for more in ({}, other)]
    assert runs[0].stdout == runs[1].stdout != "", runs[1].stderr


def test_features_have_the_gaussian_kernel():
    one, images = query(num_features=20_000, channels=3), records(40, 3)[0]
    images[1] = images[0] // 2 + 60  # a near one
    features = one.encode(images) * 2.0**-GRID_BITS
    pixels = images.reshape(40, -1) / 255
    distances = ((pixels[:, None] - pixels[None]) ** 2).mean(axis=-1)
    kernel = np.exp(-distances / (2 * 0.25**2))
    assert kernel[0, 1] > 0.1
    # 10,000 cosines of variance at most 1: five standard deviations.
    assert abs(features @ features.T - kernel).max() < 0.05


def test_frequencies_are_the_public_seeds():
    assert (query(seed=1).frequencies() == query(seed=1).frequencies()).all()
    assert (query(seed=1).frequencies() != query(seed=2).frequencies()).any()


def test_noise_is_of_the_accounted_size_once():
    """Kolmogorov and Smirnov; false alarm once in a million keys."""
    one = query(sigma=3.0, num_features=40_000)
    noise = one.release(one.zero_sums(), NOISE_KEY) / (3.0 * 2.0**GRID_BITS)
    assert noise.shape == (CLASSES, 40_000)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-6
    assert len(np.unique(noise)) > 0.9 * noise.size  # no two classes or coordinates share a draw
    # It doesn't depend on what it is added to.
    assert (one.release(one.zero_sums() + 12345, NOISE_KEY) - one.release(one.zero_sums(), NOISE_KEY) == 12345).all()


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.05], ids=["of replacing a record", "halved", "five per cent more"])
def test_noise_of_another_size_is_found(factor, monkeypatch):
    real = frequency_module.gaussian_noise
    monkeypatch.setattr(frequency_module, "gaussian_noise", lambda *address: real(*address[:3], factor * address[3]))
    one = query(sigma=3.0, num_features=40_000)
    noise = one.release(one.zero_sums(), NOISE_KEY) / (3.0 * 2.0**GRID_BITS)
    assert stats.kstest(noise.ravel(), "norm").pvalue < 1e-6


def test_embeddings_are_means_by_the_public_count():
    images, labels, ids = records(300)
    one, labels = query(num_features=5000, sigma=0.5), np.repeat(np.arange(CLASSES), [200, 70, 30])
    sums = one.partial_sums(images, labels, ids, KEY)
    clean, noisy = one.embeddings(sums), one.embeddings(one.release(sums, NOISE_KEY))
    features = one.encode(images) * 2.0**-GRID_BITS
    assert clean[0] == pytest.approx(2.0 * features[:200].mean(axis=0))  # twice as many as a third
    assert clean[2] == pytest.approx(0.3 * features[270:].mean(axis=0))
    assert (noisy - clean).std() == pytest.approx(one.noise_deviation, rel=0.03)
    assert one.noise_deviation == pytest.approx(0.5 / 100)


def test_a_query_that_samples_or_repeats_is_refused():
    for event in (PoissonSampledGaussian(0.5, 1.0, 1), PoissonSampledGaussian(1.0, 1.0, 2)):
        with pytest.raises(ValueError, match="one round over all records"):
            replace(query(), event=event)


def test_a_kernel_too_narrow_for_exact_phases_is_refused():
    with pytest.raises(InputError, match=r"frequency.bandwidth=1e-07: expected more"):
        query(bandwidth=1e-7).encode(records(1)[0])


def test_memory_beyond_the_sums_does_not_grow_with_the_records(monkeypatch):
    monkeypatch.setattr(frequency_module, "SLICE_NUMBERS", 100 * 64)
    one, peaks = query(), []
    for count in (1000, 16_000):
        block, total = records(count), one.zero_sums()
        tracemalloc.start()
        one.partial_sums(*block, KEY, total)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 15_000 * 10  # of 60 features of 4 bytes each


def test_sums_are_added_to_the_total_that_is_given():
    one, block = query(), records(50)
    total = np.full_like(one.zero_sums(), 7)
    assert one.partial_sums(*block, KEY, total) is total
    assert (total == one.partial_sums(*block, KEY) + 7).all()
