"""From the privacy loss of one trial to that of the best of K trials: the numbers behind a `Selection`.

Let one trial have the law Q on one data set and Q' on its neighbour, f(x) = E[x^K], and u(y) = Q(better than y). The
best of K trials, A, has the density f'(1 - u) with respect to Q. On the neighbour u' <= T(u), where
T(u) = sup {Q'(E): Q(E) <= u} is the trade-off curve, and f' rises. So for every epsilon >= 0

    delta_A(epsilon) <= E[phi(exp(epsilon - L))],   phi(r) = max over u of (f'(1 - u) - r f'(1 - T(u)))+,

L being the privacy loss of Q against Q'. phi is convex and falls, hence pessimistic privacy loss distributions on both
sides keep the bound valid. It holds for every law of K that is independent of the data and secret, and for every fixed
total order of the outputs. (Liu and Talwar 2019; Papernot and Steinke 2022; Koskela, Redberg and Wang 2024.)

Profiles are lists of deltas at the multiples of the grid; only this module reads dp_accounting's distributions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from scipy.signal import fftconvolve

# Mass that is moved to an infinite loss: more than round-off takes from a profile, nothing beside a delta of 1e-10.
SLACK = 1e-12
# Where u is tried: T is steep at 0. Between two of them, the bound takes the worse end of each term.
_RANKS = np.unique([0.0, *np.logspace(-12, -1, 20000), *np.linspace(0.1, 1.0, 10000)])
# Losses beyond the trial's own that the selection is followed to; what is left becomes an infinite loss.
_MAX_REACH = 40.0


@dataclass(frozen=True)
class _Losses:
    """A discrete privacy loss: masses float64[n] at `grid` * (lowest, lowest + 1, ...), the rest at infinity."""

    grid: float
    lowest: int
    masses: np.ndarray
    infinite: float

    @property
    def highest(self) -> int:
        return self.lowest + len(self.masses) - 1

    @functools.cached_property
    def values(self) -> np.ndarray:
        return self.grid * np.arange(self.lowest, self.highest + 1)

    def profile(self) -> np.ndarray:
        """delta at epsilon = 0, grid, 2 grid, ..., until it no longer falls."""
        above, other = (
            np.append(np.cumsum(mass[self.values > 0][::-1])[::-1], 0.0)
            for mass in (self.masses, self.masses * np.exp(-self.values))
        )
        epsilon = self.grid * np.arange(len(above))
        return _ended(self.infinite + above - np.exp(epsilon) * other)

    def positive(self) -> tuple[np.ndarray, np.ndarray]:
        """Cumulated masses of losses above 0, the largest first, under the first and under the second law."""
        masses, losses = self.masses[self.values > 0][::-1], self.values[self.values > 0][::-1]
        return np.cumsum(masses), np.cumsum(masses * np.exp(-losses))


def _losses(pmf: pld_pmf.PLDPmf) -> _Losses:
    dense = pmf.to_dense_pmf()
    masses = np.maximum(dense._probs, 0.0)  # a convolution by FFT leaves some of -1e-18
    # From a loss of 0 on, so that a profile has an entry for each multiple of the grid.
    masses = np.pad(masses, (max(0, dense._lower_loss), max(0, 1 - dense._lower_loss - len(masses))))
    infinite = max(dense._infinity_mass, 1.0 - float(masses.sum()), 0.0)
    return _Losses(dense._discretization, min(0, dense._lower_loss), masses, infinite)


def _directions(pld: PrivacyLossDistribution) -> tuple[_Losses, _Losses]:
    """The loss of removing a record, and of adding one."""
    return _losses(pld._pmf_remove), _losses(pld._pmf_add)


def select(trials: Sequence[PrivacyLossDistribution], probabilities: np.ndarray) -> PrivacyLossDistribution:
    """A pessimistic privacy loss distribution of the best of K trials, on the same grid; it composes with others.

    Args:
      trials: of every candidate for a trial; the pointwise maximum of their profiles is charged, in each direction. It
        lies above each candidate's, and so above every mixture's.
      probabilities: P(K = k), float64[max + 1].
    """
    remove, add = (_padded(losses) for losses in _directions(envelope(trials)))
    profiles = selected_profile(remove, add, probabilities), selected_profile(add, remove, probabilities)
    return _distribution(*profiles, remove.grid)


def envelope(trials: Sequence[PrivacyLossDistribution]) -> PrivacyLossDistribution:
    """The pointwise maximum of the profiles at epsilon >= 0 in each direction."""
    remove, add = zip(*map(_directions, trials), strict=True)
    return _distribution(_maximum(_profiles(remove)), _maximum(_profiles(add)), remove[0].grid)


def dominated(candidate: PrivacyLossDistribution, charged: Sequence[PrivacyLossDistribution]) -> bool:
    """Whether the candidate's profile lies below the charged envelope in each direction at every epsilon.

    Compared at every multiple of the grid, where the charged profile has its kinks, and at infinity: between two of
    them it is a line in exp(epsilon), and the candidate's is convex.
    """
    for sides in zip(*map(_directions, [candidate, *charged]), strict=True):
        new, *known = _profiles(sides)
        with_it, without = _maximum([new, *known]), _maximum(known)
        if np.any(with_it > np.pad(without, (0, len(with_it) - len(without)), mode="edge") + SLACK):
            return False
    return True


def _profiles(sides: Sequence[_Losses]) -> list[np.ndarray]:
    return [loss.profile() for loss in sides]


def _maximum(profiles: Sequence[np.ndarray]) -> np.ndarray:
    length = max(map(len, profiles))
    return np.max([np.pad(profile, (0, length - len(profile)), mode="edge") for profile in profiles], axis=0)


def _ended(deltas: np.ndarray) -> np.ndarray:
    """Within [0, 1], falling, and cut where nothing but `SLACK` is left to fall."""
    deltas = np.minimum.accumulate(np.clip(deltas, 0.0, 1.0))
    return deltas[: int(np.argmax(deltas <= deltas[-1] + SLACK)) + 1]


def _padded(losses: _Losses) -> _Losses:
    return replace(losses, infinite=losses.infinite + SLACK)


def selected_profile(loss: _Losses, opposite: _Losses, probabilities: np.ndarray) -> np.ndarray:
    """delta_A at epsilon = 0, grid, 2 grid, ..., until it no longer falls.

    Args:
      loss: of Q against Q'.
      opposite: of Q' against Q, which bounds T. It must be the other direction: with the same one the bound is false.
      probabilities: P(K = k).
    """
    slope = np.polynomial.Polynomial(np.trim_zeros(probabilities * np.arange(len(probabilities)), "b")[1:])  # f'
    better = _trade_off(loss, opposite, _RANKS)
    own, other = slope(1.0 - _RANKS[:-1]), slope(1.0 - better[1:])
    # a - b r over all u at once: the lines that are the largest somewhere are the corners of the hull of (b, a).
    other, first = np.unique(other, return_index=True)
    corners = _concave_corners(other, own[first])[::-1]
    a, b = own[first][corners], other[corners]
    breaks = np.diff(a) / np.diff(b)
    reach = min(np.log(max(a / np.maximum(b, 1e-300))), _MAX_REACH)
    last = max(0, loss.highest + int(np.ceil(reach / loss.grid)))
    r = np.exp(loss.grid * np.arange(-loss.highest, last - loss.lowest + 1))
    line = np.searchsorted(breaks, r)
    phi = np.maximum(a[line] - b[line] * r, 0.0)
    # The expectation over L for all epsilons on the grid is one convolution.
    return _ended(fftconvolve(phi, loss.masses, mode="valid") + loss.infinite * slope(1.0))


def _trade_off(loss: _Losses, opposite: _Losses, u: np.ndarray) -> np.ndarray:
    """T(u), from the positive losses of each direction alone: those are exact to round-off, negative ones are not."""
    under_second, under_first = opposite.positive()
    x = np.concatenate([[0.0], under_first])
    y = np.concatenate([[0.0], under_second]) + opposite.infinite
    from_opposite = np.interp(u, np.append(x, x[-1] + 1.0), np.append(y, y[-1] + 1.0))
    under_first, under_second = loss.positive()
    x = np.concatenate([[0.0, loss.infinite], under_first + loss.infinite])
    y = np.concatenate([[0.0, 0.0], under_second])
    from_loss = 1.0 - np.interp(1.0 - u, np.append(x, x[-1] + 1.0), np.append(y, y[-1] + 1.0))
    return np.clip(np.minimum(from_opposite, from_loss), 0.0, 1.0)


def _distribution(remove: np.ndarray, add: np.ndarray, grid: float) -> PrivacyLossDistribution:
    """The distribution with these profiles at epsilon >= 0."""
    return PrivacyLossDistribution(_both_sides(remove, add, grid), _both_sides(add, remove, grid))


def _both_sides(deltas: np.ndarray, opposite: np.ndarray, grid: float) -> pld_pmf.PLDPmf:
    """One direction of it; at epsilon < 0 the opposite direction says what its profile is:

    H(A, A') at -epsilon is 1 - exp(-epsilon) (1 - H(A', A) at epsilon).
    """
    epsilon = grid * np.arange(len(opposite) - 1, 0, -1)
    below = 1.0 - np.exp(-epsilon) * (1.0 - opposite[:0:-1])
    middle = min(deltas[0], opposite[0])
    # True profiles fall; where a bound on the opposite one is loose, the points from it may not.
    profile = np.minimum.accumulate(np.concatenate([below, [middle], deltas[1:]]))
    return _connect(np.arange(1 - len(opposite), len(deltas)), profile, grid)


def _connect(positions: np.ndarray, deltas: np.ndarray, grid: float) -> pld_pmf.PLDPmf:
    """The pessimistic distribution whose profile is the convex hull of these points (Doroshenko et al. 2022).

    A true profile is convex in exp(epsilon), so what lies above it at these points lies above it with their hull too.
    """
    t = np.exp(grid * positions)
    corners = _concave_corners(np.concatenate([[0.0], t]), np.concatenate([[0.0], 1.0 - deltas]))[1:] - 1
    return pld_pmf.create_pmf_pessimistic_connect_dots(grid, positions[corners], deltas[corners])


def _concave_corners(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Indices of the corners of the smallest concave function above the points; x rises strictly.

    Andrew's chain, after a few sweeps that drop most of the points below the chord of their neighbours.
    """
    left = np.arange(len(x))
    for _ in range(8 if len(x) > 2 else 0):
        width, rise = np.diff(x[left]), np.diff(y[left])
        left = left[np.concatenate([[True], rise[:-1] * width[1:] > rise[1:] * width[:-1], [True]])]
    xs, ys, corners = x[left].tolist(), y[left].tolist(), [0]
    for i in range(1, len(left)):
        while len(corners) > 1:
            last, before = corners[-1], corners[-2]
            if (ys[last] - ys[before]) * (xs[i] - xs[last]) > (ys[i] - ys[last]) * (xs[last] - xs[before]):
                break
            corners.pop()
        corners.append(i)
    return left[corners]
