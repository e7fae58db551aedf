"""MNIST's files: plain, gzipped, broken in every way that a header can tell, and real."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from e2h.config import DataConfig
from e2h.data.sources import open_source, read_shard
from e2h.errors import InputError

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def config(path: Path, **values: object) -> DataConfig:
    return DataConfig(source="idx", path=str(path), **values)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_records_are_read_in_shards(tmp_path: Path, write_idx, suffix: str) -> None:
    arrays = write_idx(tmp_path, {"train": 25, "t10k": 7}, suffix)
    data = config(tmp_path, records_per_shard=10)
    source = open_source(data)
    assert (source.num_train, source.num_test) == (25, 7)
    assert source.class_names == tuple("0123456789")
    assert [(shard.split, len(shard)) for shard in source.shards] == [
        ("train", 10),
        ("train", 10),
        ("train", 5),
        ("test", 7),
    ]
    records = [record for shard in source.shards[:3] for record in read_shard(shard, data)]
    assert [record.name for record in records] == [f"{IMAGES}:{index}" for index in range(25)]
    np.testing.assert_array_equal([record.content[:, :, 0] for record in records], arrays[IMAGES])
    assert [record.label for record in records] == arrays[LABELS].tolist()


def test_class_names_can_be_given(tmp_path: Path, write_idx) -> None:
    write_idx(tmp_path, {"train": 25, "t10k": 7})
    assert open_source(config(tmp_path, class_names=list("abcdefghij"))).class_names == tuple("abcdefghij")
    data = config(tmp_path, class_names=["a", "b"])
    with pytest.raises(InputError, match=rf"label=2: expected .*\[0, 2\) for record {IMAGES}:2"):
        list(read_shard(open_source(data).shards[0], data))


def test_missing_file_is_named(tmp_path: Path, write_idx) -> None:
    write_idx(tmp_path, {"train": 4})
    with pytest.raises(InputError, match="t10k-images-idx3-ubyte"):
        open_source(config(tmp_path))


def test_missing_path_and_file_instead_of_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.path=.*none.*found nothing"):
        open_source(config(tmp_path / "none"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="a folder with idx data, found a file"):
        open_source(config(tmp_path / "file"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", [IMAGES, LABELS])
@pytest.mark.parametrize("change", [lambda body: body[:-1], lambda body: body + b"\0", lambda body: body[:6]])
def test_length_against_the_header(tmp_path: Path, write_idx, suffix: str, name: str, change) -> None:
    write_idx(tmp_path, {"train": 9, "t10k": 3}, suffix)
    path = tmp_path / f"{name}{suffix}"
    content = path.read_bytes()
    path.write_bytes(gzip.compress(change(gzip.decompress(content))) if suffix else change(content))
    with pytest.raises(InputError, match=name):
        open_source(config(tmp_path))


@pytest.mark.parametrize("change", [lambda body: body[:-20], lambda body: b"plain text", lambda body: body[:40]])
def test_broken_gzip(tmp_path: Path, write_idx, change) -> None:
    write_idx(tmp_path, {"train": 9, "t10k": 3}, ".gz")
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=r"images-idx3-ubyte\.gz: expected a whole gzip file"):
        open_source(config(tmp_path))


def test_wrong_magic(tmp_path: Path, write_idx) -> None:
    write_idx(tmp_path, {"train": 9, "t10k": 3})
    (tmp_path / IMAGES).write_bytes((tmp_path / LABELS).read_bytes() + b"\0" * 16)
    with pytest.raises(InputError, match="magic number 0x803, found 0x801"):
        open_source(config(tmp_path))


def test_labels_of_another_length(tmp_path: Path, write_idx) -> None:
    write_idx(tmp_path, {"train": 9, "t10k": 3})
    (tmp_path / LABELS).write_bytes((tmp_path / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(InputError, match="expected 9 labels, one for each image, found 3"):
        open_source(config(tmp_path))


def test_upscale_needs_consent(tmp_path: Path, write_idx) -> None:
    write_idx(tmp_path, {"train": 9, "t10k": 3})
    with pytest.raises(InputError, match=r"data.image_size=16: expected at most 8"):
        open_source(config(tmp_path, image_size=16))
    assert open_source(config(tmp_path, image_size=16, resize="any")).num_train == 9


def test_real_mnist(shared_data) -> None:
    data = config(shared_data("mnist"), image_size=28)
    source = open_source(data)
    assert (source.num_train, source.num_test) == (60_000, 10_000)
    records = list(read_shard(source.shards[0], data))
    assert [record.label for record in records[:5]] == [5, 0, 4, 1, 9]
    assert records[-1].name == f"{IMAGES}:4095"
    assert round(np.mean([record.content for record in records])) == 33
