"""What can be said before Ray starts and before anything is written: in a second, without torch."""

from __future__ import annotations

import json

from e2h.config import Config, expect
from e2h.curriculum.run import Run, check_binding
from e2h.data.filesystem import write_bytes
from e2h.data.records import Source
from e2h.data.remote import Place
from e2h.data.sources import open_source
from e2h.distributed.console import show_plan
from e2h.privacy.plan import PrivacyPlan, check_batch, make_plan


def preflight(config: Config) -> Source:
    """Looks at the source before Ray starts or a file is written: what can be refused is refused in a second.

    Raises:
      InputError: if the data can't be listed, or the expected batch is larger than N.
    """
    source = open_source(config.data)
    check_batch(config, config.data.num_records or source.num_train)
    fractions, classes = config.sampling.class_fractions, len(source.class_names)
    one_each = fractions is None or len(fractions) == classes
    expect(one_each, "sampling.class_fractions", fractions, f"{classes} shares, one a class")
    return source


def dry_run(config: Config, root: Place) -> PrivacyPlan:
    """Plans without data, Ray, or spending: writes `plan.json` and prints it."""
    check_binding(root, config)
    source = preflight(config)
    num_records = config.data.num_records or source.num_train
    run = Run(root, config)
    plan = run.shared_plan(make_plan(config, num_records, source.class_names))
    content = plan.to_json()
    # The plan of a run that has begun is what its ledger was opened with: looking must not change it.
    if run.ledger.budget() is None:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_bytes(root / "plan.json", json.dumps(content, indent=2).encode())
    show_plan(plan, {release["name"]: release["epsilon_alone"] for release in content["releases"]})
    return plan
