"""A small stand-in is repeated until it is as many images as the private set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from e2h.config import DataConfig
from e2h.data.exports import write_hf_parquet
from e2h.data.prepare import finish_prepared, prepare_shard
from e2h.data.sources import open_source
from e2h.data.storage import load_split, open_prepared
from e2h.distributed.stand_in import repeated

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)


def few(tmp_path) -> DataConfig:
    write_hf_parquet(tmp_path / "central.parquet", IMAGES, np.arange(12) % 3, ("a", "b", "c"))
    return DataConfig(source="parquet", path=str(tmp_path / "central.parquet"), test_fraction=0.25)


def prepared_from(source, data, folder):
    stats = [prepare_shard(shard, data, str(folder), index) for index, shard in enumerate(source.shards)]
    finish_prepared(str(folder), source, data, stats)
    return open_prepared(folder)


def test_a_few_images_become_as_many_as_the_private_ones(tmp_path):
    data = few(tmp_path)
    source = repeated(open_source(data), data, 100)
    assert 100 <= source.num_train <= 150
    found = prepared_from(source, data, tmp_path / "stand-in")
    train = load_split(found, "train")
    assert len(np.unique(train.ids)) == len(train) == source.num_train
    known = {image.tobytes() for image in IMAGES}
    assert {image.tobytes() for image in train.images} <= known


def test_enough_images_and_those_known_by_their_files_stay_as_they_are(tmp_path):
    data = few(tmp_path)
    source = open_source(data)
    assert repeated(source, data, source.num_train) is source
    assert repeated(source, replace(data, source="image_folder"), 1000) is source
