from __future__ import annotations

import json
import re
import shutil
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from e2h.errors import InputError
from e2h.reporting.pictures import class_strips
from e2h.reporting.report import render, write_report

VOID = {"meta", "img", "link", "br", "hr", "input"}


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
    sensitive = ("87.6 ± 1.2 %", "12.35", "small_cnn_v1", "DP-SGD loss on the private images", "31.27", "1.41")
    for word in (*sensitive, "95.1 ± 0.4 %", "65.4 %", "83.4 %", "machine-7", "/secret/place"):
        assert word in internal
        assert word not in release
    for word in ("Warm-up loss on the images of the easy stage", "The guarantee", "Poisson-sampled Gaussian", "5000"):
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
    named = {a["id"] for _, a in page.tags if "id" in a}
    assert all(s.startswith("data:image/png;base64,") or s.removeprefix("#") in named for s in sources)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_page_is_well_formed_and_readable_by_a_screen_reader(page):
    assert page.broken == []
    assert page.open == []
    assert ("html", {"lang": "en"}) in page.tags
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1
    assert tags.count("main") == tags.count("nav") == tags.count("header") == tags.count("footer") == 1
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
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


@pytest.mark.parametrize("missing", ["inception", "memorisation", "downstream"])
def test_what_was_not_measured_is_not_shown(run, missing):
    words = {"inception": "Inception score", "memorisation": "Memorisation", "downstream": "CNN"}
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert words[missing] in Page(render(run, internal=True)).text
    (run / "evaluation.json").write_text(json.dumps(evaluation | {missing: {} if missing == "downstream" else None}))
    (run / "evaluation" / "baselines.json").unlink()
    page = Page(render(run, internal=True))
    assert page.broken == []
    assert words[missing] not in page.text.replace("small_cnn_v1", "")
    assert ("No classifier was trained" in page.text) == (missing == "downstream") != ("learnt from" in page.text)
    assert "Fréchet distance" in page.text


def test_a_ratio_of_distances_may_not_exist(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["memorisation"] |= {"ratio": None, "nearest_train_of_test": [0.0, 0.0, 0.0]}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = Page(render(run, internal=True)).text
    assert "do (by chance 1.4 %)." in text
    assert "ratio of the medians" not in text


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


@pytest.fixture
def frequency_run(run, write_table):
    plan = json.loads((run / "plan.json").read_text())
    event = {"type": "poisson_sampled_gaussian", "sampling_prob": 1.0, "noise_multiplier": 12.0, "count": 1}
    plan["releases"].insert(1, {"name": "frequency", "event": event, "epsilon_alone": 0.3})
    (run / "plan.json").write_text(json.dumps(plan))
    write_table(run / "frequency" / "images.parquet", [0, 1, 2])
    return run


def test_a_second_easy_stage_is_shown_with_its_images(frequency_run):
    page = Page(render(frequency_run, internal=False))
    labels = [a["aria-label"] for _, a in page.tags if a.get("role") == "img"]
    assert "1 images of the easy stage's generator of class zero" in labels
    assert any("Mean embeddings (easy stage): to epsilon" in label for label in labels)


def test_charts_are_files_too_and_the_same_as_on_the_page(run):
    html = write_report(run).read_text()
    files = sorted(path.name for path in (run / "figures").iterdir())
    assert files == ["budget.svg", "epsilon_by_step.svg", "noise_by_share.svg", "trade_off.svg"]
    for name in files:
        root = ElementTree.parse(run / "figures" / name).getroot()
        title, description = root[0].text, root[1].text
        assert f'aria-label="{escape(f"{title}. {description}")}"' in html


def test_the_guess_is_the_same_in_the_table_and_in_words(run):
    text = Page(render(run, internal=False)).text
    assert len(set(re.findall(r"([\d.]+ %)(?: of cases|\s+Private records)", text))) == 1


def test_only_the_first_twenty_classes_and_ten_images_are_shown(tmp_path, write_table):
    write_table(tmp_path / "part-00000.parquet", list(range(30)) * 12)
    strips = class_strips(tmp_path, [f"c{k}" for k in range(30)], "images")
    assert [strip["name"] for strip in strips] == [f"c{k}" for k in range(20)]
    assert all(len(strip["sources"]) == 10 for strip in strips)
    assert class_strips(tmp_path / "missing", ["a"], "images") == []
