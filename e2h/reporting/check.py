"""What is wrong with a release folder: anything unexpected, sensitive, private or false in it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors import SafetensorError, safe_open

from e2h.config import NOT_PRIVATE
from e2h.errors import InputError
from e2h.reporting.metrics import METRICS, ReleaseClass
from e2h.reporting.recompute import TOLERANCE, read_ledger, recompute, stated_epsilon

TEXTS = ("README.md", "ledger.json", "config.yaml", "report.html")
FILES = (*TEXTS, "model.safetensors", "grid.png")
DATA = re.compile(r"data/[A-Za-z0-9][\w.-]*\.parquet")
LEDGER_KEYS = (
    "epsilon",
    "delta",
    "target_epsilon",
    "neighbouring_relation",
    "accountant",
    "accountant_version",
    "releases",
    "n_is_public",
    "tuning",
)

_DATA_URI = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]*")
# Two path components or more, so that closing tags and "1/N" don't count; storage addresses and home folders do.
_PRIVATE_PATH = re.compile(
    r"(?<![\w/.<])/[A-Za-z_][\w.-]*(?:/[\w.-]+)+|\b(?:s3|gs|file|hdfs|abfs)://[^\s\"'<]+|~/[\w.-]+|\b[A-Z]:\\\w+"
)
_SENSITIVE_WORDS = (
    *(word for n, m in METRICS.items() if m.release_class is ReleaseClass.SENSITIVE for word in (n, m.title)),
    "evaluation.json",
    "metrics.jsonl",
)
_SENSITIVE_MARK = re.compile(r"[\"']class[\"']\s*:\s*[\"']sensitive[\"']|release-class\"\s+content=\"sensitive\"")


def check(release_dir: str | os.PathLike[str]) -> list[str]:
    """Problems of a release folder, one line each; an empty list means that none was found.

    Looked for: unexpected or missing files, links, columns other than image and label, words that belong to sensitive
    metrics, absolute paths and storage addresses, a ledger whose epsilon does not recompute or exceeds its target, and
    a run that was not private to begin with.
    """
    folder = Path(release_dir)
    if not folder.is_dir():
        return [f"release_dir={folder}: expected a release folder"]
    return [*content_problems(folder), *ledger_problems(folder), *_not_private(folder)]


def content_problems(folder: Path) -> list[str]:
    """Problems of the files themselves."""
    found = [*_unexpected(folder)]
    found += [f"{name}: missing" for name in FILES if not (folder / name).is_file()]
    tables = sorted(folder.glob("data/*.parquet"))
    found += [] if tables else ["data/*.parquet: missing"]
    for name in TEXTS:
        if (folder / name).is_file():
            found += _text_problems(name, (folder / name).read_text(errors="replace"))
    for table in tables:
        found += _table_problems(table)
    if (folder / "model.safetensors").is_file():
        found += _model_problems(folder / "model.safetensors")
    return found


def _unexpected(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield f"{name}: expected a regular file, not a link or device"
        elif path.is_dir() and name != "data":
            yield f"{name}: unexpected folder"
        elif path.is_file() and name not in FILES and not DATA.fullmatch(name):
            yield f"{name}: unexpected file"


def _text_problems(name: str, text: str) -> list[str]:
    text = _DATA_URI.sub("", text)
    found = [f"{name}: sensitive name {word!r}" for word in _SENSITIVE_WORDS if word in text]
    if _SENSITIVE_MARK.search(text):
        found.append(f"{name}: content marked sensitive")
    found += [f"{name}: private path {match!r}" for match in sorted(set(_PRIVATE_PATH.findall(text)))]
    return found


def _table_problems(path: Path) -> list[str]:
    name = f"data/{path.name}"
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if sorted(schema.names) != ["image", "label"]:
                return [f"{name}: expected the columns image and label, found {', '.join(schema.names)}"]
            if sorted(field.name for field in schema.field("image").type) != ["bytes", "path"]:
                return [f"{name}: expected image to hold bytes and path, found {schema.field('image').type}"]
            notes = " ".join(f"{key!r} {value!r}" for key, value in (schema.metadata or {}).items())
            paths = file.read(["image.path"])["image"].combine_chunks().flatten()[0].drop_null().to_pylist()
    except (pa.ArrowException, OSError, TypeError, AttributeError) as error:
        return [f"{name}: expected a Parquet file with columns image (bytes, path) and label ({type(error).__name__})"]
    found = _text_problems(name, notes)
    private = next((value for value in paths if value.startswith(("/", "~")) or ":" in value or ".." in value), None)
    return found if private is None else [*found, f"{name}: private path {private!r} in image.path"]


def _model_problems(path: Path) -> list[str]:
    try:
        with safe_open(str(path), "numpy") as file:
            notes = json.dumps(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        return [f"{path.name}: expected a safetensors file ({type(error).__name__})"]
    return _text_problems(path.name, notes)


def ledger_problems(folder: Path) -> list[str]:
    """A ledger that is incomplete, says too much, or states an epsilon that its events don't give."""
    if not (folder / "ledger.json").is_file():
        return []
    try:
        ledger = read_ledger(folder / "ledger.json")
        found = [f"ledger.json: {key} is missing" for key in LEDGER_KEYS if key not in ledger]
        found += [
            f"ledger.json: unexpected entry {k!r}"
            for k in ledger
            if k not in (*LEDGER_KEYS, "not_private", "ledger_head")
        ]
        stated, again = stated_epsilon(ledger), recompute(ledger)
    except InputError as error:
        return [f"ledger.json: {error}"]
    if not abs(stated - again) <= TOLERANCE:
        found.append(f"ledger.json: epsilon={stated:.9g}: its events give {again:.9g}")
    if not stated <= float(ledger.get("target_epsilon", stated)) + TOLERANCE:
        found.append(f"ledger.json: epsilon={stated:.9g}: above target_epsilon={ledger['target_epsilon']}")
    return found


def _not_private(folder: Path) -> list[str]:
    """Files that carry the stamp of test mode, each on its own: parts of two runs may have been mixed."""
    marked = [name for name in ("ledger.json",) if '"not_private": true' in _text(folder / name)]
    marked += [f"data/{path.name}" for path in sorted(folder.glob("data/*.parquet")) if NOT_PRIVATE in _notes(path)]
    marked += [name for name in ("model.safetensors", "grid.png") if NOT_PRIVATE in _notes(folder / name)]
    return [f"{name}: {NOT_PRIVATE}" for name in marked]


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _notes(path: Path) -> str:
    """The metadata that a file carries, as text; unreadable files are reported elsewhere."""
    try:
        if path.suffix == ".parquet":
            return " ".join(str(value, errors="replace") for value in (pq.read_schema(path).metadata or {}).values())
        if path.suffix == ".png":
            with Image.open(path) as picture:
                return " ".join(str(value) for value in picture.info.values())
        with safe_open(str(path), "numpy") as file:
            return " ".join((file.metadata() or {}).values())
    except (pa.ArrowException, SafetensorError, OSError):
        return ""
