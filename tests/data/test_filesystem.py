"""Atomic writes, hidden files, and the same functions on an S3 server."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from e2h.config import DataConfig
from e2h.data import filesystem
from e2h.data.images import encode_png
from e2h.data.mapping import map_split
from e2h.data.storage import load_split, open_prepared
from e2h.errors import InputError


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    filesystem.write_bytes(path, b"old")
    with pytest.raises(RuntimeError), filesystem.atomic_writer(path) as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions(tmp_path: Path) -> None:
    filesystem.make_folder(tmp_path / "a")
    filesystem.write_bytes(tmp_path / "a/private", b"")
    filesystem.write_bytes(tmp_path / "a/public", b"", filesystem.PUBLIC)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a/private").stat().st_mode & 0o777 == 0o600
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a/public").stat().st_mode & 0o777 == 0o666 & ~umask


def test_hidden_files_are_not_listed(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.png", ".hidden.png", ".git/d.png", "a/._c.png", "__MACOSX/e.png"):
        filesystem.make_folder((tmp_path / name).parent)
        (tmp_path / name).write_bytes(b"123")
    assert filesystem.list_files(tmp_path) == [("a/c.png", 3), ("b.png", 3)]


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(InputError, match="s3://"):
        filesystem.resolve("ftp2://host/file")


def test_google_storage_is_known() -> None:
    file_system, path = filesystem.resolve("gs://anonymous@bucket/a b/c#1")
    assert (file_system.type_name, path) == ("gcs", "bucket/a b/c#1")


def test_s3_round_trip(bucket: str) -> None:
    location = filesystem.join(bucket, "folder", "a b#1%.bin")
    assert filesystem.kind(location) == "missing"
    filesystem.write_bytes(location, b"content")
    assert filesystem.kind(location) == "file"
    assert filesystem.kind(f"{bucket}/folder") == "folder"
    assert filesystem.read_bytes(location) == b"content"
    assert filesystem.list_files(bucket) == [("folder/a b#1%.bin", 7)]
    with pytest.raises(RuntimeError), filesystem.atomic_writer(location) as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert filesystem.read_bytes(location) == b"content"


def test_prepare_on_s3_equals_local(bucket: str, tmp_path: Path, rng: np.random.Generator, prepare) -> None:
    for name in [f"{split}/{animal}/{i} #.png" for split in ("train", "test") for animal in "ab" for i in range(3)]:
        content = encode_png(rng.integers(0, 256, (8, 8, 1), dtype=np.uint8))
        filesystem.write_bytes(filesystem.join(bucket, "in", name), content)
        filesystem.make_folder((tmp_path / "in" / name).parent)
        (tmp_path / "in" / name).write_bytes(content)
    remote = prepare(DataConfig(source="image_folder", path=f"{bucket}/in"), f"{bucket}/run/prepared")
    local = prepare(DataConfig(source="image_folder", path=str(tmp_path / "in")), tmp_path / "prepared")
    assert remote == local
    prepared = open_prepared(f"{bucket}/run/prepared")
    loaded, mapped = load_split(prepared, "train"), map_split(prepared, "train", tmp_path / "cache")
    np.testing.assert_array_equal(loaded.images, mapped.images)
    assert len(loaded) == 6


def test_missing_s3_path_is_refused(bucket: str, prepare, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.path=s3://images/none: expected image_folder data, found nothing"):
        prepare(DataConfig(source="image_folder", path=f"{bucket}/none"), tmp_path)
