"""The two ways in which e2h refuses; every job turns them into one line and an exit code."""

from __future__ import annotations

import errno


class InputError(ValueError):
    """A configuration or an input that can't be used (exit code 2).

    The message reads ``name=value``, what was expected, and what to do next.
    """


class BudgetError(RuntimeError):
    """The privacy budget does not allow what was asked (exit code 3)."""


def is_disk_full(error: OSError) -> bool:
    """Whether there is no room, on the disk or in the user's share of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def one_line(error: BaseException) -> str:
    """A library's message as part of such a line; pyarrow's may have several."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
