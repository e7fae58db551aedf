"""The stage reads the real images that it needs, block by block, and finds what whole splits would give."""

from __future__ import annotations

import numpy as np
import pytest

from e2h import results as stages
from e2h.config import Config, DataConfig, EvaluationConfig, SamplingConfig
from e2h.curriculum.run import Run
from e2h.curriculum.synthesis import shard_path, synthesized
from e2h.data.exports import write_hf_parquet
from e2h.data.prepare import finish_prepared, prepare_shard
from e2h.data.sources import open_source
from e2h.data.storage import load_split, open_prepared
from e2h.errors import InputError
from e2h.evaluation.evaluate import evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Digits in several files; of the training images two shards stand for synthetic ones."""
    data = DataConfig(records_per_shard=200)
    run = Run(
        tmp_path_factory.mktemp("run"),
        Config(
            data=data,
            sampling=SamplingConfig(num_images=300, images_per_shard=200),
            evaluation=EvaluationConfig(classifiers=["logistic_regression"], max_feature_records=300),
        ),
    )
    source = open_source(data)
    stats = [prepare_shard(shard, data, run.prepared, index) for index, shard in enumerate(source.shards)]
    finish_prepared(run.prepared, source, data, stats)
    train = load_split(open_prepared(run.prepared), "train")
    run.synthetic.mkdir()
    for index, part in enumerate((slice(0, 200), slice(200, 300))):
        write_hf_parquet(shard_path(run.synthetic, index), train.images[part], train.labels[part], list("0123456789"))
    return run


@pytest.mark.parametrize("count", [2, 170, 777, 10**6])
@pytest.mark.parametrize("block", [64, 1000])
def test_real_images_are_spread_over_the_set_and_few_files_opened(run, monkeypatch, count, block):
    prepared, opened, original = open_prepared(run.prepared), [], stages.iter_batches

    def watched(files, size):
        for file in files:
            opened.append(file)
            yield from original([file], size)

    monkeypatch.setattr(stages, "iter_batches", watched)
    monkeypatch.setattr(stages, "EVALUATED_AT_ONCE", block)
    images, labels = stages.some_images(prepared, count)
    whole = load_split(prepared, "train")
    places = np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int)
    np.testing.assert_array_equal(images, whole.images[places])
    np.testing.assert_array_equal(labels, whole.labels[places])
    assert len(opened) == len(prepared.files("train"))
    opened.clear()
    monkeypatch.setattr(stages, "EVALUATED_FILES", 2)
    images, labels = stages.some_images(prepared, count)
    assert len(images) == len(labels) == min(count, len(whole))
    rows = len(whole) / len(prepared.files("train"))
    assert len(opened) <= max(2, count // rows + 2)
    assert {opened[0], opened[-1]} == {prepared.files("train")[0], prepared.files("train")[-1]}


def spread(records, count):
    places = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)
    return records.images[places], records.labels[places]


def test_blocks_of_any_size_give_what_whole_splits_give(run, monkeypatch):
    train, test = (load_split(open_prepared(run.prepared), split) for split in ("train", "test"))
    synthetic, settings = (train.images[:300], train.labels[:300]), run.config.evaluation
    whole = evaluate(
        synthetic,
        spread(train, settings.max_feature_records),
        [(test.images, test.labels)],
        settings,
        run.config.seed,
        list("0123456789"),
        [(train.images, train.labels)],
    )
    monkeypatch.setattr(stages, "EVALUATED_AT_ONCE", 50)
    found = stages._evaluate(run)
    of_blocks, of_whole = (one["downstream"]["logistic_regression"].pop("per_class") for one in (found, whole))
    assert list(of_blocks.values()) == list(of_whole.values())
    assert found == whole


def test_too_small_a_test_set_is_refused_before_any_training(run, monkeypatch):
    prepared = open_prepared(run.prepared)
    vars(prepared.manifest)["num_test"] = 1
    monkeypatch.setattr(stages, "open_prepared", lambda folder: prepared)
    monkeypatch.setattr(stages, "measure", lambda *call: pytest.fail("trained"))
    with pytest.raises(InputError, match="data=1 test images: expected at least 2; hold more out"):
        stages._evaluate(run)


@pytest.mark.parametrize("lost", ["the mark", "a part"])
def test_images_that_are_not_all_there_are_not_evaluated(run, monkeypatch, lost):
    """What is measured is kept: of a part of the images it would stand for all of them."""
    monkeypatch.setattr(stages, "_evaluate", lambda run: pytest.fail("measured"))
    if lost == "a part":
        (run.synthetic / "grid.png").touch()
        run.mark_done("sample")
        assert synthesized(run)
        shard_path(run.synthetic, 1).unlink()
    with pytest.raises(InputError, match="expected all synthetic images; run the sample job first"):
        stages.evaluate(run)
    assert not run.evaluation.exists()
