"""A small stand-in is repeated until it is as many images as the private set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from e2h.config import Config, DataConfig
from e2h.data.exports import write_hf_parquet
from e2h.data.prepare import finish_prepared, prepare_shard
from e2h.data.sources import open_source
from e2h.data.storage import load_split, open_prepared
from e2h.distributed.stand_in import as_on, repeated, shared_images
from e2h.privacy.plan import make_plan

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


def test_private_images_are_known_again_under_other_names_and_others_are_not(tmp_path):
    data = few(tmp_path)
    source = open_source(data)
    private = prepared_from(source, data, tmp_path / "private")
    repetition = prepared_from(repeated(source, data, 100), data, tmp_path / "stand-in")
    assert shared_images(private, repetition) == 1
    # Images of one colour are alike everywhere, and tell nothing.
    others = np.random.default_rng(1).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    for name, images, share in (("blank", np.zeros_like(others), 0.0), ("others", others, 0.0), ("own", IMAGES, 1.0)):
        path = tmp_path / f"{name}.parquet"
        write_hf_parquet(path, images, np.arange(12) % 3, ("a", "b", "c"))
        there = replace(data, path=str(path), test_fraction=0.0)
        assert shared_images(private, prepared_from(open_source(there), there, tmp_path / name)) == share, name


def test_on_a_larger_set_batches_and_the_noise_beside_a_mean_stay_as_large():
    config = Config(curriculum=["central", "frequency"])
    config.finetune.expected_batch_size = 1523  # all records: its sampling probability is 1
    config.central.noise_multiplier = config.frequency.noise_multiplier = 20.0
    plan = make_plan(config, 1523, list("0123456789"))
    there = as_on(plan, 2 * 1523, list("0123456789"), config)
    for name, times in (("central", 1.0), ("frequency", 2.0), ("finetune", 1.0)):
        here, event = plan.release(name).event, there.release(name).event
        assert event.noise_multiplier == times * here.noise_multiplier
        # Twice the records: half the rate, or twice the sum under twice the noise.
        assert event.sampling_prob == here.sampling_prob / (1.0 if name == "frequency" else 2.0)
