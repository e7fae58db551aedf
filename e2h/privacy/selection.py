"""The noise with which the best of a random number of trials meets a total epsilon.

What makes the figures true is the caller's part: trials are drawn i.i.d. from a fixed list of candidates, with
replacement; K is drawn once, from the law that is charged here, and stays secret; only the best trial leaves; the order
of the outputs is fixed and total, and every score that reads the data is a release inside the trial.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from e2h.errors import BudgetError
from e2h.privacy import selection_profile
from e2h.privacy.accounting import (
    COARSE_GRID,
    FINE_GRID,
    MAX_NOISE_MULTIPLIER,
    TOLERANCE,
    calibrate,
    epsilon_pld,
    privacy_loss,
    solve,
)
from e2h.privacy.events import Choice, PoissonSampledGaussian, Release, Selection
from e2h.privacy.trial_law import TrialLaw


def selected_epsilon(
    selection: Selection, delta: float, outside: Sequence[Release] = (), grid: float = FINE_GRID
) -> float:
    """Epsilon of the selected output together with the releases made once, outside the selection."""
    return epsilon_pld([*outside, Choice("search", selection)], delta, grid)


def dominated(candidate: Sequence[Release], charged: Sequence[Sequence[Release]], grid: float = FINE_GRID) -> bool:
    """Whether a trial costs no more than what is charged for `charged`, in each direction, at every epsilon.

    A common (epsilon, delta) is not enough: a selection prefers the candidate with the heavier tail.
    """
    return selection_profile.dominated(privacy_loss(candidate, grid), [privacy_loss(trial, grid) for trial in charged])


def calibrate_trial(
    law: TrialLaw,
    fixed_inside: Sequence[Release],
    name: str,
    event: PoissonSampledGaussian,
    target: float,
    delta: float,
    outside: Sequence[Release] = (),
) -> Release:
    """The release `name` of one trial with the smallest noise so that the selected output is (target, delta)-DP.

    Args:
      fixed_inside: what each trial releases besides, its score for example.
      event: sampling probability and count of the release; its noise multiplier is ignored.
      outside: releases made once, before the selection.

    Returns:
      A release with which `selected_epsilon` lies between (1 - accounting.TOLERANCE) * target and target.

    Raises:
      BudgetError: if the other releases leave nothing.
    """

    def trial(noise_multiplier: float) -> Release:
        return Release(name, replace(event, noise_multiplier=noise_multiplier))

    def cost(grid: float, noise_multiplier: float) -> float:
        selection = Selection(law, ((*fixed_inside, trial(noise_multiplier)),))
        return selected_epsilon(selection, delta, outside, grid)

    if cost(COARSE_GRID, MAX_NOISE_MULTIPLIER) > target:
        names = ", ".join(release.name for release in (*outside, *fixed_inside))
        raise BudgetError(
            f"privacy.epsilon={target:g}: {names or 'the choice'} alone, with {law.expected_trials:g} expected trials, "
            f"leaves nothing for {name}; expect fewer trials, give the others more noise, or raise the target"
        )
    single = calibrate([*outside, *fixed_inside], name, event, target, delta, COARSE_GRID)
    costs = [(functools.partial(cost, COARSE_GRID), 1.2), (functools.partial(cost, FINE_GRID), 1.003)]
    return trial(solve(costs, target, single.event.noise_multiplier))


def calibrate_trials(
    law: TrialLaw,
    candidates: Sequence[tuple[Sequence[Release], PoissonSampledGaussian]],
    name: str,
    target: float,
    delta: float,
    outside: Sequence[Release] = (),
) -> Selection:
    """`calibrate_trial` for several candidates (what each releases besides, its event), which are charged together.

    Each is calibrated alone, to one epsilon below the target: their profiles cross, so their envelope costs more.

    Returns:
      The selection, each candidate with its own noise; together they cost at most `target`, and little less.

    Raises:
      BudgetError: if a candidate's other releases leave nothing.
    """
    alone = target
    while True:
        found = [
            (*inside, calibrate_trial(law, inside, name, event, alone, delta, outside)) for inside, event in candidates
        ]
        selection = Selection(law, tuple(found))
        total = selected_epsilon(selection, delta, outside)
        if total <= target:
            return selection
        alone *= (1 - TOLERANCE) * target / total
