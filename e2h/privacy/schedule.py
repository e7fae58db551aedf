"""Which expected batch and number of steps a budget of gradients buys most with, at a given (epsilon, delta).

After T steps the sum of all noises has deviation sigma sqrt(T) C, that of what the records say grows as B T: the ratio
B sqrt(T) / sigma is how well a direction that all steps share is heard. With all records in each step it does not
depend on T, and no schedule exceeds that limit. Small batches, which cost little, come near it as long as sigma stays
well above 1; where the budget is large, they don't, and larger batches pay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from e2h.config import Config
from e2h.errors import InputError
from e2h.privacy.accounting import COARSE_GRID, calibrate
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.plan import easy_release

LEAST_STEPS = 50
LEAST_SHARE = 2**-9  # of the records in a batch: below, sigma is near its least whatever the number of steps
ENOUGH = 0.95  # of the best that the budget buys: then more steps are worth more than a louder signal


@dataclass(frozen=True)
class Schedule:
    """A schedule of DP-SGD; `signal` is its B sqrt(T) / sigma, over that of full batches."""

    expected_batch_size: int
    num_steps: int
    noise_multiplier: float
    signal: float


def schedules(config: Config, num_records: int, num_gradients: float) -> list[Schedule]:
    """Schedules of about so many gradients, batches doubling.

    Args:
      config: validated; its privacy and easy stages hold.
      num_records: public N.
      num_gradients: per-record gradients in all: expected batch times steps.

    Raises:
      InputError: if so few gradients make no schedule.
    """
    easy = [easy_release(config, stage, grid=COARSE_GRID) for stage in config.curriculum]
    limit = num_records / _noise(config, easy, 1.0, 1)
    found, batch = [], 2 ** max(4, math.ceil(math.log2(num_records * LEAST_SHARE)))
    while batch <= num_records and (num_steps := round(num_gradients / batch)) >= LEAST_STEPS:
        noise = _noise(config, easy, batch / num_records, num_steps)
        found.append(Schedule(batch, num_steps, noise, batch * num_steps**0.5 / noise / limit))
        batch *= 2
    if batch > num_records and not found:
        raise InputError(f"N={num_records}: expected at least {batch} training records for a schedule of DP-SGD")
    if not found:
        hours, need = config.scaling.hours, LEAST_STEPS * batch
        given = "finetune.num_steps * finetune.expected_batch_size" if hours is None else f"scaling.hours={hours}"
        raise InputError(f"{given}: expected at least {need} gradients, found {num_gradients:.0f}; give more")
    return found


def _noise(config: Config, easy: Sequence[Release], sampling_prob: float, num_steps: int) -> float:
    step = PoissonSampledGaussian(sampling_prob, 1.0, num_steps)
    target = config.privacy.epsilon, config.privacy.delta
    return calibrate(easy, "finetune", step, *target, COARSE_GRID).event.noise_multiplier


def recommended(found: Sequence[Schedule]) -> Schedule:
    """The smallest batch, and so the most steps, that hears nearly as well as the best of them."""
    best = max(one.signal for one in found)
    return next(one for one in found if one.signal >= ENOUGH * best)


def explained(found: Sequence[Schedule], best: Schedule) -> str:
    """Why, in one line."""
    loudest = max(found, key=lambda one: one.signal)
    if best is loudest:
        return f"{_share(best)}, the most that so many gradients buy; a larger batch has too few steps"
    return f"{_share(best)}; batches of {loudest.expected_batch_size} reach {loudest.signal:.0%}, with fewer steps"


def _share(one: Schedule) -> str:
    return f"batches of {one.expected_batch_size} hear {one.signal:.0%} of what full batches would"


def table(found: Sequence[Schedule], best: Schedule) -> list[str]:
    """The schedules as lines of text; `*` marks the recommended one."""
    rows = [f"{'batch':>8}{'steps':>8}{'noise':>10}{'signal':>9}"]
    for one in found:
        row = f"{one.expected_batch_size:>8}{one.num_steps:>8}{one.noise_multiplier:>10.4f}{one.signal:>9.0%}"
        rows.append(row + " *" * (one is best))
    return rows
