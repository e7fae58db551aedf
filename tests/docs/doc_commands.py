"""Every command of README and docs, and one table that says how each is checked without running it.

A command that no row knows is refused. What can be run in a minute is run besides, by test_walks.py.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cluster_checks import ROOT, RefusedError, check_commands, check_job

from e2h.__main__ import main as receiver
from e2h.curriculum.search import check_search

# The log tells of the past.
DOCUMENTS = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "LOG.md")]
PROGRAMS = r"(?:\.venv/bin/)?(?:python3?|make|ray|pip|docker|kubectl|openssl|tensorboard|export) "


def fenced(text: str, language: str) -> list[str]:
    """The contents of blocks in that language; its name may be followed by a mark."""
    found = re.findall(r"(?ms)^[ ]*```(\w*)[^\n]*\n(.*?)^[ ]*```[ ]*$", text)
    return [content for name, content in found if name == language]


def commands(text: str) -> list[str]:
    """One a line, of `sh` blocks, then those in the running text."""
    lines = [line for block in fenced(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(rf"`({PROGRAMS}[^`]+)`", re.sub(r"(?ms)^[ ]*```.*?^[ ]*```[ ]*$", "", text))
    return [command for line in [*lines, *inline] if (command := _tidy(line))]


def _tidy(line: str) -> str:
    """Without a comment, and with single spaces."""
    return " ".join(re.sub(r"(^|\s)#\s.*", "", line).split())


# How a command is checked: each raises if it is wrong --------------------------------------------------------------


def _make(words: Sequence[str]) -> None:
    """Make knows the target; it says what it would run."""
    # The environment counts as made, whatever the age of its mark.
    call = ["make", "-n", "-o", ".venv/.ready", *words[1:]]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not re.search(r"jobs/|pytest|ruff|benchmarks/|docs/site", done.stdout):
        raise RefusedError(done.stderr or f"{shlex.join(words)}: does nothing")


def _install(words: Sequence[str]) -> None:
    """From files that are there, and nothing that pyproject.toml does not name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = " ".join([*project["dependencies"], *(line for lines in extras.values() for line in lines)])
    for word in words[2:]:
        if word in ("-c", "."):
            continue
        extra = re.fullmatch(r"e2h\[(\w+)\]", word)
        named = extra[1] in extras if extra else re.search(rf"(^| ){word}[>\[]", known)
        if not named and not (ROOT / word).is_file():
            raise RefusedError(f"pip install {word}: no such file, package or extra")


def _receiver(words: Sequence[str]) -> None:
    """The receiver's program understands it, and says that there is no such release."""
    try:
        code = receiver([*words[3:-1], "/nowhere"])
    except SystemExit as error:
        raise RefusedError(f"{shlex.join(words)}: no such command") from error
    if code != 2:
        raise RefusedError(f"{shlex.join(words)}: exit code {code}")


def _owner(words: Sequence[str]) -> None:
    """A program with a parser of its own: its help names what is given to it."""
    help_text = (ROOT / words[1]).read_text().split('"""')[1]
    if shlex.join(words) not in help_text:
        raise RefusedError(f"{shlex.join(words)}: not in its help")


def _benchmark(words: Sequence[str]) -> None:
    sources = [ROOT / words[1], *sorted((ROOT / "benchmarks" / "lib").glob("*.py"))]
    text = "".join(path.read_text() for path in sources)
    for word in words[2:]:
        if word.startswith("--") and f'"{word}"' not in text:
            raise RefusedError(f"{words[1]} {word}: no such option")


def _job(words: Sequence[str]) -> None:
    """Its file exists, and its settings compose to a valid configuration; for a search, to one that is allowed."""
    settings = [word for word in words[2:] if word not in ("--cfg", "job", "--resolve", "--help")]
    if not (ROOT / words[1]).is_file():
        raise RefusedError(f"{words[1]}: no such job")
    config = check_job([words[1], *settings])
    if words[1] == "jobs/search.py":
        check_search(config)


def _ray(words: Sequence[str]) -> None:
    """Ray has the command and its options, the job behind `--` composes, files are there."""
    if check_commands(shlex.join(words)) < 1:
        raise RefusedError(f"{shlex.join(words)}: not seen")
    _files(words)


def _files(words: Sequence[str]) -> None:
    for word in words:
        if word.endswith((".yaml", "Dockerfile")) and not (ROOT / word).is_file():
            raise RefusedError(f"{word}: no such file")


def _nothing(words: Sequence[str]) -> None:
    """Not e2h's."""


TABLE: list[tuple[str, Callable[[Sequence[str]], None]]] = [
    (r"pip install|kubectl port-forward|ray \.\.\.", _nothing),  # names, not commands
    (r"make [a-z]+( ARGS=.*)?", _make),
    (r"pip install .*", _install),
    (r"python3 -m venv \.venv && \. \.venv/bin/activate", _nothing),
    (r"python -m e2h (check|recompute) \S+", _receiver),
    (r"python jobs/(status|ledger)\.py .*", _owner),
    (r"python jobs/.*", _job),
    (r"python benchmarks/.*", _benchmark),
    (r"ray [a-z].*", _ray),
    (r"(docker build|kubectl apply) .*", _files),
    (r"kubectl port-forward .*", _nothing),
    (r"export( RAY_\w+=\w+)+", _nothing),
    (r"export RAY_AUTH_TOKEN=\$\(kubectl get secret e2h .*\)", _nothing),
    (r"umask 077", _nothing),
    (r"openssl rand -hex 32", _nothing),
    (r"tensorboard --logdir \S+", _nothing),
]


def check(command: str) -> None:
    """Raises where a command is unknown or wrong."""
    plain = re.sub(r" > \S+$", "", command).removeprefix(".venv/bin/")
    for pattern, means in TABLE:
        if re.fullmatch(pattern, plain):
            means(shlex.split(plain))
            return
    raise RefusedError(f"{command}: not in the table of tests/docs/doc_commands.py")


class Named(NamedTuple):
    document: Path
    command: str


def all_commands() -> list[Named]:
    """Each once, where it is first named."""
    found = {command: path for path in reversed(DOCUMENTS) for command in commands(path.read_text())}
    return [Named(path, command) for command, path in found.items()]
