"""TensorBoard in a real browser, on what a run writes: our tags with their units, pictures and trials."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page

from e2h.reporting.metrics import METRICS, MetricWriter, ReleaseClass, tag

pytestmark = [pytest.mark.browser, pytest.mark.long]
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("curves")
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 1), dtype=np.uint8)
    with MetricWriter(run) as metrics:
        for name, metric in METRICS.items():
            for step in (1, 2, 3):
                if metric.unit == "image":
                    metrics.image(name, picture, step)
                else:
                    metrics.scalar(name, 1 / step, step)
        for place, score in enumerate((0.5, 0.75)):
            metrics.trial(f"trial-{place:03d}", {"warmup.num_steps": 100 * (place + 1)}, score)
    return run / "tb"


@pytest.fixture(scope="module", params=list(ReleaseClass))
def served(written: Path, request: pytest.FixtureRequest) -> Iterator[tuple[ReleaseClass, str]]:
    """TensorBoard on one of the two directories, and its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(written / request.param)]
    command += ["--port", "0", "--host", "127.0.0.1", "--load_fast", "false"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = next(found[0] for line in server.stderr if (found := re.search(r"http://[^\s]+", line)))
        yield request.param, address
        server.terminate()


def show(page: Page, address: str, view: str) -> None:
    page.set_viewport_size({"width": 1400, "height": 3000})
    page.goto("about:blank")  # another view alone would be no navigation
    page.goto(f"{address}#{view}")


def seen(page: Page, words: str) -> None:
    page.get_by_text(words, exact=True).first.wait_for(timeout=PATIENCE_MS)


def unfold(page: Page, group: str, first: str) -> None:
    """Shows the cards of a group of tags; the first two groups are open from the start."""
    header = page.get_by_text(group, exact=True).first
    header.wait_for(timeout=PATIENCE_MS)
    if not page.get_by_text(first, exact=True).first.is_visible():
        header.click()
    seen(page, first)


def test_every_tag_of_a_class_is_shown_with_its_unit_and_no_other(page, served, tmp_path):
    kind, address = served
    show(page, address, "timeseries")
    mine = [name for name, metric in METRICS.items() if metric.release_class is kind]
    for group in sorted({name.split("/")[0] for name in mine}):
        unfold(page, group, tag(next(name for name in mine if name.startswith(f"{group}/"))))
    for name in mine:
        seen(page, tag(name))
    others = [name for name in METRICS if name not in mine]
    assert not any(page.get_by_text(tag(name), exact=True).count() for name in others)
    page.screenshot(path=tmp_path / f"{kind}.png")


@pytest.mark.parametrize("served", [ReleaseClass.RELEASABLE], indirect=True)
def test_pictures_and_trials_are_where_people_look_for_them(page, served, tmp_path):
    _, address = served
    show(page, address, "images")
    for name in (name for name, metric in METRICS.items() if metric.unit == "image"):
        unfold(page, name.split("/")[0], name)
    page.locator("img[src*='individualImage']").first.wait_for(timeout=PATIENCE_MS)
    page.screenshot(path=tmp_path / "images.png")
    show(page, address, "hparams")
    for words in ("warmup.num_steps", "search/score", "trials/trial-001", "0.75000"):
        seen(page, words)
    page.screenshot(path=tmp_path / "hparams.png")
