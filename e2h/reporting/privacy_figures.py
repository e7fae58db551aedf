"""The charts that follow from a plan: what each release adds, what an attack can do, how noise and budget trade."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from e2h.reporting import facts, privacy_curves
from e2h.reporting.figures import (
    ACCENT,
    IN_AXES,
    PART,
    RULE,
    SERIES,
    SOFT,
    WARN,
    WIDTH,
    Drawing,
    Point,
    drawing,
    line_chart,
    sheet,
    styled,
)


def privacy_figures(plan: Mapping[str, Any]) -> dict[str, Drawing]:
    """The charts that follow from a plan, by file name; all of them may be published."""
    keys = ("releases", "epsilon", "delta", "target_epsilon", "epsilon_schedule")
    return _privacy_figures(json.dumps({key: plan[key] for key in keys}))


@functools.lru_cache(maxsize=16)
def _privacy_figures(plan_json: str) -> dict[str, Drawing]:
    plan = json.loads(plan_json)
    found = {"budget": _budget(plan), "trade_off": _trade_off(plan)}
    spent, shares = privacy_curves.spent_after(plan), privacy_curves.noise_by_share(plan)
    if len(plan["epsilon_schedule"]) > 1:
        points = [(0.0, spent[-2] if len(spent) > 1 else 0.0), *map(tuple, plan["epsilon_schedule"])]
        title = "Epsilon spent during DP-SGD, all stages together"
        found["epsilon_by_step"] = line_chart(points, title, target=plan["target_epsilon"])
    if shares and len(shares["central"]) > 1:
        found["noise_by_share"] = _noise_by_share(plan, shares)
    return found


@styled
def _budget(plan: Mapping[str, Any]) -> Drawing:
    """A bar for each release, from what was spent before it to what was spent after it, and one for what is left."""
    spent, target = privacy_curves.spent_after(plan), plan["target_epsilon"]
    titles = [facts.TITLES.get(one["name"], one["name"].capitalize()) for one in plan["releases"]]
    rows = [(t, a, b, ACCENT) for t, a, b in zip(titles, [0.0, *spent], spent, strict=False)]
    rows.append(("Left", spent[-1], max(target, spent[-1]), PART))
    figure, axes = sheet(WIDTH, 46 * len(rows) + 44)
    words = []
    for y, (title, start, end, colour) in enumerate(rows):
        axes.barh(y, end - start, left=start, height=0.4, color=colour, edgecolor=colour, linewidth=0.5)
        value = facts.up(end) if colour == ACCENT else f"{end - start:.2g}"
        axes.annotate(title, (0, y - 0.32), (0, 0), **IN_AXES)
        axes.annotate(value, (1, y), (6, 0), va="center", **IN_AXES)
        words.append(f"{title}: {'to ' if colour == ACCENT else ''}epsilon {value}")
    axes.axvline(target, color=WARN, linestyle=(0, (4, 3)), linewidth=1.5)
    axes.set_xlim(0, max(target, spent[-1]))
    axes.set_ylim(len(rows) - 0.6, -0.8)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(f"epsilon; the dashed line is the target, {facts.up(target)}", loc="left")
    return drawing(figure, "Privacy budget, release after release", "; ".join(words) + f"; target {facts.up(target)}.")


@styled
def _trade_off(plan: Mapping[str, Any]) -> Drawing:
    alarms, misses = zip(*privacy_curves.trade_off(plan), strict=True)
    figure, axes = sheet(WIDTH, 0.97 * WIDTH)
    axes.fill_between(alarms, misses, color=RULE, alpha=0.6, linewidth=0)
    axes.plot(alarms, misses, color=ACCENT)
    axes.plot([0, 1], [1, 0], color=SOFT, linestyle=(0, (4, 3)), linewidth=1.5)
    axes.annotate("blind guessing", (0.52, 0.52), color=SOFT)
    if np.interp(0.1, alarms, misses) > 0.25:  # else there is no room for it
        axes.annotate("out of reach of\nevery attack", (0.02, 0.03), color=SOFT)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="false alarms: “was in”, though it was not")
    axes.set_ylabel("misses: “was not in”, though it was")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda share, _: f"{share:.0%}")
    guess = facts.percent_up(privacy_curves.best_guess(plan))
    table = "; ".join(
        f"at {share:.0%} false alarms at least {math.floor(1000 * max(0, miss)) / 10:.1f} % misses"
        for share, miss in zip(alarms, misses, strict=True)
        if share in (0.05, 0.1, 0.25)
    )
    return drawing(figure, "Errors of the best attack on one record", f"A guess is right in at most {guess}; {table}.")


@styled
def _noise_by_share(plan: Mapping[str, Any], shares: Mapping[str, Sequence[Point]]) -> Drawing:
    alone = {one["name"]: one for one in plan["releases"]}
    share = alone["central"]["epsilon_alone"] / plan["epsilon"]
    figure, axes = sheet()
    words = []
    for (marker, colour), (name, what) in zip(SERIES, (("finetune", "DP-SGD"), ("central", "central")), strict=False):
        xs, ys = zip(*shares[name], strict=True)
        noise = alone[name]["event"]["noise_multiplier"]
        axes.plot([100 * x for x in xs], ys, color=colour)
        axes.plot([100 * share], [noise], marker=marker, color=colour, markersize=8)
        axes.annotate(what, (100 * xs[0], ys[0]), (4, 5), textcoords="offset points", color=colour)
        words.append(f"{what} noise multiplier {noise:.3g}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "2357" else "")
    axes.grid(axis="x", visible=False)
    axes.set(xlim=(0, 100), xlabel="share of epsilon for central images, %")
    title = "Noise multipliers by the share that central images get"
    return drawing(figure, title, f"This run, at {share:.0%}: {', '.join(words)}.")
