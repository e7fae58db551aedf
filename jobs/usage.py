"""`--help` of a job: what it does, its presets, every setting with its default and what e2h/config.py says of it."""

from __future__ import annotations

import ast
import inspect
import io
import json
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import e2h.config
from e2h.config import Config
from e2h.settings import presets


def usage(program: str, description: str) -> str:
    """The text of `--help`.

    Args:
      program: as it is called, e.g. jobs/pipeline.py.
      description: what it does, and examples.
    """
    lines = [description.strip(), "", f"usage: python {program} [GROUP=PRESET ...] [KEY=VALUE ...]"]
    lines += [
        "Quote lists: 'curriculum=[central,frequency]'. None is written null. More: docs/guide.md",
        "",
        "Presets:",
    ]
    lines += [f"  {group}=" + "|".join(presets(group)) for group in ("data", "model", "experiment", "scaling")]
    lines += ["", "Settings, with their defaults (--cfg job --resolve prints those of a call):"]
    comments = dict(_comments(inspect.getsource(e2h.config)))
    return "\n".join([*lines, *_settings(Config(), comments, "")])


def _settings(section: Any, comments: dict[tuple[str, str], str], prefix: str) -> Iterator[str]:
    """A line for each setting, its section's title before it."""
    for one in sorted(fields(section), key=lambda one: is_dataclass(getattr(section, one.name))):
        value, name = getattr(section, one.name), prefix + one.name
        if is_dataclass(value):
            yield from ("", f"{name}: {(value.__doc__ or '').strip()}")
            yield from _settings(value, comments, f"{name}.")
        else:
            comment = comments.get((type(section).__name__, one.name), "")
            shown = value if isinstance(value, str) else json.dumps(value)
            yield f"  {f'{name}={shown}':<44} {comment}".rstrip()


def _comments(source: str) -> Iterator[tuple[tuple[str, str], str]]:
    """The comment beside each field of each class, by class and field."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    beside = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    for node in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                lines = range(field.lineno, (field.end_lineno or field.lineno) + 1)
                yield (node.name, field.target.id), " ".join(beside[line] for line in lines if line in beside)
