"""What a run is bound to: its configuration as plain values, their digest, and how two of them differ.

This module imports neither torch nor ray nor hydra.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from e2h.config import Config

# What may change between two calls of the same run: where it runs and what is only looked at.
FREE_KEYS = ("scaling", "run", "dry_run")


def binding(config: Config) -> dict[str, Any]:
    """The part of the configuration that a run is bound to, as plain nested dictionaries."""
    values = asdict(config)
    return {key: value for key, value in values.items() if key not in FREE_KEYS}


def digest(value: object) -> str:
    """SHA-256 (hex) of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, each with the old and the new value."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(old.keys() | new.keys()):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append((name, a, b))
    return found
