"""Recommended batches and steps: what a budget of gradients buys."""

from __future__ import annotations

import pytest

from e2h.config import Config
from e2h.errors import InputError
from e2h.privacy.accounting import calibrate
from e2h.privacy.events import PoissonSampledGaussian
from e2h.privacy.schedule import ENOUGH, Schedule, explained, recommended, schedules, table

N, GRADIENTS = 3000, 30_000


def found(epsilon: float, gradients: float = GRADIENTS) -> list[Schedule]:
    config = Config(curriculum=[])
    config.privacy.epsilon, config.privacy.delta = epsilon, 1e-5
    return schedules(config, N, gradients)


@pytest.fixture(scope="module")
def low() -> list[Schedule]:
    return found(0.5)


@pytest.fixture(scope="module")
def high() -> list[Schedule]:
    return found(10.0)


def test_every_schedule_spends_the_gradients_and_its_noise_is_the_plans(low):
    assert [one.expected_batch_size for one in low] == [16, 32, 64, 128, 256, 512]
    for one in low:
        assert one.expected_batch_size * one.num_steps == pytest.approx(GRADIENTS, rel=0.02)
    one = low[2]
    step = PoissonSampledGaussian(one.expected_batch_size / N, 1.0, one.num_steps)
    exact = calibrate([], "finetune", step, 0.5, 1e-5).event.noise_multiplier
    assert exact <= one.noise_multiplier <= 1.02 * exact


def test_no_schedule_is_heard_better_than_full_batches_and_small_ones_less(low, high):
    for rows in (low, high):
        signals = [one.signal for one in rows]
        assert signals == sorted(signals)
        assert signals[-1] < 1.01
    # With a small epsilon the noise is large, and small batches lose little; with a large one they lose most.
    assert low[-3].signal / low[-1].signal > 0.85 > 0.75 > high[-3].signal / high[-1].signal


def test_the_smallest_batch_that_is_heard_is_recommended(low, high):
    rows = [Schedule(2**k, 2 ** (12 - k), 1.0, signal) for k, signal in enumerate((0.5, 0.9, 0.96, 0.99, 1.0), 4)]
    assert recommended(rows) is rows[2]
    assert ENOUGH * rows[-1].signal > rows[1].signal
    assert explained(rows, rows[2]) == (
        "batches of 64 hear 96% of what full batches would; batches of 256 reach 100%, with fewer steps"
    )
    assert "the most that so many gradients buy" in explained(rows, rows[4])
    assert [line.endswith("*") for line in table(rows, rows[2])] == [False, False, False, True, False, False]
    assert recommended(low).expected_batch_size <= recommended(high).expected_batch_size


def test_too_few_gradients_are_refused():
    with pytest.raises(InputError, match=r"expected at least 800 gradients, found 500; give more"):
        found(1.0, 500)
