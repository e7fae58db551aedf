"""Charts as they are drawn, read back from their SVG."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from e2h.reporting import figures

TEXT = "{http://www.w3.org/2000/svg}text"


def words(drawing: figures.Drawing) -> list[str]:
    return [one.text for one in ElementTree.fromstring(drawing.file()).iter(TEXT)]


def longest_path(drawing: figures.Drawing) -> list[tuple[float, float]]:
    paths = re.findall(r'<path d="([^"]+)"', drawing.svg)
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", max(paths, key=len))]


def test_a_curve_keeps_its_ends_and_its_middle_is_thinned():
    drawing = figures.line_chart([(step, float(step % 7)) for step in range(5001)], "Loss & more", "nats")
    points = longest_path(drawing)
    assert 100 < len(points) < 400
    assert points[0][0] == min(x for x, _ in points)
    assert points[-1][0] == max(x for x, _ in points)
    assert "at step 5000; lowest 0, highest 6 nats" in drawing.description
    assert 'aria-label="Loss &amp; more. From 0 at step 0' in drawing.inline()


def test_a_chart_on_the_page_has_the_pages_colours_and_font_and_no_identifiers_or_styles_of_its_own():
    drawing = figures.line_chart([(0, 1.0), (1, 2.0)], "A curve", target=3.0)
    page, file = drawing.inline(), drawing.file().decode()
    assert not re.search(r"#[0-9a-f]{6}", page)
    assert "var(--accent)" in page
    assert "var(--" not in file
    assert "<style" not in page + file
    assert "<metadata" not in page + file
    assert not re.search(r"<g id=|DejaVu", page)
    assert words(drawing)[-1] == "target 3.000"


def test_the_same_chart_gives_the_same_bytes():
    first, second = (figures.line_chart([(0, 1.0), (1, 2.0)], "A curve") for _ in range(2))
    assert first == second


def test_dots_show_every_value_whatever_a_class_is_called():
    series = {"CNN": {"<b>&": (0.5, 0.01), "$x_1$": (0.75, 0.0)}, "perceptron": {"$x_1$": (0.25, 0.0)}}
    drawing = figures.dot_plot(series, "Accuracy")
    assert {"<b>&", "$x_1$", "CNN", "perceptron"} <= set(words(drawing))
    assert drawing.description == "<b>&, CNN: 50.0 %; $x_1$, CNN: 75.0 %; $x_1$, perceptron: 25.0 %."
    assert "<b>" not in drawing.inline()


def test_the_best_trial_is_drawn_last_and_thick():
    trials = [({"lr": 0.1 * i, "steps": i % 2}, score) for i, score in enumerate((0.2, 0.9, 0.5, 0.9))]
    drawing = figures.parallel_coordinates(trials, {"lr": 0.1, "steps": 1})  # of two equal ones that which was chosen
    curves = [
        path for path in re.findall(r"<path [^>]*>", drawing.svg) if figures.PART in path or figures.ACCENT in path
    ]
    assert len(curves) == 4
    assert "stroke-width: 3" in curves[-1]
    assert drawing.description == "4 trials; the best, score 0.9, has lr 0.1, steps 1."


def test_matplotlib_keeps_its_settings_and_is_imported_only_when_something_is_drawn():
    code = "import sys, e2h.reporting.report; assert not {'matplotlib', 'dp_accounting'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.line_chart([(0, 1.0), (1, 2.0)], "A curve")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("values", [["b", "a"], [3, 1, 2], [1, "auto"], [[1, 1], [1, 2]], [None, 5.0]])
def test_places_are_equally_apart(values):
    texts, heights = figures._places(values)
    assert set(texts) == {json.dumps(value).strip('"').removesuffix(".0") for value in values}
    assert sorted(heights) == pytest.approx([i / (len(values) - 1) for i in range(len(values))])
