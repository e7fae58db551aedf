"""The IDX files of MNIST and its relatives, gzipped or not (format: http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from e2h.config import DataConfig
from e2h.data import filesystem
from e2h.data.records import (
    RawRecord,
    Shard,
    Source,
    check_array_size,
    check_label,
    choose_class_names,
    cut,
    make_source,
    path_error,
)
from e2h.errors import InputError

FILES = {"train": "train-{}-ubyte", "test": "t10k-{}-ubyte"}
IMAGES, LABELS = "images-idx3", "labels-idx1"
MAGIC = {IMAGES: 0x803, LABELS: 0x801}  # unsigned bytes in 3 dimensions, in 1
CHUNK = 2**20


def open_idx(data: DataConfig) -> Source:
    """Lists a folder with the four MNIST files; headers are held against the real sizes, gzipped ones included."""
    names = choose_class_names([str(digit) for digit in range(10)], data, fixed=False)
    found = {name for name, _ in filesystem.list_files(str(data.path))}
    shards: list[Shard] = []
    for split, pattern in FILES.items():
        images, labels = (_find(found, pattern.format(part), data) for part in (IMAGES, LABELS))
        shards += _split_shards(split, names, images, labels, data)
    return make_source(shards, names, data)


def _find(found: set[str], name: str, data: DataConfig) -> str:
    for candidate in (name, f"{name}.gz"):
        if candidate in found:
            return filesystem.join(str(data.path), candidate)
    raise path_error(data, f"a folder with {name} (or .gz)", "the four MNIST file names are needed")


def _split_shards(split: str, names: tuple[str, ...], images: str, labels: str, data: DataConfig) -> list[Shard]:
    count, height, width = _check_file(images, IMAGES)
    (num_labels,) = _check_file(labels, LABELS)
    if count != num_labels:
        raise InputError(
            f"file={labels}: expected {count} labels, one for each image, found {num_labels}; fetch it again"
        )
    check_array_size(height, width, data)
    prefix = images.rsplit("/", 1)[-1].removesuffix(".gz")  # names don't change when the file is unpacked
    return [Shard(split, names, images, prefix, *part, labels) for part in cut(count, data.records_per_shard)]


def _check_file(location: str, part: str) -> tuple[int, ...]:
    """The dimensions in the header, after the content's length was held against them."""
    with _open(location) as file:
        shape = _read_header(file, location, part)
        size, expected = 0, math.prod(shape)
        while size <= expected and (chunk := file.read(CHUNK)):
            size += len(chunk)
    if size != expected:
        found = "more" if size > expected else f"{size}"
        raise InputError(
            f"file={location}: expected {expected} bytes after the header, found {found}; fetch the file again"
        )
    if not expected:
        raise InputError(f"file={location}: expected records, the header counts none")
    return shape


def _read_header(file: Any, location: str, part: str) -> tuple[int, ...]:
    dimensions = MAGIC[part] & 0xFF
    header = file.read(4 + 4 * dimensions)
    magic = int.from_bytes(header[:4], "big")
    if len(header) < 4 + 4 * dimensions or magic != MAGIC[part]:
        raise InputError(f"file={location}: expected an IDX file with magic number {MAGIC[part]:#x}, found {magic:#x}")
    return struct.unpack(f">{dimensions}I", header[4:])


@contextmanager
def _open(location: str) -> Iterator[Any]:
    with filesystem.open_input(location) as raw:
        try:
            yield gzip.GzipFile(fileobj=raw) if location.endswith(".gz") else raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"file={location}: expected a whole gzip file ({error}); fetch again") from error


def read_idx(shard: Shard, data: DataConfig) -> Iterator[RawRecord]:
    """Yields uint8 [H, W, 1] images."""
    with _open(shard.labels_file) as file:
        _read_header(file, shard.labels_file, LABELS)
        labels = np.frombuffer(file.read(), dtype=np.uint8)
    with _open(shard.file) as file:
        _, height, width = _read_header(file, shard.file, IMAGES)
        file.seek(16 + shard.start * height * width)
        block = file.read(len(shard) * height * width)
    images = np.frombuffer(block, dtype=np.uint8).reshape(-1, height, width, 1)
    for index, image in zip(range(shard.start, shard.stop), images, strict=True):
        name = f"{shard.name}:{index}"
        yield RawRecord(name, image, check_label(name, labels[index], len(shard.class_names)))
