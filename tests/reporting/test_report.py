from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from e2h.errors import InputError
from e2h.reporting import figures
from e2h.reporting.report import render, write_report

VOID = {"meta", "img", "link", "br", "hr", "line", "rect", "polyline", "input"}


class Page(HTMLParser):
    """Collects tags and text, and notices tags that don't close in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.broken = [], [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.broken.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(make_run):
    return make_run()


@pytest.fixture(params=[True, False], ids=["internal", "release"])
def page(run, request):
    return Page(render(run, internal=request.param))


def test_internal_shows_what_release_leaves_out(run):
    internal, release = (Page(render(run, internal=kind)).text for kind in (True, False))
    for word in ("87.6 %", "12.3", "small_cnn_v1", "DP-SGD loss on the private images", "machine-7", "/secret/place"):
        assert word in internal
        assert word not in release
    for word in ("Warm-up loss on the central images", "The guarantee", "Poisson-sampled Gaussian", "5000"):
        assert word in internal
        assert word in release
    assert "Do not publish this page" in internal


def test_a_sensitive_row_that_calls_itself_releasable_stays_out(run):
    row = {"name": "finetune/mean_norm", "class": "releasable", "time": 0}
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row | {"value": step, "step": step}) + "\n" for step in range(5))
    assert "gradient norm" in render(run, internal=True)
    assert "gradient norm" not in render(run, internal=False)


def test_written_report_is_for_its_owner(run):
    path = write_report(run)
    assert path == run / "report.html"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == render(run, internal=True)


def test_page_is_self_contained_and_has_no_scripts(page):
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    sources = [a[k] for _, a in page.tags for k in ("src", "href", "srcset") if k in a]
    assert len(sources) > 10
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_page_is_well_formed_and_readable_by_a_screen_reader(page):
    assert page.broken == []
    assert page.open == []
    assert ("html", {"lang": "en"}) in page.tags
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1
    assert tags.count("main") == 1
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert all("alt" in attributes for tag, attributes in page.tags if tag == "img")
    assert all(a.get("role") == "img" and a["aria-label"] for tag, a in page.tags if tag == "svg")
    named = {a["id"] for _, a in page.tags if "id" in a}
    assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= named


def test_images_come_by_class_with_words(page):
    labels = [a["aria-label"] for tag, a in page.tags if tag == "span" and a.get("role") == "img"]
    assert labels == [f"5 noisy central images of class {name}" for name in ("zero", "one", "two")] + [
        "5 synthetic images of class zero",
        "9 synthetic images of class one",
        "9 synthetic images of class two",
    ]


def test_words_from_outside_are_escaped(run):
    plan = json.loads((run / "plan.json").read_text())
    plan["public"]["class_names"] = ["<script>alert(1)</script>", "a&b", '"quoted"']
    (run / "plan.json").write_text(json.dumps(plan))
    html = render(run, internal=True)
    assert "<script" not in html
    assert Page(html).broken == []


def test_run_without_easy_stage_evaluation_and_metrics_still_has_a_report(run):
    shutil.rmtree(run / "central")
    for name in ("evaluation.json", "metrics.jsonl", "environment.json", "command.txt"):
        (run / name).unlink()
    page = Page(render(run, internal=True))
    assert page.broken == []
    assert "Utility on real images" not in page.text
    assert "What looks like noise" not in page.text


def test_damaged_plan_is_refused(run):
    (run / "plan.json").write_text("{")
    with pytest.raises(InputError, match=r"plan\.json: expected a readable file"):
        render(run, internal=False)


def test_not_private_banner(make_run):
    for kind in (True, False):
        assert "NOT PRIVATE" in render(make_run(f"run{kind}", not_private=True), internal=kind)


def test_budget_bars_hold_every_cost(run):
    plan = json.loads((run / "plan.json").read_text())
    svg = figures.budget_bars(plan)
    assert svg.count("<rect") == 3
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="16"', svg)]
    whole, target = widths[-1], float(re.search(r'class="target" x1="([\d.]+)"', svg).group(1))
    assert whole / target == pytest.approx(plan["epsilon"] / plan["target_epsilon"], abs=1e-3)
    assert max(widths[:2]) < whole < sum(widths[:2])


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.3, 2.7), (-5, 5), (0, 60000), (9.99, 10.01), (2, 2), (0, 0), (1e-7, 3e-7)]
)
def test_ticks_are_few_and_span_the_range(low, high):
    found = figures.ticks(low, high)
    assert 2 <= len(found) <= 7 or low == high
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12
    assert found == sorted(set(found))


def test_chart_keeps_the_ends_and_thins_the_middle():
    points = [(step, float(step % 7)) for step in range(5001)]
    svg = figures.line_chart(points, "Loss & more", "nats")
    drawn = re.search(r'points="([^"]+)"', svg).group(1).split()
    assert len(drawn) < 400
    assert float(drawn[0].split(",")[0]) == figures.LEFT
    assert float(drawn[-1].split(",")[0]) == figures.WIDTH - figures.RIGHT
    assert "Loss &amp; more" in svg
    assert "at step 5000; lowest 0, highest 6 nats" in svg


def test_only_the_first_twenty_classes_and_ten_images_are_shown(tmp_path, write_table):
    write_table(tmp_path / "part-00000.parquet", list(range(30)) * 12)
    strips = figures.class_strips(tmp_path, [f"c{k}" for k in range(30)], "images")
    assert [strip["name"] for strip in strips] == [f"c{k}" for k in range(20)]
    assert all(len(strip["sources"]) == 10 for strip in strips)
    assert figures.class_strips(tmp_path / "missing", ["a"], "images") == []
