"""Charts by matplotlib, as SVG: inline in the report, in its colours and its font, and as files of their own."""

from __future__ import annotations

import functools
import io
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from e2h.reporting import facts

Point = tuple[float, float]

# Drawn colour -> the page's, which turns dark with it.
COLOURS = {
    "#1f2529": "var(--ink)",
    "#59636b": "var(--soft)",
    "#dcdfdc": "var(--rule)",
    "#1d6a72": "var(--accent)",
    "#689799": "var(--part)",
    "#8a3b12": "var(--warn)",
    "#ffffff": "none",
}
INK, SOFT, RULE, ACCENT, PART, WARN, GROUND = COLOURS
# Shape and colour, so that no series is told by colour alone.
SERIES = (("o", ACCENT), ("s", WARN), ("^", SOFT), ("D", PART))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a class may be named $x$
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "legend.fontsize": 12,
}
# Of annotations: across as a share of the axes, up as the values are, moved by some points.
IN_AXES: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
# Drawn at this width in CSS pixels, which is about what a chart gets on the page.
WIDTH, HEIGHT = 400, 220
MAX_POINTS = 300


class Drawing(NamedTuple):
    """One chart; `description` says in words what it shows."""

    title: str
    description: str
    svg: str

    def inline(self) -> Markup:
        """As an element of the page: its colours, its font, no identifiers that two charts could share."""
        svg = re.sub(r"font-family: [^;\"]*; ", "", self.svg)
        for drawn, page in COLOURS.items():
            svg = svg.replace(drawn, page)
        words = escape(f"{self.title}. {self.description}")
        return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{words}" ', 1))

    def file(self, warning: str | None = None) -> bytes:
        """As an SVG file; with a warning where its figures are of a run that is not private."""
        description = f"{warning}. {self.description}" if warning else self.description
        words = f"<title>{escape(self.title)}</title><desc>{escape(description)}</desc>"
        head, rest = self.svg.split(">", 1)
        return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>{words}{rest}'.encode()


def styled(draw: Callable[..., Drawing]) -> Callable[..., Drawing]:
    """Has a drawing function run in our style, and leaves everybody else's settings of matplotlib as they are."""

    @functools.wraps(draw)
    def styled(*arguments: Any, **named: Any) -> Drawing:
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # on its first use it tells of its fonts
        from matplotlib import rc_context  # half a second to import, and every `import e2h.reporting` would pay it

        with rc_context(STYLE):
            return draw(*arguments, **named)

    return styled


def sheet(width: float = WIDTH, height: float = HEIGHT) -> tuple[Any, Any]:
    """A figure of that many CSS pixels and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return figure, figure.add_subplot()


def drawing(figure: Any, title: str, description: str) -> Drawing:
    """The figure as SVG, without what matplotlib says of itself, style sheets and identifiers."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": title}):  # the same chart gives the same bytes, another one other identifiers
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg[svg.index("<svg ") :], flags=re.DOTALL)
    svg = re.sub(r'<defs>\s*<clipPath.*?</defs>|(?<=<g) id="[^"]*"| clip-path="[^"]*"', "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf"<svg \1 {_NAMESPACES}>", svg)
    return Drawing(title, description, re.sub(r"\n\s*", "\n", svg))


@styled
def line_chart(points: Sequence[Point], title: str, unit: str = "", target: float | None = None) -> Drawing:
    """One curve.

    Args:
      points: (x, y), sorted by x, at least two; thinned to about 300, the last one kept.
      target: drawn as a dashed line.
    """
    shown = [*points[:: max(1, len(points) // MAX_POINTS)], points[-1]]
    xs, ys = zip(*shown, strict=True)
    figure, axes = sheet()
    axes.plot(xs, ys, color=ACCENT)
    axes.grid(axis="x", visible=False)
    if target is not None:
        axes.axhline(target, color=WARN, linestyle=(0, (4, 3)), linewidth=1.5)
        axes.annotate(f"target {facts.up(target)}", (0, target), (4, -4), va="top", **IN_AXES)
        axes.set_ylim(0, 1.08 * max(target, *ys))
    axes.set_xlabel("step", loc="right")
    axes.locator_params(nbins=5)
    description = f"From {ys[0]:.4g} at step {xs[0]:g} to {ys[-1]:.4g} at step {xs[-1]:g}; "
    description += f"lowest {min(ys):.4g}, highest {max(ys):.4g}{' ' + unit if unit else ''}."
    return drawing(figure, title, description)


@styled
def parallel_coordinates(trials: Sequence[tuple[Mapping[str, Any], float]], chosen: Mapping[str, Any]) -> Drawing:
    """An axis for each searched setting and one for the score; a line a trial, the best last and thick.

    Args:
      trials: values by setting, the same settings in each, and a score.
      chosen: the values of the best, which of equal scores is the one that the search took.
    """
    names = [*trials[0][0], "score"]
    columns = [_places([values[name] for values, _ in trials]) for name in names[:-1]]
    columns.append(_places([score for _, score in trials]))
    order = sorted(range(len(trials)), key=lambda index: (trials[index][0] == chosen, trials[index][1]))
    figure, axes = sheet(WIDTH, 260)
    for index in order:
        best = index == order[-1]
        heights = [heights[index] for _, heights in columns]
        axes.plot(range(len(names)), heights, color=ACCENT if best else PART, linewidth=3 if best else 1.5)
    for x, (texts, _) in enumerate(columns):
        for text, height in texts.items():
            axes.annotate(text, (x, height), (5, 2), textcoords="offset points")
    axes.set_xticks(range(len(names)), [name.split(".")[-1].replace("_", "\n") for name in names])
    axes.set(xlim=(-0.1, len(names) - 0.6), ylim=(-0.05, 1.1), yticks=[])
    values = ", ".join(f"{name} {value}" for name, value in trials[order[-1]][0].items())
    description = f"{len(trials)} trials; the best, score {trials[order[-1]][1]:.4g}, has {values}."
    return drawing(figure, "Values and score of every finished trial", description)


def _places(values: Sequence[Any]) -> tuple[dict[str, float], list[float]]:
    """Labels of an axis with their heights in [0, 1], and the height of each value: different ones equally apart.

    An axis of many values shows its ends.
    """
    values = [one if isinstance(one, (int, float, str)) else json.dumps(one) for one in values]  # lists, and null
    kinds = sorted(set(values), key=lambda one: (isinstance(one, str), one))
    heights = {one: index / max(1, len(kinds) - 1) for index, one in enumerate(kinds)}
    named = kinds if len(kinds) <= 6 else [kinds[0], kinds[-1]]
    texts = {f"{one:.4g}" if isinstance(one, float) else str(one): heights[one] for one in named}
    return texts, [heights[one] for one in values]


Dots = Mapping[str, Mapping[str, tuple[float, float]]]  # series -> row -> (value, spread), shares of 1


@styled
def dot_plot(series: Dots, title: str) -> Drawing:
    """Shares in per cent, a row for each name and a marker for each series; the spread is a line through the marker."""
    rows = list(dict.fromkeys(row for values in series.values() for row in values))
    figure, axes = sheet(WIDTH, 25 * len(rows) + 80)
    for index, (name, values) in enumerate(series.items()):
        marker, colour = SERIES[index % len(SERIES)]
        ys = [rows.index(row) for row in values]
        xs, spreads = (np.array(part) * 100 for part in zip(*values.values(), strict=True))
        axes.errorbar(xs, ys, xerr=spreads, fmt=marker, color=colour, markersize=7, linewidth=1.5, label=name)
    axes.set_yticks(range(len(rows)), [row if len(row) <= 24 else row[:23] + "…" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(min(axes.get_xlim()[0], 90), 100.5)  # a point of accuracy never looks like a gulf
    axes.set_xlabel("%", loc="right")
    axes.locator_params(axis="x", nbins=6)
    if len(series) > 1:
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.2, columnspacing=1.2)
    parts = (f"{row}, {name}: {100 * x:.1f} %" for name, values in series.items() for row, (x, _) in values.items())
    return drawing(figure, title, "; ".join(parts) + ".")
