"""requirements.lock: the versions that e2h is tested with, of exactly what pyproject.toml needs.

python .ci/lock.py write    this environment's versions -> requirements.lock
python .ci/lock.py check    a line for everything that doesn't fit; exit code 1 if there is one
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT, LOCK = ROOT / "pyproject.toml", ROOT / "requirements.lock"
HEADER = "# By `.ci/lock.py write`: the tested version of everything that pyproject.toml needs, `dev` included.\n"
PIN = re.compile(r"([A-Za-z0-9][\w.-]*)==([\w.!]+)")
# What torch's CUDA wheels bring along and pin themselves; its CPU wheels know nothing of it.
ACCELERATOR = re.compile(r"(nvidia|cuda)-|(pytorch-)?triton$")

Demand = tuple[str, Requirement]  # who asks, for what


def demands() -> Iterator[Demand]:
    """Every requirement of the project and of all that it needs, by the installed packages' own metadata."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pending: list[Demand] = [("pyproject.toml", Requirement(line)) for line in lines]
    visited: set[tuple[str, str]] = set()
    while pending:
        asker, requirement = pending.pop()
        yield asker, requirement
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) not in visited:
                visited.add((name, extra))
                pending += [(name, one) for one in _requirements(name, extra)]


def _requirements(name: str, extra: str) -> list[Requirement]:
    """What an installed package needs on this interpreter and platform; nothing where it is not installed."""
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    applies = [one for one in found if one.marker is None or one.marker.evaluate({"extra": extra})]
    return [one for one in applies if not ACCELERATOR.match(canonicalize_name(one.name))]


def installed(name: str) -> str | None:
    """The public version: `2.13.0+cpu` is `2.13.0`."""
    try:
        return Version(distribution(name).version).public
    except PackageNotFoundError:
        return None


def read_lock() -> tuple[dict[str, str], list[str]]:
    """Pins by canonical name, and a line for each that is none."""
    pins: dict[str, str] = {}
    problems = []
    for line in LOCK.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        match = PIN.fullmatch(line)
        if match is None or canonicalize_name(match[1]) in pins:
            problems.append(f"{line!r}: expected name==version, each name once")
        else:
            pins[canonicalize_name(match[1])] = match[2]
    return pins, problems


def write() -> list[str]:
    """Writes the lock; returns what is missing, and writes nothing then."""
    names = {str(canonicalize_name(requirement.name)) for _, requirement in demands()}
    versions = {name: installed(name) for name in sorted(names)}
    missing = [f"{name}: not installed" for name, version in versions.items() if version is None]
    if not missing:
        LOCK.write_text(HEADER + "".join(f"{name}=={version}\n" for name, version in versions.items()))
    return missing


def check() -> list[str]:
    """What is wrong with the lock or with this environment."""
    pins, problems = read_lock()
    needed = set()
    for asker, requirement in demands():
        name = str(canonicalize_name(requirement.name))
        needed.add(name)
        if name not in pins:
            problems.append(f"{name}: not pinned; {asker} needs {requirement}")
        elif not requirement.specifier.contains(pins[name], prereleases=True):
            problems.append(f"{name}=={pins[name]}: {asker} needs {requirement}")
    problems += [f"{name}=={pins[name]}: nothing needs it" for name in sorted(pins.keys() - needed)]
    for name, pinned in pins.items():
        if (found := installed(name)) is None or Version(found) != Version(pinned):
            problems.append(f"{name}=={pinned}: this environment has {found or 'none'}")
    return list(dict.fromkeys(problems))


def main(arguments: list[str]) -> int:
    commands = {"write": write, "check": check}
    if len(arguments) != 1 or arguments[0] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    problems = commands[arguments[0]]()
    for problem in problems:
        print(f"requirements.lock: {problem}", file=sys.stderr)
    if not problems:
        print(f"{LOCK.name}: {len(read_lock()[0])} packages pinned, all as pyproject.toml and this environment say")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
