"""From sources to prepared sets: what is kept, what is counted, what is refused, and nothing half-written."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from e2h.config import DataConfig
from e2h.data import storage
from e2h.data.images import decode, encode_png, fit
from e2h.data.prepare import finish_prepared, prepare_shard
from e2h.data.sources import is_test, open_source, record_id
from e2h.data.storage import load_split, open_prepared
from e2h.errors import InputError

NAMES = [f"{animal}/{index:02d}.png" for animal in ("cats", "dogs") for index in range(20)]


@pytest.fixture
def pets(tmp_path: Path, write_images) -> DataConfig:
    folder = write_images(tmp_path / "pets", NAMES, side=8)
    return DataConfig(source="image_folder", path=str(folder), channels=3, records_per_shard=15)


def test_rows_are_the_listed_records_in_order(pets: DataConfig, tmp_path: Path, prepare) -> None:
    manifest = prepare(pets, tmp_path / "prepared")
    prepared = open_prepared(tmp_path / "prepared")
    assert prepared.manifest == manifest
    for split, held_out in (("train", False), ("test", True)):
        names = [name for name in NAMES if is_test(name, pets.test_fraction) == held_out]
        rows = load_split(prepared, split)
        assert rows.ids.tolist() == [record_id(name) for name in names]
        assert rows.labels.tolist() == [int(name.startswith("dogs")) for name in names]
        expected = [decode((tmp_path / "pets" / name).read_bytes()) for name in names]
        np.testing.assert_array_equal(rows.images, expected)
    assert manifest.num_listed_train == manifest.num_train
    assert manifest.class_names == ("cats", "dogs")


def test_running_twice_gives_equal_rows(pets: DataConfig, tmp_path: Path, prepare) -> None:
    first = prepare(pets, tmp_path / "a")
    again, other = prepare(pets, tmp_path / "a"), prepare(pets, tmp_path / "b")
    assert first == again == other
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(
        path.name for path in (tmp_path / "b").iterdir()
    )


def test_a_shard_is_written_a_few_rows_at_a_time(pets: DataConfig, tmp_path: Path, prepare, monkeypatch) -> None:
    whole = prepare(pets, tmp_path / "a")
    monkeypatch.setattr(storage, "ROW_GROUP_BYTES", 4 * 8 * 8 * 3)
    assert prepare(pets, tmp_path / "b") == whole  # digests of rows, hence the same rows
    for path in (one.name for one in open_prepared(tmp_path / "b").files("train")):
        facts = pq.ParquetFile(path).metadata
        groups = [facts.row_group(group).num_rows for group in range(facts.num_row_groups)]
        assert groups[:-1] == [4] * (len(groups) - 1)
        assert 1 <= groups[-1] <= 4
        assert sum(groups) > 8
    rows = [load_split(open_prepared(tmp_path / folder), "train").images for folder in ("a", "b")]
    np.testing.assert_array_equal(*rows)


def test_order_of_the_shards_does_not_matter(pets: DataConfig, tmp_path: Path, prepare) -> None:
    expected = prepare(pets, tmp_path / "a")
    source = open_source(pets)
    indices = [2, 0, 1, 2]  # a retry included
    stats = {index: prepare_shard(source.shards[index], pets, tmp_path / "b", index) for index in indices}
    assert finish_prepared(tmp_path / "b", source, pets, list(stats.values())) == expected


def test_another_pixel_gives_another_digest(pets: DataConfig, tmp_path: Path, prepare) -> None:
    before = prepare(pets, tmp_path / "a").digest
    path = tmp_path / "pets" / NAMES[0]
    image = decode(path.read_bytes()).copy()
    image[0, 0, 0] ^= 1
    path.write_bytes(encode_png(image))
    assert prepare(pets, tmp_path / "b").digest != before


def test_files_are_owner_only(pets: DataConfig, tmp_path: Path, prepare) -> None:
    (tmp_path / "pets/cats/bad.png").write_text("text")
    prepare(replace(pets, max_rejected_fraction=0.5), tmp_path / "prepared")
    assert (tmp_path / "prepared").stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "prepared").iterdir()}
    assert {"meta.json", "rejected.jsonl", "train-00000.parquet", "test-00000.parquet"} <= modes.keys()
    assert set(modes.values()) == {0o600}


def test_public_number_of_records(pets: DataConfig, tmp_path: Path, prepare) -> None:
    assert prepare(replace(pets, num_records=123), tmp_path / "prepared").num_listed_train == 123


def test_corrupt_images_are_skipped_and_named(pets: DataConfig, tmp_path: Path, prepare) -> None:
    names = [name for name in NAMES if not is_test(name, pets.test_fraction)]
    (tmp_path / "pets" / names[0]).write_text("a text named .png")
    content = (tmp_path / "pets" / names[1]).read_bytes()
    (tmp_path / "pets" / names[1]).write_bytes(content[:60])
    manifest = prepare(replace(pets, max_rejected_fraction=0.05), tmp_path / "prepared")
    lines = (tmp_path / "prepared/rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == names[:2]
    assert json.loads(lines[0])["reason"] == "not an image of a known format"
    assert manifest.num_rejected == 2
    assert manifest.num_listed_train == len(names)  # N stays what was listed
    assert manifest.num_train == len(names) - 2
    rows = load_split(open_prepared(tmp_path / "prepared"), "train")
    assert record_id(names[0]) not in rows.ids
    assert len(rows) == len(names) - 2


def test_too_many_corrupt_images_are_refused(pets: DataConfig, tmp_path: Path, prepare) -> None:
    for name in NAMES[:7]:
        (tmp_path / "pets" / name).write_text("a text named .png")
    with pytest.raises(InputError, match=r"max_rejected_fraction=0.001.*7 of 40 \(17.50%\): cats/00\.png") as error:
        prepare(pets, tmp_path / "prepared")
    listed = tmp_path / "prepared.rejected.jsonl"
    assert str(listed) in str(error.value)
    assert len(listed.read_text().splitlines()) == 7
    assert listed.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "prepared/meta.json").exists()
    share = re.search(r"or skip them: (data\.max_rejected_fraction=)([\d.]+)$", str(error.value))
    prepare(replace(pets, max_rejected_fraction=float(share[2])), tmp_path / "prepared")
    assert not listed.exists()


@pytest.mark.parametrize(
    ("number", "advised"), [(1, "0.1"), (3, "0.1"), (4, "0.1"), (5, "0.5"), (20, "0.5"), (21, None)]
)
def test_the_share_to_allow_is_advised_in_levels_for_it_is_published(pets, tmp_path, prepare, number, advised) -> None:
    for name in NAMES[:number]:
        (tmp_path / "pets" / name).write_text("a text named .png")
    with pytest.raises(InputError) as error:
        prepare(pets, tmp_path / "prepared")
    found = re.search(r"or skip them: data\.max_rejected_fraction=([\d.]+)$", str(error.value))
    assert (found and found[1]) == advised


def test_bomb_is_refused_whatever_the_share(pets: DataConfig, tmp_path: Path, prepare) -> None:
    content = bytearray((tmp_path / "pets" / NAMES[3]).read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    (tmp_path / "pets" / NAMES[3]).write_bytes(with_crc(bytes(content)))
    with pytest.raises(InputError, match=r"record=cats/03\.png: .*64000000 pixels"):
        prepare(replace(pets, max_rejected_fraction=0.9), tmp_path / "prepared")


def with_crc(png: bytes) -> bytes:
    """A PNG whose header was changed, with the header's check sum corrected."""
    return png[:29] + zlib.crc32(png[12:29]).to_bytes(4, "big") + png[33:]


def test_uniform_refuses_another_size(pets: DataConfig, tmp_path: Path, write_images, prepare) -> None:
    write_images(tmp_path / "pets", ["dogs/large.png"], side=9)
    with pytest.raises(InputError, match=r"found 8x8 \(cats.*\) and 9x9 \(dogs/large\.png\); data\.resize=any"):
        prepare(pets, tmp_path / "prepared")
    assert not (tmp_path / "prepared/meta.json").exists()
    manifest = prepare(replace(pets, resize="any"), tmp_path / "prepared")
    assert manifest.num_train + manifest.num_test == 41


def test_uniform_tells_apart_sizes_of_equal_area(pets: DataConfig, tmp_path: Path, prepare) -> None:
    (tmp_path / "pets/cats/00.png").write_bytes(encode_png(np.zeros((4, 16, 3), dtype=np.uint8)))
    with pytest.raises(InputError, match="one size"):
        prepare(replace(pets, image_size=4), tmp_path / "prepared")


def test_uniform_shrinks_but_does_not_enlarge(pets: DataConfig, tmp_path: Path, prepare) -> None:
    prepare(replace(pets, image_size=4, channels=1), tmp_path / "small")
    rows = load_split(open_prepared(tmp_path / "small"), "train")
    assert rows.images.shape[1:] == (4, 4, 1)
    first = next(name for name in NAMES if not is_test(name, pets.test_fraction))
    np.testing.assert_array_equal(rows.images[0], fit(decode((tmp_path / "pets" / first).read_bytes()), 4, 1))
    with pytest.raises(InputError, match=r"data\.image_size=16: expected at most 8.*8x8"):
        prepare(replace(pets, image_size=16), tmp_path / "large")
    assert prepare(replace(pets, image_size=16, resize="any"), tmp_path / "large").image_size == 16


def test_class_left_with_one_readable_image(tmp_path: Path, write_images, prepare) -> None:
    folder = write_images(tmp_path / "pets", [*NAMES, "birds/0.png", "birds/1.png"])
    (folder / "birds/1.png").write_text("text")
    data = DataConfig(source="image_folder", path=str(folder), channels=3, test_fraction=0.0, max_rejected_fraction=0.5)
    with pytest.raises(InputError, match="class 'birds' has 1"):
        prepare(data, tmp_path / "prepared")
    assert not (tmp_path / "prepared/meta.json").exists()


@pytest.mark.parametrize("choose", [lambda stats: stats[:-1], lambda stats: [*stats, stats[0]]])
def test_missing_or_doubled_shard_is_refused(pets: DataConfig, tmp_path: Path, choose: Callable) -> None:
    source = open_source(pets)
    stats = [prepare_shard(shard, pets, tmp_path / "p", index) for index, shard in enumerate(source.shards)]
    with pytest.raises(InputError, match="every listed record exactly once"):
        finish_prepared(tmp_path / "p", source, pets, choose(stats))


def test_repeated_ids_are_refused(pets: DataConfig, tmp_path: Path) -> None:
    data = replace(pets, records_per_shard=20)
    source = open_source(data)
    stats = [prepare_shard(shard, data, tmp_path / "p", index) for index, shard in enumerate(source.shards)]
    first, second = tmp_path / "p/train-00000.parquet", tmp_path / "p/train-00001.parquet"
    second.write_bytes(first.read_bytes())
    rows = stats[0].rows["train"]
    held_out = source.num_test
    with pytest.raises(InputError, match=f"unique ids, found {rows + held_out} ids in {2 * rows + held_out} rows"):
        finish_prepared(tmp_path / "p", source, data, stats)


def test_label_out_of_range_stops_the_shard(tmp_path: Path, write_idx, prepare) -> None:
    write_idx(tmp_path, {"train": 30, "t10k": 30})
    data = DataConfig(source="idx", path=str(tmp_path), class_names=["a", "b", "c"])
    with pytest.raises(InputError, match=r"label=3.*train-images-idx3-ubyte:3"):
        prepare(data, tmp_path / "prepared")
    assert list((tmp_path / "prepared").iterdir()) == []


def test_digits(tmp_path: Path, prepare) -> None:
    manifest = prepare(DataConfig(), tmp_path)
    assert manifest.num_train + manifest.num_test == 1797
    assert [file.name for file in manifest.files["train"]] == ["train-00000.parquet"]


def test_real_mnist_shard(shared_data, tmp_path: Path) -> None:
    data = DataConfig(source="idx", path=str(shared_data("mnist")), image_size=28, records_per_shard=1000)
    source = open_source(data)
    stats = prepare_shard(source.shards[0], data, tmp_path, 0)
    assert stats.rows == {"train": 1000, "test": 0}
    assert stats.train_class_counts[5] == 92
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.parquet"]


def test_real_cifar10_shard(shared_data, tmp_path: Path) -> None:
    path = str(shared_data("cifar10"))
    data = DataConfig(source="parquet", path=path, image_size=32, channels=3, records_per_shard=1000)
    source = open_source(data)
    stats = prepare_shard(source.shards[-1], data, tmp_path, 59)
    assert stats.rows == {"train": 0, "test": 1000}
    assert stats.smallest is not None
    assert stats.smallest[:3] == (1024, 32, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["test-00059.parquet"]
