"""Trials of a search: which settings each one tries, where it lies, and which of them is the best.

A trial is a run of its own, below `trials/` of the search's directory: its noise is its own, what it shares with others
is the prepared set and what those easy stages released of which no setting is searched. Under `selection` that
folder is a private store: nothing leaves it but the best trial, and what is there tells how many there were.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from e2h import settings
from e2h.binding import binding, digest
from e2h.config import Config, LedgerConfig, RunConfig, SearchConfig, expect
from e2h.curriculum.run import Run
from e2h.data.filesystem import write_bytes
from e2h.data.remote import Place
from e2h.data.storage import open_prepared
from e2h.errors import InputError
from e2h.privacy.keys import derive_key
from e2h.privacy.plan import PrivacyPlan
from e2h.privacy.scores import Score
from e2h.privacy.trial_law import POISSON, TrialLaw
from e2h.settings import value
from e2h.validation import validate

Values = dict[str, Any]  # by dotted key
# Settings that a release's mechanism depends on; all others leave the accounting as it is.
ACCOUNTED = (
    *(f"central.{name}" for name in ("num_rounds", "sampling_prob", "noise_multiplier", "budget_share")),
    *(f"frequency.{name}" for name in ("noise_multiplier", "budget_share")),
    *(f"finetune.{name}" for name in ("num_steps", "expected_batch_size")),
)
MAX_CANDIDATES = 10_000
RUNGS = {"fifo": (1.0,), "asha": (1 / 9, 1 / 3, 1.0)}  # shares of a trial's DP-SGD steps after which it is scored


@dataclass(frozen=True)
class Trial:
    """One trial: the values it tries, its whole configuration, and its plan, fixed before the first private query."""

    name: str
    values: Values
    config: Config
    plan: PrivacyPlan


def space(config: Config) -> dict[str, list[Any]]:
    """The searched settings with their values: `search.space`, or the length and the share of each easy stage.

    Without an easy stage the learning rate of the hard one.
    """
    if config.search.space is not None:
        return config.search.space
    found: dict[str, list[Any]] = {}
    for stage, name in (("central", "warmup"), ("frequency", "frequency.warmup")):
        if stage in config.curriculum:
            length, settings = value(config, f"{name}.num_steps"), getattr(config, stage)
            found[f"{name}.num_steps"] = sorted({max(1, length // 2), length, 2 * length})
            if settings.noise_multiplier is None:
                found[f"{stage}.budget_share"] = [settings.budget_share / part for part in (4, 2, 1)]
    rate = config.finetune.learning_rate
    return found or {"finetune.learning_rate": [rate / 2, rate, 2 * rate]}


def candidates(config: Config) -> list[Values]:
    """All combinations, in a fixed order: a trial draws one of them, each with the same probability.

    Raises:
      InputError: if there are too many, or one of them is no valid configuration.
    """
    searched = space(config)
    count = math.prod(len(values) for values in searched.values())
    expect(count <= MAX_CANDIDATES, "search.space", f"{count} combinations", f"at most {MAX_CANDIDATES}", "list fewer")
    found = [dict(zip(searched, values, strict=True)) for values in product(*searched.values())]
    for values in found:
        validate(with_values(config, values))
    return found


def check_search(config: Config) -> None:
    """Rules between the searched settings and the way of searching (docs/search.md says why).

    Raises:
      InputError: naming the setting.
    """
    search = config.search
    modes = "proxy, selection or compose: how the choice is paid for; there is no default on sensitive data"
    expect(search.privacy is not None, "search.privacy", search.privacy, modes, "see docs/search.md")
    candidates(config)
    if search.privacy == "selection":
        trial_law(config)
    if score_kind(search) == "central":
        reason = "distances to different central images can't be compared"
        shared = "central" in shared_stages(config)
        expect(shared, "search.score", "central", "central images, and no setting of them in search.space", reason)
    if search.privacy == "compose" and search.sampler == "optuna" and not same_accounting(config):
        reason = "what a trial costs must be fixed before any trial is seen"
        expect(False, "search.sampler", "optuna", "no setting in search.space that the accounting depends on", reason)
    same = search.proxy.source == config.data.source and _whole(search.proxy.path) == _whole(config.data.path)
    advice = "these are the private images themselves; trials on them are charged by selection or compose"
    expect(not same, "search.proxy.source", search.proxy.source, "public or synthetic images", advice)
    if search.proxy.source == "central":
        reason = "they are released, and paid for, before the search"
        ok = "central" in shared_stages(config) and same_accounting(config)
        expect(ok, "search.proxy.source", "central", "no setting in search.space that the accounting uses", reason)


def _whole(path: str | None) -> str | None:
    """However it is written: one path."""
    return path if path is None or "://" in path else str(Path(path).expanduser().resolve())


def trial_law(config: Config) -> TrialLaw:
    """The law of the number of trials under `selection`; `InputError` if there is none."""
    search = config.search
    shape = POISSON if search.law == "poisson" else search.shape
    return TrialLaw(shape, search.expected_trials, search.max_trials)


def shared_stages(config: Config) -> list[str]:
    """The easy stages whose release can serve all trials: it is made once, outside."""
    searched = [name for name in space(config) if not name.startswith("frequency.warmup.")]
    return [stage for stage in config.curriculum if not any(name.startswith(f"{stage}.") for name in searched)]


def same_accounting(config: Config) -> bool:
    """Whether all candidates have the same mechanisms."""
    return not any(name in ACCOUNTED for name in space(config))


def with_values(config: Config, values: Values) -> Config:
    """A copy with the values that a trial tries; `InputError` if one isn't a setting's."""
    return settings.with_values(config, values, "search.space")


def accounted(values: Values) -> tuple[tuple[str, Any], ...]:
    """The values that the accounting depends on."""
    return tuple((name, value) for name, value in values.items() if name in ACCOUNTED)


def trial_config(run: Run, values: Values, name: str) -> Config:
    """A trial's whole configuration: the search's, with these values, in a folder below it."""
    config, search = with_values(run.config, values), run.config.search
    return replace(
        config,
        privacy=replace(config.privacy, secret=run.secret_reference),
        sampling=replace(config.sampling, num_images=search.score_images),
        evaluation=replace(config.evaluation, enabled=False),
        ledger=LedgerConfig(),
        search=SearchConfig(),
        run=RunConfig(str(store(run.root)), name),
    )


def store(root: Place) -> Place:
    """Where the trials of a search lie."""
    return root / "trials"


def draw_candidates(key: bytes, number: int, choices: int) -> list[int]:
    """Which candidate each trial tries: independent and uniform, a function of the key alone."""
    # 32 bytes modulo a small number are uniform to within 2^-240.
    return [int.from_bytes(derive_key(key, "trial", trial), "big") % choices for trial in range(number)]


def search_address(run: Run) -> str:
    """What a search's secret draws are for: with other settings or other data they are drawn anew."""
    data = open_prepared(run.prepared).manifest.digest
    return digest([run.root.name, search_binding(run.config), binding(run.config), data])


def search_binding(config: Config) -> dict[str, Any]:
    """What the choice depends on beside the settings that any run has."""
    return {"search": vars(config.search) | {"proxy": vars(config.search.proxy)}, "space": space(config)}


def score_kind(search: SearchConfig) -> str:
    return search.score or ("test" if search.privacy == "proxy" else "accuracy")


def score_path(root: Place, share: float = 1.0) -> Place:
    """The score of a trial after a share of its DP-SGD steps."""
    return root / ("score.json" if share == 1 else f"score-{share:.3f}.json")


def write_score(path: Place, score: Score) -> None:
    write_bytes(path, json.dumps(score.to_json()).encode())


def read_score(path: Place) -> Score | None:
    """None before there is one."""
    return Score.from_json(json.loads(path.read_text())) if path.exists() else None


def best(scored: Iterable[tuple[Trial, Score]], kind: str) -> tuple[Trial, Score]:
    """The trial with the highest score; not a number is the worst, and of equal ones the first is taken.

    The order of outputs is fixed beforehand and total, as the bound on a selection asks.

    Args:
      scored: trials in their order.
      kind: of the scores, as the search accounts for it.

    Raises:
      InputError: if there is no trial.
      ValueError: if a score was made of anything else than what its trial is charged for.
    """
    found = list(scored)
    for trial, score in found:
        paid = score.release is None or score.release in trial.plan.releases
        if score.kind != kind or not paid:
            raise ValueError(f"{trial.name}: a score of kind {score.kind} that nobody accounts for")
    if not found:
        raise InputError("search: expected at least one finished trial")
    return max(found, key=lambda one: -math.inf if math.isnan(one[1].value) else one[1].value)
