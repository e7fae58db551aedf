"""The law of the number of trials K of a private selection, and its draw: one table of whole weights is both.

The charge of a selection holds for the law that K is really drawn from. So the law is *defined* as whole weights of
0..max_trials: K is drawn from them exactly, and the accountant reads its probabilities off them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln, softmax

from e2h.config import expect

POISSON = math.inf
RANDOM_BYTES = 32
_RESOLUTION = 2.0**53


@dataclass(frozen=True)
class TrialLaw:
    """K given K <= max_trials, for K truncated negative binomial or Poisson (Papernot and Steinke 2022).

    "Given", not "at most": a draw of min(K, max_trials) costs more than this law is charged.

    Attributes:
      shape: above -1: P(K = k) is proportional to Gamma(k + shape) / k! * theta^k, k >= 1, for a theta < 1; 0 is the
        logarithmic law, 1 the geometric. Infinity (`POISSON`) is the Poisson law, which alone may give K = 0: then
        nothing is released.
      expected_trials: the mean of K as drawn, that is after the condition; theta or the Poisson rate follows from it.
      max_trials: the largest K.

    Raises:
      InputError: if no such law exists, for example if the mean is out of reach of K <= max_trials.
    """

    shape: float = 3.0
    expected_trials: float = 8.0
    max_trials: int = 32

    def __post_init__(self) -> None:
        expect(self.shape > -1, "search.shape", self.shape, "a number above -1; for Poisson, search.law=poisson")
        expect(self.max_trials >= 1, "search.max_trials", self.max_trials, "at least 1")
        least, most = self._mean(_LOG_RATE_MIN), self._mean(self._log_rate_max)
        expectation = f"a number from {max(least, 0.01):.4g} to {most:.4g}, the mean of K <= {self.max_trials}"
        reachable = max(least, 0.01) <= self.expected_trials <= most
        advice = "change it, or raise search.max_trials"
        expect(reachable, "search.expected_trials", self.expected_trials, expectation, advice)

    @property
    def poisson(self) -> bool:
        return math.isinf(self.shape)

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """Whole weights, int64[max_trials + 1]: K = k has probability weights[k] / weights.sum(), exactly."""
        rate = brentq(lambda x: self._mean(x) - self.expected_trials, _LOG_RATE_MIN, self._log_rate_max, xtol=1e-14)
        return np.rint(self._exact(rate) * _RESOLUTION).astype(np.int64)

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """P(K = k), float64[max_trials + 1]."""
        return self.weights / self.weights.sum()

    def draw(self, randomness: bytes) -> int:
        """K from 32 secret, uniform bytes, as `e2h.privacy.keys.derive_key` gives; K itself is as secret as they."""
        if len(randomness) != RANDOM_BYTES:
            raise ValueError(f"expected {RANDOM_BYTES} random bytes, got {len(randomness)}")
        point = int.from_bytes(randomness, "big") * int(self.weights.sum()) >> 8 * RANDOM_BYTES
        return int(np.searchsorted(np.cumsum(self.weights), point, side="right"))

    def to_json(self) -> dict[str, Any]:
        shape = "poisson" if self.poisson else self.shape
        return {"shape": shape, "expected_trials": self.expected_trials, "max_trials": self.max_trials}

    @staticmethod
    def from_json(value: dict[str, Any]) -> TrialLaw:
        shape = POISSON if value["shape"] == "poisson" else float(value["shape"])
        return TrialLaw(shape, value["expected_trials"], value["max_trials"])

    @property
    def _log_rate_max(self) -> float:
        # theta < 1; a Poisson rate may lie far above max_trials, with K given K <= max_trials close to it.
        return math.log(self.max_trials) + 8.0 if self.poisson else 0.0

    def _mean(self, log_rate: float) -> float:
        return float(self._exact(log_rate) @ np.arange(self.max_trials + 1))

    def _exact(self, log_rate: float) -> np.ndarray:
        k = np.arange(self.max_trials + 1.0)
        if self.poisson:
            return softmax(k * log_rate - gammaln(k + 1))
        k = k[1:]
        return np.concatenate([[0.0], softmax(k * log_rate + gammaln(k + self.shape) - gammaln(k + 1))])


# Where K is 1 (negative binomial) or 0 (Poisson) to double precision.
_LOG_RATE_MIN = -50.0
