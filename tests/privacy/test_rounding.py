"""What is stated of a guarantee is never less than what was accounted."""

from __future__ import annotations

from decimal import Decimal

import pytest

from e2h.privacy.rounding import delta_in_words, epsilon_in_words


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        (1e-4, "1e-4"),
        (2.5e-6, "2.5e-6"),
        (1e-10, "1e-10"),
        (0.25, "2.5e-1"),
        (1.00000049e-5, "1.00001e-5"),
        (1 / 162770, "6.14364e-6"),
        (9.9999991e-6, "1e-5"),
        (1 / 3, "3.33334e-1"),
    ],
)
def test_a_delta_is_rounded_up(delta, words):
    assert delta_in_words(delta) == words
    assert Decimal(words) >= Decimal(repr(delta))


@pytest.mark.parametrize(("epsilon", "words"), [(10.0, "10"), (9.99901, "9.9991"), (0.5, "0.5"), (1 / 3, "0.3334")])
def test_an_epsilon_is_rounded_up(epsilon, words):
    assert epsilon_in_words(epsilon) == words
