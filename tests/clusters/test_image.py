"""clusters/Dockerfile, as far as it can be held without building it: the lock, no root, no data."""

from __future__ import annotations

import re
import shlex

import pytest
from cluster_checks import CLUSTERS, ROOT

NEEDED = {"pyproject.toml", "requirements.lock", "README.md", "LICENSE", "e2h", "jobs"}
KNOWN = {"FROM", "COPY", "WORKDIR", "ARG", "RUN", "ENV", "USER"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of each, comments and continuations resolved."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def copied(found: list[tuple[str, str]]) -> set[str]:
    names: set[str] = set()
    for kind, arguments in found:
        if kind == "COPY":
            words = [word for word in shlex.split(arguments) if not word.startswith("--")]
            names |= set(words[:-1])
    return names


def check_image(text: str) -> None:
    found = instructions(text)
    unknown = [kind for kind, _ in found if kind not in KNOWN]
    assert not unknown, f"instructions: {unknown}"
    assert found[0][0] == "FROM"
    assert copied(found) == NEEDED
    for name in NEEDED:
        assert (ROOT / name).exists(), name
    assert [user for kind, user in found if kind == "USER"][-1] not in ("root", "0")
    installs = [one for kind, run in found if kind == "RUN" for one in re.findall(r"pip install[^;&]*", run)]
    assert len(installs) == 2
    for install in installs:
        assert "-c requirements.lock" in install or "requirements.lock)" in install, install


def text() -> str:
    return (CLUSTERS / "Dockerfile").read_text()


def test_the_image_is_locked_not_root_and_without_data():
    check_image(text())


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("-c requirements.lock . ", ". "),
        ("USER ray", "USER root"),
        ("jobs /home/ray/e2h/jobs", "runs /home/ray/e2h/runs"),
        ("pyproject.toml requirements.lock", "pyprojekt.toml requirements.lock"),
        ("WORKDIR", "WORKDIRS"),
    ],
)
def test_a_mistake_in_the_image_is_caught(right, wrong):
    assert right in text()
    with pytest.raises(AssertionError):
        check_image(text().replace(right, wrong))


def test_nothing_but_what_is_copied_reaches_the_build():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == NEEDED
