"""Epsilons and deltas in words: rounded up, so that a statement never claims more than was accounted."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context, Decimal

DELTA_DIGITS = 6


def rounded_up(value: float, decimals: int = 4) -> float:
    """To so many decimals."""
    # The tiny reduction keeps 1.0 from becoming 1.001 by binary round-off.
    return math.ceil(value * 10**decimals * (1 - 1e-12)) / 10**decimals


def epsilon_in_words(epsilon: float) -> str:
    """To four decimals, without zeros at the end."""
    return f"{rounded_up(epsilon):.4f}".rstrip("0").rstrip(".")


def delta_in_words(delta: float) -> str:
    """To six significant digits, as people write it: 1e-5, 2.5e-6."""
    up = Context(prec=DELTA_DIGITS, rounding=ROUND_CEILING).create_decimal(Decimal(repr(float(delta))))
    mantissa, exponent = f"{up:.{DELTA_DIGITS - 1}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
