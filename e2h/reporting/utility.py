"""`evaluation.json` as rows and charts of the internal report; all of it is sensitive."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e2h.reporting import facts, figures

BASELINES = "evaluation/baselines.json"
CLASSIFIERS = {"logistic_regression": "logistic regression", "mlp": "perceptron", "cnn": "CNN"}
SETS = {"real": "real images", "no_easy_stage": "without the easy stage"}
OWN = "this set"


def utility(run_dir: Path) -> dict[str, Any] | None:
    """What the report shows of how useful the synthetic set is; None before it is evaluated.

    Baselines are results of the same classifiers, learnt from other sets: {name of the set: as "downstream" of
    evaluation.json}, with the names "real" and "no_easy_stage", or any other.
    """
    if not (run_dir / "evaluation.json").exists():
        return None
    evaluation = facts.read_json(run_dir / "evaluation.json")
    others = facts.read_json(run_dir / BASELINES) if (run_dir / BASELINES).exists() else {}
    sets = {OWN: evaluation["downstream"]} | {SETS.get(name, name): found for name, found in others.items()}
    by_class = _by_class(evaluation)
    return {
        **evaluation,
        "sets": list(sets),
        "rows": [(CLASSIFIERS.get(one, one), [_accuracy(s.get(one)) for s in sets.values()]) for one in sets[OWN]],
        "num_seeds": max((len(found.get("accuracies", [])) for found in evaluation["downstream"].values()), default=0),
        "accuracy": _chart(sets),
        "by_class": by_class,
        "class_names": list(dict.fromkeys(name for shares in by_class.values() for name in shares)),
        "class_chart": _class_chart(by_class),
        "image_rows": _image_rows(evaluation.get("inception")),
        "memorisation": evaluation.get("memorisation"),
    }


def _accuracy(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    spread = f" ± {100 * found['std']:.1f}" if found.get("std") else ""
    return f"{100 * found['accuracy']:.1f}{spread} %"


def _chart(sets: Mapping[str, Mapping[str, Any]]) -> figures.Drawing | None:
    dots = {
        name: {CLASSIFIERS.get(key, key): (one["accuracy"], one.get("std") or 0.0) for key, one in found.items()}
        for name, found in sets.items()
    }
    shown = {name: rows for name, rows in dots.items() if rows}
    return figures.dot_plot(shown, "Accuracy on real images") if shown else None


def _by_class(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    found = {CLASSIFIERS.get(key, key): one.get("per_class") for key, one in evaluation["downstream"].items()}
    return {name: shares for name, shares in found.items() if shares}


def _class_chart(by_class: Mapping[str, Mapping[str, float]]) -> figures.Drawing | None:
    dots = {name: {key: (share, 0.0) for key, share in shares.items()} for name, shares in by_class.items()}
    return figures.dot_plot(dots, "Accuracy by class") if dots else None


def _image_rows(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Measures of the images themselves, by the standard Inception network."""
    if not found:
        return []
    score = f"{found['inception_score']:.3g} ± {found['inception_score_std']:.2g}"
    return [
        ("FID (0 is best)", f"{found['fid']:.4g}"),
        ("KID (0 is best)", f"{found['kid']:.3g} ± {found['kid_std']:.2g}"),
        ("Precision (share of synthetic images that look real)", f"{found['precision']:.3f}"),
        ("Recall (share of real images that are covered)", f"{found['recall']:.3f}"),
        ("Inception score", score),
    ]
