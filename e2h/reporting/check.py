"""What is wrong with a release folder: anything unexpected, sensitive, private or false in it."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open

from e2h.config import NOT_PRIVATE
from e2h.data.private_paths import private_paths
from e2h.errors import InputError
from e2h.reporting.metrics import METRICS, ReleaseClass
from e2h.reporting.recompute import TOLERANCE, read_ledger, recompute, stated_epsilon

TEXTS = ("README.md", "ledger.json", "config.yaml", "report.html")
FILES = (*TEXTS, "model.safetensors", "grid.png")
DATA = re.compile(r"data/[A-Za-z0-9][\w.-]*\.parquet")
FIGURES = re.compile(r"figures/(budget|trade_off|epsilon_by_step|noise_by_share|trials)\.svg")
FOLDERS = ("data", "figures")
# Say where the private data, the run and its secret lie, not how the release was made.
PRIVATE_KEYS = (
    ("data", "path"),
    ("privacy", "secret"),
    ("evaluation", "inception_weights"),
    ("run", "storage"),
    ("ledger", "path"),
    ("search", "proxy", "path"),
)
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

# Of what somebody else wrote: yaml builds dates and numbers without asking whether they are any.
_NO_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError)
_DATA_URI = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]*)")
# Nothing but pixels: no text, no EXIF, no colour profile, nothing behind the end.
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_STAMP = b"not_private\0" + NOT_PRIVATE.encode()
_SENSITIVE_WORDS = (
    *(word for n, m in METRICS.items() if m.release_class is ReleaseClass.SENSITIVE for word in (n, m.title)),
    "evaluation.json",
    "baselines.json",
    "metrics.jsonl",
)
_SENSITIVE_MARK = re.compile(r"[\"']class[\"']\s*:\s*[\"']sensitive[\"']|release-class\"\s+content=\"sensitive\"")


def check(release_dir: str | os.PathLike[str]) -> list[str]:
    """Problems of a release folder, one line each; an empty list means that none was found.

    Looked for: unexpected or missing files, links, columns other than image and label, rows that the card does not
    count, images that carry more than pixels, metadata, words that belong to sensitive metrics, settings that are kept
    back, absolute paths and storage addresses, a ledger whose epsilon does not recompute or exceeds its target, and a
    run that was not private to begin with.
    """
    folder = Path(release_dir)
    try:
        if not folder.is_dir() or not any((folder / name).exists() for name in ("ledger.json", "README.md")):
            return [f"release_dir={folder}: expected a release folder, runs/NAME/release"]
        return [*content_problems(folder), *ledger_problems(folder), *_not_private(folder)]
    except OSError as error:
        return [f"release_dir={folder}: expected files that you may read ({error.strerror}: {error.filename})"]


def content_problems(folder: Path) -> list[str]:
    """Problems of the files themselves."""
    found = [*_unexpected(folder)]
    found += [f"{name}: missing" for name in FILES if not (folder / name).is_file()]
    tables, charts = sorted(folder.glob("data/*.parquet")), sorted(folder.glob("figures/*.svg"))
    found += [] if tables else ["data/*.parquet: missing"]
    for name in (*TEXTS, *(chart.relative_to(folder).as_posix() for chart in charts)):
        if (folder / name).is_file():
            found += _text_problems(name, (folder / name).read_text(errors="replace"))
    found += [*_foreign_content(charts), *_kept_back(folder / "config.yaml")]
    found += [problem for table in tables for problem in _table_problems(table)]
    found += _counts(folder / "README.md", tables) if not found else []
    if (folder / "model.safetensors").is_file():
        found += _model_problems(folder / "model.safetensors")
    if (folder / "grid.png").is_file():
        found += _png_problems("grid.png", (folder / "grid.png").read_bytes())
    return found


def _unexpected(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield f"{name}: expected a regular file, not a link or device"
        elif path.is_dir() and name not in FOLDERS:
            yield f"{name}: unexpected folder"
        elif path.is_file() and name not in FILES and not DATA.fullmatch(name) and not FIGURES.fullmatch(name):
            yield f"{name}: unexpected file"


def _text_problems(name: str, text: str) -> list[str]:
    found = [problem for uri in _DATA_URI.findall(text) for problem in _png_problems(name, _decoded(uri))][:1]
    text = _DATA_URI.sub("", text)
    found += [f"{name}: sensitive name {word!r}" for word in _SENSITIVE_WORDS if word in text]
    if _SENSITIVE_MARK.search(text):
        found.append(f"{name}: content marked sensitive")
    found += [f"{name}: private path {match!r}" for match in private_paths(text)]
    return found


def _decoded(uri: str) -> bytes:
    """What a data URI holds; nothing, which is no image either, where it is damaged."""
    with suppress(ValueError):
        return base64.b64decode(uri)
    return b""


def _png_problems(name: str, content: bytes) -> list[str]:
    """What a PNG file holds beside its pixels; other kinds of file are refused, they may be an original."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return [f"{name}: expected a PNG image"]
    place, kind = 8, b""
    while place < len(content):
        size, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        body = content[place + 8 : place + 8 + size]
        if kind not in _PNG_CHUNKS and (kind, body) != (b"tEXt", _STAMP):
            return [f"{name}: expected pixels alone, found an entry {kind.decode('latin-1')!r}"]
        place += size + 12
        if kind == b"IEND":
            break
    whole = kind == b"IEND" and place == len(content)
    return [] if whole else [f"{name}: expected a whole PNG image and nothing behind it"]


def _foreign_content(charts: list[Path]) -> Iterator[str]:
    for path in charts:
        found = re.search(r"<(script|image|foreignObject)\b|base64", path.read_text(errors="replace"))
        if found:
            yield f"figures/{path.name}: expected lines and words, found {found.group()!r}"


def _kept_back(path: Path) -> Iterator[str]:
    """Settings of `PRIVATE_KEYS` in a published configuration."""
    try:
        values = yaml.safe_load(path.read_text()) if path.is_file() else {}
    except _NO_YAML as error:
        yield f"{path.name}: expected YAML ({type(error).__name__})"
        return
    for keys in PRIVATE_KEYS:
        value: Any = values
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            yield f"{path.name}: private setting {'.'.join(keys)}"


def _table_problems(path: Path) -> list[str]:
    name = f"data/{path.name}"
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if sorted(schema.names) != ["image", "label"]:
                return [f"{name}: expected the columns image and label, found {', '.join(schema.names)}"]
            if sorted(field.name for field in schema.field("image").type) != ["bytes", "path"]:
                return [f"{name}: expected image to hold bytes and path, found {schema.field('image').type}"]
            if not pa.types.is_integer(schema.field("label").type):
                return [f"{name}: expected label to hold whole numbers, found {schema.field('label').type}"]
            notes = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
            found = _note_problems(name, notes, {"huggingface", "not_private"})
            for batch in file.iter_batches(1000):  # the labels too: damage shows in reading alone
                found += [
                    problem for row in batch.column("image").to_pylist() for problem in _image_problems(name, row)
                ]
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        return [f"{name}: expected a Parquet file with columns image (bytes, path) and label ({type(error).__name__})"]
    return list(dict.fromkeys(found))


def _image_problems(name: str, row: Mapping[str, Any]) -> list[str]:
    found = _png_problems(name, row["bytes"] or b"")
    return found if row["path"] is None else [*found, f"{name}: private path {row['path']!r} in image.path"]


def _note_problems(name: str, notes: Mapping[str, str], expected: Set[str]) -> list[str]:
    """Metadata of a file: entries that we don't write, and private words in those that we do."""
    found = [f"{name}: unexpected metadata {key!r}" for key in notes if key not in expected]
    return found + _text_problems(name, json.dumps(dict(notes)))


def _counts(card: Path, tables: list[Path]) -> Iterator[str]:
    """More or fewer rows than the card counts, and labels that it does not name."""
    try:
        described = yaml.safe_load(card.read_text().split("---\n")[1])["dataset_info"]
        stated = described["splits"][0]["num_examples"]
        names = set(map(str, described["features"][1]["dtype"]["class_label"]["names"].keys()))
    except _NO_YAML as error:
        yield f"{card.name}: expected the front matter of a dataset card ({type(error).__name__})"
        return
    labels = [label for table in tables for label in pq.read_table(table, columns=["label"])["label"].to_pylist()]
    if len(labels) != stated:
        yield f"data: expected the {stated} images that {card.name} counts, found {len(labels)}"
    if unknown := sorted({label for label in labels if str(label) not in names}, key=str):
        yield f"data: expected the labels that {card.name} names, found {unknown[0]}"


def _model_problems(path: Path) -> list[str]:
    try:
        with safe_open(str(path), "numpy") as file:
            notes = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        return [f"{path.name}: expected a safetensors file ({type(error).__name__})"]
    return _note_problems(path.name, notes, {"format", "not_private"})


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
        target = stated_epsilon(ledger, "target_epsilon") if "target_epsilon" in ledger else stated
    except InputError as error:
        return [f"ledger.json: {error}"]
    if not abs(stated - again) <= TOLERANCE:
        found.append(f"ledger.json: epsilon={stated:.9g}: its events give {again:.9g}")
    if not stated <= target + TOLERANCE:
        found.append(f"ledger.json: epsilon={stated:.9g}: above target_epsilon={target}")
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
    except (pa.ArrowException, SafetensorError, OSError, ValueError, Image.DecompressionBombError):
        return ""
