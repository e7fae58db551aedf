"""The guarantee in words and rows, shared by the dataset card and the report; nothing here is sensitive."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import yaml

from e2h.config import describe_record
from e2h.data.remote import Place
from e2h.errors import InputError
from e2h.privacy.rounding import delta_in_words, rounded_up
from e2h.reporting.privacy_curves import best_guess, hit_rate

RELATIONS = {
    "REPLACE_SPECIAL": "one record's contribution is replaced by nothing (add-or-remove-one in its zero-out form); "
    "the number of records is public",
    "ADD_OR_REMOVE_ONE": "one record is added or removed",
    "REPLACE_ONE": "one record is replaced by another",
}

MECHANISMS = {"poisson_sampled_gaussian": "Poisson-sampled Gaussian", "selection": "best of a random number of trials"}
TITLES = {
    "central": "Central images (easy stage)",
    "frequency": "Mean embeddings (easy stage)",
    "finetune": "DP-SGD training (hard stage)",
    "score": "Score of a trial",
    "search": "Search (the best trial)",
}

ASSUMPTIONS = (
    "One person contributed one record. Where a person contributed several, the guarantee for that person is weaker: "
    "with m records epsilon is m times as large, and delta grows faster still.",
    "The run's secret, from which sampling and noise were drawn, stays secret. Its owner can undo the noise.",
    "No setting was chosen by looking at the private images, unless “tuning” in ledger.json says so and charges it.",
    "The software computes what it states. Sums are whole numbers and noise is rounded to their grid, against attacks "
    "on low-order bits (Mironov, 2012); that the noise is Gaussian to within rounding is assumed.",
)

NOT_PROTECTED = (
    "What holds for the whole population or a class: teaching it is the purpose of this data.",
    "Everything that is public, as listed on this page, the number of records included.",
    "How the images were collected, selected, labelled and cropped before e2h read them.",
    "The machines, folders and logs of the run itself: the guarantee is about the folder release/ only.",
    "Other publications from the same images: another run costs anew. By the simple bound epsilons and deltas add up: "
    "two runs like this one have twice both. More images drawn from the published model cost nothing.",
    "Against disappointment: how useful the images are is not stated here, because that is measured on private images "
    "without noise, outside the guarantee. Try them on real images of your own.",
    "Fairness: rare groups are drawn less faithfully than frequent ones; synthetic images can be wrong.",
)


def read_json(path: Place) -> dict[str, Any]:
    """A JSON object of the run directory; `InputError` if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(path.name, error) from error


def read_config(run_dir: Place) -> dict[str, Any]:
    """The run's resolved `config.yaml` as nested dictionaries; `InputError` if it is missing or damaged."""
    try:
        return yaml.safe_load((run_dir / "config.yaml").read_text())
    except (OSError, yaml.YAMLError) as error:
        raise _unreadable("config.yaml", error) from error


def _unreadable(name: str, error: Exception) -> InputError:
    damaged = not isinstance(error, OSError)
    advice = "it is damaged: remove it, and run the same command again" if damaged else "finish the run first"
    return InputError(f"{name}: expected a readable file in the run directory; {advice} ({type(error).__name__})")


def up(value: float, digits: int = 4) -> str:
    """`value` with that many significant digits, rounded up: a printed epsilon must not understate."""
    if value <= 0 or not math.isfinite(value):
        return "0" if value <= 0 else "∞"
    decimals = digits - 1 - math.floor(math.log10(value))
    return f"{rounded_up(value, decimals):.{max(decimals, 0)}f}"


def share_key(share: float) -> str:
    """How a trial's scores are named in `search.json`: by the share of its steps after which they were taken."""
    return f"{share:.3f}"


def number(value: float) -> str:
    """A parameter in at most six significant digits."""
    return f"{value:.6g}"


def percent_up(share: float) -> str:
    """A share of 1 as a percentage, rounded up; more digits where one would say "all"."""
    digits = 1 if share < 0.999 else 3
    return f"{rounded_up(100 * share, digits):.{digits}f} %"


def sentence(plan: Mapping[str, Any]) -> str:
    """The guarantee in one sentence."""
    unit = describe_record(plan["public"]["class_names"])
    stated = f"({up(plan['epsilon'])}, {delta_in_words(plan['delta'])})"
    return (
        f"Everything in the folder release/, taken together, is {stated}-"
        f"differentially private with regard to any single record, that is {unit}."
    )


def meaning(plan: Mapping[str, Any]) -> str:
    """What the guarantee means for one person, as the bound on a membership guess."""
    return (
        "In plain words: if a fair coin decided whether one given record takes part, even someone who knows all other "
        "records and sees the whole release would tell right in at most "
        f"{percent_up(best_guess(plan))} of cases; 50 % is blind guessing, 100 % no protection. An attack that wrongly "
        f"accuses 1 % of the absent finds at most {percent_up(hit_rate(plan, 0.01))} of those who took part. These are "
        "worst cases over all records and all attacks. As a rule, an epsilon up to about 1 is a strong promise, a few "
        "a meaningful one, 10 a weak one."
    )


def public_facts(plan: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """What the release declares public, by name."""
    data = config["data"]
    size = f"{data['image_size']} x {data['image_size']} pixels, {'grey' if data['channels'] == 1 else 'colour'}"
    facts = {"Training records N": str(plan["num_records"]), "Images": size}
    for name, value in plan["public"].items():
        if name == "class_names":
            facts["Classes"] = ", ".join(map(str, value))
        elif name != "num_records":
            facts[name.replace("_", " ").capitalize()] = value if isinstance(value, str) else json.dumps(value)
    facts["Settings"] = "every setting in config.yaml"
    return facts


def release_rows(plan: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row of text for each accounted release; below a search, what one of its trials releases to the choice."""
    rows = []
    for release in plan["releases"]:
        event = release["event"]
        rows.append(_row(release["name"], event) | {"epsilon_alone": up(release["epsilon_alone"])})
        where = ", in each trial of kind {}" if len(event.get("candidates", [])) > 1 else ", in each trial"
        for kind, trial in enumerate(event.get("candidates", []), 1):
            rows += [_row(one["name"], one["event"], where.format(kind)) for one in trial]
    return rows


def _row(name: str, event: Mapping[str, Any], where: str = "") -> dict[str, str]:
    title = TITLES.get(name, name.capitalize())
    given = {key: number(event[key]) if key in event else "" for key in ("sampling_prob", "noise_multiplier")}
    return {
        "name": name,
        "title": title.split(" (")[0] + where if where else title,
        "mechanism": MECHANISMS.get(event["type"], event["type"]),
        **given,
        "count": str(event["count"]),
        "epsilon_alone": "",
    }


def choice(plan: Mapping[str, Any]) -> str:
    """How the settings were chosen and who paid, in a sentence or two."""
    tuning = plan.get("tuning")
    if not tuning:
        nothing = "No search chose the settings of this run: nothing was spent on choosing."
        return f"{nothing} Of other choices this page knows nothing."
    paid = {
        "proxy": "It cost nothing: no private image was read for it, or only what had been released and paid for.",
        "selection": "Its cost is part of the epsilon above; how many trials there were stays secret.",
        "compose": "Its cost, that of every trial, is part of the epsilon above.",
    }
    mode, how = tuning["mode"], tuning["how"][0].upper() + tuning["how"][1:]
    average = " on average" if mode == "selection" else ""
    return f"{how}: {tuning['expected_trials']:g} trials{average} (mode “{mode}”). {paid.get(mode, '')}".strip()


def searched(config: Mapping[str, Any]) -> dict[str, str]:
    """What a search could choose from, by setting; public like every setting."""
    space = (config.get("search") or {}).get("space") or {}
    return {
        name: ", ".join(map(str, found)) if isinstance(found, list) else str(found) for name, found in space.items()
    }
