"""Settings by dotted keys and presets, as on the command line, without Hydra: for programs, notebooks and searches.

This module imports neither torch nor ray nor hydra.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from importlib.resources import files
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from e2h.config import Config, expect

OVERRIDE = "override /"  # in a preset's `defaults`: the choice that it makes for another group
GLOBAL = "# @package _global_"


def compose(settings: Config | Mapping[str, Any] | None = None) -> Config:
    """A configuration, still to be validated.

    Args:
      settings: a `Config`; or values by dotted key and presets by group, with the words of the command line, e.g.
        `{"data": "mnist", "data.path": "idx", "privacy.epsilon": 1.0}`; none: the demo on scikit-learn's digits.

    Raises:
      InputError: if a key or a preset isn't one, or a value is of another type.

    >>> compose({"experiment": "mnist_cpu", "data.path": "idx", "privacy.epsilon": 2}).finetune.num_steps
    100
    >>> compose({"privacy.epsilonn": 1.0})
    Traceback (most recent call last):
    e2h.errors.InputError: privacy.epsilonn=1.0: expected a known key (docs/guide.md); did you mean privacy.epsilon?
    """
    if isinstance(settings, Config):
        return copy.deepcopy(settings)
    given = dict(settings or {})
    standard = _standard_presets()
    presets = {group: given.pop(group) for group in standard if group in given}
    return with_values(Config(), {**_preset_values(standard, presets), **given})


def value(config: Config, name: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, name.split("."), config)


def with_values(config: Config, values: Mapping[str, Any], where: str = "") -> Config:
    """A copy with other values of dotted keys: `with_values(config, {"warmup.num_steps": 200})`.

    Args:
      where: the setting that holds the values, for messages.

    Raises:
      InputError: if a key isn't one, or its value is of another type.
    """
    copied = copy.deepcopy(config)
    for name, new in values.items():
        *sections, last = name.split(".")
        holder: Any = copied
        for section in sections:
            holder = getattr(holder, section, None)
        known = is_dataclass(holder) and hasattr(holder, last) and not is_dataclass(getattr(holder, last))
        like = "" if known or not (found := like_key(name)) else f"did you mean {found}?"
        expect(known or not where, where, name, "the dotted key of a setting, e.g. warmup.num_steps", like)
        expect(known, name, new, "a known key (docs/guide.md)", like)
        kind = get_type_hints(type(holder))[last]
        place = f"{where}.{name}" if where else name
        expect(_fits(new, kind), place, repr(new), f"values of type {_type_name(kind)}")
        setattr(holder, last, float(new) if type(new) is int and not _fits(new, kind, strict=True) else new)
    return copied


def kinds_of(key: str) -> set[Any]:
    """The types that a setting takes, `list` for any list: {float, NoneType} of central.noise_multiplier."""
    *sections, last = key.split(".")
    holder: Any = functools.reduce(getattr, sections, Config())
    kind = get_type_hints(type(holder))[last]
    options = () if get_origin(kind) is list else get_args(kind)
    return {get_origin(one) or one for one in options or (kind,)}


def like_key(key: str) -> str | None:
    """What may have been meant: settings of that name in any section, or one that is spelt alike."""
    same = [one for one in KEYS if one.split(".")[-1] == key and one != key]
    near = get_close_matches(key, [*KEYS, *GROUPS], n=1, cutoff=0.75)
    return " or ".join(same[:3] or near) or None


def _fits(value: Any, kind: Any, strict: bool = False) -> bool:
    """Whether a value is of the type that the schema asks for; unless `strict`, a whole number serves as a float."""
    if kind is Any:
        return True
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(one, get_args(kind)[0], strict) for one in value)
    if get_args(kind):
        return any(_fits(value, one, strict) for one in get_args(kind))
    return type(value) is kind or (not strict and kind is float and type(value) is int)


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _standard_presets() -> dict[str, str | None]:
    """The preset of each group where none is named, in the order in which they are laid over each other."""
    entries = _read("config.yaml")["defaults"]
    choices = [one for one in entries if isinstance(one, dict)]
    return {group: name for one in choices for group, name in one.items() if not group.startswith("override ")}


def _preset_values(standard: dict[str, str | None], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key of all presets: the given ones, those that a given one asks for, and the standard ones."""
    chosen, found = dict(given), dict[str, dict[str, Any]]()
    for group in reversed(standard):  # the last choice is nearest to the user
        name = chosen.get(group, standard[group])
        found[group], asked = _preset(group, name) if name is not None else ({}, {})
        chosen = {**asked, **chosen}
    return {key: one for group in standard for key, one in found[group].items()}


def presets(group: str) -> list[str]:
    """The names of a group's presets."""
    return sorted(one.name.removesuffix(".yaml") for one in (files("e2h.conf") / group).iterdir())


def check_preset(group: str, name: Any) -> None:
    """Raises `InputError` with all presets of the group, unless the name is one."""
    known = presets(group)
    expect(name in known, group, name, "one of " + ", ".join(known))


def _preset(group: str, name: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of `e2h/conf/<group>/<name>.yaml` by dotted key, and the presets of other groups that it asks for."""
    check_preset(group, name)
    content = _read(f"{group}/{name}.yaml")
    asked = {key.removeprefix(OVERRIDE): one for line in content.pop("defaults", []) for key, one in line.items()}
    inside = content if GLOBAL in _text(f"{group}/{name}.yaml") else {group: content}
    return dict(flat(inside)), asked


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested sections by dotted key."""
    for key, one in values.items():
        if isinstance(one, dict):
            yield from flat(one, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", one


GROUPS = ("data", "model", "scaling", "experiment")  # of presets
KEYS = tuple(key for key, _ in flat(asdict(Config())))


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(_text(name))
    return content


def _text(name: str) -> str:
    return files("e2h.conf").joinpath(name).read_text()
