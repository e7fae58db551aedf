"""Parquet in the three layouts, its splits and class names, and the real CIFAR-10."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from e2h.config import DataConfig
from e2h.data import parquet
from e2h.data.images import decode, encode_png
from e2h.data.sources import is_test, open_source, read_shard
from e2h.errors import InputError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def config(path: Path, **values: object) -> DataConfig:
    return DataConfig(**{"source": "parquet", "path": str(path), "image_size": 4, "channels": 3, **values})


@pytest.fixture
def images(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)


def write(path: Path, images: np.ndarray, layout: str = "struct", labels: object = None, names: object = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [encode_png(image) for image in images]
    column = {
        "struct": lambda: pa.array([{"bytes": content, "path": None} for content in files], IMAGE),
        "binary": lambda: pa.array(files, pa.binary()),
        "large": lambda: pa.array(files, pa.large_binary()),
        "raw": lambda: pa.array([image.tobytes() for image in images], pa.binary()),
        "fixed": lambda: pa.array([image.tobytes() for image in images], pa.binary(images[0].size)),
    }[layout]()
    labels = np.arange(len(images)) % 3 if labels is None else labels
    table = pa.table({"image": column, "label": pa.array(labels), "other": pa.array(["text"] * len(images))})
    if names is not None:
        features = {"label": {"_type": "ClassLabel", "names": names}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=6)
    return path


def read_all(data: DataConfig) -> list:
    return [record for shard in open_source(data).shards for record in read_shard(shard, data)]


def pixels(content: bytes | np.ndarray) -> np.ndarray:
    return decode(content) if isinstance(content, bytes) else content


@pytest.mark.parametrize("layout", ["struct", "binary", "large", "raw", "fixed"])
@pytest.mark.parametrize("size", [3, 6, 7, 100])
@pytest.mark.parametrize("batch", [1, 2, 4, 256])
def test_layouts_in_shards_across_row_groups_and_batches(
    tmp_path: Path, images: np.ndarray, layout: str, size: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "BATCH", batch)
    data = config(write(tmp_path / "all.parquet", images, layout), records_per_shard=size)
    assert all(len(shard) <= size for shard in open_source(data).shards)
    records = read_all(data)
    assert [record.name for record in records] == [f"all.parquet:{index}" for index in range(20)]
    np.testing.assert_array_equal([pixels(record.content) for record in records], images)
    assert [record.label for record in records] == [index % 3 for index in range(20)]


def test_image_file_of_just_the_raw_length_is_decoded(tmp_path: Path) -> None:
    image = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    length = len(encode_png(image[0]))
    side = int(np.ceil(np.sqrt(length)))
    padded = encode_png(image[0]) + b"\0" * (side**2 - length)
    table = pa.table({"image": pa.array([padded], pa.binary()), "label": [0]})
    pq.write_table(table, tmp_path / "a.parquet")
    (record,) = read_all(config(tmp_path / "a.parquet", image_size=side, channels=1))
    np.testing.assert_array_equal(decode(record.content), image[0])


def test_single_file_is_split_by_the_hash_rule(tmp_path: Path, images: np.ndarray) -> None:
    source = open_source(config(write(tmp_path / "train.parquet", images)))
    assert source.num_test == sum(is_test(f"train.parquet:{index}", 1 / 6) for index in range(20))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.parquet", "test.parquet"),
        ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
        ("train/0.parquet", "test/0.parquet"),
        ("training_set.parquet", "val.parquet"),
    ],
)
def test_own_split(tmp_path: Path, images: np.ndarray, train: str, test: str) -> None:
    write(tmp_path / train, images[:15])
    write(tmp_path / test, images[15:])
    source = open_source(config(tmp_path))
    assert (source.num_train, source.num_test) == (15, 5)
    assert [(shard.split, shard.name) for shard in source.shards] == [("train", train), ("test", test)]


def test_validation_is_unused_beside_test(tmp_path: Path, images: np.ndarray) -> None:
    for name, part in (("train", images[:10]), ("validation", images[10:13]), ("test", images[13:])):
        write(tmp_path / f"{name}-0.parquet", part)
    source = open_source(config(tmp_path))
    assert (source.num_train, source.num_test) == (10, 7)


def test_files_without_split_names(tmp_path: Path, images: np.ndarray) -> None:
    write(tmp_path / "values-0.parquet", images[:10])
    write(tmp_path / "values-1.parquet", images[10:])
    write(tmp_path / "test.parquet", images)
    with pytest.raises(InputError, match="no splits at all"):
        open_source(config(tmp_path))


def test_a_link_that_lists_a_file_twice_is_refused(tmp_path: Path, images: np.ndarray) -> None:
    write(tmp_path / "values.parquet", images)
    (tmp_path / "README.md").symlink_to("values.parquet")  # of another ending: not listed
    assert open_source(config(tmp_path)).num_train > 0
    (tmp_path / "more.parquet").symlink_to("values.parquet")
    with pytest.raises(InputError, match=r"more.parquet and values.parquet lead to the same; remove the link more"):
        open_source(config(tmp_path))


def test_class_names_of_a_class_label(tmp_path: Path, images: np.ndarray) -> None:
    path = write(tmp_path / "a.parquet", images, names=["x", "y", "z", "unseen"])
    assert open_source(config(path)).class_names == ("x", "y", "z", "unseen")
    assert open_source(config(path, class_names=list("abcd"))).class_names == tuple("abcd")
    with pytest.raises(InputError, match="expected 4 names"):
        open_source(config(path, class_names=list("abc")))


def test_class_names_from_settings_or_labels(tmp_path: Path, images: np.ndarray) -> None:
    path = write(tmp_path / "a.parquet", images)
    assert open_source(config(path)).class_names == ("0", "1", "2")
    assert open_source(config(path, class_names=list("abc"))).class_names == tuple("abc")
    assert open_source(config(path, label_column=None)).class_names == ("image",)
    assert {record.label for record in read_all(config(path, label_column=None))} == {0}


@pytest.mark.parametrize(("bad", "shown"), [(3, "3"), (-1, "-1"), (None, "None")])
def test_label_out_of_range_is_named(tmp_path: Path, images: np.ndarray, bad: int | None, shown: str) -> None:
    labels = [0, 1, 2, bad] * 5
    path = write(tmp_path / "a.parquet", images, labels=labels)
    with pytest.raises(InputError, match=rf"label={shown}: .*record a\.parquet:3"):
        read_all(config(path, class_names=list("abc")))


def test_columns_that_do_not_fit(tmp_path: Path, images: np.ndarray) -> None:
    path = write(tmp_path / "a.parquet", images)
    with pytest.raises(InputError, match=r"data.image_column=img: expected one of image, label, other"):
        open_source(config(path, image_column="img"))
    with pytest.raises(InputError, match=r"data.label_column=class"):
        open_source(config(path, label_column="class"))
    with pytest.raises(InputError, match=r"data.label_column=other: expected whole numbers, found string"):
        open_source(config(path, label_column="other"))
    with pytest.raises(InputError, match=r"data.image_column=label: expected struct"):
        open_source(config(path, image_column="label"))
    for content in ("abc", [1, 2]):
        pq.write_table(pa.table({"image": [{"bytes": content}], "label": [0]}), tmp_path / "c.parquet")
        with pytest.raises(InputError, match=r"data.image_column=image: expected struct<bytes, path> or binary, found"):
            open_source(config(tmp_path / "c.parquet"))
    for name in ("image", "label"):
        table = pq.read_table(path)
        pq.write_table(table.append_column(name, table[name]), tmp_path / "twice.parquet")
        with pytest.raises(InputError, match=rf"data.{name}_column={name}: expected one such column in twice.parquet"):
            open_source(config(tmp_path / "twice.parquet"))
    with pytest.raises(InputError, match="expected labels below 10000, found 10000000"):
        open_source(config(write(tmp_path / "b.parquet", images[:2], labels=[0, 10_000_000])))


def test_empty_broken_and_missing(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"found no \*\.parquet"):
        open_source(config(tmp_path))
    with pytest.raises(InputError, match="found nothing"):
        open_source(config(tmp_path / "none.parquet"))
    empty = write(tmp_path / "empty.parquet", images[:0], labels=pa.array([], pa.int64()))
    with pytest.raises(InputError, match="rows to train on"):
        open_source(config(empty, class_names=["a"]))
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"bad\.parquet: expected a Parquet file"):
        open_source(config(tmp_path / "bad.parquet"))


def test_damaged_page_is_an_input_error(tmp_path: Path, images: np.ndarray) -> None:
    path = write(tmp_path / "a.parquet", images)
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet is not"):
        read_all(config(path, class_names=list("abc")))


def test_a_damaged_label_column_is_one_line(tmp_path: Path, images: np.ndarray) -> None:
    path = write(tmp_path / "a.parquet", images)
    start = pq.read_metadata(path).row_group(0).column(2).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(InputError) as listed:
        open_source(config(path))
    with pytest.raises(InputError) as read:
        read_all(config(path, class_names=list("abc")))
    assert str(listed.value).startswith(f"data.path={path}: expected readable parquet data (")
    assert str(listed.value).endswith("; correct the path or its permissions, or fetch the data again")
    assert "\n" not in str(listed.value) + str(read.value)


def test_missing_image_has_no_content(tmp_path: Path) -> None:
    column = pa.array([{"bytes": None, "path": "a.png"}, None], IMAGE)
    pq.write_table(pa.table({"image": column, "label": [0, 0]}), tmp_path / "a.parquet")
    assert [record.content for record in read_all(config(tmp_path / "a.parquet"))] == [b"", b""]


def test_real_cifar10(shared_data) -> None:
    data = DataConfig(source="parquet", path=str(shared_data("cifar10")), image_size=32, channels=3)
    source = open_source(data)
    assert (source.num_train, source.num_test) == (50_000, 10_000)
    assert source.class_names == tuple("0123456789")
    records = list(read_shard(source.shards[2], data))
    assert (records[0].name, len(records)) == ("train.parquet:8192", 4096)
    assert decode(records[0].content).shape == (32, 32, 3)
