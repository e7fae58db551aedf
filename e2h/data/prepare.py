"""From listed shards to a prepared set: decode, fit and write each shard, then check the whole.

Work is per record, and the checks read merged counts, so a cluster can prepare the shards in any order and any number
of times: the same input gives the same rows in the same order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from e2h.config import DataConfig
from e2h.data import filesystem
from e2h.data.images import CorruptImage, decode, fit
from e2h.data.records import RawRecord, Shard, Source, path_error, record_id, record_split, upscale_error
from e2h.data.sources import read_shard
from e2h.data.storage import SPLITS, Manifest, PreparedFile, Row, RowWriter, read_ids, row_writer, write_manifest
from e2h.errors import InputError

MIN_TRAIN_IMAGES = 2  # a class
SHOWN = 5  # examples in a message
REJECTED_LEVELS = (0.01, 0.1, 0.5)

SourceSize = tuple[int, int, int, str]  # area, height, width, record name: comparable


@dataclass
class ShardStats:
    """What one prepared shard adds to the checks of the whole; mergeable, plain data."""

    index: int
    listed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 of the rows; only splits with rows
    train_class_counts: dict[int, int] = field(default_factory=dict)
    rejected: list[dict[str, str]] = field(default_factory=list)  # name, reason
    smallest: SourceSize | None = None
    largest: SourceSize | None = None

    def add(self, split: str, label: int, size: SourceSize) -> None:
        """Counts one accepted record."""
        self.rows[split] += 1
        if split == "train":
            self.train_class_counts[label] = self.train_class_counts.get(label, 0) + 1
        self.smallest = size if self.smallest is None else min(self.smallest, size)
        self.largest = size if self.largest is None else max(self.largest, size)


def prepare_shard(shard: Shard, data: DataConfig, folder: filesystem.Location, index: int) -> ShardStats:
    """Reads, decodes and fits one shard and writes `train-00000.parquet` and `test-00000.parquet` (where not empty).

    Running it again writes the same rows under the same names.

    Args:
      shard: from `open_source`.
      data: the settings `shard` was listed with.
      folder: the prepared folder; created owner-only if absent.
      index: the shard's position in `Source.shards`, part of the file names.

    Raises:
      InputError: a label outside the classes, or an image that declares too many pixels; the record is named.
    """
    filesystem.make_folder(folder)
    stats = ShardStats(index)
    with ExitStack() as stack:  # after an exception neither file appears
        writers: dict[str, RowWriter] = {}
        for record in read_shard(shard, data):
            split = record_split(record.name, shard, data.test_fraction)
            row = _fitted(record, split, data, stats)
            if row is None:
                continue
            if split not in writers:
                location = filesystem.join(folder, _file_name(split, index))
                writer = row_writer(location, (data.image_size, data.channels), shard.class_names)
                writers[split] = stack.enter_context(writer)
            writers[split].add(row)
    stats.digests = {split: writer.digest() for split, writer in writers.items()}
    return stats


def _fitted(record: RawRecord, split: str, data: DataConfig, stats: ShardStats) -> Row | None:
    """The record's row, or None if it is corrupt; counted either way."""
    stats.listed[split] += 1
    try:
        image = _pixels(record)
    except CorruptImage as error:
        stats.rejected.append({"name": record.name, "reason": str(error)})
        return None
    height, width = image.shape[:2]
    stats.add(split, record.label, (height * width, height, width, record.name))
    return record_id(record.name), record.label, fit(image, data.image_size, data.channels).tobytes()


def _pixels(record: RawRecord) -> np.ndarray:
    if isinstance(record.content, np.ndarray):
        return record.content
    try:
        return decode(record.content)
    except InputError as error:
        raise InputError(f"record={record.name}: {error}") from error


def finish_prepared(
    folder: filesystem.Location, source: Source, data: DataConfig, stats: Sequence[ShardStats]
) -> Manifest:
    """Checks the whole and writes `rejected.jsonl` (if any) and, last, `meta.json`.

    Raises:
      InputError: too many corrupt images, sizes against `data.resize`, a class with fewer than two training images,
        ids that repeat, shards missing or twice. Then there is no `meta.json` and the caller removes the folder; the
        list of too many corrupt images is kept beside it (`<folder>.rejected.jsonl`).
    """
    stats = sorted(stats, key=lambda one: one.index)
    num_listed = _check_complete(source, data, stats)
    rejected = [entry for one in stats for entry in one.rejected]
    _check_rejected(folder, data, rejected, sum(num_listed.values()))
    _check_sizes(data, stats)
    _check_classes(source, data, stats)
    files = {split: _list_files(split, stats) for split in SPLITS}
    _check_ids(folder, data, [file for split in SPLITS for file in files[split]])
    manifest = Manifest(
        num_train=sum(file.rows for file in files["train"]),
        num_test=sum(file.rows for file in files["test"]),
        num_listed_train=data.num_records if data.num_records is not None else num_listed["train"],
        image_size=data.image_size,
        channels=data.channels,
        class_names=source.class_names,
        num_rejected=len(rejected),
        digest=_digest_files(files),
        files=files,
    )
    filesystem.remove(_refused_list(folder))
    if rejected:
        _write_rejected(filesystem.join(folder, "rejected.jsonl"), rejected)
    write_manifest(folder, manifest)
    return manifest


def _file_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.parquet"


def _list_files(split: str, stats: Sequence[ShardStats]) -> tuple[PreparedFile, ...]:
    with_rows = [one for one in stats if one.rows[split]]
    return tuple(PreparedFile(_file_name(split, one.index), one.rows[split], one.digests[split]) for one in with_rows)


def _digest_files(files: dict[str, tuple[PreparedFile, ...]]) -> str:
    lines = "".join(f"{file.name}:{file.digest}\n" for split in SPLITS for file in files[split])
    return hashlib.sha256(lines.encode()).hexdigest()


def _check_complete(source: Source, data: DataConfig, stats: Sequence[ShardStats]) -> dict[str, int]:
    """Listed records by split; a shard that ran twice would double records, and with them the sensitivity."""
    indices = [one.index for one in stats]
    listed = {split: sum(one.listed[split] for one in stats) for split in SPLITS}
    if indices != list(range(len(source.shards))) or listed != {"train": source.num_train, "test": source.num_test}:
        raise path_error(data, "every listed record exactly once", "the source changed meanwhile; prepare again")
    return listed


def _check_rejected(
    folder: filesystem.Location, data: DataConfig, rejected: list[dict[str, str]], num_listed: int
) -> None:
    share = len(rejected) / num_listed
    if share <= data.max_rejected_fraction:
        return
    where = _refused_list(folder)
    _write_rejected(where, rejected)
    shown = ", ".join(f"{entry['name']} ({entry['reason']})" for entry in rejected[:SHOWN])
    raise InputError(
        f"data.max_rejected_fraction={data.max_rejected_fraction}: expected at most this share of corrupt images, "
        f"found {len(rejected)} of {num_listed} ({share:.2%}): {shown}{', ...' if len(rejected) > SHOWN else ''}; "
        f"all are listed in {where}; repair or remove them{_or_skip(share)}"
    )


def _refused_list(folder: filesystem.Location) -> str:
    """Where the list is while the set itself is refused."""
    return f"{str(folder).rstrip('/')}.rejected.jsonl"


def _or_skip(share: float) -> str:
    """Advice of one of few levels: the setting is published, and the very share would tell what one record changes."""
    level = next((level for level in REJECTED_LEVELS if level >= share), None)
    return f", or skip them: data.max_rejected_fraction={level:g}" if level else ""


def _write_rejected(location: str, rejected: list[dict[str, str]]) -> None:
    filesystem.write_bytes(location, "".join(json.dumps(entry) + "\n" for entry in rejected).encode())


def _check_sizes(data: DataConfig, stats: Sequence[ShardStats]) -> None:
    smallest = min((one.smallest for one in stats if one.smallest), default=None)
    largest = max((one.largest for one in stats if one.largest), default=None)
    if data.resize == "any" or smallest is None or largest is None:
        return
    _, height, width, example = smallest
    if smallest[:3] != largest[:3]:
        raise InputError(
            f"data.resize=uniform: expected source images of one size, found {width}x{height} ({example}) and "
            f"{largest[2]}x{largest[1]} ({largest[3]}); data.resize=any crops and resizes each image"
        )
    if min(height, width) < data.image_size:
        raise upscale_error(height, width, example, data)


def _check_classes(source: Source, data: DataConfig, stats: Sequence[ShardStats]) -> None:
    for label, name in enumerate(source.class_names):
        count = sum(one.train_class_counts.get(label, 0) for one in stats)
        if count < MIN_TRAIN_IMAGES:
            found = f"at least {MIN_TRAIN_IMAGES} readable training images a class, class {name!r} has {count}"
            raise path_error(data, found, "add images, or leave the class out")


def _check_ids(folder: filesystem.Location, data: DataConfig, files: Sequence[PreparedFile]) -> None:
    ids = np.concatenate([read_ids(filesystem.join(folder, file.name)) for file in files])
    num_unique = len(np.unique(ids))
    if num_unique != sum(file.rows for file in files):
        raise path_error(data, f"rows with unique ids, found {num_unique} ids in {len(ids)} rows", "prepare again")
