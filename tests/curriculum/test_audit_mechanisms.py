"""The audit passes the real mechanisms, and finds every planted fault in the tier that is there for it.

The secret is fixed, so every run is the same. With another one, correct code fails the one-run tier one time in forty
at most (in fact far more rarely), and the others one time in a million.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import small_runs
from audit_faults import CENTRAL_FAULTS, FREQUENCY_FAULTS, GRADIENT_FAULTS
from small_runs import MODEL

from e2h.config import CentralConfig, Config, FinetuneConfig, FrequencyConfig, PrivacyConfig
from e2h.curriculum import audit_central, audit_frequency, audit_gradient
from e2h.curriculum.audit import TIERS, calibrated, passed, report, summary
from e2h.curriculum.canaries import Subject
from e2h.curriculum.workers import Workers
from e2h.privacy.audit import Evidence, Tier, judge
from e2h.privacy.events import Release

SECRET = bytes(range(32))
SETTINGS = FinetuneConfig(noise_multiplicity=2)
SUBJECT = Subject(Config(model=MODEL, finetune=SETTINGS), num_canaries=600, num_steps=16)
RELEASE = calibrated(SUBJECT, "finetune", audit_gradient.event_to_audit(SUBJECT))


def judged(seen: Evidence, release: Release = RELEASE) -> dict[str, Tier]:
    return judge(seen, release, SUBJECT.delta, 0.975)


def faults_of(tiers: dict[str, Tier]) -> list[str]:
    return [fault for tier in tiers.values() for fault in tier.faults]


def cases(faults: dict) -> list:
    return [pytest.param(tier, fault, id=f"{fault.__name__}-{tier}") for tier in faults for fault in faults[tier]]


def observed(workers: Workers, folder: Path) -> dict[str, Evidence]:
    """What the auditor sees of each fault."""
    seen = {"correct": audit_gradient.observe(SUBJECT, RELEASE, SECRET, workers)}
    for fault in dict.fromkeys(fault for faults in GRADIENT_FAULTS.values() for fault in faults):
        with pytest.MonkeyPatch.context() as patch:
            fault(patch)
            seen[fault.__name__] = audit_gradient.observe(SUBJECT, RELEASE, SECRET, workers)
    return seen


@pytest.fixture(scope="module")
def group(tmp_path_factory) -> dict[str, dict[str, Tier]]:
    """Verdicts on a group of two real processes, by fault."""
    seen = small_runs.spawn(2, observed, tmp_path_factory.mktemp("group"))[0]
    return {name: judged(evidence) for name, evidence in seen.items()}


@pytest.mark.slow
def test_dp_sgd_on_two_workers_passes(group):
    tiers = group["correct"]
    assert faults_of(tiers) == []
    assert tiers["coupled"].figures["canary"] == pytest.approx(1 - 2**-10, abs=1e-5)
    figures = tiers["one_run"].figures
    assert figures["epsilon_lower_bound"] <= figures["epsilon_claimed"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("tier", "fault"), cases(GRADIENT_FAULTS))
def test_a_fault_of_dp_sgd_is_found_by_its_tier(group, tier, fault):
    assert not group[fault.__name__][tier].passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "tier", "named"),
    [
        ("no_noise", "noise", "the noise has 0.0000 times"),
        ("noise_over_workers", "noise", "the noise has 0.5"),
        ("reused_noise", "noise", "two steps share noise"),
        ("no_noise_in_a_layer", "noise", "single coordinates"),
        ("noise_of_each_worker", "noise", "workers hold different releases"),
        ("no_clipping", "coupled", "one record (canary) moves a release by 8"),
        ("same_masks", "sampler", "records of two workers join together 9."),
        ("no_noise", "one_run", "claimed is"),
    ],
)
def test_a_fault_is_described(group, fault, tier, named):
    assert any(named in text for text in group[fault][tier].faults), group[fault][tier].faults


@pytest.mark.parametrize(
    "config",
    [
        replace(SUBJECT.config, finetune=replace(SETTINGS, engine="opacus")),
        replace(SUBJECT.config, finetune=replace(SETTINGS, engine="loop", max_grad_norm=0.02)),
        replace(SUBJECT.config, privacy=PrivacyConfig(noise_shares=3)),
        replace(SUBJECT.config, finetune=replace(SETTINGS, clipping="normalized", dtype="bfloat16")),
        replace(SUBJECT.config, finetune=replace(SETTINGS, clipping="global", norm_threshold=3.0)),
    ],
    ids=["opacus", "loop, another clip norm", "noise in shares", "normalized, bfloat16", "global"],
)
def test_other_settings_of_dp_sgd_pass(config):
    subject = replace(SUBJECT, config=config, num_canaries=200, num_steps=3)
    release = calibrated(subject, "finetune", audit_gradient.event_to_audit(subject))
    seen = audit_gradient.observe(subject, release, SECRET, Workers.current())
    assert faults_of(judged(seen, release)) == []
    assert max(seen.distances.values()) > 0.98


def central(**settings) -> tuple[Subject, Release]:
    config = Config(central=CentralConfig(**{"num_rounds": 20, "sampling_prob": 0.2, **settings}))
    subject = replace(SUBJECT, config=config, num_canaries=1000)
    return subject, calibrated(subject, "central", audit_central.event_to_audit(subject))


def judged_query(subject: Subject, release: Release) -> dict[str, Tier]:
    return judged(audit_central.observe(subject, release, SECRET), release)


QUERIES = {
    "default": {"num_rounds": 5, "sampling_prob": 0.5},
    "all records": {"num_rounds": 3, "sampling_prob": 1.0},
    "around grey, counted": {"centre": 0.5, "count_weight": 0.5},
    "around light grey": {"centre": 0.7, "max_norm": 1.0},
    "of all, half size": {"class_conditional": False, "pool_factor": 2},
    "mode": {"query": "mode"},
    "mode of all, fine": {"query": "mode", "num_bins": 256, "class_conditional": False, "pool_factor": 2},
}


@pytest.mark.parametrize("settings", QUERIES.values(), ids=QUERIES)
def test_the_central_query_passes(settings):
    tiers = judged_query(*central(**settings))
    assert faults_of(tiers) == []
    assert 0.99 < max(tiers["coupled"].figures.values()) <= 1


@pytest.mark.parametrize(("tier", "fault"), cases(CENTRAL_FAULTS))
def test_a_fault_of_the_central_query_is_found_by_its_tier(monkeypatch, tier, fault):
    fault(monkeypatch)
    assert not judged_query(*central())[tier].passed


def test_masks_that_blocks_share_are_described(monkeypatch):
    same_masks = CENTRAL_FAULTS["sampler"][0]
    same_masks(monkeypatch)
    found = " ".join(judged_query(*central())["sampler"].faults)
    assert "records of two workers join together" in found
    assert "other records entered than were drawn" in found


@pytest.mark.parametrize("settings", QUERIES.values(), ids=QUERIES)
def test_canaries_of_every_query_show_missing_noise(monkeypatch, settings):
    """Each canary's own coordinate tells whether it was drawn: nearly all guesses are right."""
    no_noise = CENTRAL_FAULTS["one_run"][0]
    subject, release = central(**settings)
    no_noise(monkeypatch)
    figures = judged_query(subject, release)["one_run"].figures
    assert figures["epsilon_lower_bound"] > 2 * figures["epsilon_claimed"]


def judged_embeddings(num_canaries: int = 400, **settings) -> dict[str, Tier]:
    config = Config(frequency=FrequencyConfig(**{"num_features": 200, **settings}))
    subject = replace(SUBJECT, config=config, num_canaries=num_canaries)
    release = calibrated(subject, "frequency", audit_frequency.event_to_audit(subject))
    return judged(audit_frequency.observe(subject, release, SECRET), release)


@pytest.mark.parametrize("settings", [{}, {"num_features": 2, "bandwidth": 1.0}], ids=["default", "one wave"])
def test_the_query_of_mean_embeddings_passes(settings):
    tiers = judged_embeddings(**settings)
    assert faults_of(tiers) == []
    assert 0.99 < max(tiers["coupled"].figures.values()) <= 1


@pytest.mark.parametrize(("tier", "fault"), cases(FREQUENCY_FAULTS))
def test_a_fault_of_the_query_of_mean_embeddings_is_found_by_its_tier(monkeypatch, tier, fault):
    fault(monkeypatch)
    assert not judged_embeddings()[tier].passed


def test_report_and_summary_name_the_failed_tier():
    good, bad = Tier((), {"x": 1.0}, 0.0), Tier(("something is wrong",), {"x": 2.0}, 1e-6)
    bounds = {
        "epsilon_claimed": 1.0,
        "epsilon_lower_bound": 0.3,
        "ceiling": 4.5,
        "epsilon_lower_bound_gaussian": 0.4,
        "ceiling_gaussian": 7.8,
    }
    noise = {"standard_deviation": 1.0, "num_values": 5}
    tiers = {
        "noise": Tier((), noise, 0.0),
        "coupled": good,
        "sampler": Tier((), {"rate": 0.1, "accounted_rate": 0.1}, 0.0),
        "one_run": Tier((), bounds, 0.0),
    }
    found = {"gradient": tiers, "central": {**tiers, "one_run": Tier((), {**bounds, "epsilon_lower_bound": 0.5}, 0.0)}}
    written = report(found)
    assert list(written) == ["epsilon_claimed", "epsilon_lower_bound", "confidence", "tiers", "ceiling"]
    assert written["epsilon_lower_bound"] == 0.5
    assert tuple(written["tiers"]) == TIERS
    assert all(tier["passed"] for tier in written["tiers"].values())
    assert passed(found)
    assert json.loads(json.dumps(written)) == written
    found["central"]["coupled"] = bad
    assert not passed(found)
    assert [tier["passed"] for tier in report(found)["tiers"].values()] == [True, False, True, True]
    lines = dict(summary(found))
    assert lines["coupled"].startswith("FAIL")
    assert lines["noise"].startswith("pass")
    assert "central: something is wrong" in lines[""]
