"""Secret, addressed randomness: Poisson masks and Gaussian noise.

The statistical tests work on fixed keys, so they give the same answer every time. Each check is a function that accepts
what is right and rejects a version that was broken on purpose; `ALARM` is the chance that a right generator is rejected
by one check, had the key been drawn anew.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from e2h.privacy import noise as noise_module
from e2h.privacy import sampling
from e2h.privacy.keys import derive_key
from e2h.privacy.noise import LARGEST_DEVIATION, gaussian_noise
from e2h.privacy.sampling import poisson_mask

ALARM = 1e-6
SECRET = bytes(range(32))
KEY, OTHER_KEY = derive_key(SECRET, "a test"), derive_key(SECRET, "another test")

# Poisson masks -------------------------------------------------------------------------------------------------------

IDS = np.random.default_rng(0).choice(2**62, 2000, replace=False) - 2**61
STEPS, Q = 400, 0.1


def masks(draw) -> np.ndarray:
    """bool [STEPS, N] of a sampler draw(step) -> bool [N]."""
    return np.stack([draw(step) for step in range(STEPS)])


@pytest.fixture(scope="module")
def taken() -> np.ndarray:
    return masks(lambda step: poisson_mask(KEY, step, IDS, Q))


def rate_is_right(taken: np.ndarray) -> bool:
    return stats.binomtest(int(taken.sum()), taken.size, Q).pvalue > ALARM


def sizes_vary_as_they_must(taken: np.ndarray) -> bool:
    """Variance of the batch size is N q (1-q): chi-square, both sides."""
    sizes = taken.sum(axis=1)
    statistic = ((sizes - taken.shape[1] * Q) ** 2).sum() / (taken.shape[1] * Q * (1 - Q))
    return min(stats.chi2.cdf(statistic, len(sizes)), stats.chi2.sf(statistic, len(sizes))) > ALARM / 2


def steps_are_independent(taken: np.ndarray) -> bool:
    """Records taken in steps t and t + lag: mean product of centred coins."""
    centred = (taken - Q) / np.sqrt(Q * (1 - Q))
    scores = [float((centred[:-lag] * centred[lag:]).mean()) * np.sqrt(taken[lag:].size) for lag in range(1, 6)]
    return max(map(abs, scores)) < stats.norm.isf(ALARM / 2 / len(scores))


def records_are_independent(taken: np.ndarray) -> bool:
    """Neighbouring records of the set in one step, by several distances."""
    return steps_are_independent(taken.T)


CHECKS = [rate_is_right, sizes_vary_as_they_must, steps_are_independent, records_are_independent]


def uniform(step: int) -> np.ndarray:
    return np.random.default_rng(step).random(len(IDS))


BROKEN_SAMPLERS = {
    "5 % too many": (rate_is_right, lambda step: uniform(step) < 1.05 * Q),
    "a fixed size": (sizes_vary_as_they_must, lambda step: uniform(step).argsort().argsort() < Q * len(IDS)),
    "the same coins in every step": (steps_are_independent, lambda step: uniform(0) < Q),
    "pairs of records share a coin": (records_are_independent, lambda step: np.repeat(uniform(step)[::2], 2) < Q),
}


@pytest.mark.parametrize("check", CHECKS)
def test_masks_are_independent_coins_of_the_accounted_probability(taken, check):
    assert check(taken)


@pytest.mark.parametrize(("check", "draw"), BROKEN_SAMPLERS.values(), ids=BROKEN_SAMPLERS)
def test_a_broken_sampler_is_rejected(check, draw):
    assert not check(masks(draw))


def test_a_record_keeps_its_coin_whatever_the_others_and_their_order(taken):
    order = np.random.default_rng(1).permutation(len(IDS))[:700]
    for step in (0, 17):
        assert (poisson_mask(KEY, step, IDS[order], Q) == taken[step][order]).all()
        for one in range(5):
            assert poisson_mask(KEY, step, IDS[one : one + 1], Q) == taken[step][one]


@pytest.mark.parametrize("coins", [1, 7, 99, 100, 101])
def test_coins_tossed_in_parts_are_those_of_the_whole(monkeypatch, coins):
    whole = poisson_mask(KEY, 0, IDS[:100], Q)
    monkeypatch.setattr(sampling, "COINS", coins)
    assert (poisson_mask(KEY, 0, IDS[:100], Q) == whole).all()


def test_another_key_or_step_gives_other_coins(taken):
    for other in (poisson_mask(OTHER_KEY, 0, IDS, Q), poisson_mask(KEY, 1, IDS, Q)):
        agreement = stats.binomtest(int((other == taken[0]).sum()), len(IDS), Q**2 + (1 - Q) ** 2)
        assert agreement.pvalue > ALARM


def test_coins_are_nested_in_the_probability():
    few, many = poisson_mask(KEY, 3, IDS, 0.1), poisson_mask(KEY, 3, IDS, 0.3)
    assert (many | ~few).all()
    assert many.sum() > few.sum()


def test_the_ends_of_the_probability():
    assert poisson_mask(KEY, 0, IDS, 1.0).all()
    assert not poisson_mask(KEY, 0, IDS, 1e-18).any()
    assert poisson_mask(KEY, 0, IDS, np.nextafter(1.0, 0.0)).all()
    assert poisson_mask(KEY, 0, IDS[:0], 0.5).shape == (0,)


# Noise ---------------------------------------------------------------------------------------------------------------

DRAWS, SCALE = 4_000_000, 2.0**30


@pytest.fixture(scope="module")
def normal() -> np.ndarray:
    return gaussian_noise(KEY, 0, DRAWS, SCALE) / SCALE


def shape_is_normal(z: np.ndarray) -> bool:
    return stats.kstest(z[:500_000], "norm").pvalue > ALARM


def cells_are_filled(z: np.ndarray) -> bool:
    """Chi-square over 200 cells of equal probability."""
    cells = np.floor(stats.norm.cdf(z) * 200).astype(int).clip(0, 199)
    return stats.chisquare(np.bincount(cells, minlength=200)).pvalue > ALARM


def tails_are_normal(z: np.ndarray) -> bool:
    """How many lie beyond 2 to 5 standard deviations, on each side."""
    levels = [2.0, 3.0, 4.0, 4.5, 5.0]
    counts = [(int((side * z > level).sum()), stats.norm.sf(level)) for level in levels for side in (1, -1)]
    return all(stats.binomtest(count, len(z), p).pvalue > ALARM / len(counts) for count, p in counts)


def moments_are_right(z: np.ndarray) -> bool:
    limit, n = stats.norm.isf(ALARM / 4), len(z)
    return abs(z.mean()) * np.sqrt(n) < limit and abs(z.var() - 1) * np.sqrt(n / 2) < limit


def neighbours_are_independent(z: np.ndarray) -> bool:
    """Correlations of values and of squares at small distances: the two of a Box-Muller pair share a radius."""
    scores = []
    for series in (z, (z**2 - 1) / np.sqrt(2)):
        scores += [float((series[:-lag] * series[lag:]).mean()) * np.sqrt(len(z) - lag) for lag in (1, 2, 3)]
    return max(map(abs, scores)) < stats.norm.isf(ALARM / 2 / len(scores))


@pytest.mark.parametrize(
    "check", [shape_is_normal, cells_are_filled, tails_are_normal, moments_are_right, neighbours_are_independent]
)
def test_noise_is_standard_normal(normal, check):
    assert check(normal)


def drawn(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(DRAWS)


BROKEN_NOISE = {
    "std 0.4 % too small": (moments_are_right, lambda: 0.996 * drawn()),
    "a sum of 12 uniforms": (tails_are_normal, lambda: np.random.default_rng(0).random((DRAWS, 12)).sum(axis=1) - 6),
    "clamped at 4": (tails_are_normal, lambda: drawn().clip(-4, 4)),
    "Student's t": (cells_are_filled, lambda: np.random.default_rng(0).standard_t(60, DRAWS)),
    "shifted by 0.01": (shape_is_normal, lambda: drawn() + 0.01),
    "pairs are equal": (neighbours_are_independent, lambda: np.repeat(drawn()[::2], 2)),
    "pairs share a size": (neighbours_are_independent, lambda: np.repeat(abs(drawn()[::2]), 2) * np.sign(drawn(1))),
}


@pytest.mark.parametrize(("check", "draw"), BROKEN_NOISE.values(), ids=BROKEN_NOISE)
def test_broken_noise_is_rejected(check, draw):
    assert not check(draw())


def test_noise_of_two_keys_is_independent(normal):
    other = gaussian_noise(OTHER_KEY, 0, DRAWS, SCALE) / SCALE
    assert abs(float((normal * other).mean())) * np.sqrt(DRAWS) < stats.norm.isf(ALARM / 2)
    assert (gaussian_noise(KEY, 0, 1000, SCALE) == gaussian_noise(KEY, 0, 1000, SCALE)).all()


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (1, 2), (0, 100), (1, 100), (2, 99), (37, 38), (37, 37), (99, 100)]
)
def test_a_slice_of_the_noise_is_the_slice_of_the_whole(start, stop):
    assert (gaussian_noise(KEY, start, stop, SCALE) == gaussian_noise(KEY, 0, 100, SCALE)[start:stop]).all()


def test_noise_scales_and_is_rounded_to_whole_numbers():
    fine, coarse = gaussian_noise(KEY, 0, 200_000, 2.0**40), gaussian_noise(KEY, 0, 200_000, 1.5)
    assert fine.dtype == coarse.dtype == np.int64
    assert (coarse == np.rint(fine / 2.0**40 * 1.5)).all()
    # Rounding adds 1/12 of variance; it never takes any away.
    assert coarse.var() == pytest.approx(1.5**2 + 1 / 12, rel=0.02)


def test_noise_never_comes_in_steps_wider_than_its_grid(monkeypatch):
    largest = gaussian_noise(KEY, 0, 100_000, LARGEST_DEVIATION)
    assert 0.4 < (largest % 2).mean() < 0.6  # the lowest bit is noise too
    monkeypatch.setattr(noise_module, "keystream", lambda key, first, count: bytes(16 * count))
    assert abs(gaussian_noise(KEY, 0, 4, LARGEST_DEVIATION)).max() < 2**53  # so is that of the furthest tail
    for deviation in (LARGEST_DEVIATION * 1.01, 1e30, np.inf, np.nan, -1.0):
        with pytest.raises(ValueError, match="standard_deviation="):
            gaussian_noise(KEY, 0, 4, deviation)


def radii(monkeypatch, uniforms: list[int], deviation: float) -> np.ndarray:
    """The noise whose radius comes of these uniforms, in parts of 2^128, at angle 0."""
    words = [(one >> 64, one & (2**64 - 1), 0, 0) for one in uniforms]
    monkeypatch.setattr(noise_module, "keystream", lambda *_: np.array(words, "<u8").tobytes())
    return gaussian_noise(KEY, 0, 2 * len(words), deviation)[::2]


@pytest.mark.parametrize("deviation", [1.7 * 2.0**30, 12 * 2.0**30, 1000 * 2.0**30, LARGEST_DEVIATION])
def test_near_its_centre_noise_reaches_every_point_of_the_grid(deviation, monkeypatch):
    steps = range(1, 20_000)
    squares = [Fraction(step) ** 2 / Fraction(deviation) ** 2 for step in steps]
    near_one = [2**128 - 1 - int(square / 2 * 2**128) for square in squares]  # -2 ln(1 - s / 2) is s
    assert list(radii(monkeypatch, near_one, deviation)) == list(steps)


def test_the_radius_is_right_to_a_step_of_the_grid_from_end_to_end(monkeypatch):
    powers = [int(2 ** (128 - step / 8)) for step in range(1, 8 * 120)]
    uniforms = sorted({*powers, *(2**128 - 1 - one for one in powers)})
    with localcontext(prec=60):
        logarithms = [((one + Decimal("0.5")) / 2**128).ln() for one in uniforms]
        exact = [int((-2 * one).sqrt() * Decimal(LARGEST_DEVIATION)) for one in logarithms]
    assert abs(radii(monkeypatch, uniforms, LARGEST_DEVIATION) - exact).max() <= 2


@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_the_ends_of_the_uniform_numbers_give_finite_noise(monkeypatch, byte):
    monkeypatch.setattr(noise_module, "keystream", lambda key, first, count: bytes([byte]) * (16 * count))
    extreme = gaussian_noise(KEY, 0, 4, 1000.0)
    assert abs(extreme).max() < 20_000
    if byte == 0:
        assert abs(extreme).max() > 9_000  # the tail is not cut before 9 standard deviations
