"""Shows or checks a ledger: which releases were planned and charged, and whether anyone altered the record of it.

python jobs/ledger.py show PATH      a table
python jobs/ledger.py verify PATH    `ok: N records, head SHA`, or one line and exit code 3 (altered), 2 (none there)

PATH is a run directory or a ledger, local or as s3://bucket/prefix. Nothing is written, and Ray is not started.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from e2h.curriculum.run import witness_path
from e2h.data.remote import Place, place
from e2h.errors import BudgetError, InputError
from e2h.reporting.facts import read_config, read_json
from e2h.reporting.spending import read, table, verify
from e2h.reporting.status import ledger_of

BAD_INPUT, NO_BUDGET = 2, 3


def main(arguments: list[str]) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("show", "verify"))
    parser.add_argument("path", metavar="PATH", help="a run directory, a ledger file, or s3://bucket/prefix")
    given = parser.parse_args(arguments)
    try:
        return told(given.action, given.path)
    except OSError as error:
        raise InputError(f"{given.path}: expected a ledger that you may read ({error.strerror or error})") from error


def told(action: str, path: str) -> str:
    location, run = find(path)
    chain = read(location, witness_path(run) if run else None)
    if action == "show":
        return "\n".join(table(chain))
    return verify(chain, plan_of(run) if run else None)


def find(given: str) -> tuple[str, Place | None]:
    """Where the ledger lies, and the run directory it belongs to, where that can be told."""
    path = place(given)
    if not (path / "config.yaml").exists():
        of_a_run = path.name == "ledger.jsonl" and (path.parent / "config.yaml").exists()
        return str(path / "ledger.jsonl" if Path(given).is_dir() else path), path.parent if of_a_run else None
    own = path / "ledger.jsonl"
    return str(own) if own.exists() else ledger_of(path, read_config(path)), path


def plan_of(run: Place) -> dict[str, Any] | None:
    return read_json(run / "plan.json") if (run / "plan.json").exists() else None


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except (BudgetError, InputError) as error:
        print(f"e2h: {error}", file=sys.stderr)
        sys.exit(NO_BUDGET if isinstance(error, BudgetError) else BAD_INPUT)
