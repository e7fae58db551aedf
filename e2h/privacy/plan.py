"""The one place that couples the privacy modules: from public settings to every release, its cost, and words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import e2h
from e2h.config import Config, SearchConfig, describe_record, expect
from e2h.errors import BudgetError
from e2h.privacy.accounting import (
    COARSE_GRID,
    FINE_GRID,
    NEIGHBOURING_RELATION,
    Bound,
    calibrate,
    epsilon,
    epsilon_curve,
    epsilon_pld,
)
from e2h.privacy.dataset_ledger import SharedBudget
from e2h.privacy.events import Charge, PoissonSampledGaussian, Release, charge, event_from_json
from e2h.privacy.ledger import Budget
from e2h.privacy.rounding import delta_in_words, epsilon_in_words

REPORTED_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


@dataclass(frozen=True)
class PrivacyPlan:
    """Every release of a run before anything is spent. All of it is public."""

    target_epsilon: float
    delta: float
    num_records: int
    class_names: tuple[str, ...]
    releases: tuple[Charge, ...]
    bound: Bound
    not_private: bool
    shared: SharedBudget | None = None  # with ledger.scope=dataset
    tuning: dict[str, Any] | None = None  # how settings were chosen, where a search chose them

    def release(self, name: str) -> Release:
        return next(one for one in self.releases if one.name == name and isinstance(one, Release))

    @property
    def budget(self) -> Budget:
        return Budget(self.target_epsilon, self.delta, NEIGHBOURING_RELATION.name, self.releases)

    @property
    def warnings(self) -> list[str]:
        found = []
        if self.delta >= 1 / self.num_records:
            found.append(
                f"privacy.delta={self.delta:g} is not below 1/N = 1/{self.num_records} = {1 / self.num_records:.3g}: a "
                "mechanism that publishes one record at random would satisfy such a delta; choose a smaller one"
            )
        if self.not_private:
            found.append("NOT PRIVATE: privacy.test_mode=true uses a published secret; anyone can subtract the noise")
        return found

    def epsilon_after(self, num_steps: int) -> float:
        """Epsilon spent once `num_steps` DP-SGD steps have been charged."""
        *before, last = self.releases
        return epsilon_pld([*before, charge(last.name, replace(last.event, count=num_steps))], self.delta, COARSE_GRID)

    def epsilon_schedule(self, points: int = 8) -> list[tuple[int, float]]:
        """(steps charged, epsilon) at evenly spaced steps of the last release, for the status line."""
        if self.tuning is not None and self.tuning["mode"] != "proxy":
            return []  # a search is charged whole, before its first step
        total = self.releases[-1].event.count
        steps = sorted({max(1, round(total * i / points)) for i in range(1, points)})
        return [*((step, self.epsilon_after(step)) for step in steps), (total, self.bound.epsilon)]

    def statement(self) -> list[str]:
        """The guarantee in sentences that a data-protection officer can quote."""
        return [
            f"Everything in this release is ({epsilon_in_words(self.bound.epsilon)}, {delta_in_words(self.delta)})-"
            "differentially private.",
            f"Unit of protection: one record ({describe_record(self.class_names)}). Neighbouring data sets: one "
            "record's contribution is replaced by nothing (add-or-remove-one in its zero-out form).",
            f"Public, and not protected: the number of training records N = {self.num_records}, the list of "
            f"{len(self.class_names)} class{'es' * (len(self.class_names) != 1)}, the image size, and every setting in "
            "config.yaml.",
            *(_describe(release) for release in self.releases),
            *([self._shared_statement(self.shared)] if self.shared else []),
            "All that is published (images, weights, card, release report) is computed from these releases alone.",
            "Adversary: sees everything published and knows every other record; does not know the run's secret.",
            "Not covered: how the private set was collected and pre-processed, several records of one person, the "
            "confidentiality of the machines that computed it, and evaluation on real data, which is not published.",
        ]

    def _shared_statement(self, shared: SharedBudget) -> str:
        return (
            f"All runs that are charged to the budget of data set {shared.name}, later ones included, are together "
            f"({epsilon_in_words(shared.epsilon)}, {delta_in_words(self.delta)})-differentially private; when this one "
            f"was planned, {shared.num_runs} of them, itself included, held epsilon "
            f"{epsilon_in_words(shared.epsilon_held)}."
        )

    def to_json(self) -> dict[str, Any]:
        """plan.json of the run directory."""
        # From 1/N on a delta promises nothing.
        deltas = sorted({*(one for one in REPORTED_DELTAS if one < 1 / self.num_records), self.delta}, reverse=True)
        return {
            "releases": [_release_json(release, self.delta) for release in self.releases],
            "epsilon": self.bound.epsilon,
            "delta": self.delta,
            "target_epsilon": self.target_epsilon,
            "num_records": self.num_records,
            "epsilon_rdp": self.bound.epsilon_rdp,
            "accountant": "pld",
            "accountant_version": f"dp-accounting {version('dp-accounting')}",
            "neighbouring_relation": NEIGHBOURING_RELATION.name,
            "epsilon_at_delta": [list(p) for p in zip(deltas, epsilon_curve(self.releases, deltas), strict=True)],
            "epsilon_schedule": [list(point) for point in self.epsilon_schedule()],
            "n_is_public": True,
            "public": {"num_records": self.num_records, "class_names": list(self.class_names)},
            "statement": self.statement(),
            "warnings": self.warnings,
            "not_private": self.not_private,
            "tuning": self.tuning,
            **({"shared": asdict(self.shared)} if self.shared else {}),
        }


def read_plan(value: dict[str, Any]) -> PrivacyPlan:
    """The plan that `PrivacyPlan.to_json` wrote."""
    releases = tuple(charge(r["name"], event_from_json(r["event"])) for r in value["releases"])
    bound = Bound(value["epsilon"], value["epsilon_rdp"])
    names = tuple(value["public"]["class_names"])
    shared = SharedBudget(**value["shared"]) if "shared" in value else None
    target, delta, num_records = value["target_epsilon"], value["delta"], value["num_records"]
    not_private, tuning = value["not_private"], value["tuning"]
    return PrivacyPlan(target, delta, num_records, names, releases, bound, not_private, shared, tuning)


def _release_json(release: Charge, delta: float) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if isinstance(release, Release):
        event = release.event
        facts = {"sampling_prob": event.sampling_prob, "num_steps": event.count}
        facts["noise_multiplier"] = event.noise_multiplier
    alone = epsilon_pld([release], delta)
    return {"name": release.name, **facts, "epsilon_alone": alone, "event": release.event.to_json()}


def _describe(release: Charge) -> str:
    if not isinstance(release, Release):
        law, kinds = release.event.law, len(release.event.candidates)
        return (
            f"Search: the best of a random number of trials is released, {law.expected_trials:g} on average and at "
            f"most {law.max_trials}; each is charged as the worst of {kinds} kinds of trial. How many "
            "there were is secret, and nothing else of them is released."
        )
    event = release.event
    titles = {"central": "Central images", "frequency": "Mean embeddings", "finetune": "DP-SGD"}
    what = titles.get(release.name, release.name.capitalize())
    times = "1 round" if event.count == 1 else f"{event.count} rounds"
    return (
        f"{what}: {times} of the Poisson-sampled Gaussian mechanism, sampling probability {event.sampling_prob:.6g}, "
        f"noise multiplier {event.noise_multiplier:.6g}."
    )


def make_plan(config: Config, num_records: int, class_names: Sequence[str]) -> PrivacyPlan:
    """Solves every noise multiplier so that all stages together meet (epsilon, delta).

    Args:
      config: validated settings.
      num_records: public N of the training split.
      class_names: public class list.

    Raises:
      InputError: if the expected batch is larger than N.
      BudgetError: if the easy stage alone exceeds the target.
    """
    check_batch(config, num_records)
    batch = config.finetune.expected_batch_size
    target, delta = config.privacy.epsilon, config.privacy.delta
    easy = [easy_release(config, stage) for stage in config.curriculum]
    step = PoissonSampledGaussian(batch / num_records, 1.0, config.finetune.num_steps)
    releases = (*easy, calibrate(easy, "finetune", step, target, delta))
    return plan_of(releases, config, num_records, class_names)


def plan_of(
    releases: Sequence[Charge],
    config: Config,
    num_records: int,
    class_names: Sequence[str],
    part: bool = False,
) -> PrivacyPlan:
    """The plan of given releases, and what they cost together at privacy.delta.

    Args:
      releases: DP-SGD last.
      config: validated settings.
      num_records: public N of the training split.
      class_names: public class list.
      part: whether it is one trial's, whose target is its own cost: the search's ledger holds privacy.epsilon.

    Raises:
      BudgetError: if they cost more than privacy.epsilon.
    """
    delta, bound = config.privacy.delta, epsilon(releases, config.privacy.delta)
    target = bound.epsilon if part else config.privacy.epsilon
    if bound.epsilon > target:
        raise BudgetError(f"privacy.epsilon={target:g}: the plan costs {bound.epsilon:.6g}")
    names, test_mode, chosen = tuple(class_names), config.privacy.test_mode, tuning(config.search)
    return PrivacyPlan(target, delta, num_records, names, tuple(releases), bound, test_mode, None, chosen)


def tuning(search: SearchConfig) -> dict[str, Any] | None:
    """How a search chooses the settings, and who pays for it; None without one."""
    if search.privacy is None:
        return None
    how = {
        "proxy": "by trials on public or synthetic images, which cost nothing",
        "selection": "the best of a secret random number of trials on the private images, charged as one release",
        "compose": "by trials on the private images, all of them charged",
    }
    return {"mode": search.privacy, "how": how[search.privacy], "expected_trials": search.expected_trials}


def check_batch(config: Config, num_records: int) -> None:
    """Raises `InputError` if the expected batch is larger than N."""
    batch = config.finetune.expected_batch_size
    expectation = f"at most the {num_records} training records"
    expect(batch <= num_records, "finetune.expected_batch_size", batch, expectation, "lower it, or use more data")


def easy_release(config: Config, stage: str, target: float | None = None, grid: float = FINE_GRID) -> Release:
    """An easy stage's release, by its noise multiplier or by its share of epsilon.

    A share f means that the stage alone is (f * epsilon, delta)-DP; epsilons of stages don't add up.

    Args:
      stage: of `curriculum`.
      target: epsilon that the share is of; none: privacy.epsilon.
    """
    central, settings = config.central, config.central if stage == "central" else config.frequency
    # The mean embeddings are one sum over all records.
    sampling_prob, count = (central.sampling_prob, central.num_rounds) if stage == "central" else (1.0, 1)
    event = PoissonSampledGaussian(sampling_prob, settings.noise_multiplier or 1.0, count)
    if settings.noise_multiplier is not None:
        return Release(stage, event)
    target = config.privacy.epsilon if target is None else target
    return calibrate([], stage, event, settings.budget_share * target, config.privacy.delta, grid)


def code_digest() -> str:
    """SHA-256 of the code that determines a release: other code is another domain, paid again."""
    root = Path(e2h.__file__).parent
    digest = hashlib.sha256(e2h.__version__.encode())
    paths = [root / "config.py", root / "binding.py"]
    for package in ("privacy", "diffusion", "curriculum", "data", "evaluation", "distributed"):
        paths += sorted((root / package).glob("*.py"))
    for path in paths:
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
