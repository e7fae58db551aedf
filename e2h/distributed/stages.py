"""Every stage of a run: skips what is done, does its work on Ray, and leaves `_SUCCESS.json`.

`jobs/pipeline.py` calls them in this order; each of the other jobs calls one.
"""

from __future__ import annotations

import json
import time
from functools import partial

from e2h import results
from e2h.config import expect
from e2h.curriculum import stages
from e2h.curriculum.labels import image_labels
from e2h.curriculum.run import Run
from e2h.curriculum.stages import forget_images_of_other_weights, read_or_make_plan
from e2h.curriculum.synthesis import choose_average, num_shards, synthesized, write_synthetic_grid
from e2h.data.remote import Place
from e2h.data.storage import Prepared, open_prepared
from e2h.distributed import datasets
from e2h.distributed.capacity import await_nodes
from e2h.distributed.console import say, show_plan, training_status, working
from e2h.distributed.nodes import on_any_node
from e2h.distributed.progress import PROGRESS_FILE
from e2h.distributed.training import train_on_workers
from e2h.privacy.accounting import epsilon
from e2h.privacy.plan import PrivacyPlan, read_plan
from e2h.privacy.rounding import delta_in_words, rounded_up


def prepare(run: Run) -> Prepared:
    """Private images in any supported layout -> canonical shards (sensitive)."""
    with working("prepare") as tell:
        if not run.done("prepare"):
            await_nodes(run.config.scaling, run.root)
        prepared = stages.prepare(run, partial(datasets.prepare_shards, tell=tell))
    facts = prepared.manifest
    rejected = (
        f", {facts.num_rejected} rejected, but counted in N (prepared/rejected.jsonl)" if facts.num_rejected else ""
    )
    shape = f"{facts.image_size}x{facts.image_size}x{facts.channels}"
    counts = f"{facts.num_train} training + {facts.num_test} test images"
    say("prepare", f"{counts}, {shape}, {len(facts.class_names)} class{'es' * (len(facts.class_names) > 1)}{rejected}")
    return prepared


def calibrate(run: Run, prepared: Prepared) -> PrivacyPlan:
    """Solves every noise multiplier for the target and opens the budget; spends nothing."""
    with working("plan"):
        content = read_or_make_plan(run, prepared)
        plan = read_plan(content)
        run.open_budget(plan.budget)
    show_plan(plan, [release["epsilon_alone"] for release in content["releases"]], run.config)
    return plan


def train(run: Run, plan: PrivacyPlan) -> None:
    """Warm-up on the images of the easy stages (free), then DP-SGD, the last event; on Ray Train workers."""
    if not run.done("train"):
        schedule = [tuple(point) for point in json.loads((run.root / "plan.json").read_text())["epsilon_schedule"]]
        await_nodes(run.config.scaling, run.root)
        start = time.monotonic()
        # Here, not at a worker's first charge: what an older driver left running is refused from now on.
        run.ledger.take_over()
        with training_status(run.root / PROGRESS_FILE, run.config, schedule, plan.target_epsilon):
            train_on_workers(run, plan.release("finetune"))
        seconds = time.monotonic() - start
        say("train", f"warm-up and {run.config.finetune.num_steps} DP-SGD steps done, this call {seconds:.0f} s")
        run.mark_done("train")
    spent = epsilon(run.ledger.charged(), plan.delta).epsilon
    cost = f"epsilon {rounded_up(spent):.4f} of {plan.target_epsilon:g}"
    say("ledger", f"{cost} spent at delta {delta_in_words(plan.delta)}, all stages together")


def sample(run: Run) -> None:
    """Synthetic images from the released weights."""
    expect(run.weights.exists(), "run.name", run.root.name, "a trained run", "run the train job first")
    facts = open_prepared(run.prepared).manifest
    labels = image_labels(run.config.sampling, len(facts.class_names))
    if not synthesized(run):
        with working("sample") as tell:
            await_nodes(run.config.scaling, run.root)
            settle_weights(run)
            datasets.synthesize(run, num_shards(run.config.sampling), tell)
            write_synthetic_grid(run, len(facts.class_names))
            run.mark_done("sample")
            results.show_grid(run, "synthetic")
    say("sample", f"{len(labels)} synthetic images (synthetic/grid.png)")


def settle_weights(run: Run) -> None:
    """Chooses the average to sample from, and forgets images that a stopped call made from other weights."""
    if run.config.sampling.ema_widths:
        on_any_node(partial(choose_average, run))
    forget_images_of_other_weights(run)


def evaluate(run: Run) -> None:
    """Train on synthetic, test on real: sensitive, for the data's owner only."""
    if not run.config.evaluation.enabled:
        return
    with working("evaluate", "training classifiers"):
        result = results.evaluate(run, on_any_node)
    accuracies = ", ".join(f"{name} {value['accuracy']:.3f}" for name, value in result["downstream"].items())
    found = f"accuracy on {result['num_real_test']} real test images: {accuracies}" if accuracies else "no classifier"
    say("evaluate", f"{found} (sensitive)")


def publish(run: Run) -> Place:
    """`release/`: the only folder to publish, and the report for its owner (`e2h.results.publish`)."""
    with working("publish"):
        release = results.publish(run)
    say("publish", f"to publish: {release}")
    say("", f"before that: python -m e2h check {release}; choose a licence in its README.md")
    say("", f"for you alone: {run.root / 'report.html'}; curves: tensorboard --logdir {run.root}/tb")
    return release
