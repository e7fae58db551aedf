"""One real browser for all tests of this folder, and pages to look at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_run import build_run, reference_epsilons, write_table
from playwright.sync_api import Browser, Page, sync_playwright

from e2h.reporting.publish import publish
from e2h.reporting.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
# It runs as root in a container, and must say nothing to anybody.
FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=found, args=[f"--{flag}" for flag in FLAGS.split()])
        yield one
        one.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    one = browser.new_page()
    yield one
    one.close()


def search_results(run: Path) -> None:
    """As a search leaves them whose trials are all paid for."""
    values = [{"warmup.num_steps": steps, "finetune.learning_rate": rate} for steps, rate in ((100, 1e-3), (400, 2e-3))]
    trials: list[dict[str, Any]] = [{"values": one, "scores": {"1.000": 0.5 + 0.1 * i}} for i, one in enumerate(values)]
    score = {"kind": "accuracy", "value": 0.6, "release": None}
    (run / "search.json").write_text(json.dumps({"values": values[1], "score": score, "trials": trials}))
    plan = json.loads((run / "plan.json").read_text())
    plan["tuning"] = {"mode": "proxy", "how": "by trials on public images", "expected_trials": 2.0}
    (run / "plan.json").write_text(json.dumps(plan))


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two renderings of one report that has every section."""
    run = build_run(tmp_path_factory.mktemp("reported") / "run", reference_epsilons())
    write_table(run / "frequency" / "images.parquet", [0, 1, 2] * 3)
    search_results(run)
    return {"internal": write_report(run), "release": publish(run) / "report.html"}
