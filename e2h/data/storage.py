"""The canonical prepared set: Parquet shards of equal-sized uint8 images, and `meta.json` as the sign of a whole set.

Each shard has the columns id (int64), label (int32) and image (fixed-size binary, H*W*C bytes), and names its shape in
the schema metadata under `e2h`. All files are sensitive (owner-only).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from e2h.data import filesystem
from e2h.errors import InputError

SPLITS = ("train", "test")
FORMAT = "e2h-prepared/1"
BATCH = 1024  # rows read at a time
DAMAGED_FILE = "expected the bytes that were written; delete it, and the same command makes it again"
DAMAGED = "expected the bytes that were written; delete the folder that it is in, and the same command makes it again"
ROW_GROUP_BYTES = 16 * 2**20  # of pixels

Row = tuple[int, int, bytes]  # id, label, pixels (HWC)


@dataclass(frozen=True)
class PreparedFile:
    """One shard: its name (in the manifest) or location, rows, and the digest of them (`RowWriter.digest`)."""

    name: str
    rows: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """`meta.json`.

    Attributes:
      num_train: rows of the training split.
      num_test: rows of the test split.
      num_listed_train: the public N: training records listed before any was rejected, or `data.num_records`.
      image_size: pixels; images are square.
      channels: 1 or 3.
      class_names: public; labels index it.
      num_rejected: corrupt images that were skipped, named in `rejected.jsonl`.
      digest: SHA-256 over the shards' row digests in order.
      files: by split, in row order.
    """

    num_train: int
    num_test: int
    num_listed_train: int
    image_size: int
    channels: int
    class_names: tuple[str, ...]
    num_rejected: int
    digest: str
    files: dict[str, tuple[PreparedFile, ...]]


@dataclass(frozen=True)
class Prepared:
    """A whole prepared set and where it lies."""

    folder: str
    manifest: Manifest

    def files(self, split: str) -> list[PreparedFile]:
        """The split's files in row order, with their locations as names."""
        return [replace(one, name=filesystem.join(self.folder, one.name)) for one in self.manifest.files[split]]

    def blocks(self, split: str, size: int = BATCH) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images and labels of the split, at most `size` at a time."""
        return ((block.images, block.labels) for block in iter_batches(self.files(split), size))

    def shape(self, split: str) -> tuple[int, int, int, int]:
        """[rows, H, W, C] of the split's images."""
        facts = self.manifest
        rows = facts.num_train if split == "train" else facts.num_test
        return rows, facts.image_size, facts.image_size, facts.channels


@dataclass(frozen=True)
class ImageSet:
    """Arrays of one split: ids int64 [N], labels int64 [N], images uint8 [N, H, W, C]."""

    ids: np.ndarray
    labels: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class RowWriter:
    """Writes the rows of one shard, a row group at a time, and digests them; from `row_writer`."""

    def __init__(self, parquet: pq.ParquetWriter) -> None:
        self._parquet, self._digest, self._pending = parquet, hashlib.sha256(), list[Row]()
        self._group = max(1, ROW_GROUP_BYTES // parquet.schema.field("image").type.byte_width)

    def add(self, row: Row) -> None:
        identity, label, pixels = row
        self._digest.update(identity.to_bytes(8, "little") + label.to_bytes(4, "little"))
        self._digest.update(pixels)
        self._pending.append(row)
        if len(self._pending) == self._group:
            self.flush()

    def flush(self) -> None:
        """Writes what waits for a row group to be full."""
        if self._pending:
            columns = zip(self._parquet.schema.types, zip(*self._pending, strict=True), strict=True)
            arrays = [pa.array(values, kind) for kind, values in columns]
            self._parquet.write_table(pa.Table.from_arrays(arrays, schema=self._parquet.schema))
            self._pending.clear()

    def digest(self) -> str:
        """SHA-256 over id (8 bytes, little-endian), label (4) and pixels of each row.

        Of the rows, because Parquet's own bytes differ from version to version.
        """
        return self._digest.hexdigest()


@contextmanager
def row_writer(
    location: filesystem.Location, shape: tuple[int, int], class_names: Sequence[str]
) -> Iterator[RowWriter]:
    """A writer of one shard in the memory of a row group; the file appears when the block ends without an exception.

    Args:
      location: where to; replaced atomically.
      shape: image size and channels.
      class_names: public.
    """
    image_size, channels = shape
    facts = {"image_size": image_size, "channels": channels, "dtype": "uint8", "class_names": list(class_names)}
    columns = [("id", pa.int64()), ("label", pa.int32()), ("image", pa.binary(image_size * image_size * channels))]
    schema = pa.schema(columns, {"e2h": json.dumps(facts)})
    # A dictionary of images would only be filled and given up.
    dictionary = ["label"]
    with (
        filesystem.atomic_writer(location) as file,
        pq.ParquetWriter(
            file, schema, compression="zstd", use_dictionary=dictionary, write_page_checksum=True
        ) as parquet,
    ):
        writer = RowWriter(parquet)
        yield writer
        writer.flush()


def read_ids(location: filesystem.Location) -> np.ndarray:
    """The ids of one shard, int64 [N]; nothing else is read."""
    with open_shard(location) as shard:
        return shard.read(columns=["id"])["id"].to_numpy()


@contextmanager
def open_shard(location: filesystem.Location, damaged: str = DAMAGED) -> Iterator[pq.ParquetFile]:
    """A Parquet file of ours to read within the block.

    Raises:
      InputError: where its bytes are not those that were written, with `damaged`.
    """
    try:
        with filesystem.open_input(location) as file:
            yield pq.ParquetFile(file, page_checksum_verification=True)
    except MemoryError:
        raise
    except Exception as error:
        filesystem.read_bytes(location)  # what the disk or the network refuses is said as it is
        raise InputError(f"file={location}: {damaged}") from error


def write_manifest(folder: filesystem.Location, manifest: Manifest) -> None:
    """Writes `meta.json`, which makes the set whole: the last file."""
    content = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2)
    filesystem.write_bytes(filesystem.join(folder, "meta.json"), content.encode())


def open_prepared(folder: filesystem.Location) -> Prepared:
    """Reads `meta.json`.

    Raises:
      InputError: if it is absent, or not one of e2h's.
    """
    location = filesystem.join(folder, "meta.json")
    if filesystem.kind(location) != "file":
        raise InputError(f"file={location}: expected a prepared set, found none; run the prepare job first")
    try:
        return Prepared(os.fspath(folder), _parse_manifest(json.loads(filesystem.read_bytes(location))))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"file={location}: {DAMAGED_FILE}") from error


def _parse_manifest(values: dict[str, Any]) -> Manifest:
    if values.pop("format") != FORMAT:
        raise ValueError(f"not {FORMAT}")
    listed = values.pop("files")
    files = {split: tuple(PreparedFile(**file) for file in listed[split]) for split in SPLITS}
    return Manifest(**{**values, "class_names": tuple(values["class_names"]), "files": files})


def iter_batches(files: Iterable[PreparedFile], batch_size: int) -> Iterator[ImageSet]:
    """Reads shards one after the other in batches of at most `batch_size` rows; arrays are read-only views.

    A batch never spans two files. Memory stays at about one batch (plus one compressed row group).

    Raises:
      InputError: after the last batch of a file whose rows are not those of the manifest. What is named by the
        manifest's digest, noise among it, must be of those rows.
    """
    for one in files:
        digest = hashlib.sha256()
        with open_shard(one.name) as file:
            facts = json.loads(file.schema_arrow.metadata[b"e2h"])
            shape = (-1, facts["image_size"], facts["image_size"], facts["channels"])
            for batch in file.iter_batches(batch_size=batch_size):
                labels = batch.column("label").to_numpy().astype(np.int64)
                rows = ImageSet(
                    batch.column("id").to_numpy(), labels, _fixed_bytes(batch.column("image")).reshape(shape)
                )
                digest.update(_row_bytes(rows))
                yield rows
        if digest.hexdigest() != one.digest:
            raise InputError(f"file={one.name}: {DAMAGED}")


def _row_bytes(rows: ImageSet) -> memoryview:
    """What `RowWriter` digests of these rows."""
    pixels = rows.images.reshape(len(rows), -1)
    table = np.empty(len(rows), [("id", "<i8"), ("label", "<i4"), ("pixels", "u1", pixels.shape[1:])])
    table["id"], table["label"], table["pixels"] = rows.ids, rows.labels, pixels
    return table.view(np.uint8).data


def _fixed_bytes(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    """The column's bytes without a copy, uint8 [rows * width]."""
    width, start = column.type.byte_width, column.offset
    return np.frombuffer(column.buffers()[1], dtype=np.uint8)[start * width : (start + len(column)) * width]


def load_split(prepared: Prepared, split: str) -> ImageSet:
    """Loads a whole split into memory; rows in the order of the files."""
    ids, labels = (np.empty(prepared.shape(split)[0], np.int64) for _ in range(2))
    images, start = np.empty(prepared.shape(split), np.uint8), 0
    for batch in iter_batches(prepared.files(split), BATCH):
        here = slice(start, start + len(batch))
        ids[here], labels[here], images[here] = batch.ids, batch.labels, batch.images
        start += len(batch)
    return ImageSet(ids, labels, images)
