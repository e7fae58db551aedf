"""Shows how a run stands, from its storage alone: stages, epsilon spent, who runs it, what to do next.

python jobs/status.py PATH           lines for people
python jobs/status.py PATH --json    one object

PATH is a run directory, local or as s3://bucket/prefix/run. Nothing is written, and Ray is not started. Exit codes: 0
shown; 2 no run there, in one line; 3 shown, and its ledger was altered. For the owner: how fast a run moves depends on
the private records.
"""

from __future__ import annotations

import argparse
import json
import sys

from ledger import BAD_INPUT, NO_BUDGET

from e2h.curriculum.lease import holder
from e2h.curriculum.run import witness_path
from e2h.data.remote import place
from e2h.errors import InputError
from e2h.reporting.status import Status, look
from e2h.reporting.status_lines import lines, to_json


def main(arguments: list[str]) -> tuple[str, int]:
    """What to print, and the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="a run directory, or s3://bucket/prefix/run")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args(arguments)
    try:
        status = status_of(given.path)
    except OSError as error:
        raise InputError(f"{given.path}: expected a run that you may read ({error.strerror or error})") from error
    shown = json.dumps(to_json(status), indent=2) if given.json else "\n".join(lines(status))
    return shown, NO_BUDGET if status.altered else 0


def status_of(given: str) -> Status:
    root = place(given)
    return look(root, witness_path(root), holder(root))


if __name__ == "__main__":
    try:
        text, code = main(sys.argv[1:])
        print(text)
        sys.exit(code)
    except InputError as error:
        print(f"e2h: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
