"""What ends a run, told once: a refusal in its one line, a fault in one line for each cause and in full in a file."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from e2h.data.filesystem import store_refusal, write_bytes
from e2h.data.remote import Place
from e2h.errors import BudgetError, InputError, is_disk_full

FAILURE_FILE = "failure.txt"
MAX_CAUSES, MAX_CHARACTERS = 3, 300


class RunFailedError(Exception):
    """A fault whose text is all that the terminal needs; the rest lies in the run's `failure.txt`."""


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
    """The one line that an input error, a full disk or a store deserves; None for a fault of the program."""
    for one in causes(error):
        # Ray's own wrappers inherit from the wrapped class but carry a traceback as their text.
        if isinstance(one, InputError) and type(one) is InputError:
            return str(one)
        if isinstance(one, OSError) and is_disk_full(one):
            return f"{one.filename or 'run.storage'}: the disk is full; make room, then run the same command again"
        if isinstance(one, OSError) and (said := store_refusal(one)):
            return f"run.storage: {said}"
    return None


def budget_refusal(error: BaseException) -> str | None:
    """The message of a `BudgetError` among the causes."""
    return next((str(one) for one in causes(error) if type(one) is BudgetError), None)


@contextmanager
def noted(root: Place) -> Iterator[None]:
    """Leaves in the run's `failure.txt` why the block ended early; what an earlier call left there goes.

    The first line is for people in a hurry; below it are the tracebacks of a fault, of the workers too. The file is the
    owner's: messages may tell about the data.

    Raises:
      RunFailedError: in place of a fault. Refusals are raised as they are; so is a fault that can't be written down.
    """
    path = root / FAILURE_FILE
    path.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        if message := budget_refusal(error) or refusal(error):
            with suppress(OSError):  # on a full disk the error itself must do
                write_bytes(path, f"refused: {message}\n".encode())
            raise
        message, text = summary(error), _plain("".join(traceback.format_exception(error)))
        try:
            write_bytes(path, f"failed: {message}\n\n{text}".encode())
        except OSError:
            raise error from None
        raise RunFailedError(f"failed: {message}; the full tracebacks are in {path}") from error


def summary(error: BaseException) -> str:
    """The distinct causes, each once, in one line: `worker 1: ValueError: ...; workers 0, 2: RuntimeError: ...`.

    Causes that differ in numbers alone (ports, addresses, process ids) count as one.
    """
    groups: dict[str, tuple[list[int], str]] = {}
    for rank, one in _roots(error, None):
        text = _line(one)
        ranks, _ = groups.setdefault(re.sub(r"[\d.:]*\d", "#", text), ([], text))
        ranks += [] if rank is None or rank in ranks else [rank]
    told = [_who(ranks) + text for ranks, text in groups.values()]
    more = [f"{len(told) - MAX_CAUSES} more"] if len(told) > MAX_CAUSES else []
    return "; ".join([*told[:MAX_CAUSES], *more])


def _roots(error: BaseException, rank: int | None) -> Iterator[tuple[int | None, BaseException]]:
    """What Ray's wrappers hold at last, with the worker's rank where one of them names it."""
    workers: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    for worker, failure in sorted(workers.items()):
        yield from _roots(failure, worker)
    names = ("cause", "controller_failure", "_base_exc")
    inner = next((one for name in names if isinstance(one := getattr(error, name, None), BaseException)), None)
    if inner is not None:
        yield from _roots(inner, rank)
    elif not workers:
        yield rank, error


def _who(ranks: list[int]) -> str:
    return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}: " if ranks else ""


def _line(error: BaseException) -> str:
    """Type and first line of the message."""
    first = next((line.strip() for line in _plain(str(error)).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {first}".removesuffix(": ")
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."


def _plain(text: str) -> str:
    """Without the colours of Ray's messages."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)
