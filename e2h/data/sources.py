"""From `DataConfig` to shards, and from a shard to raw records."""

from __future__ import annotations

from collections.abc import Iterator

from pyarrow import ArrowException

from e2h.config import DataConfig
from e2h.data import filesystem
from e2h.data.cifar import open_cifar, read_cifar
from e2h.data.digits import open_digits, read_digits
from e2h.data.folders import open_folder, read_folder
from e2h.data.idx import open_idx, read_idx
from e2h.data.parquet import open_parquet, read_parquet
from e2h.data.records import RawRecord, Shard, Source, is_test, path_error, record_id
from e2h.errors import one_line

__all__ = ["RawRecord", "Shard", "Source", "is_test", "open_source", "read_shard", "record_id"]

FORMATS = {
    "digits": (open_digits, read_digits),
    "idx": (open_idx, read_idx),
    "cifar": (open_cifar, read_cifar),
    "image_folder": (open_folder, read_folder),
    "parquet": (open_parquet, read_parquet),
}
NEEDS_FOLDER = ("idx", "cifar")


def open_source(data: DataConfig) -> Source:
    """Lists a source without decoding an image and checks all that can be seen so.

    Raises:
      InputError: if the path is missing or unreadable, or the format's own checks fail.
    """
    opener, _ = FORMATS[data.source]
    if data.source == "digits":
        return opener(data)
    try:
        kind = filesystem.kind(str(data.path))
        if kind == "missing" or (data.source in NEEDS_FOLDER and kind != "folder"):
            what = f"a folder with {data.source} data" if data.source in NEEDS_FOLDER else f"{data.source} data"
            raise path_error(data, f"{what}, found {'nothing' if kind == 'missing' else 'a file'}", "correct the path")
        return opener(data)
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise path_error(data, f"names in UTF-8, found {error.object!r}", "rename it") from error
    except (OSError, ArrowException) as error:
        advice = "correct the path or its permissions, or fetch the data again"
        raise path_error(data, f"readable {data.source} data ({one_line(error)})", advice) from error


def read_shard(shard: Shard, data: DataConfig) -> Iterator[RawRecord]:
    """Yields a shard's records in their listed order.

    Raises:
      InputError: naming the record and the label, if a label is outside the classes; if the file can't be read.
    """
    _, reader = FORMATS[data.source]
    try:
        yield from reader(shard, data)
    except (OSError, UnicodeDecodeError, ArrowException) as error:
        expectation = f"readable {data.source} data, {shard.file} is not ({one_line(error)})"
        raise path_error(data, expectation, "fetch again") from error
