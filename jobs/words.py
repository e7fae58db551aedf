"""The words of a command line, checked before Hydra reads them: one line with the way out instead of its own page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from e2h.config import expect
from e2h.settings import GROUPS, KEYS, check_preset, kinds_of, like_key

HYDRA_OPTIONS = {
    *("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "--resolve", "-p", "--package", "-i", "--info"),
    *("-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"),
}
NAMES = {float: "a number", int: "a whole number", bool: "true or false"}
SPELLINGS = {  # that OmegaConf takes
    float: re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d+)?|[+-]?inf|nan", re.IGNORECASE),
    int: re.compile(r"[+-]?\d[\d_]*"),
    bool: re.compile("true|false|yes|no|on|off|y|n|1|0", re.IGNORECASE),
}
TEXT = {str, type(None)}
SETTING = re.compile(r"([A-Za-z_][\w.]*)=(.*)", re.DOTALL)


def quoted(words: Sequence[str]) -> list[str]:
    """The words, with quotes around those values that Hydra has no grammar for: `~/pets`, `/my pets (2020)`, `données`.

    Only where the setting is a text and Hydra would refuse the word: what it reads keeps its meaning.
    """
    return [_quoted(word) for word in words]


def _quoted(word: str) -> str:
    key, separator, value = word.partition("=")
    if key not in KEYS or not separator or not kinds_of(key) <= TEXT or "$" in value or _parsed(word) is not None:
        return word
    again = f'{key}="{value}"'
    parsed = _parsed(again)
    return again if parsed is not None and _text(parsed.value()) == value else word


def check_words(words: Sequence[str]) -> None:
    """Checks names of settings and of presets; anything else is left to Hydra.

    Raises:
      InputError: naming the first wrong word, and what is like it.
    """
    options = {word.split("=")[0] for word in words if word.startswith("-")}
    for option in sorted(options - HYDRA_OPTIONS):
        setting = option.lstrip("-").replace("-", "_")
        meant = (like_key(setting) or setting).split()[0]
        expect(False, "option", option, "settings as key=value", f"e.g. {meant}=..., see --help")
    own_presets = not options & {"-cp", "--config-path", "-cd", "--config-dir"}
    for key, value in (found.groups() for word in words if (found := SETTING.fullmatch(word))):
        if key in GROUPS and own_presets and value != "null":
            check_preset(key, value)
        elif not key.startswith("hydra.") and not _is_known(key):
            like = like_key(key)
            expect(False, key, value, "a known key (see --help)", f"did you mean {like}?" if like else "")
        elif key in KEYS and "$" not in value:
            _check_value(key, value)


def _check_value(key: str, written: str) -> None:
    """Refuses what is of another kind than the setting; how a value is written is left to Hydra."""
    kinds, parsed = kinds_of(key), _parsed(f"{key}={written}")
    if parsed is None:
        quotes = f"""what has quotes in it, '{key}="..."' with \\" for each"""
        expect(not kinds <= TEXT, key, written, "one value", quotes)
        expect(list not in kinds, key, written, "a list", f"""written '{key}=["...", "..."]'""")
        return
    several = f"a list is written '{key}=[...]'" if list in kinds else f"""what has a comma, '{key}="..."'"""
    expect(not parsed.is_sweep_override(), key, written, "one value", several)
    value = parsed.value()
    word, or_null = _text(value), ", or null" if type(None) in kinds else ""
    if list in kinds and value is not None:
        expect(isinstance(value, list), key, written, f"a list{or_null}", f"written '{key}=[...]'")
    elif not {int, float, bool}.isdisjoint(kinds) and value is not None:
        kind = next(kind for kind in (float, int, bool) if kind in kinds)
        expect(bool(SPELLINGS[kind].fullmatch(word)), key, written, f"{NAMES[kind]}{or_null}")


def _parsed(word: str) -> Any:
    """What Hydra reads in a word; None where it can't."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _text(value: Any) -> str:
    """A value as the user meant it, in quotes or not."""
    return str(getattr(value, "text", value))


def _is_known(key: str) -> bool:
    """Also a section, and what is below `search.space`."""
    return key.startswith("search.space.") or any(f"{one}.".startswith(f"{key}.") for one in (*KEYS, *GROUPS))
