"""e2h: publishable synthetic images from private ones, with an (epsilon, delta) guarantee.

For programs and notebooks there are five names, see `e2h.api`: `from e2h import plan, run, load_release, audit,
recompute_epsilon`. They are loaded when they are asked for: `import e2h` alone loads nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e2h.api import audit, load_release, plan, recompute_epsilon, run

__version__ = "0.1.0"
__all__ = ["audit", "load_release", "plan", "recompute_epsilon", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'e2h' has no attribute {name!r}")
    from e2h import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
