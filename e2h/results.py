"""What a run ends with: measurements for its owner, and the release. Without Ray, in the memory of one machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from e2h.config import expect
from e2h.curriculum.run import Run
from e2h.curriculum.stages import read_or_make_plan
from e2h.curriculum.synthesis import synthesized
from e2h.data.exports import read_hf_parquet
from e2h.data.filesystem import copy_files, list_files, remove, write_bytes
from e2h.data.images import decode
from e2h.data.remote import Place
from e2h.data.storage import Prepared, iter_batches, open_prepared
from e2h.errors import BudgetError
from e2h.evaluation.evaluate import evaluate as measure
from e2h.privacy.plan import read_plan
from e2h.reporting.facts import read_json
from e2h.reporting.metrics import MetricWriter
from e2h.reporting.publish import publish as build_release
from e2h.reporting.report import write_report

Measured = dict[str, Any]
EVALUATED_AT_ONCE, EVALUATED_FILES = 1000, 64  # real images
# What a report and a release are made of.
REPORTED = (
    "config.yaml",
    "command.txt",
    "environment.json",
    "plan.json",
    "metrics.jsonl",
    "evaluation.json",
    "evaluation/",
    "search.json",
    "central/",
    "frequency/",
    "figures/",
    "synthetic/",
    "checkpoints/model.safetensors",
)


def evaluate(run: Run, elsewhere: Callable[[Callable[[], Measured]], Measured] = lambda work: work()) -> Measured:
    """Train on synthetic, test on real; measured once and kept. Sensitive: for the data's owner only.

    Args:
      run: with synthetic images.
      elsewhere: runs what takes minutes of a processor, e.g. on another machine.

    Returns:
      `evaluation.json`, see `e2h.evaluation.evaluate.evaluate`.
    """
    if not run.evaluation.exists():
        _expect_images(run)
        result = elsewhere(partial(_evaluate, run))
        with MetricWriter(run.root, run.config.privacy.test_mode) as metrics:
            for name, value in result["downstream"].items():
                metrics.scalar(f"evaluation/{name}", value["accuracy"], 0)
            metrics.scalar("evaluation/frechet", result["frechet"]["distance"], 0)
        write_bytes(run.evaluation, json.dumps(result, indent=2).encode())
    return read_json(run.evaluation)


def _expect_images(run: Run) -> None:
    expect(synthesized(run), "run.name", run.root.name, "all synthetic images", "run the sample job first")


def show_grid(run: Run, folder: str) -> None:
    """The picture that `central`, `frequency` or `synthetic` holds, in TensorBoard: of releasable images alone."""
    with MetricWriter(run.root, run.config.privacy.test_mode) as metrics:
        metrics.image(f"{folder}/grid", decode((run.root / folder / "grid.png").read_bytes()), 0)


def _evaluate(run: Run) -> Measured:
    """In the memory of the synthetic set, twice, and of `evaluation.max_feature_records` real images."""
    config, prepared = run.config, open_prepared(run.prepared)
    facts = prepared.manifest
    advice = "hold more out (data.test_fraction), or publish without: jobs/publish.py"
    expect(facts.num_test >= 2, "data", f"{facts.num_test} test images", "at least 2", advice)
    return measure(
        read_hf_parquet(sorted(run.synthetic.glob("part-*.parquet"))),
        some_images(prepared, config.evaluation.max_feature_records),
        prepared.blocks("test"),
        config.evaluation,
        config.seed,
        facts.class_names,
        prepared.blocks("train"),
    )


def some_images(prepared: Prepared, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Training images, at most `count`, and their labels: spread over the set, whose files may be sorted by class.

    Of a large set few files are opened.
    """
    files = prepared.files("train")
    per_file = max(1, prepared.manifest.num_train // len(files))
    num_files = min(len(files), max(EVALUATED_FILES, -(-count // per_file) + 1))
    chosen = [files[place] for place in np.linspace(0, len(files) - 1, num_files).round().astype(int)]
    total = sum(file.rows for file in chosen)
    places = np.linspace(0, total - 1, min(count, total)).round().astype(int)
    images, labels, start = [], [], 0
    for block in iter_batches(chosen, EVALUATED_AT_ONCE):
        here = places[(places >= start) & (places < start + len(block))] - start
        images.append(block.images[here])
        labels.append(block.labels[here])
        start += len(block)
    return np.concatenate(images), np.concatenate(labels)


def publish(run: Run) -> Place:
    """`release/`: the only folder to publish, and the report for its owner.

    Raises:
      InputError: if there are no synthetic images, or the release has anything private in it.
      BudgetError: if the ledger charged anything else than the plan says: then the plan's epsilon is not the release's.
    """
    _expect_images(run)
    plan = read_plan(read_or_make_plan(run, open_prepared(run.prepared)))
    run.open_budget(plan.budget)
    if set(run.ledger.charged()) != set(plan.releases):
        raise BudgetError(f"{run.ledger.location}: expected charges of {plan.releases}, found {run.ledger.charged()}")
    with _on_this_machine(run) as folder:
        build_release(folder, run.ledger.head())
        write_report(folder)
    return run.release


@contextmanager
def _on_this_machine(run: Run) -> Iterator[Path]:
    """The run directory; for one in a bucket, a copy of what a report is made of, and what is made of it goes back."""
    if isinstance(run.root, Path):
        yield run.root
        return
    folder = run.scratch / "publish"
    remove(folder)
    try:
        names = [name for name, _ in list_files(run.root)]
        copy_files(run.root, folder, [name for name in names if name.startswith(REPORTED)])
        yield folder
        made = [name for name, _ in list_files(folder) if name.startswith(("release/", "report.html", "figures/"))]
        # The card last: a folder without one is no release.
        copy_files(folder, run.root, sorted(made, key=lambda name: name == "release/README.md"))
        for name in names:
            if name.startswith("release/") and name not in made:
                remove(run.root / name)
    finally:
        remove(folder)
