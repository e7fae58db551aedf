"""What can be said before Ray starts and before anything is written: in a second, without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from e2h.config import Config
from e2h.curriculum.listing import listed, public_records
from e2h.curriculum.notes import check_binding, usable
from e2h.curriculum.run import Run, make_root
from e2h.curriculum.search import candidates
from e2h.curriculum.search_plan import SearchPlan, plan_search, price_list
from e2h.data.filesystem import write_bytes
from e2h.data.records import Source, few
from e2h.data.remote import Place
from e2h.distributed.console import say, show_plan, warn
from e2h.privacy.plan import PrivacyPlan, make_plan
from e2h.privacy.rounding import rounded_up


def dry_run(config: Config, root: Place) -> PrivacyPlan:
    """Plans without data, Ray, or spending: writes `plan.json` and prints it."""
    check_binding(root, config)
    source = listed(config)
    num_records = public_records(config, source)
    run, plan = Run(root, config), make_plan(config, num_records, source.class_names)
    with usable(config):
        plan = run.shared_plan(plan)
    content = plan.to_json()
    _say_images(config, source)
    _keep(run, content)
    show_plan(plan, [release["epsilon_alone"] for release in content["releases"]], config)
    return plan


def _keep(run: Run, content: dict[str, Any]) -> None:
    """The plan of a run that has begun is what its ledger was opened with: looking must not change it."""
    with usable(run.config):
        if run.ledger.budget() is None:
            make_root(run.config)
            write_bytes(run.root / "plan.json", json.dumps(content, indent=2).encode())


def _say_images(config: Config, source: Source) -> None:
    say("images", understood(config, source))
    warn(source.remarks)


def understood(config: Config, source: Source) -> str:
    """What the listing says of the images, which nobody has opened yet."""
    classes = f"{len(source.class_names)} class{'es' * (len(source.class_names) > 1)}"
    size, channels = config.data.image_size, "grey" if config.data.channels == 1 else "colour"
    return (
        f"{source.num_train} training + {source.num_test} test listed, {classes}, whose names will be "
        f"published ({few(source.class_names)}), to be {size}x{size} {channels}; sizes and damaged files show when the "
        "run opens them"
    )


def search_dry_run(config: Config, root: Place) -> None:
    """Plans a search without data, Ray, or spending: `plan.json`, and what each way of searching would cost."""
    check_binding(root, config)
    source = listed(config)
    num_records = public_records(config, source)
    if config.search.privacy == "proxy":
        dry_run(config, root)
        rows = price_list(config, num_records)
    else:
        run, plan = Run(root, config), _plan_any(config, num_records, source.class_names)
        with usable(config):
            plan = replace(plan, whole=run.shared_plan(plan.whole))
        rows = price_list(config, num_records)
        content = {**plan.to_json(config), "prices": rows}
        _say_images(config, source)
        _keep(run, content)
        show_plan(plan.whole, [release["epsilon_alone"] for release in content["releases"]])
        _show_trial(content["search"])
    _show_prices(rows)


def _plan_any(config: Config, num_records: int, class_names: Sequence[str]) -> SearchPlan:
    """Which trials are drawn is a secret that there need not be yet; those listed first are as many."""
    number, choices = int(config.search.expected_trials), candidates(config)
    return plan_search(config, num_records, class_names, [choices[place % len(choices)] for place in range(number)])


def _show_trial(facts: dict[str, Any]) -> None:
    noise, alone = facts["noise_multiplier_per_trial"], facts["epsilon_per_trial"]
    shown = f"{noise:.4f}" if isinstance(noise, float) else f"{noise[0]:.4f} to {noise[-1]:.4f}"
    say("search", f"{facts['mode']}: one trial has noise {shown} and alone costs epsilon {rounded_up(alone):.4f}")


def _show_prices(rows: list[dict[str, Any]]) -> None:
    """Noise of one trial by way of searching and expected number of trials, against a single run's."""
    say(
        "prices",
        f"noise of one trial; a single run, and each trial of a proxy search, has {rows[0]['noise_multiplier']:.4f}",
    )
    print(f"{'':<10} {'trials':>8}{'selection':>19}{'compose':>19}")
    by_mode = {(row["mode"], row["expected_trials"]): row for row in rows[1:]}
    for number in sorted({number for _, number in by_mode}):
        cells = [by_mode[mode, number] for mode in ("selection", "compose")]
        print(f"{'':<10} {number:>8g}{''.join(map(_shown_price, cells))}", flush=True)


def _shown_price(row: dict[str, Any]) -> str:
    if row["noise_multiplier"] is None:
        return f"{'-':>19}"
    return f"{row['noise_multiplier']:>11.4f} {'x' + format(row['factor'], '.2f'):>7}"
