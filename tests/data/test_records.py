"""The public rules on names: ids and the held-out part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from e2h.config import DataConfig
from e2h.data.records import check_label, choose_class_names, cut, is_test, record_id
from e2h.data.sources import open_source, read_shard
from e2h.errors import InputError

NAMES = [f"train-images-idx3-ubyte:{index}" for index in range(20_000)]


def within_five_sigma(share: float, expected: float, count: int) -> bool:
    return abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / count)


def test_record_ids_are_distinct_stable_and_63_bit() -> None:
    ids = [record_id(name) for name in NAMES]
    assert len(set(ids)) == len(ids)
    assert 0 <= min(ids) < max(ids) < 2**63
    assert within_five_sigma(np.mean([i >= 2**62 for i in ids]), 0.5, len(ids))
    assert record_id("digits:0") == 1610232262726702858  # never changes: runs are resumed by ids


def test_held_out_share_and_independence_of_other_records() -> None:
    held_out = [name for name in NAMES if is_test(name, 1 / 6)]
    assert within_five_sigma(len(held_out) / len(NAMES), 1 / 6, len(NAMES))
    assert not within_five_sigma(np.mean([is_test(name, 1 / 5) for name in NAMES]), 1 / 6, len(NAMES))
    assert [name for name in NAMES[::7] if is_test(name, 1 / 6)] == [n for n in NAMES[::7] if n in set(held_out)]


def test_a_larger_fraction_only_adds_to_the_held_out_part() -> None:
    small = {name for name in NAMES if is_test(name, 0.1)}
    assert small < {name for name in NAMES if is_test(name, 0.2)}
    assert not any(is_test(name, 0.0) for name in NAMES)


def test_split_does_not_follow_the_id() -> None:
    low_ids = [is_test(name, 1 / 6) for name in NAMES if record_id(name) < 2**62]
    assert within_five_sigma(np.mean(low_ids), 1 / 6, len(low_ids))


def test_cut_covers_everything_once() -> None:
    assert cut(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert cut(0, 4) == []


@pytest.mark.parametrize("label", [-1, 3, None, 1.0, np.int64(3)])
def test_label_outside_the_classes_is_refused(label: Any) -> None:
    with pytest.raises(InputError, match=rf"label={label}.*cats/1\.png"):
        check_label("cats/1.png", label, 3)
    assert check_label("cats/1.png", np.uint8(2), 3) == 2


def test_class_names_are_overridden_only_by_as_many() -> None:
    assert choose_class_names(["0", "1"], DataConfig()) == ("0", "1")
    assert choose_class_names(["0", "1"], DataConfig(class_names=["no", "yes"])) == ("no", "yes")
    with pytest.raises(InputError, match="expected 2 names"):
        choose_class_names(["0", "1"], DataConfig(class_names=["no"]))


def test_digits_are_listed_and_read() -> None:
    data = DataConfig(records_per_shard=500)
    source = open_source(data)
    assert source.class_names == tuple("0123456789")
    assert [len(shard) for shard in source.shards] == [500, 500, 500, 297]
    records = [record for shard in source.shards for record in read_shard(shard, data)]
    assert [record.name for record in records] == [f"digits:{index}" for index in range(1797)]
    held_out = sum(is_test(record.name, data.test_fraction) for record in records)
    assert (source.num_train, source.num_test) == (1797 - held_out, held_out)
    assert records[0].content.shape == (8, 8, 1)
    assert max(record.content.max() for record in records) == 255
    assert {int(value) for value in np.unique([r.content for r in records])} == {round(v * 255 / 16) for v in range(17)}


def test_digits_are_not_upscaled_unless_asked() -> None:
    with pytest.raises(InputError, match=r"data.image_size=16.*data.resize=any"):
        open_source(DataConfig(image_size=16))
    assert open_source(DataConfig(image_size=16, resize="any")).num_train > 0


def test_shards_can_be_sent_to_another_process() -> None:
    import pickle

    source = open_source(DataConfig())
    assert pickle.loads(pickle.dumps(source)) == source
