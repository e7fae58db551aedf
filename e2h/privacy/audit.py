"""The four tiers of a privacy audit: statistics of what a mechanism was seen to do, and a verdict.

  noise     the released noise has the accounted size, in every coordinate, and is new in every step
  coupled   one record, under the same key, moves a release by at most the sensitivity
  sampler   the draws are independent coins of the accounted probability, the same for all workers
  one_run   no more can be guessed about canaries than the claimed epsilon allows

The first three compare with what the code says that it does and find small faults; only the last looks at the output as
an adversary would, and it finds large ones. A pass is no proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from e2h.privacy.accounting import epsilon_curve
from e2h.privacy.events import Release
from e2h.privacy.one_run import ceiling, gaussian_epsilon, gaussian_mu, lower_bounds

# A correct mechanism fails the noise or the sampler tier with at most this probability, shared among a tier's tests.
FALSE_ALARM_RATE = 1e-6
# Floating-point room for a distance in units of the sensitivity. Correct code never needs it: no false alarms.
DISTANCE_TOLERANCE = 1e-6
CLAIMED_DELTAS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


@dataclass(frozen=True)
class Evidence:
    """What a mechanism was seen to do: arguments of the tiers below, under the same names."""

    square_sums: np.ndarray
    sample: np.ndarray
    releases_agree: bool
    distances: dict[str, float]
    draws: np.ndarray
    draws_agree: bool
    entered_as_drawn: bool
    scores: np.ndarray
    included: np.ndarray


@dataclass(frozen=True)
class Tier:
    """What one tier saw of one mechanism.

    Attributes:
      faults: one sentence each; none where the tier passed.
      figures: what was measured.
      false_alarm_rate: largest probability that a correct mechanism fails here.
    """

    faults: tuple[str, ...]
    figures: dict[str, float | bool]
    false_alarm_rate: float

    @property
    def passed(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        rate = self.false_alarm_rate
        return {"passed": self.passed, "faults": list(self.faults), "false_alarm_rate": rate, **self.figures}


def judge(seen: Evidence, release: Release, delta: float, confidence: float) -> dict[str, Tier]:
    """All tiers on one mechanism whose accounted event is the release's."""
    q = release.event.sampling_prob
    return {
        "noise": noise_tier(seen.square_sums, seen.sample, seen.releases_agree),
        "coupled": coupled_tier(seen.distances),
        "sampler": sampler_tier(seen.draws, q, seen.draws_agree, seen.entered_as_drawn),
        "one_run": one_run_tier(seen.scores, seen.included, release, delta, confidence),
    }


def noise_tier(square_sums: np.ndarray, sample: np.ndarray, releases_agree: bool) -> Tier:
    """Tests what was released less the clipped sum, in units of the accounted standard deviation.

    Args:
      square_sums: [P], of each coordinate over all T steps.
      sample: [T, D], some coordinates' values in each step.
      releases_agree: whether all workers hold the same release, bit for bit.
    """
    num_steps, num_coordinates = len(sample), len(square_sums)
    total, size = float(square_sums.sum()), num_steps * num_coordinates
    ratio = float(np.sqrt(total / size))
    extremes = [_two_sided(stats.chi2(num_steps), value) for value in (square_sums.min(), square_sums.max())]
    smallest, largest = (float(np.sqrt(value / num_steps)) for value in (square_sums.min(), square_sums.max()))
    repeated = _step_correlations(sample)
    tests = {
        f"the noise has {ratio:.4f} times the accounted standard deviation": _two_sided(stats.chi2(size), total),
        f"the noise of single coordinates is {smallest:.3f} to {largest:.3f} times the accounted": (
            num_coordinates * min(extremes)
        ),
        "two steps share noise": _pairs(num_steps) * 2 * float(stats.norm.sf(repeated)),
        "the noise is not Gaussian": float(stats.kstest(sample.ravel()[: 2**17], "norm").pvalue),
    }
    faults = _failed(tests) + (() if releases_agree else ("workers hold different releases",))
    figures = {
        "standard_deviation": ratio,
        "smallest_coordinate": smallest,
        "largest_coordinate": largest,
        "largest_step_correlation_z": repeated,
        "num_values": size,
        "releases_agree": releases_agree,
    }
    return Tier(faults, figures, FALSE_ALARM_RATE)


def _step_correlations(sample: np.ndarray) -> float:
    """Largest |z| among all pairs of steps: <a, b> / |b| is standard normal for independent a and b."""
    norms = np.linalg.norm(sample, axis=1)
    products = sample @ sample.T / np.where(norms > 0, norms, np.inf)
    return float(np.abs(np.triu(products, 1)).max(initial=0.0))


def coupled_tier(distances: Mapping[str, float]) -> Tier:
    """Tests how far one record moves a release under the same key, in units of the sensitivity.

    Args:
      distances: by kind of record.
    """
    far = {kind: one for kind, one in distances.items() if not one <= 1 + DISTANCE_TOLERANCE}
    faults = tuple(f"one record ({kind}) moves a release by {one:.4g} sensitivities" for kind, one in far.items())
    if max(distances.values()) < 0.5:
        faults += (f"no record moves a release by more than {max(distances.values()):.4g}: nothing was tested",)
    return Tier(faults, {kind.replace(" ", "_"): one for kind, one in distances.items()}, 0.0)


def sampler_tier(draws: np.ndarray, sampling_prob: float, draws_agree: bool, entered_as_drawn: bool) -> Tier:
    """Tests draws of n records in T steps against independent coins.

    Args:
      draws: bool [T, n].
      sampling_prob: accounted, in (0, 1].
      draws_agree: whether all workers make the same draws.
      entered_as_drawn: whether exactly the drawn canaries entered each sum.
    """
    (num_steps, num_records), q = draws.shape, sampling_prob
    agree = {"workers make different draws": draws_agree, "other records entered than were drawn": entered_as_drawn}
    faults = tuple(text for text, holds in agree.items() if not holds)
    figures: dict[str, float | bool] = {"draws_agree": draws_agree, "entered_as_drawn": entered_as_drawn}
    figures |= {"rate": float(draws.mean()), "accounted_rate": q, "num_coins": draws.size}
    if q == 1:
        missed = () if draws.all() else ("a record was left out although all are to join",)
        return Tier(faults + missed, figures, 0.0)
    variance = float(draws.sum(axis=1).var(ddof=1) / (num_records * q * (1 - q)))
    overlaps, together = _step_overlaps(draws), _together(draws)
    next_steps = int((draws[0 : num_steps - 1 : 2] & draws[1::2]).sum())
    expected_pair = [float(count) / (num_steps * (num_records // 2) * q**2) for count in together]
    tests = {
        f"records join at {figures['rate']:.6g} instead of {q:.6g}": _two_sided(
            stats.binom(draws.size, q), int(draws.sum())
        ),
        "some records join too often or too rarely": num_records * _extreme(draws.sum(axis=0), num_steps, q),
        f"batch sizes vary {variance:.2f} times as much as independent coins": _two_sided(
            stats.chi2(num_steps - 1), variance * (num_steps - 1)
        ),
        "draws of neighbouring steps depend on each other": _two_sided(
            stats.binom(num_steps // 2 * num_records, q**2), next_steps
        ),
        "draws of two steps depend on each other": _pairs(num_steps) * _extreme(overlaps, num_records, q**2),
        f"records of two workers join together {max(expected_pair):.2f} times as often as independent ones": 2
        * _extreme(np.array(together), num_steps * (num_records // 2), q**2),
    }
    figures |= {
        "batch_size_variance": variance,
        "pairs_of_blocks": expected_pair[0],
        "pairs_of_stripes": expected_pair[1],
    }
    return Tier(faults + _failed(tests), figures, FALSE_ALARM_RATE)


def _step_overlaps(draws: np.ndarray) -> np.ndarray:
    """How many records each two steps share."""
    counts = draws.astype(np.float32) @ draws.astype(np.float32).T
    return counts[np.triu_indices(len(draws), 1)]


def _together(draws: np.ndarray) -> tuple[int, int]:
    """How often records join together that two workers would hold, in contiguous blocks or in turn."""
    half = draws.shape[1] // 2
    blocks = draws[:, :half] & draws[:, half : 2 * half]
    stripes = draws[:, 0 : 2 * half : 2] & draws[:, 1 : 2 * half : 2]
    return int(blocks.sum()), int(stripes.sum())


def one_run_tier(scores: np.ndarray, included: np.ndarray, release: Release, delta: float, confidence: float) -> Tier:
    """Tests whether more can be guessed about canaries than the release's accounted epsilon allows.

    The Gaussian curve that is held against the second bound is one that the whole accounted curve stays within, at
    each of `CLAIMED_DELTAS`.

    Args:
      scores, included: as in `lower_bounds`.
      delta: of the claimed epsilon.
      confidence: of both bounds together.
    """
    deltas = [delta, *CLAIMED_DELTAS]
    curve = epsilon_curve([release], deltas)
    claimed = curve[0]
    claimed_mu = max(gaussian_mu(one, at) for one, at in zip(curve, deltas, strict=True) if one > 0)
    found = lower_bounds(scores, included, delta, (1 - confidence) / 2)
    highest = ceiling(len(scores), delta, (1 - confidence) / 2)
    refuted = {
        f"epsilon is at least {found.epsilon:.4g}, claimed is {claimed:.4g}": found.epsilon > claimed,
        f"mu is at least {found.mu:.4g}, claimed is {claimed_mu:.4g}": found.mu > claimed_mu,
    }
    figures: dict[str, float | bool] = {
        "epsilon_claimed": claimed,
        "epsilon_lower_bound": found.epsilon,
        "ceiling": highest.epsilon,
        "mu_claimed": claimed_mu,
        "mu_lower_bound": found.mu,
        "epsilon_lower_bound_gaussian": gaussian_epsilon(found.mu, delta),
        "ceiling_gaussian": gaussian_epsilon(highest.mu, delta),
        "num_canaries": len(scores),
    }
    return Tier(tuple(text for text, true in refuted.items() if true), figures, 1 - confidence)


def _failed(tests: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(text for text, p in tests.items() if not p > FALSE_ALARM_RATE / len(tests))


def _extreme(counts: np.ndarray, num: int, prob: float) -> float:
    """Two-sided p-value of the least likely count, as if there were only that one."""
    return min(_two_sided(stats.binom(num, prob), count) for count in (counts.min(), counts.max()))


def _two_sided(distribution: Any, value: float) -> float:
    if np.isnan(value):
        return 0.0
    below, above = distribution.cdf(value), distribution.sf(value)
    if isinstance(distribution.dist, stats.rv_discrete):
        above += distribution.pmf(value)
    return min(1.0, 2 * float(min(below, above)))


def _pairs(count: int) -> int:
    return count * (count - 1) // 2
