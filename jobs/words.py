"""The words of a command line, checked before Hydra reads them: one line with the way out instead of its own page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches

from e2h.config import Config, expect
from e2h.settings import check_preset, flat

GROUPS = ("data", "model", "scaling", "experiment")
HYDRA_OPTIONS = {
    *("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "--resolve", "-p", "--package", "-i", "--info"),
    *("-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"),
}
KEYS = tuple(key for key, _ in flat(asdict(Config())))
SETTING = re.compile(r"([A-Za-z_][\w.]*)=(.*)", re.DOTALL)


def check_words(words: Sequence[str]) -> None:
    """Checks names of settings and of presets; anything else is left to Hydra.

    Raises:
      InputError: naming the first wrong word, and what is like it.
    """
    options = {word.split("=")[0] for word in words if word.startswith("-")}
    for option in sorted(options - HYDRA_OPTIONS):
        setting = option.lstrip("-").replace("-", "_")
        meant = (_like(setting) or setting).split()[0]
        expect(False, "option", option, "settings as key=value", f"e.g. {meant}=..., see --help")
    own_presets = not options & {"-cp", "--config-path", "-cd", "--config-dir"}
    for key, value in (found.groups() for word in words if (found := SETTING.fullmatch(word))):
        if key in GROUPS and own_presets and value != "null":
            check_preset(key, value)
        elif not key.startswith("hydra.") and not _is_known(key):
            like = _like(key)
            expect(False, key, value, "a known key (see --help)", f"did you mean {like}?" if like else "")


def _is_known(key: str) -> bool:
    """Also a section, and what is below `search.space`."""
    return key.startswith("search.space.") or any(f"{one}.".startswith(f"{key}.") for one in (*KEYS, *GROUPS))


def _like(key: str) -> str | None:
    """What may have been meant: settings of that name in any section, or one that is spelt alike."""
    same = [one for one in KEYS if one.split(".")[-1] == key and one != key]
    near = get_close_matches(key, [*KEYS, *GROUPS], n=1, cutoff=0.75)
    return " or ".join(same[:3] or near) or None
