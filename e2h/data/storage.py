"""The canonical prepared set: Parquet shards of equal-sized uint8 images, and `meta.json` as the sign of a whole set.

Each shard has the columns id (int64), label (int32) and image (fixed-size binary, H*W*C bytes), and names its shape in
the schema metadata under `e2h`. All files are sensitive (owner-only).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from e2h.data import filesystem
from e2h.errors import InputError

SPLITS = ("train", "test")
FORMAT = "e2h-prepared/1"
BATCH = 1024  # rows read at a time

Row = tuple[int, int, bytes]  # id, label, pixels (HWC)


@dataclass(frozen=True)
class PreparedFile:
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

    def paths(self, split: str) -> list[str]:
        """The split's files in row order."""
        return [filesystem.join(self.folder, file.name) for file in self.manifest.files[split]]


@dataclass(frozen=True)
class ImageSet:
    """Arrays of one split: ids int64 [N], labels int64 [N], images uint8 [N, H, W, C]."""

    ids: np.ndarray
    labels: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def write_rows(
    location: filesystem.Location, rows: Sequence[Row], shape: tuple[int, int], class_names: Sequence[str]
) -> str:
    """Writes one shard and returns the digest of its rows.

    Args:
      location: where to; replaced atomically.
      rows: at least one.
      shape: image size and channels.
      class_names: public.
    """
    ids, labels, images = zip(*rows, strict=True)
    image_size, channels = shape
    facts = {"image_size": image_size, "channels": channels, "dtype": "uint8", "class_names": list(class_names)}
    columns = {
        "id": pa.array(ids, pa.int64()),
        "label": pa.array(labels, pa.int32()),
        "image": pa.array(images, pa.binary(image_size * image_size * channels)),
    }
    table = pa.table(columns).replace_schema_metadata({"e2h": json.dumps(facts)})
    with filesystem.atomic_writer(location) as file:
        pq.write_table(table, file, compression="zstd")
    return digest_rows(rows)


def digest_rows(rows: Iterable[Row]) -> str:
    """SHA-256 over id (8 bytes, little-endian), label (4) and pixels of each row.

    Of the rows, because Parquet's own bytes differ from version to version.
    """
    total = hashlib.sha256()
    for identity, label, image in rows:
        total.update(identity.to_bytes(8, "little") + label.to_bytes(4, "little") + image)
    return total.hexdigest()


def read_ids(location: filesystem.Location) -> np.ndarray:
    """The ids of one shard, int64 [N]; nothing else is read."""
    with filesystem.open_input(location) as file:
        return pq.ParquetFile(file).read(columns=["id"])["id"].to_numpy()


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
        raise InputError(f"file={location}: expected e2h's manifest ({error!r}); prepare again") from error


def _parse_manifest(values: dict[str, Any]) -> Manifest:
    if values.pop("format") != FORMAT:
        raise ValueError(f"not {FORMAT}")
    listed = values.pop("files")
    files = {split: tuple(PreparedFile(**file) for file in listed[split]) for split in SPLITS}
    return Manifest(**{**values, "class_names": tuple(values["class_names"]), "files": files})


def iter_batches(files: Iterable[filesystem.Location], batch_size: int) -> Iterator[ImageSet]:
    """Reads shards one after the other in batches of at most `batch_size` rows; arrays are read-only views.

    A batch never spans two files. Memory stays at about one batch (plus one compressed row group).
    """
    for location in files:
        with filesystem.open_input(location) as stream:
            file = pq.ParquetFile(stream)
            facts = json.loads(file.schema_arrow.metadata[b"e2h"])
            shape = (-1, facts["image_size"], facts["image_size"], facts["channels"])
            for batch in file.iter_batches(batch_size=batch_size):
                labels = batch.column("label").to_numpy().astype(np.int64)
                yield ImageSet(
                    batch.column("id").to_numpy(), labels, _fixed_bytes(batch.column("image")).reshape(shape)
                )


def _fixed_bytes(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    """The column's bytes without a copy, uint8 [rows * width]."""
    width, start = column.type.byte_width, column.offset
    return np.frombuffer(column.buffers()[1], dtype=np.uint8)[start * width : (start + len(column)) * width]


def load_split(prepared: Prepared, split: str) -> ImageSet:
    """Loads a whole split into memory; rows in the order of the files."""
    ids, labels = _load_labels(prepared, split)
    images = np.empty(_shape(prepared, split), dtype=np.uint8)
    start = 0
    for batch in iter_batches(prepared.paths(split), BATCH):
        images[start : start + len(batch)] = batch.images
        start += len(batch)
    return ImageSet(ids, labels, images)


def _shape(prepared: Prepared, split: str) -> tuple[int, int, int, int]:
    manifest = prepared.manifest
    rows = manifest.num_train if split == "train" else manifest.num_test
    return rows, manifest.image_size, manifest.image_size, manifest.channels


def _load_labels(prepared: Prepared, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of a split, both int64 [N]."""
    ids, labels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for location in prepared.paths(split):
        with filesystem.open_input(location) as stream:
            table = pq.ParquetFile(stream).read(columns=["id", "label"])
        ids.append(table["id"].to_numpy())
        labels.append(table["label"].to_numpy())
    return np.concatenate(ids), np.concatenate(labels)


def map_split(prepared: Prepared, split: str, cache_folder: str | os.PathLike[str]) -> ImageSet:
    """A split whose images stay on disk: reading an image costs page faults only, processes of a node share the pages.

    The first call writes the images once as an uncompressed .npy file; its name carries the digest of the rows.
    Several processes may do so at once: each writes its own temporary file, the last rename wins, all are equal.

    Args:
      prepared: where to read.
      split: `train` or `test`.
      cache_folder: local; created owner-only if absent.

    Returns:
      ids and labels in memory, images mapped read-only.
    """
    path = Path(cache_folder).absolute() / f"{split}-{prepared.manifest.digest[:32]}.npy"
    ids, labels = _load_labels(prepared, split)
    if not path.exists():
        filesystem.make_folder(path.parent)
        _write_npy(path, prepared, split)
    return ImageSet(ids, labels, _map_npy(path, _shape(prepared, split)))


def _map_npy(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        # An empty file can't be mapped.
        images = np.load(path, mmap_mode="r" if shape[0] else None)
    except ValueError as error:
        raise InputError(f"file={path}: expected a .npy file ({error}); delete it") from error
    if images.shape != shape or images.dtype != np.uint8:
        raise InputError(f"file={path}: expected uint8 images of shape {shape}; delete it")
    return images


def _write_npy(path: Path, prepared: Prepared, split: str) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": _shape(prepared, split)}
    # Written, not mapped: a full disk then raises an error instead of killing the process.
    with filesystem.atomic_writer(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for batch in iter_batches(prepared.paths(split), BATCH):
            file.write(batch.images.tobytes())
