"""One trial of a search on Ray: central images, training, synthetic images, score; and how the best becomes the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from e2h.curriculum.machine import machine
from e2h.curriculum.notes import describe
from e2h.curriculum.run import Run, open_run
from e2h.curriculum.search import (
    RUNGS,
    Trial,
    read_score,
    score_kind,
    score_path,
    shared_stages,
    store,
    with_values,
    write_score,
)
from e2h.curriculum.synthesis import num_shards
from e2h.curriculum.train import easy_images
from e2h.data.exports import read_hf_parquet
from e2h.data.filesystem import copy_files, list_files, remove, write_bytes
from e2h.data.remote import Place
from e2h.data.storage import open_prepared
from e2h.distributed import datasets
from e2h.distributed.easy import release_easy_stage
from e2h.distributed.nodes import on_any_node
from e2h.distributed.stages import settle_weights
from e2h.distributed.training import train_on_workers
from e2h.evaluation.downstream import fit
from e2h.privacy.keys import derive_key
from e2h.privacy.scores import Score, central_distance, noisy_accuracy, score_name, stand_in_accuracy
from e2h.reporting.facts import read_json, share_key

RESULT = "search.json"
MODEL = ("checkpoints/model.safetensors", "checkpoints/average")  # what a trial's training released


def common(search: Run) -> Place:
    """Whose prepared set the trials train on: the search's own, or its public stand-in's."""
    return search.root / "stand-in" if search.config.search.privacy == "proxy" else search.root


def run_trial(search: Run, trial: Trial, report: Callable[[float, float], None]) -> None:
    """Runs a trial, or what is left of it; a score that was taken before is reported again.

    Args:
      report: called as report(share of the DP-SGD steps, score).
    """
    for share in RUNGS[search.config.search.scheduler]:
        path = score_path(store(search.root) / trial.name, share)
        score = read_score(path)
        if score is None:
            with open_run(trial.config, common(search)) as run:
                score = _score_after(search, run, trial, share)
                write_score(path, score)
        report(share, score.value)


def _score_after(search: Run, run: Run, trial: Trial, share: float) -> Score:
    run.bind()
    run.open_budget(trial.plan.budget)
    run.ledger.take_over()
    shared = [] if search.config.search.privacy == "proxy" else shared_stages(search.config)
    for stage in run.config.curriculum:
        if stage in shared:
            _take(search.root, run.root, f"{stage}/")
        else:
            release_easy_stage(run, open_prepared(run.prepared), trial.plan, stage)
    release = trial.plan.release("finetune")
    train_on_workers(run, release, max(1, round(share * release.event.count)))
    settle_weights(run)
    datasets.synthesize(run, num_shards(run.config.sampling))
    return on_any_node(partial(_score, search, run, trial, share))


def _score(search: Run, run: Run, trial: Trial, share: float) -> Score:
    kind, prepared = score_kind(search.config.search), open_prepared(run.prepared)
    synthetic = read_hf_parquet(sorted(run.synthetic.glob("part-*.parquet")))
    if kind == "central":
        return central_distance(synthetic, easy_images(run, "central"))
    classes = len(prepared.manifest.class_names)
    predict = fit("logistic_regression", *synthetic, classes, run.config.evaluation.cnn_epochs, run.config.seed)
    if kind == "test":
        return stand_in_accuracy(predict, prepared.blocks("test"))
    release = trial.plan.release(score_name(share))
    images, labels = synthetic
    made = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    # Of other images it would be another query: the ledger refuses to pay a second time.
    domain = run.domain(release.name, release.event.to_json(), prepared.manifest.digest, f"{machine()} {made}")
    run.ledger.spend(release.name, release.event, domain, 0, 1)
    key = derive_key(run.secret(), "score/noise", domain)
    return noisy_accuracy(predict, prepared.blocks("train"), trial.plan.num_records, release, key)


def values_and_scores(search: Run, trial: Trial) -> dict[str, Any]:
    """What may be said of a trial that all are charged for, or that read public images."""
    shares = RUNGS[search.config.search.scheduler]
    scores = {share_key(share): read_score(score_path(store(search.root) / trial.name, share)) for share in shares}
    return {"values": trial.values, "scores": {share: one.value for share, one in scores.items() if one}}


def adopt(search: Run, trial: Trial, score: Score, told: dict[str, Any]) -> Run:
    """Makes the best trial the run: its files are copied, and `search.json` says that all of them are there.

    Args:
      told: what else may be said of the search.
    """
    run = replace(search, config=with_values(search.config, trial.values))
    source = store(search.root) / trial.name
    if not (source / "checkpoints" / "model.safetensors").exists():
        raise RuntimeError(f"{trial.name}: expected the weights of the best trial")
    for name in (*(f"{stage}/" for stage in run.config.curriculum), *MODEL):
        _take(source, run.root, name)
    _take_rows(source, run)
    for stage in ("train", *run.config.curriculum):
        run.mark_done(stage)
    result = {"values": trial.values, "score": score.to_json(), **told}
    write_bytes(run.root / RESULT, json.dumps(result, indent=2).encode())
    return run


def adopt_settings(search: Run, trial: Trial, score: Score, told: dict[str, Any]) -> Run:
    """Makes the best trial's settings the run's: those alone are taken from it."""
    run = replace(search, config=with_values(search.config, trial.values))
    if search.config.search.proxy.source == "central":
        run.mark_done("central")  # released, and paid for, before the search; no searched setting changes them
    result = {"values": trial.values, "score": score.to_json(), **told}
    write_bytes(run.root / RESULT, json.dumps(result, indent=2).encode())
    return run


def adopted(search: Run) -> Run | None:
    """The run that a finished search has become; None before."""
    if not (search.root / RESULT).exists():
        return None
    values = read_json(search.root / RESULT)["values"]
    run = replace(search, config=with_values(search.config, values))
    describe(run.root, run.config)
    if search.config.search.privacy == "selection":
        remove(store(search.root))  # the others never leave; how many there were is a secret
    return run


def _take(source: Place, target: Place, prefix: str) -> None:
    names = [name for name, _ in list_files(source) if name.startswith(prefix) and not name.endswith("_SUCCESS.json")]
    copy_files(source, target, names)


def _take_rows(source: Place, run: Run) -> None:
    """Of a trial's metrics those that may be released."""
    path = source / "metrics.jsonl"
    rows = path.read_bytes().splitlines() if path.exists() else []
    kept = [row for row in rows if _releasable(row)]
    before = run.root / "metrics.jsonl"
    shared = [row for row in (before.read_bytes().splitlines() if before.exists() else []) if row not in kept]
    write_bytes(before, b"".join(row + b"\n" for row in [*shared, *kept]))


def _releasable(row: bytes) -> bool:
    with suppress(ValueError, KeyError, TypeError):  # torn on a full disk
        return bool(json.loads(row)["class"] == "releasable")
    return False
