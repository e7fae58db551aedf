"""Every stage of a run: skips what is done, does its work on Ray, and leaves `_SUCCESS.json`.

`jobs/pipeline.py` calls them in this order; each of the other jobs calls one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray

from e2h.config import expect, stamp
from e2h.curriculum.central import CentralQuery
from e2h.curriculum.machine import machine
from e2h.curriculum.run import Run
from e2h.curriculum.synthesis import image_labels, num_shards, shard_path
from e2h.data.exports import read_hf_parquet, write_hf_parquet
from e2h.data.filesystem import copy_files, list_files, remove, write_bytes
from e2h.data.images import grid, upscale, write_png
from e2h.data.prepare import finish_prepared
from e2h.data.remote import Place
from e2h.data.sources import open_source
from e2h.data.storage import Prepared, iter_batches, open_prepared
from e2h.distributed import datasets
from e2h.distributed.capacity import await_workers
from e2h.distributed.console import say, show_plan, training_status
from e2h.distributed.nodes import alive, check_shared
from e2h.distributed.progress import PROGRESS_FILE
from e2h.distributed.training import train_on_workers
from e2h.errors import BudgetError, InputError
from e2h.evaluation.evaluate import evaluate as measure
from e2h.privacy.accounting import epsilon
from e2h.privacy.keys import derive_key
from e2h.privacy.plan import PrivacyPlan, make_plan, read_plan
from e2h.reporting.facts import read_json
from e2h.reporting.metrics import MetricWriter
from e2h.reporting.publish import publish as build_release
from e2h.reporting.report import write_report

GRID_SIDE = 320
EVALUATED_AT_ONCE = 1000  # real images
REPORTED = (
    "config.yaml",
    "command.txt",
    "environment.json",
    "plan.json",
    "metrics.jsonl",
    "evaluation.json",
    "search.json",
    "central/",
    "synthetic/",
    "checkpoints/model.safetensors",
)


def prepare(run: Run) -> Prepared:
    """Private images in any supported layout -> canonical shards (sensitive)."""
    if not run.done("prepare"):
        _await_nodes(run)
        source = open_source(run.config.data)
        remove(run.prepared)
        try:
            stats = datasets.prepare_shards(source, run.config.data, str(run.prepared))
            # Writes `meta.json`, without which nobody takes the folder for a prepared set.
            finish_prepared(str(run.prepared), source, run.config.data, stats)
        except BaseException:
            remove(run.prepared)
            raise
        run.bind()
        run.mark_done("prepare")
    prepared = open_prepared(run.prepared)
    facts = prepared.manifest
    rejected = f", {facts.num_rejected} rejected (prepared/rejected.jsonl)" if facts.num_rejected else ""
    shape = f"{facts.image_size}x{facts.image_size}x{facts.channels}"
    counts = f"{facts.num_train} training + {facts.num_test} test images"
    say("prepare", f"{counts}, {shape}, {len(facts.class_names)} classes{rejected}")
    return prepared


def _await_nodes(run: Run) -> None:
    """Before work is given to nodes: there is room for the workers, and all that came see the same run."""
    await_workers(run.config.scaling)
    if isinstance(run.root, Path) and len(alive()) > 1:
        check_shared(run.root)


def calibrate(run: Run, prepared: Prepared) -> PrivacyPlan:
    """Solves every noise multiplier for the target and opens the budget; spends nothing."""
    plan, content = _read_or_make_plan(run, prepared)
    show_plan(plan, {release["name"]: release["epsilon_alone"] for release in content["releases"]})
    return plan


def _read_or_make_plan(run: Run, prepared: Prepared) -> tuple[PrivacyPlan, dict[str, Any]]:
    path, facts = run.root / "plan.json", prepared.manifest
    if run.ledger.budget() is None or not path.exists():
        made = run.shared_plan(make_plan(run.config, facts.num_listed_train, facts.class_names))
        write_bytes(path, json.dumps(made.to_json(), indent=2).encode())
    content = read_json(path)
    plan = read_plan(content)
    public = (plan.num_records, plan.class_names, plan.not_private)
    if public != (facts.num_listed_train, facts.class_names, run.config.privacy.test_mode):
        raise InputError(f"{path}: expected the plan of this data and configuration; it was altered, remove it")
    run.open_budget(plan.budget)
    return plan, content


def release_central_images(run: Run, prepared: Prepared, plan: PrivacyPlan) -> None:
    """The easy stage: one pass over the data, noise once, central images (event 1)."""
    if not run.config.central.enabled:
        return
    if not run.done("central"):
        _await_nodes(run)
        facts, event = prepared.manifest, plan.release("central").event
        classes = len(facts.class_names)
        query = CentralQuery(run.config.central, event, facts.image_size, facts.channels, classes, plan.num_records)
        domain = run.domain(event.to_json(), facts.digest, machine())
        run.ledger.spend("central", event, domain, 0, event.count)
        sums = datasets.central_sums(run, prepared, query, domain)
        noise_key = derive_key(run.secret(), "central/noise", domain)
        released = query.release(sums, noise_key)
        _write_central(run, query.decode(released), facts.class_names)
        write_bytes(run.central / "event.json", json.dumps({**event.to_json(), **stamp(run.config)}, indent=2).encode())
        run.mark_done("central")
    num_rounds, kind = run.config.central.num_rounds, run.config.central.query
    say("central", f"{num_rounds} noisy {kind} images a class released (central/grid.png)")


def _write_central(run: Run, images: np.ndarray, class_names: tuple[str, ...]) -> None:
    """images: uint8 [rounds, groups, H, W, C]."""
    num_rounds, num_groups = images.shape[:2]
    labels = np.arange(num_groups) if run.config.central.class_conditional else np.full(num_groups, -1)
    run.central.mkdir(exist_ok=True, mode=0o700)
    flat = images.reshape(-1, *images.shape[2:])
    rounds = np.repeat(np.arange(num_rounds), num_groups)
    target, notes = run.central / "images.parquet", stamp(run.config)
    write_hf_parquet(target, flat, np.tile(labels, num_rounds), class_names, {"round": rounds}, notes)
    _write_grid(run, "central/grid", run.central / "grid.png", flat, num_groups)


def _write_grid(run: Run, metric: str, path: Place, images: np.ndarray, columns: int) -> None:
    picture = upscale(grid(images, columns), GRID_SIDE)
    write_png(path, picture, stamp(run.config))
    with MetricWriter(run.root, run.config.privacy.test_mode) as metrics:
        metrics.image(metric, picture, 0)


def train(run: Run, plan: PrivacyPlan) -> None:
    """Warm-up on the central images, then DP-SGD (event 2); on Ray Train workers."""
    if not run.done("train"):
        schedule = [tuple(point) for point in json.loads((run.root / "plan.json").read_text())["epsilon_schedule"]]
        _await_nodes(run)
        start = time.monotonic()
        # Here, not at a worker's first charge: what an older driver left running is refused from now on.
        run.ledger.take_over()
        with training_status(run.root / PROGRESS_FILE, run.config, schedule, plan.target_epsilon):
            train_on_workers(run, plan.release("finetune"))
        say("train", f"warm-up and {run.config.finetune.num_steps} DP-SGD steps in {time.monotonic() - start:.0f} s")
        run.mark_done("train")
    spent = epsilon(run.ledger.charged(), plan.delta).epsilon
    say("ledger", f"epsilon {spent:.4f} of {plan.target_epsilon:g} spent at delta {plan.delta:g}, all stages together")


def sample(run: Run) -> None:
    """Synthetic images from the released weights."""
    expect(run.weights.exists(), "run.name", run.root.name, "a trained run", "run the train job first")
    facts = open_prepared(run.prepared).manifest
    labels = image_labels(run.config.sampling, len(facts.class_names))
    if not run.done("sample"):
        _await_nodes(run)
        forget_images_of_other_weights(run)
        datasets.synthesize(run, num_shards(run.config.sampling))
        columns = len(facts.class_names)
        images, shown = read_hf_parquet([shard_path(run.synthetic, 0)])
        by_class = [np.flatnonzero(shown == label)[:8] for label in range(columns)]
        rows = min(len(places) for places in by_class)
        picked = np.stack([places[:rows] for places in by_class], axis=1).reshape(-1)
        _write_grid(run, "synthetic/grid", run.synthetic / "grid.png", images[picked], columns)
        run.mark_done("sample")
    say("sample", f"{len(labels)} synthetic images (synthetic/grid.png)")


def forget_images_of_other_weights(run: Run) -> None:
    """Keeps images that a stopped call left only if they came from these very weights."""
    path, weights = run.synthetic / "weights.sha256", hashlib.sha256(run.weights.read_bytes()).hexdigest()
    if not path.exists() or path.read_text() != weights:
        remove(run.synthetic)
        run.synthetic.mkdir(mode=0o700)
        write_bytes(path, weights.encode())


def evaluate(run: Run) -> None:
    """Train on synthetic, test on real: sensitive, for the data's owner only."""
    if not run.config.evaluation.enabled:
        return
    if not run.evaluation.exists():
        result = ray.get(ray.remote(_evaluate).remote(run))
        with MetricWriter(run.root, run.config.privacy.test_mode) as metrics:
            for name, value in result["downstream"].items():
                metrics.scalar(f"evaluation/{name}", value["accuracy"], 0)
            metrics.scalar("evaluation/frechet", result["frechet"]["distance"], 0)
        write_bytes(run.evaluation, json.dumps(result, indent=2).encode())
    result = json.loads(run.evaluation.read_text())
    accuracies = ", ".join(f"{name} {value['accuracy']:.3f}" for name, value in result["downstream"].items())
    say("evaluate", f"accuracy on {result['num_real_test']} real test images: {accuracies} (sensitive)")


def _evaluate(run: Run) -> dict[str, Any]:
    """In the memory of the synthetic set, twice, and of `evaluation.max_feature_records` real images."""
    config, prepared = run.config, open_prepared(run.prepared)
    facts = prepared.manifest
    expect(facts.num_test >= 2, "real_test", f"{facts.num_test} images", "at least 2", "evaluate a larger set")
    return measure(
        read_hf_parquet(sorted(run.synthetic.glob("part-*.parquet"))),
        _first_images(prepared, config.evaluation.max_feature_records),
        ((block.images, block.labels) for block in iter_batches(prepared.paths("test"), EVALUATED_AT_ONCE)),
        config.evaluation,
        config.seed,
        facts.class_names,
    )


def _first_images(prepared: Prepared, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first training images, at most `count`, and their labels; files behind them are not opened."""
    blocks, read = [], 0
    for block in iter_batches(prepared.paths("train"), EVALUATED_AT_ONCE):
        blocks.append(block)
        read += len(block)
        if read >= count:
            break
    images, labels = ([getattr(block, name) for block in blocks] for name in ("images", "labels"))
    return np.concatenate(images)[:count], np.concatenate(labels)[:count]


def publish(run: Run) -> Place:
    """`release/`: the only folder to publish, and the report for its owner.

    Raises:
      BudgetError: if the ledger charged anything else than the plan says: then the plan's epsilon is not the release's.
    """
    if not run.done("sample"):
        raise InputError(f"run.name={run.root.name}: expected synthetic images; run the sample job first")
    plan, _ = _read_or_make_plan(run, open_prepared(run.prepared))
    if set(run.ledger.charged()) != set(plan.releases):
        raise BudgetError(f"{run.ledger.location}: expected charges of {plan.releases}, found {run.ledger.charged()}")
    with _on_this_machine(run) as folder:
        build_release(folder, run.ledger.head())
        write_report(folder)
    say("publish", f"to publish: {run.release}")
    say("", f"for you alone: {run.root / 'report.html'}")
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
        made = [name for name, _ in list_files(folder) if name.startswith(("release/", "report.html"))]
        copy_files(folder, run.root, made)
        for name in names:
            if name.startswith("release/") and name not in made:
                remove(run.root / name)
    finally:
        remove(folder)
