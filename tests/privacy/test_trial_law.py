"""The number of trials: the laws' moments, the draw against its own probabilities, laws that don't exist."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import chisquare, logser, nbinom, poisson

from e2h.errors import InputError
from e2h.privacy.keys import TEST_SECRET, derive_key
from e2h.privacy.trial_law import POISSON, TrialLaw

LAWS = [
    TrialLaw(),
    TrialLaw(0.0, 4.0, 32),
    TrialLaw(1.0, 16.0, 200),
    TrialLaw(-0.5, 2.0, 16),
    TrialLaw(POISSON, 8.0, 32),
    TrialLaw(POISSON, 0.5, 4),
    TrialLaw(3.0, 1.0, 32),
]
names = pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law.shape:g}-{law.expected_trials:g}")


@names
def test_the_law_has_the_mean_that_was_asked_for_and_adds_up_to_one(law):
    assert law.probabilities @ np.arange(law.max_trials + 1) == pytest.approx(law.expected_trials, abs=1e-9)
    assert law.probabilities.sum() == pytest.approx(1, abs=1e-15)
    assert (law.probabilities[0] > 0) == law.poisson
    assert law.probabilities.min() >= 0


def test_far_truncation_gives_the_laws_that_have_a_name():
    def ratio(law):
        return law.probabilities[3] / law.probabilities[2]

    for law, shape in ((TrialLaw(1.0, 4.0, 400), 1), (TrialLaw(3.0, 8.0, 400), 3)):
        success = 1 - ratio(law) * 3 / (shape + 2)
        expected = nbinom(shape, success).pmf(np.arange(1, 401)) / (1 - nbinom(shape, success).pmf(0))
        np.testing.assert_allclose(law.probabilities[1:], expected, atol=1e-9)
    logarithmic = TrialLaw(0.0, 4.0, 400)
    expected = logser(ratio(logarithmic) * 1.5).pmf(np.arange(1, 401))
    np.testing.assert_allclose(logarithmic.probabilities[1:], expected, atol=1e-9)
    np.testing.assert_allclose(TrialLaw(POISSON, 8.0, 60).probabilities, poisson(8).pmf(np.arange(61)), atol=1e-9)


def test_truncation_is_a_condition_not_a_minimum():
    """Below the largest K the probabilities keep the ratios of the law without a limit; nothing piles up at the end."""
    law = TrialLaw(1.0, 8.0, 16)
    ratios = law.probabilities[2:] / law.probabilities[1:-1]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)


@names
def test_draws_have_the_probabilities_that_are_charged(law):
    draws = [law.draw(derive_key(TEST_SECRET, "num_trials", i)) for i in range(4000)]
    seen = np.bincount(draws, minlength=law.max_trials + 1)
    expected = len(draws) * law.probabilities
    likely = expected >= 5
    assert seen[expected == 0].sum() == 0
    if likely.sum() > 1:
        pooled = [np.append(n[likely], n[~likely].sum() + 1e-9) for n in (seen, expected)]
        assert chisquare(pooled[0], pooled[1] * pooled[0].sum() / pooled[1].sum()).pvalue > 1e-4
    else:
        assert seen[likely] == len(draws)


def test_the_draw_is_a_function_of_its_bytes_over_the_whole_range():
    law = TrialLaw(POISSON, 8.0, 32)
    assert law.draw(bytes(32)) == 0
    assert law.draw(b"\xff" * 32) == 32
    # The boundary between 0 and 1 lies at weights[0] / total of the range, to the last bit.
    boundary = -(-int(law.weights[0]) * 2**256 // int(law.weights.sum()))
    assert law.draw(boundary.to_bytes(32, "big")) == 1
    assert law.draw((boundary - 1).to_bytes(32, "big")) == 0
    with pytest.raises(ValueError, match="32 random bytes"):
        law.draw(b"short")


@pytest.mark.parametrize("law", [TrialLaw(), TrialLaw(POISSON, 4.0, 16)])
def test_json_brings_back_the_same_law(law):
    again = TrialLaw.from_json(json.loads(json.dumps(law.to_json(), allow_nan=False)))
    assert again == law
    assert (again.weights == law.weights).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 4.0, 32), "shape=-1.0: expected a number above -1"),
        ((3.0, 0.5, 32), "expected_trials=0.5: expected a number from 1 to"),
        ((0.0, 8.0, 32), "to 7.885, the mean of K <= 32; change it, or raise search.max_trials"),
        ((3.0, 4.0, 0), "max_trials=0: expected at least 1"),
        ((POISSON, 0.0, 32), "expected_trials=0.0"),
        ((POISSON, 33.0, 32), "expected_trials=33.0"),
        ((math.nan, 4.0, 32), "shape=nan"),
        ((3.0, math.nan, 32), "expected_trials=nan"),
    ],
)
def test_laws_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(InputError) as refusal:
        TrialLaw(*arguments)
    assert message in str(refusal.value)
