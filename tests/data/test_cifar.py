"""CIFAR's four published forms, and pickles that must not be trusted."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from e2h.config import DataConfig
from e2h.data.sources import open_source, read_shard
from e2h.errors import InputError

NAMES = [f"name{index}" for index in range(10)]


@pytest.fixture
def images(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)


def planes(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def config(path: Path, **values: object) -> DataConfig:
    return DataConfig(source="cifar", path=str(path), image_size=32, channels=3, **values)


def write_binary(folder: Path, name: str, images: np.ndarray, label_bytes: int = 1) -> None:
    labels = np.zeros((len(images), label_bytes), dtype=np.uint8)
    labels[:, -1] = np.arange(len(images))
    (folder / name).write_bytes(np.hstack([labels, planes(images)]).tobytes())


def write_python(folder: Path, name: str, images: np.ndarray, key: bytes = b"labels") -> None:
    batch = {b"batch_label": b"a batch", key: list(range(len(images))), b"data": planes(images)}
    (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def read_all(data: DataConfig) -> list:
    return [record for shard in open_source(data).shards for record in read_shard(shard, data)]


def check(data: DataConfig, images: np.ndarray, names: list[str]) -> None:
    records = read_all(data)
    assert [record.name for record in records] == names
    np.testing.assert_array_equal([record.content for record in records], images)
    assert [record.label for record in records] == [0, 1, 2, 3, 0, 1, 2, 0, 1]


def test_cifar10_binary(tmp_path: Path, images: np.ndarray) -> None:
    write_binary(tmp_path, "data_batch_1.bin", images[:4])
    write_binary(tmp_path, "data_batch_2.bin", images[4:7])
    write_binary(tmp_path, "test_batch.bin", images[7:])
    (tmp_path / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    source = open_source(config(tmp_path))
    assert (source.num_train, source.num_test, source.class_names) == (7, 2, tuple(NAMES))
    expected = [f"data_batch_1.bin:{i}" for i in range(4)] + [f"data_batch_2.bin:{i}" for i in range(3)]
    check(config(tmp_path, records_per_shard=3), images, [*expected, "test_batch.bin:0", "test_batch.bin:1"])


def test_cifar10_python(tmp_path: Path, images: np.ndarray) -> None:
    write_python(tmp_path, "data_batch_1", images[:4])
    write_python(tmp_path, "data_batch_2", images[4:7])
    write_python(tmp_path, "test_batch", images[7:])
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [name.encode() for name in NAMES]}, 2))
    assert open_source(config(tmp_path)).class_names == tuple(NAMES)
    expected = [f"data_batch_1:{i}" for i in range(4)] + [f"data_batch_2:{i}" for i in range(3)]
    check(config(tmp_path, records_per_shard=3), images, [*expected, "test_batch:0", "test_batch:1"])


@pytest.mark.parametrize("form", ["binary", "python"])
def test_cifar100_has_the_fine_labels(tmp_path: Path, images: np.ndarray, form: str) -> None:
    for name, part in (("train", images[:7]), ("test", images[7:])):
        if form == "binary":
            write_binary(tmp_path, f"{name}.bin", part, label_bytes=2)
        else:
            write_python(tmp_path, name, part, key=b"fine_labels")
    data = config(tmp_path)
    assert open_source(data).class_names == tuple(str(label) for label in range(100))
    assert [record.label for record in read_all(data)] == [*range(7), 0, 1]


def test_batch_as_python_2_wrote_it(tmp_path: Path) -> None:
    # Protocol 0, byte strings, the module path of old numpy: {'data': zeros((2, 3072), uint8), 'labels': [1, 0]}.
    pixels = b"".join(b"\\x%02x" % (i % 256) for i in range(2 * 3072))
    content = (
        b"(dp0\nS'data'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\nS'b'\np5\ntp6\n"
        b"Rp7\n(I1\n(I2\nI3072\ntp8\ncnumpy\ndtype\np9\n(S'u1'\np10\nI0\nI1\ntp11\nRp12\n(I3\nS'|'\np13\nNNNI-1\nI-1\n"
        b"I0\ntp14\nbI00\nS'" + pixels + b"'\np15\ntp16\nbsS'labels'\np17\n(lp18\nI1\naI0\nas."
    )
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(content)
    first, second, *_ = read_all(config(tmp_path))
    assert (first.label, second.label) == (1, 0)
    assert first.content[0, 1].tolist() == [1, (1024 + 1) % 256, (2048 + 1) % 256]


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, images: np.ndarray, name: str) -> None:
    write_python(tmp_path, "data_batch_1", images)
    write_python(tmp_path, "test_batch", images)
    content = pickle.dumps({b"data": Malicious(tmp_path / "marker")}, 2)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.*system is not allowed"):
        open_source(config(tmp_path))
    assert not (tmp_path / "marker").exists()
    pickle.loads(content)  # the same bytes do run where pickle is trusted
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"text", pickle.dumps([1, 2]), pickle.dumps({b"data": np.zeros((2, 3)), b"labels": [0, 1]}, 2)],
)
def test_other_content_is_refused(tmp_path: Path, images: np.ndarray, content: bytes) -> None:
    write_python(tmp_path, "test_batch", images)
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(InputError, match="data_batch_1"):
        open_source(config(tmp_path))


def test_truncated_binary_batch(tmp_path: Path, images: np.ndarray) -> None:
    write_binary(tmp_path, "data_batch_1.bin", images)
    write_binary(tmp_path, "test_batch.bin", images)
    with (tmp_path / "test_batch.bin").open("r+b") as file:
        file.truncate(3073 * 8 + 100)
    with pytest.raises(InputError, match=r"test_batch\.bin: expected whole records of 3073 bytes"):
        open_source(config(tmp_path))


def test_folder_without_or_with_two_forms(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(InputError, match="found 0 forms"):
        open_source(config(tmp_path))
    for name in ("data_batch_1", "test_batch"):
        write_python(tmp_path, name, images)
        write_binary(tmp_path, f"{name}.bin", images)
    with pytest.raises(InputError, match="found 2 forms"):
        open_source(config(tmp_path))


def test_label_out_of_range_is_named(tmp_path: Path, images: np.ndarray) -> None:
    write_binary(tmp_path, "data_batch_1.bin", np.concatenate([images, images]))
    write_binary(tmp_path, "test_batch.bin", images)
    with pytest.raises(InputError, match=r"label=10: .* record data_batch_1\.bin:10"):
        read_all(config(tmp_path))


def test_wrong_number_of_class_names(tmp_path: Path, images: np.ndarray) -> None:
    write_binary(tmp_path, "data_batch_1.bin", images)
    write_binary(tmp_path, "test_batch.bin", images)
    with pytest.raises(InputError, match=r"data.class_names"):
        open_source(config(tmp_path, class_names=["a", "b"]))
    (tmp_path / "batches.meta.txt").write_text("only one")
    with pytest.raises(InputError, match=r"batches\.meta\.txt: expected 10 class names, found 1"):
        open_source(config(tmp_path))
