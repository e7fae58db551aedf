"""Parquet: the Hugging Face image layout, a binary column of image files, or raw pixels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from e2h.config import DataConfig
from e2h.data import filesystem
from e2h.data.links import refuse_double_links
from e2h.data.records import (
    RawRecord,
    Shard,
    Source,
    check_label,
    choose_class_names,
    cut,
    make_source,
    path_error,
)
from e2h.errors import InputError, one_line

BATCH = 256  # rows decoded at a time
MAX_CLASSES = 10_000  # above this an integer column is hardly a label


@dataclass(frozen=True)
class _File:
    location: str
    name: str  # relative to data.path
    rows: int
    schema: pa.Schema


def open_parquet(data: DataConfig) -> Source:
    """Lists a Parquet file, or a folder of them; only metadata and, without class names, the label column are read.

    Raises:
      InputError: no files or rows, a missing or unusable column, files with and without a split in one folder, a link
        by which a file is listed twice.
    """
    groups = _split_groups([_open_file(data, name) for name in _list_names(data)], data)
    files = [file for group in groups.values() for file in group]
    for file in files:
        _check_columns(file, data)
    names = _class_names(files, data)
    shards = [
        Shard(split, names, file.location, file.name, *part)
        for split, group in groups.items()
        for file in group
        for part in cut(file.rows, data.records_per_shard)
    ]
    if not any(shard.split != "test" for shard in shards):
        raise path_error(data, "rows to train on, found none")
    return make_source(shards, names, data)


def _list_names(data: DataConfig) -> list[str]:
    path = str(data.path)
    if filesystem.kind(path) == "file":
        return [""]
    refuse_double_links(data, (".parquet",))
    names = [name for name, _ in filesystem.list_files(path) if name.lower().endswith(".parquet")]
    if not names:
        raise path_error(data, "a Parquet file or a folder of them, found no *.parquet")
    return names


def _open_file(data: DataConfig, name: str) -> _File:
    path = str(data.path)
    location = filesystem.join(path, name) if name else path
    try:
        with filesystem.open_input(location) as file:
            parquet = pq.ParquetFile(file)
            return _File(location, name or path.rsplit("/", 1)[-1], parquet.metadata.num_rows, parquet.schema_arrow)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"file={location}: expected a Parquet file ({one_line(error)}); fetch again") from error


def _split_groups(files: list[_File], data: DataConfig) -> dict[str, list[_File]]:
    """Files by split: `train` and `test` where the names say so, else `all`."""
    by_word: dict[str | None, list[_File]] = {}
    for file in files:
        by_word.setdefault(_split_word(file.name), []).append(file)
    if len(files) == 1 or by_word.keys() == {None} or by_word.keys() == {"train"}:
        return {"all": files}
    if None in by_word or "train" not in by_word:
        words = ", ".join(f"{group[0].name}: {word or 'no split'}" for word, group in by_word.items())
        raise path_error(data, f"train*.parquet with test*.parquet, or no splits at all, found {words}", "rename them")
    return {"train": by_word["train"], "test": by_word["test" if "test" in by_word else "validation"]}


def _split_word(name: str) -> str | None:
    """`train`, `test` or `validation`, from a folder of that name or the beginning of the file's."""
    *folders, base = name.lower().split("/")
    for part in (*folders, base):
        pattern = r"(train|test|validation|val(?![a-z]))" + (".*" if part is base else "")
        if match := re.fullmatch(pattern, part):
            return "validation" if match[1].startswith("val") else match[1]
    return None


def _check_columns(file: _File, data: DataConfig) -> None:
    columns = {field.name: field.type for field in file.schema}
    for key, name in (("image_column", data.image_column), ("label_column", data.label_column)):
        if name is not None and name not in columns:
            raise InputError(f"data.{key}={name}: expected one of {', '.join(columns)} (the columns of {file.name})")
        if file.schema.names.count(name) > 1:
            raise InputError(f"data.{key}={name}: expected one such column in {file.name}, found several; rename them")
    image = columns[data.image_column]
    place = image.get_field_index("bytes") if pa.types.is_struct(image) else -1  # -1 for none, and for several
    if not _is_binary(image.field(place).type if place >= 0 else image):
        raise InputError(
            f"data.image_column={data.image_column}: expected struct<bytes, path> or binary, found {image}"
        )
    if data.label_column is not None and not pa.types.is_integer(columns[data.label_column]):
        found = columns[data.label_column]
        raise InputError(f"data.label_column={data.label_column}: expected whole numbers, found {found} in {file.name}")


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _class_names(files: list[_File], data: DataConfig) -> tuple[str, ...]:
    if data.label_column is None:
        return choose_class_names(["image"], data)
    own = _class_label_names(files[0].schema, data.label_column)
    if own is not None:
        return choose_class_names(own, data)
    if data.class_names is not None:
        return tuple(data.class_names)
    return tuple(str(label) for label in range(_max_label(files, data.label_column) + 1))


def _class_label_names(schema: pa.Schema, column: str) -> list[str] | None:
    """The names of a Hugging Face ClassLabel, if the schema's metadata has one."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _max_label(files: list[_File], column: str) -> int:
    top = -1
    for file in files:
        with filesystem.open_input(file.location) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(columns=[column]):
                top = max(top, pc.max(batch.column(0)).as_py() or 0)
    if not 0 <= top < MAX_CLASSES:
        raise InputError(
            f"data.label_column={column}: expected labels below {MAX_CLASSES}, found {top}; see class_names"
        )
    return top


def read_parquet(shard: Shard, data: DataConfig) -> Iterator[RawRecord]:
    """Yields image files' bytes, or uint8 arrays where the column holds raw pixels; a missing image yields none."""
    columns = [data.image_column] + ([data.label_column] if data.label_column else [])
    with filesystem.open_input(shard.file) as stream:
        file = pq.ParquetFile(stream)
        groups, first = _row_groups(file.metadata, shard)
        batches = file.iter_batches(batch_size=BATCH, row_groups=groups, columns=columns)
        for index, content, label in _rows(batches, first, shard, data):
            name = f"{shard.name}:{index}"
            yield RawRecord(name, _pixels(content, data), check_label(name, label, len(shard.class_names)))


def _row_groups(metadata: Any, shard: Shard) -> tuple[list[int], int]:
    """The row groups that overlap a shard, and the index of their first row."""
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    stops = np.cumsum(sizes)
    groups = [g for g, stop in enumerate(stops) if stop > shard.start and stop - sizes[g] < shard.stop]
    return groups, int(stops[groups[0]] - sizes[groups[0]])


def _rows(batches: Iterator[Any], first: int, shard: Shard, data: DataConfig) -> Iterator[tuple[int, bytes, Any]]:
    """The rows of a shard, of batches from row `first` on: a row group may be much larger than a shard."""
    for batch in batches:
        if first >= shard.stop:
            return
        skipped = min(len(batch), max(0, shard.start - first))
        batch = batch.slice(skipped, shard.stop - first - skipped)
        first += skipped
        images = batch.column(data.image_column)
        contents = images.field("bytes") if pa.types.is_struct(images.type) else images
        labels = batch.column(data.label_column).to_pylist() if data.label_column else [0] * len(batch)
        for offset, (content, label) in enumerate(zip(contents.to_pylist(), labels, strict=True)):
            yield first + offset, content or b"", label
        first += len(batch)


def _pixels(content: bytes, data: DataConfig) -> bytes | np.ndarray:
    shape = (data.image_size, data.image_size, data.channels)
    if len(content) != np.prod(shape) or _is_image_file(content):
        return content
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _is_image_file(content: bytes) -> bool:
    """Marks long enough that raw pixels of just the right number don't have them by chance."""
    jpeg = content.startswith(b"\xff\xd8\xff") and content.endswith(b"\xff\xd9")
    bmp = content.startswith(b"BM") and int.from_bytes(content[2:6], "little") == len(content)
    webp = content.startswith(b"RIFF") and content[8:12] == b"WEBP"
    return jpeg or bmp or webp or content.startswith((b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))
