"""Epsilon from a published ledger alone, independent of the code that planned and spent it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from e2h.errors import InputError

TOLERANCE = 1e-6

# What a third party runs beside ledger.json; printed in the dataset card and tested as printed.
_RECIPE = """\
import json, dp_accounting as dp
ledger = json.load(open("ledger.json"))
relation = dp.NeighboringRelation[ledger["neighbouring_relation"]]
accountant = dp.{accountant}(neighboring_relation=relation)
for e in [release["event"] for release in ledger["releases"]]:
    step = dp.PoissonSampledDpEvent(e["sampling_prob"], dp.GaussianDpEvent(e["noise_multiplier"]))
    accountant.compose(step, e["count"])
print(accountant.get_epsilon(ledger["delta"]))
"""
# Of a search, dp_accounting knows the Renyi bound (Papernot and Steinke 2022) alone.
_SEARCH_RECIPE = """\
# To compare with the epsilon stated, no proof of it: dp_accounting's Renyi figure, whose number of trials has no limit.
import json, dp_accounting as dp
ledger = json.load(open("ledger.json"))
def composed(releases):
    steps = [(dp.PoissonSampledDpEvent(e["sampling_prob"], dp.GaussianDpEvent(e["noise_multiplier"])), e["count"])
             for e in (one["event"] for one in releases)]
    return dp.ComposedDpEvent([dp.SelfComposedDpEvent(step, count) for step, count in steps])
search = next(one["event"] for one in ledger["releases"] if one["event"]["type"] == "selection")
others = [one for one in ledger["releases"] if one["event"]["type"] != "selection"]
law, bounds = search["law"], []
for trial in search["candidates"]:
    accountant = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation[ledger["neighbouring_relation"]])
    shape = float("inf") if law["shape"] == "poisson" else law["shape"]
    accountant.compose(dp.dp_event.RepeatAndSelectDpEvent(composed(trial), law["expected_trials"], shape))
    bounds.append(accountant.compose(composed(others)).get_epsilon(ledger["delta"]))
print(max(bounds))
"""
_ACCOUNTANTS = {"pld": "pld.PLDAccountant", "rdp": "rdp.RdpAccountant"}


def recipe(plan: Mapping[str, Any]) -> str:
    """The lines that recompute epsilon from `ledger.json` with dp_accounting, or of a search a looser bound.

    Args:
      plan: `plan.json`, or a published ledger; its accountant is "pld" or "rdp".
    """
    if selected(plan):
        return _SEARCH_RECIPE
    return _RECIPE.format(accountant=_ACCOUNTANTS[plan["accountant"]])


def selected(plan: Mapping[str, Any]) -> bool:
    """Whether a release is the best of a random number of trials, of which dp_accounting alone knows no bound."""
    return any(release["event"]["type"] == "selection" for release in plan["releases"])


def read_ledger(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A published `ledger.json`.

    Raises:
      InputError: if it is missing or no JSON object.
    """
    try:
        ledger = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"ledger={path}: expected a readable ledger.json of a release ({error})") from error
    if not isinstance(ledger, dict):
        raise InputError(f"ledger={path}: expected a JSON object; take ledger.json of a release")
    return ledger


def stated_epsilon(ledger: Mapping[str, Any], name: str = "epsilon") -> float:
    """The epsilon that the ledger claims, or its `target_epsilon`; `InputError` if there is none."""
    try:
        return float(ledger[name])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"ledger: expected a number under {name} ({type(error).__name__}: {error})") from error


def recompute(ledger: Mapping[str, Any]) -> float:
    """Epsilon at the ledger's delta of all its releases together, by the accountant that it names.

    A search is recomputed by our own bound (`e2h.privacy.selection_profile`). The uniform formula serves
    sampling_prob = 1 too, where it equals the plain Gaussian up to 1e-7.

    Raises:
      InputError: if an entry is missing or unknown.
    """
    import dp_accounting  # a second to import, and every `import e2h.reporting` would pay it

    try:
        if any(release["event"]["type"] == "selection" for release in ledger["releases"]):
            return _with_search(ledger)
        relation = dp_accounting.NeighboringRelation[ledger["neighbouring_relation"]]
        accountants = {"pld": dp_accounting.pld.PLDAccountant, "rdp": dp_accounting.rdp.RdpAccountant}
        accountant = accountants[ledger["accountant"]](neighboring_relation=relation)
        with _quiet():
            for release in ledger["releases"]:
                accountant.compose(_event(release["event"]), int(release["event"]["count"]))
            return max(0.0, float(accountant.get_epsilon(ledger["delta"])))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"ledger: expected the entries of a published ledger.json ({reason})") from error


def _with_search(ledger: Mapping[str, Any]) -> float:
    from e2h.privacy.accounting import NEIGHBOURING_RELATION, epsilon_pld
    from e2h.privacy.events import charge, event_from_json

    relation, accountant = ledger["neighbouring_relation"], ledger["accountant"]
    if (relation, accountant) != (NEIGHBOURING_RELATION.name, "pld"):
        raise ValueError(
            f"a search is recomputed for {NEIGHBOURING_RELATION.name} by pld, not {relation}, {accountant}"
        )
    releases = [charge(one["name"], event_from_json(one["event"])) for one in ledger["releases"]]
    return epsilon_pld(releases, ledger["delta"])


def _event(event: Mapping[str, Any]) -> Any:
    import dp_accounting

    if event["type"] != "poisson_sampled_gaussian":
        raise ValueError(f"unknown event type {event['type']!r}")
    gaussian = dp_accounting.GaussianDpEvent(event["noise_multiplier"])
    return dp_accounting.PoissonSampledDpEvent(event["sampling_prob"], gaussian)


@contextmanager
def _quiet() -> Iterator[None]:
    """dp_accounting warns about every RDP order it leaves out; leaving orders out only makes epsilon larger."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
