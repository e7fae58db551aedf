"""Reading a prepared set: whole, in batches, mapped, and by several processes at once."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from e2h.config import DataConfig
from e2h.data.mapping import map_split
from e2h.data.storage import Prepared, iter_batches, load_split, open_prepared
from e2h.errors import InputError


@pytest.fixture
def prepared(tmp_path: Path, prepare, write_idx) -> Prepared:
    write_idx(tmp_path, {"train": 70, "t10k": 30})
    prepare(DataConfig(source="idx", path=str(tmp_path), records_per_shard=16), tmp_path / "prepared")
    return open_prepared(tmp_path / "prepared")


def test_schema_names_the_shape(prepared: Prepared) -> None:
    schema = pq.read_schema(prepared.files("train")[0].name)
    assert [(field.name, str(field.type)) for field in schema] == [
        ("id", "int64"),
        ("label", "int32"),
        ("image", "fixed_size_binary[64]"),
    ]
    assert json.loads(schema.metadata[b"e2h"]) == {
        "image_size": 8,
        "channels": 1,
        "dtype": "uint8",
        "class_names": list("0123456789"),
    }


@pytest.mark.parametrize("batch_size", [1, 5, 16, 100])
def test_batches_are_the_split_in_order(prepared: Prepared, batch_size: int) -> None:
    whole = load_split(prepared, "train")
    batches = list(iter_batches(prepared.files("train"), batch_size))
    assert max(len(batch) for batch in batches) <= batch_size
    for name in ("ids", "labels", "images"):
        np.testing.assert_array_equal(np.concatenate([getattr(batch, name) for batch in batches]), getattr(whole, name))


def flipped(written: bytes, place: int) -> bytes:
    return written[:place] + bytes([written[place] ^ 4]) + written[place + 1 :]


def content(prepared: Prepared) -> list[bytes]:
    rows = load_split(prepared, "train")
    return [column.tobytes() for column in (rows.ids, rows.labels, rows.images)]


def read_outcome(prepared: Prepared, whole: list[bytes]) -> str:
    """What reading the split gives: the same records, a refusal that names the file, or something else."""
    try:
        return "same" if content(prepared) == whole else "other records"
    except InputError as error:
        return "refused" if f"file={prepared.files('train')[0].name}: expected the bytes" in str(error) else str(error)


def test_a_changed_bit_in_an_image_is_refused(prepared: Prepared) -> None:
    whole, path = content(prepared), Path(prepared.files("train")[0].name)
    written, images = path.read_bytes(), pq.read_metadata(path).row_group(0).column(2)
    end = images.data_page_offset + images.total_compressed_size
    assert images.total_compressed_size > 500
    for place in range(end - 400, end, 8):
        path.write_bytes(flipped(written, place))
        assert read_outcome(prepared, whole) == "refused"
    path.write_bytes(written)
    assert read_outcome(prepared, whole) == "same"


@pytest.mark.parametrize("length", [0, 3, 100, -9, -1])
def test_a_cut_file_is_refused_by_name(prepared: Prepared, length: int) -> None:
    path = Path(prepared.files("train")[0].name)
    path.write_bytes(path.read_bytes()[:length])
    assert read_outcome(prepared, []) == "refused"


@pytest.mark.parametrize("read", ["load", "map", "batches"])
@pytest.mark.parametrize("column", ["label", "image", "id"])
def test_a_shard_that_was_written_again_with_other_rows_is_refused(prepared, tmp_path, read, column) -> None:
    """Whole Parquet of the right shape; noise is named by the digest of the rows that were prepared."""
    name = prepared.files("train")[1].name
    table = pq.read_table(name)
    values, kind = table[column].to_pylist(), table.schema.field(column).type
    values[3] = bytes(64) if column == "image" else values[3] + 1
    pq.write_table(
        table.set_column(table.schema.get_field_index(column), table.schema.field(column), [pa.array(values, kind)]),
        name,
    )
    assert pq.read_table(name).schema.field(column).type == kind
    readers = {
        "load": lambda: load_split(prepared, "train"),
        "map": lambda: map_split(prepared, "train", tmp_path / "cache"),
        "batches": lambda: list(prepared.blocks("train", 5)),
    }
    with pytest.raises(InputError, match=f"file={name}: expected the bytes that were written"):
        readers[read]()
    assert not (tmp_path / "cache").exists() or visible(tmp_path / "cache") == []


def test_dtypes_and_shapes(prepared: Prepared) -> None:
    rows = load_split(prepared, "train")
    assert (rows.ids.dtype, rows.labels.dtype, rows.images.dtype) == (np.int64, np.int64, np.uint8)
    assert (rows.ids.shape, rows.labels.shape, rows.images.shape) == ((70,), (70,), (70, 8, 8, 1))


def test_map_equals_load_and_is_read_only(prepared: Prepared, tmp_path: Path) -> None:
    for split in ("train", "test"):
        loaded, mapped = load_split(prepared, split), map_split(prepared, split, tmp_path / "cache")
        for name in ("ids", "labels", "images"):
            np.testing.assert_array_equal(getattr(loaded, name), getattr(mapped, name))
        assert isinstance(mapped.images, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            mapped.images[0] = 0
    files = visible(tmp_path / "cache")
    assert len(files) == 4  # of each split its images, and its ids with labels
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert all(prepared.manifest.digest[:32] in path.name for path in files)


def test_map_is_written_once(prepared: Prepared, tmp_path: Path) -> None:
    map_split(prepared, "train", tmp_path / "cache")
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in visible(tmp_path / "cache")}
    map_split(prepared, "train", tmp_path / "cache")
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in visible(tmp_path / "cache")} == before


def test_map_that_does_not_fit_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    whole = map_split(prepared, "train", tmp_path / "cache")
    for path in visible(tmp_path / "cache"):
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((70, 4, 4, 1), dtype=np.uint8))
        for content in (buffer.getvalue(), buffer.getvalue()[:200], b""):
            path.write_bytes(content)
            with pytest.raises(InputError, match=f"file={path}: expected .*delete it"):
                map_split(prepared, "train", tmp_path / "cache")
        path.unlink()
        np.testing.assert_array_equal(map_split(prepared, "train", tmp_path / "cache").images, whole.images)


# Notes each time that it writes the file.
MAP_MANY_TIMES = """
import os, sys
from e2h.data import mapping
from e2h.data.storage import open_prepared
write = mapping._write_npy
def noted(path, *others):
    with open(sys.argv[3], "a") as notes:
        notes.write(f"{path.parent.name}\\n")
    write(path, *others)
mapping._write_npy = noted
prepared = open_prepared(sys.argv[1])
print({int(mapping.map_split(prepared, "train", f"{sys.argv[2]}/{turn}").images.sum()) for turn in range(20)})
"""


def test_one_of_several_processes_writes_the_map_and_all_have_it(prepared: Prepared, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    command = [sys.executable, "-c", MAP_MANY_TIMES, prepared.folder, str(tmp_path / "cache"), str(notes)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    total = int(load_split(prepared, "train").images.sum())
    assert [process.communicate()[0].strip() for process in processes] == [f"{{{total}}}"] * 3
    assert sorted(notes.read_text().split(), key=int) == [str(turn) for turn in range(20)]
    assert all(len(visible(tmp_path / "cache" / str(turn))) == 2 for turn in range(20))


def visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


DIE_WHILE_WRITING = """
import os, sys
from e2h.data import mapping
from e2h.data.storage import open_prepared
def half(*batches):
    yield next(iter_batches(*batches))
    os._exit(9)
iter_batches, mapping.iter_batches = mapping.iter_batches, half
mapping.map_split(open_prepared(sys.argv[1]), "train", sys.argv[2])
"""


def test_what_a_killed_writer_left_is_removed_and_written_anew(prepared: Prepared, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DIE_WHILE_WRITING, prepared.folder, str(tmp_path / "cache")]
    assert subprocess.run(command, check=False).returncode == 9
    assert len(list((tmp_path / "cache").glob(".*.tmp"))) == 1
    mapped = map_split(prepared, "train", tmp_path / "cache")
    np.testing.assert_array_equal(mapped.images, load_split(prepared, "train").images)
    assert list((tmp_path / "cache").glob(".*.tmp")) == []


def test_a_disk_without_room_for_the_map_is_refused(prepared: Prepared, tmp_path: Path, monkeypatch) -> None:
    needed = 70 * 8 * 8
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if fits:
            map_split(prepared, "train", tmp_path / "cache")
            continue
        with pytest.raises(InputError, match=f"cache: expected {needed} bytes of free disk .*train, found {free}"):
            map_split(prepared, "train", tmp_path / "cache")
        assert visible(tmp_path / "cache") == []


def test_empty_split(tmp_path: Path, prepare) -> None:
    prepare(DataConfig(test_fraction=0.0), tmp_path / "prepared")
    prepared = open_prepared(tmp_path / "prepared")
    assert prepared.files("test") == []
    for rows in (load_split(prepared, "test"), map_split(prepared, "test", tmp_path / "cache")):
        assert rows.images.shape == (0, 8, 8, 1)
        assert len(rows) == 0


ALIEN = [None, b"", b"text", b"[1]", b'{"format": "other"}', b'{"format": "e2h-prepared/1"}']


@pytest.mark.parametrize("content", ALIEN)
def test_absent_or_alien_manifest(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(InputError, match=r"meta\.json: expected"):
        open_prepared(tmp_path)
