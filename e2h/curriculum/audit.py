"""The audit of a configuration: its mechanisms on canaries and random records, four tiers, one verdict.

It audits the code path with the configured network, clip norms and settings, not the data and not a run. The claim is
the audit's own: each mechanism gets the noise that the accountant asks for at epsilon 1 (see `Subject`).
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from e2h.config import expect
from e2h.curriculum import audit_central, audit_frequency, audit_gradient
from e2h.curriculum.canaries import Subject, canary_network
from e2h.curriculum.workers import Workers
from e2h.privacy.accounting import calibrate
from e2h.privacy.audit import Evidence, Tier, judge
from e2h.privacy.events import PoissonSampledGaussian, Release

QUERIES = {"central": (audit_central, "central query"), "frequency": (audit_frequency, "query of mean embeddings")}
TIERS = ("noise", "coupled", "sampler", "one_run")
CONFIDENCE = 0.95
NUM_WORKERS = 2  # faults of a group don't show in one process
TIMEOUT = timedelta(minutes=10)

Mechanisms = dict[str, dict[str, Tier]]


def audit(subject: Subject, secret: bytes, progress: Callable[[str], None]) -> Mechanisms:
    """All tiers, by mechanism: `gradient`, and the easy stages that are on.

    Args:
      secret: 32 fresh random bytes.
      progress: called with a line of text before each longer part.

    Raises:
      InputError: if the configured network can't be built or audited.
    """
    size, easy_stages, found = subject.config.data.image_size, subject.config.curriculum, {}
    expect(size >= 2, "data.image_size", size, "at least 2: canaries are marked by three pixels")
    confidence = 1 - (1 - CONFIDENCE) / (1 + len(easy_stages))  # of all together
    progress(f"DP-SGD on {NUM_WORKERS} workers")
    release = calibrated(subject, "finetune", audit_gradient.event_to_audit(subject))
    canary_network(subject)  # refused here where it can't be built, in one line
    found["gradient"] = judge(in_a_group(subject, release, secret), release, subject.delta, confidence)
    for stage in easy_stages:
        query, name = QUERIES[stage]
        progress(name)
        release = calibrated(subject, stage, query.event_to_audit(subject))
        found[stage] = judge(query.observe(subject, release, secret), release, subject.delta, confidence)
    return found


def calibrated(subject: Subject, name: str, event: PoissonSampledGaussian) -> Release:
    return calibrate([], name, event, subject.epsilon, subject.delta)


def in_a_group(subject: Subject, release: Release, secret: bytes) -> Evidence:
    """`audit_gradient.observe` on `NUM_WORKERS` processes with gloo between them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(subject, release, secret, folder), nprocs=NUM_WORKERS)
        # Written by our own process a moment ago, in a folder that only its owner can open.
        return pickle.loads((Path(folder) / "evidence").read_bytes())


def _worker(rank: int, subject: Subject, release: Release, secret: bytes, folder: str) -> None:
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, world_size=NUM_WORKERS, rank=rank, timeout=TIMEOUT)
    try:
        seen = audit_gradient.observe(subject, release, secret, Workers.current())
    finally:
        dist.destroy_process_group()
    if rank == 0:
        (Path(folder) / "evidence").write_bytes(pickle.dumps(seen))


def report(mechanisms: Mechanisms) -> dict[str, Any]:
    """`audit.json`: the one-run bound of Steinke et al., the larger one over the mechanisms, and all tiers."""
    one_run = [tiers["one_run"].figures for tiers in mechanisms.values()]
    return {
        "epsilon_claimed": max(figures["epsilon_claimed"] for figures in one_run),
        "epsilon_lower_bound": max(figures["epsilon_lower_bound"] for figures in one_run),
        "confidence": CONFIDENCE,
        "tiers": {name: _tier_json(mechanisms, name) for name in TIERS},
        "ceiling": max(figures["ceiling"] for figures in one_run),
    }


def passed(mechanisms: Mechanisms) -> bool:
    return all(tier.passed for tiers in mechanisms.values() for tier in tiers.values())


def summary(mechanisms: Mechanisms) -> list[tuple[str, str]]:
    """(tier, one line) for each tier, and what is wrong."""
    lines = []
    for name in TIERS:
        parts = {mechanism: tiers[name] for mechanism, tiers in mechanisms.items()}
        verdict = "pass" if all(part.passed for part in parts.values()) else "FAIL"
        words = "; ".join(f"{mechanism}: {_WORDS[name](part.figures)}" for mechanism, part in parts.items())
        lines.append((name, f"{verdict}  {words}"))
        lines += [("", f"      {mechanism}: {fault}") for mechanism, part in parts.items() for fault in part.faults]
    return lines


_WORDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "noise": lambda seen: f"{seen['standard_deviation']:.4f} of the accounted noise in {seen['num_values']} values",
    "coupled": lambda seen: f"one record moves at most {max(seen.values()):.4f} sensitivities",
    "sampler": lambda seen: f"rate {seen['rate']:.5f}, accounted {seen['accounted_rate']:.5f}",
    "one_run": lambda seen: (
        f"epsilon >= {seen['epsilon_lower_bound']:.2f} (Gaussian {seen['epsilon_lower_bound_gaussian']:.2f}), "
        f"claimed {seen['epsilon_claimed']:.2f}, ceiling {seen['ceiling']:.2f} ({seen['ceiling_gaussian']:.2f})"
    ),
}


def _tier_json(mechanisms: Mechanisms, name: str) -> dict[str, Any]:
    parts = {mechanism: tiers[name] for mechanism, tiers in mechanisms.items()}
    return {
        "passed": all(part.passed for part in parts.values()),
        "false_alarm_rate": sum(part.false_alarm_rate for part in parts.values()),
        **{mechanism: part.to_json() for mechanism, part in parts.items()},
    }
