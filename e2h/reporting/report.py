"""One self-contained HTML page about a run, in two renderings: internal (sensitive) and release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

import e2h
from e2h.config import NOT_PRIVATE
from e2h.data import filesystem
from e2h.reporting import facts, figures
from e2h.reporting.metrics import METRICS, ReleaseClass, read_curves
from e2h.reporting.pictures import MAX_CLASSES, class_strips
from e2h.reporting.privacy_curves import best_guess
from e2h.reporting.privacy_figures import privacy_figures
from e2h.reporting.recompute import recipe, selected
from e2h.reporting.utility import utility


def render(run_dir: Path, internal: bool) -> str:
    """The report as HTML.

    Args:
      run_dir: run directory with at least plan.json, config.yaml and synthetic/.
      internal: True adds what is sensitive (evaluation, private curves, environment); False leaves out all of it.

    Raises:
      InputError: if plan.json or config.yaml is missing or damaged.
    """
    plan, config = facts.read_json(run_dir / "plan.json"), facts.read_config(run_dir)
    names = plan["public"]["class_names"]
    environment = Environment(
        loader=PackageLoader("e2h.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    by_class = config["central"]["class_conditional"]
    return environment.get_template("report.html.j2").render(
        internal=_internal(run_dir, config) if internal else None,
        plan=plan,
        name=config["data"]["name"],
        num_images=count_images(run_dir),
        facts=facts,
        public=facts.public_facts(plan, config),
        relation=facts.RELATIONS.get(plan["neighbouring_relation"], plan["neighbouring_relation"]),
        banner=NOT_PRIVATE if plan["not_private"] else None,
        guess=facts.percent_up(best_guess(plan)),
        figures=released_figures(run_dir),
        central=class_strips(run_dir / "central", names if by_class else ["all records"], "noisy central images"),
        frequency=class_strips(run_dir / "frequency", names, "images of the easy stage's generator"),
        synthetic=class_strips(run_dir / "synthetic", names, "synthetic images"),
        curves=_curves(run_dir, ReleaseClass.RELEASABLE),
        search=_search(run_dir),
        searched=facts.searched(config),
        recipe=recipe(plan),
        selected=selected(plan),
        max_classes=MAX_CLASSES,
        version=e2h.__version__,
    )


def write_report(run_dir: Path) -> Path:
    """Writes the internal rendering to `report.html`, readable by its owner only, and the charts to `figures/`.

    Returns:
      The path of the report.
    """
    path, plan = run_dir / "report.html", facts.read_json(run_dir / "plan.json")
    warning = NOT_PRIVATE if plan["not_private"] else None
    (run_dir / "figures").mkdir(exist_ok=True)
    for name, drawing in released_figures(run_dir).items():
        filesystem.write_bytes(run_dir / "figures" / f"{name}.svg", drawing.file(warning))
    filesystem.write_bytes(path, render(run_dir, internal=True).encode())
    return path


def released_figures(run_dir: Path) -> dict[str, figures.Drawing]:
    """The charts that may be published, by file name: of the plan, and of a search whose trials are all paid for."""
    found = dict(privacy_figures(facts.read_json(run_dir / "plan.json")))
    search = _search(run_dir) or {}
    # A trial that was stopped early has scores of fewer steps alone, which none of another can be compared with.
    told, whole = search.get("trials", []), facts.share_key(1.0)
    trials = [(one["values"], one["scores"][whole]) for one in told if whole in one["scores"]]
    if len(trials) > 1:
        found["trials"] = figures.parallel_coordinates(trials, search["values"])
    return found


def count_images(run_dir: Path) -> int:
    """Number of synthetic images of the run."""
    return sum(pq.read_metadata(path).num_rows for path in (run_dir / "synthetic").glob("*.parquet"))


def _search(run_dir: Path) -> dict[str, Any] | None:
    """What may be told of a search: the best trial, and the others where all of them are paid for or public."""
    path = run_dir / "search.json"
    return facts.read_json(path) if path.exists() else None


def _curves(run_dir: Path, release_class: ReleaseClass) -> list[dict[str, Any]]:
    """Curves of one class, by the declaration in `METRICS`, whatever a row says of itself."""
    found = read_curves(run_dir)
    drawn = []
    for name, metric in METRICS.items():
        points = found.get(name, [])
        varies = len({value for _, value in points}) > 1
        if metric.release_class is release_class and varies:
            drawing = figures.line_chart(points, metric.title, metric.unit)
            drawn.append({"title": metric.title, "unit": metric.unit, "drawing": drawing})
    return drawn


def _internal(run_dir: Path, config: dict[str, Any]) -> dict[str, Any]:
    """All that only the internal rendering shows."""
    environment, command = (run_dir / name for name in ("environment.json", "command.txt"))
    return {
        "utility": utility(run_dir),
        "curves": _curves(run_dir, ReleaseClass.SENSITIVE),
        "environment": flatten(facts.read_json(environment)) if environment.exists() else {},
        "command": command.read_text() if command.exists() else "",
        "config": yaml.safe_dump(config, sort_keys=False),
    }


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    rows: dict[str, Any] = {}
    for key, value in values.items():
        rows |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows
