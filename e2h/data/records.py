"""What every source is turned into: shards of named, labelled records, and the public rules on their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from e2h.config import DataConfig
from e2h.errors import InputError

TEST_SPLIT_KEY = b"e2h/test-split"  # public and fixed, so that a record stays on its side for ever
MAX_FILE_BYTES = 256 * 2**20  # one image file; 64 million pixels with alpha, uncompressed


@dataclass(frozen=True)
class RawRecord:
    """One record as the source holds it.

    Attributes:
      name: unique in the source and the same in every run, e.g. `cats/0001.png`, `train.parquet:17`.
      content: an image file's bytes, or uint8 [H, W, C].
      label: index into the class names.
    """

    name: str
    content: bytes | np.ndarray
    label: int


@dataclass(frozen=True)
class Shard:
    """Records [start, stop) of one file, all of one split group: plain data that can be sent anywhere.

    Attributes:
      split: `train`, `test`, or `all` where the source has no split of its own.
      class_names: public; a label is an index into them.
      file: what to read (for an image folder the folder or zip).
      name: public prefix of the record names (`prefix:index`).
      labels_file: where the labels lie apart from the images (IDX).
      members: image files with their labels (image folder); their names are the record names.
    """

    split: str
    class_names: tuple[str, ...]
    file: str
    name: str
    start: int
    stop: int
    labels_file: str = ""
    members: tuple[tuple[str, int], ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start

    def record_names(self) -> Iterator[str]:
        if self.members:
            return (name for name, _ in self.members)
        return (f"{self.name}:{index}" for index in range(self.start, self.stop))


@dataclass(frozen=True)
class Source:
    """A listed source. `num_train` and `num_test` count what is listed, before any corrupt image is found.

    `remarks` say, a sentence each, what was understood that an owner may not have meant; they may name folders.
    """

    shards: tuple[Shard, ...]
    class_names: tuple[str, ...]
    num_train: int
    num_test: int
    remarks: tuple[str, ...] = ()


def few(words: Sequence[str], most: int = 5) -> str:
    """The first of many, for a line."""
    return ", ".join(words[:most]) + (", ..." if len(words) > most else "")


def record_id(name: str) -> int:
    """63-bit BLAKE2b hash of a record's name: a stable id that fits a signed 64-bit column."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def is_test(name: str, test_fraction: float) -> bool:
    """Whether a record is held out, decided by a keyed hash of its name alone.

    Adding or removing another record never moves it (a shuffled split would), so the split costs no privacy.
    """
    value = hashlib.blake2b(name.encode(), digest_size=8, key=TEST_SPLIT_KEY).digest()
    return int.from_bytes(value, "little") < int(test_fraction * 2**64)


def record_split(name: str, shard: Shard, test_fraction: float) -> str:
    """`train` or `test`: the source's own split, or the hash rule."""
    if shard.split != "all":
        return shard.split
    return "test" if is_test(name, test_fraction) else "train"


def cut(total: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) ranges of at most `size` that cover [0, total)."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def make_source(shards: Sequence[Shard], class_names: tuple[str, ...], data: DataConfig) -> Source:
    """Counts the listed records of each split."""
    counts = {"train": 0, "test": 0}
    for shard in shards:
        if shard.split == "all":
            held_out = sum(is_test(name, data.test_fraction) for name in shard.record_names())
            counts["test"] += held_out
            counts["train"] += len(shard) - held_out
        else:
            counts[shard.split] += len(shard)
    return Source(tuple(shards), class_names, counts["train"], counts["test"])


def choose_class_names(own: Sequence[str], data: DataConfig, fixed: bool = True) -> tuple[str, ...]:
    """`data.class_names` where set, else the source's own.

    Args:
      own: the source's names.
      data: the settings.
      fixed: whether the source's number of classes is known, so that another number is an error.
    """
    if data.class_names is None:
        return tuple(own)
    if fixed and len(data.class_names) != len(own):
        raise InputError(
            f"data.class_names={list(data.class_names)}: expected {len(own)} names, one for each of "
            f"{_short(own)}; correct the list or leave it out"
        )
    return tuple(data.class_names)


def check_label(name: str, label: object, num_classes: int) -> int:
    """The label as an int.

    Raises:
      InputError: naming the record, if the label is absent or outside [0, num_classes).
    """
    if not isinstance(label, int | np.integer) or not 0 <= label < num_classes:
        raise InputError(
            f"label={label}: expected a whole number in [0, {num_classes}) for record {name}; "
            f"correct the labels or data.class_names"
        )
    return int(label)


def check_array_size(height: int, width: int, data: DataConfig) -> None:
    """Refuses an upscale of images whose size is known without decoding."""
    if data.resize == "uniform" and min(height, width) < data.image_size:
        raise upscale_error(height, width, f"data.source={data.source}", data)


def upscale_error(height: int, width: int, example: str, data: DataConfig) -> InputError:
    """The error of source images that are smaller than `data.image_size`."""
    return InputError(
        f"data.image_size={data.image_size}: expected at most {min(height, width)}, the source's images are "
        f"{width}x{height} ({example}); choose a smaller size or data.resize=any"
    )


def path_error(data: DataConfig, expectation: str, advice: str = "") -> InputError:
    """The error of an unusable `data.path`."""
    return InputError(f"data.path={data.path}: expected {expectation}" + (f"; {advice}" if advice else ""))


def _short(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown}, ... ({len(names)})"
