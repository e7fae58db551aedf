"""CIFAR-10 and CIFAR-100, as binary or as Python batches (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
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

SIDE = 32
PIXELS = 3 * SIDE * SIDE  # a red, a green and a blue plane


@dataclass(frozen=True)
class Layout:
    """File names of one published form; binary rows are label bytes (the last one counts), then pixels."""

    train: str
    test: str
    names_file: str
    num_classes: int
    label_bytes: int = 0  # 0: Python batches
    names_key: str = ""


LAYOUTS = (
    Layout(r"data_batch_\d+\.bin", r"test_batch\.bin", "batches.meta.txt", 10, label_bytes=1),
    Layout(r"train\.bin", r"test\.bin", "fine_label_names.txt", 100, label_bytes=2),
    Layout(r"data_batch_\d+", "test_batch", "batches.meta", 10, names_key="label_names"),
    Layout("train", "test", "meta", 100, names_key="fine_label_names"),
)


def open_cifar(data: DataConfig) -> Source:
    """Lists a folder with the train and test batches of one of the four published forms."""
    found = [name for name, _ in filesystem.list_files(str(data.path))]
    layout = _find_layout(found, data)
    check_array_size(SIDE, SIDE, data)
    names = choose_class_names(_own_names(layout, found, data), data)
    shards = []
    for split, pattern in (("train", layout.train), ("test", layout.test)):
        for name in (name for name in found if re.fullmatch(pattern, name)):
            location = filesystem.join(str(data.path), name)
            ranges = cut(_count(layout, location), data.records_per_shard)
            shards += [Shard(split, names, location, name, *part) for part in ranges]
    return make_source(shards, names, data)


def _find_layout(found: list[str], data: DataConfig) -> Layout:
    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in found)

    fitting = [layout for layout in LAYOUTS if has(layout.train) and has(layout.test)]
    if len(fitting) != 1:
        expectation = "a folder with the batches of one form (data_batch_1.bin ... test_batch.bin, or train.bin, ...)"
        raise path_error(data, expectation, f"found {len(fitting)} forms; unpack the archive, one a folder")
    return fitting[0]


def _own_names(layout: Layout, found: list[str], data: DataConfig) -> list[str]:
    if layout.names_file not in found:
        return [str(label) for label in range(layout.num_classes)]
    location = filesystem.join(str(data.path), layout.names_file)
    if layout.label_bytes:
        names = filesystem.read_bytes(location).decode(errors="replace").strip().splitlines()
    else:
        listed = _load_batch(location).get(layout.names_key)
        names = [_text(name) for name in listed] if isinstance(listed, list) else []
    if len(names) != layout.num_classes:
        raise InputError(f"file={location}: expected {layout.num_classes} class names, found {len(names)}; fetch again")
    return names


def _count(layout: Layout, location: str) -> int:
    if not layout.label_bytes:
        return len(_python_batch(location)[0])
    with filesystem.open_input(location) as file:
        count, rest = divmod(file.size(), layout.label_bytes + PIXELS)
    if rest or not count:
        raise InputError(f"file={location}: expected whole records of {layout.label_bytes + PIXELS} bytes; fetch again")
    return count


def read_cifar(shard: Shard, data: DataConfig) -> Iterator[RawRecord]:
    """Yields uint8 [32, 32, 3] images."""
    pixels, labels = _binary_rows(shard) if shard.name.endswith(".bin") else _python_rows(shard)
    images = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    for index, image, label in zip(range(shard.start, shard.stop), images, labels, strict=True):
        name = f"{shard.name}:{index}"
        yield RawRecord(name, image, check_label(name, label, len(shard.class_names)))


def _binary_rows(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    layout = next(layout for layout in LAYOUTS if re.fullmatch(f"{layout.train}|{layout.test}", shard.name))
    width = layout.label_bytes + PIXELS
    with filesystem.open_input(shard.file) as file:
        file.seek(shard.start * width)
        rows = np.frombuffer(file.read(len(shard) * width), dtype=np.uint8).reshape(-1, width)
    return rows[:, layout.label_bytes :], rows[:, layout.label_bytes - 1]


def _python_rows(shard: Shard) -> tuple[np.ndarray, list[int]]:
    pixels, labels = _python_batch(shard.file)
    return pixels[shard.start : shard.stop], labels[shard.start : shard.stop]


def _python_batch(location: str) -> tuple[np.ndarray, list[int]]:
    batch = _load_batch(location)
    pixels, labels = batch.get("data"), batch.get("fine_labels", batch.get("labels"))
    shape = pixels.shape if isinstance(pixels, np.ndarray) else None
    if not isinstance(labels, list) or not labels or shape != (len(labels), PIXELS):
        raise InputError(f"file={location}: expected `data` (uint8 [N, {PIXELS}]) and N labels; fetch again")
    return np.asarray(pixels), labels


def _load_batch(location: str) -> dict[str, Any]:
    content = filesystem.read_bytes(location)
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
        values = {_text(key): value for key, value in batch.items()}
        return {key: value.pixels() if isinstance(value, _Array) else value for key, value in values.items()}
    except Exception as error:  # a hostile pickle can make the machine raise almost anything
        raise InputError(f"file={location}: expected a CIFAR Python batch ({error}); no other is unpickled") from error


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class _Array:
    """Stands in for numpy.ndarray while a pickle is read: keeps the state, runs nothing."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def pixels(self) -> np.ndarray:
        """The uint8 array that the state describes: version, shape, dtype, column order, bytes."""
        _, shape, dtype, columns_first, content = self.state
        if _text(dtype.name) not in ("u1", "|u1"):
            raise ValueError(f"dtype {dtype.name} instead of uint8")
        return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if columns_first else "C")


class _DType:
    """Stands in for numpy.dtype."""

    def __init__(self, name: Any, *flags: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like say nothing about single bytes."""


def _reconstruct(*arguments: Any) -> _Array:
    """How numpy makes the empty array whose state follows."""
    return _Array()


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 spells bytes; the real `_codecs.encode` would offer every codec."""
    return text.encode("latin1")


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _latin1,
}


class _BatchUnpickler(pickle.Unpickler):
    """Knows plain values and the stand-ins, and nothing else, so that loading a batch can't run code."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None
