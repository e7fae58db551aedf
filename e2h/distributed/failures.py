"""Which errors are the user's to mend, wherever in a chain of wrapped exceptions they lie."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from e2h.errors import BudgetError, InputError


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it wraps: `__cause__`, and Ray's `cause` and `worker_failures`."""
    pending: list[BaseException] = [error]
    seen: set[int] = set()
    while pending:
        one = pending.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        inner = [one.__cause__, one.__context__, getattr(one, "cause", None)]
        inner += list((getattr(one, "worker_failures", None) or {}).values())
        pending += [other for other in inner if isinstance(other, BaseException)]


def refusal(error: BaseException) -> str | None:
    """The one line that an input error or a full disk deserves; None for a fault of the program."""
    for one in causes(error):
        # Ray's own wrappers inherit from the wrapped class but carry a traceback as their text.
        if isinstance(one, InputError) and type(one) is InputError:
            return str(one)
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{one.filename or 'run.storage'}: the disk is full; make room, then run the same command again"
    return None


def budget_refusal(error: BaseException) -> str | None:
    """The message of a `BudgetError` among the causes."""
    return next((str(one) for one in causes(error) if type(one) is BudgetError), None)
