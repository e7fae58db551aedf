"""Checks the mechanisms of a configuration against what is claimed of them; no data, no Ray, nothing is spent.

python jobs/audit.py data=mnist data.path=FOLDER model=px28_small
"""

import json
import os

from entry import DONE, FAULT, configured

from e2h.config import Config, expect


def audit(config: Config) -> int:
    from e2h.curriculum import audit
    from e2h.curriculum.canaries import Subject
    from e2h.curriculum.run import make_root
    from e2h.data.filesystem import write_bytes
    from e2h.distributed.console import say

    expect(not config.dry_run, "dry_run", True, "no dry run: an audit reads no data and spends nothing")
    path = make_root(config) / "audit.json"
    found = audit.audit(Subject(config), os.urandom(32), lambda text: say("audit", text))
    write_bytes(path, json.dumps(audit.report(found), indent=2).encode())
    for tier, line in audit.summary(found):
        say(tier, line)
    passed = audit.passed(found)
    say("audit", f"{'passed; no proof, see docs/guarantee.md' if passed else 'FAILED'}: {path}")
    return DONE if passed else FAULT


if __name__ == "__main__":
    configured(audit)
