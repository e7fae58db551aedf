"""Pictures inside the report: curves and bars as inline SVG, images as data URIs; no script, no request."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from markupsafe import Markup

from e2h.data.images import decode, encode_png
from e2h.reporting import facts

Point = tuple[float, float]

# Units of the drawing are CSS pixels at the width that a curve has on the page.
WIDTH, HEIGHT = 400, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 36
BAR_WIDTH = 480
MAX_POINTS = 300
MAX_CLASSES = 20


def data_uri(png: bytes) -> str:
    """A PNG file as the `src` of an image."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def line_chart(points: Sequence[Point], title: str, unit: str = "", x_label: str = "step") -> Markup:
    """One curve as an SVG element whose title and description say what it shows.

    Args:
      points: (x, y), sorted by x, at least two; thinned to 300, the last one kept.
    """
    shown = [*points[:: max(1, len(points) // MAX_POINTS)], points[-1]]
    xs, ys = zip(*shown, strict=True)
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])

    def place(x: float, y: float) -> Point:
        across = (x - x_low) / ((x_high - x_low) or 1)
        upward = (y - y_low) / ((y_high - y_low) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - upward * (HEIGHT - TOP - BOTTOM)

    path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in shown)
    description = f"From {ys[0]:.4g} at {x_label} {xs[0]:g} to {ys[-1]:.4g} at {x_label} {xs[-1]:g}; "
    description += f"lowest {min(ys):.4g}, highest {max(ys):.4g}{' ' + unit if unit else ''}."
    parts = [_y_tick(y, place(x_low, y)[1]) for y in y_ticks]
    parts += [_x_tick(x, place(x, y_low)[0]) for x in x_ticks if x_low <= x <= x_high]
    parts.append(f'<polyline class="curve" points="{path}"/>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x_label)}</text>')
    return _svg(title, description, WIDTH, HEIGHT, parts)


def _y_tick(value: float, y: float) -> str:
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'


def _x_tick(value: float, x: float) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:g}</text>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) that span [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _svg(title: str, description: str, width: float, height: float, parts: Sequence[str]) -> Markup:
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(f"{title}. {description}")}">'
    words = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return Markup(head + words + "".join(parts) + "</svg>")


def budget_bars(plan: Mapping[str, Any]) -> Markup:
    """What each release costs alone and all cost together, as bars against the target."""
    rows = [(facts.TITLES.get(r["name"], r["name"]), r["epsilon_alone"], "part") for r in plan["releases"]]
    rows.append(("All together", plan["epsilon"], "whole"))
    target = plan["target_epsilon"]
    scale = (BAR_WIDTH - 60) / max(target, *(value for _, value, _ in rows))
    parts, y = [], 6
    for label, value, kind in rows:
        parts.append(f'<text class="label" x="0" y="{y + 10}">{escape(label)}</text>')
        parts.append(f'<rect class="{kind}" x="0" y="{y + 17}" width="{value * scale:.1f}" height="16" rx="2"/>')
        x = max(value, target) * scale + 8  # beside the target's line, not on it
        parts.append(f'<text class="label" x="{x:.1f}" y="{y + 30}">{facts.up(value)}</text>')
        y += 46
    x = target * scale
    parts.append(f'<line class="target" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{y}"/>')
    note = f'<text class="tick" x="{x:.1f}" y="{y + 15}" text-anchor="end">target {facts.up(target)}</text>'
    description = "; ".join(f"{label}: epsilon {facts.up(value)}" for label, value, _ in rows)
    return _svg("Privacy budget", f"{description}; target {facts.up(target)}.", BAR_WIDTH, y + 20, [*parts, note])


def parallel_coordinates(trials: Sequence[tuple[Mapping[str, Any], float]], title: str) -> Markup:
    """An axis for each searched setting and one for the score; a line a trial, the best last and thick.

    Args:
      trials: values by setting, the same settings in each, and a score.
    """
    names = [*trials[0][0], "score"]
    columns = [_places([values[name] for values, _ in trials]) for name in names[:-1]]
    columns.append(_places([score for _, score in trials]))
    xs = [LEFT + index * (WIDTH - 2 * LEFT) / (len(names) - 1) for index in range(len(names))]
    parts = []
    for name, x, (shown, _) in zip(names, xs, columns, strict=True):
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        short = escape(name.split(".")[-1].replace("_", " "))
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{short}</text>')
        for text, height in shown.items():
            y = HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM)
            parts.append(f'<text class="tick" x="{x + 4:.1f}" y="{y + 4:.1f}">{escape(text)}</text>')
    order = sorted(range(len(trials)), key=lambda index: trials[index][1])
    for index in order:
        heights = [heights[index] for _, heights in columns]
        points = [
            f"{x:.1f},{HEIGHT - BOTTOM - h * (HEIGHT - TOP - BOTTOM):.1f}" for x, h in zip(xs, heights, strict=True)
        ]
        width = 3 if index == order[-1] else 1
        parts.append(f'<polyline class="curve" style="stroke-width:{width}" points="{" ".join(points)}"/>')
    best = ", ".join(f"{name} {value}" for name, value in trials[order[-1]][0].items())
    description = f"{len(trials)} trials; the best, score {trials[order[-1]][1]:.4g}, has {best}."
    return _svg(title, description, WIDTH, HEIGHT, parts)


def _places(values: Sequence[Any]) -> tuple[dict[str, float], list[float]]:
    """Labels of an axis with their heights in [0, 1], and the height of each value: different ones equally apart.

    An axis of many values shows its ends.
    """
    kinds = sorted(set(values), key=lambda one: (isinstance(one, str), one))
    heights = {one: index / max(1, len(kinds) - 1) for index, one in enumerate(kinds)}
    named = kinds if len(kinds) <= 6 else [kinds[0], kinds[-1]]
    texts = {f"{one:.4g}" if isinstance(one, float) else str(one): heights[one] for one in named}
    return texts, [heights[one] for one in values]


def _labelled(folder: Path) -> Iterator[tuple[int, bytes]]:
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(256, columns=["image", "label"]):
                rows = batch.to_pylist()
                yield from ((int(row["label"]), row["image"]["bytes"]) for row in rows)


def class_strips(folder: Path, class_names: Sequence[str], what: str, per_class: int = 10) -> list[dict[str, Any]]:
    """The first images of each class, for at most 20 classes.

    Args:
      folder: holds Parquet files with columns image (struct of bytes, path) and label; may be missing.
      what: what the images are, for the alternative text ("synthetic images").

    Returns:
      One dictionary a class that has images: "name", "sources" (data URIs of PNG files), "alt".
    """
    found: dict[int, list[str]] = {label: [] for label in range(min(len(class_names), MAX_CLASSES))}
    for label, content in _labelled(folder):
        if len(found.get(label, range(per_class))) < per_class:
            found[label].append(data_uri(encode_png(decode(content))))
            if all(len(sources) == per_class for sources in found.values()):
                break
    return [
        {"name": name, "sources": sources, "alt": f"{len(sources)} {what} of class {name}"}
        for name, sources in zip(map(str, class_names), found.values(), strict=False)
        if sources
    ]
