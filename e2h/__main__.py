"""What a receiver of a release runs: `python -m e2h check RELEASE_DIR`, `python -m e2h recompute LEDGER_JSON`."""

from __future__ import annotations

import argparse
import sys

from e2h.errors import InputError
from e2h.privacy.rounding import delta_in_words
from e2h.reporting.check import check
from e2h.reporting.recompute import TOLERANCE, read_ledger, recompute, stated_epsilon


def _check(release_dir: str) -> int:
    problems = check(release_dir)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{release_dir}: no problem found; the stated epsilon is the recomputed one")
    return 2 if problems else 0


def _recompute(path: str) -> int:
    ledger = read_ledger(path)
    stated, found = stated_epsilon(ledger), recompute(ledger)
    same = abs(found - stated) <= TOLERANCE
    print(f"epsilon at delta {delta_in_words(ledger['delta'])}: stated {stated:.9g}, recomputed {found:.9g}")
    if not same:
        print(f"They differ by more than {TOLERANCE:g}: do not rely on the stated one.")
    return 0 if same else 1


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
      Exit code: 0 fine; 1 epsilon differs; 2 problems in the release, or bad input.
    """
    parser = argparse.ArgumentParser(prog="python -m e2h", description="Checks what e2h has published.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="what is in a release folder that should not be, or is missing")
    one.add_argument("release_dir", metavar="RELEASE_DIR")
    two = commands.add_parser("recompute", help="epsilon of a ledger, recomputed from its events")
    two.add_argument("ledger", metavar="LEDGER_JSON")
    parsed = parser.parse_args(arguments)
    try:
        return _check(parsed.release_dir) if parsed.command == "check" else _recompute(parsed.ledger)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
