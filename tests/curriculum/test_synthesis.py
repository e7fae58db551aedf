"""Synthetic images: one seed an image, a shard made once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from small_runs import prepare, small_config

from e2h.config import NOT_PRIVATE, Config, SamplingConfig, stamp
from e2h.curriculum import synthesis
from e2h.curriculum.run import Run, open_run
from e2h.curriculum.synthesis import (
    Synthesizer,
    batch_size,
    image_seeds,
    num_shards,
    shard_path,
    synthesized,
)
from e2h.curriculum.train import new_network, save_weights
from e2h.data.exports import read_hf_parquet
from e2h.data.storage import open_prepared
from e2h.distributed import stages
from e2h.errors import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run with weights, although untrained ones."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("E2H_TEST_SECRET", bytes(range(32)).hex())
        with open_run(small_config(tmp_path_factory.mktemp("runs"))) as opened:
            prepare(opened)
            opened.checkpoints.mkdir()
            network = new_network(opened, open_prepared(opened.prepared))
            # Its last layer starts at zero; moved, the images depend on their labels and all weights.
            for parameter in network.parameters():
                parameter.data.add_(0.1)
            save_weights(opened.weights, network, stamp(opened.config))
            return opened


def made_in(run: Run, folder: Path, **changes) -> np.ndarray:
    """All images of a copy of the run with other sampling settings."""
    shutil.copytree(run.root, folder / "run")
    copy = Run(folder / "run", replace(run.config, sampling=replace(run.config.sampling, **changes)))
    copy.synthetic.mkdir()
    synthesizer = Synthesizer(copy)
    paths = [shard_path(copy.synthetic, index) for index in range(num_shards(copy.config.sampling))]
    for index in range(len(paths)):
        synthesizer.write_shard(index)
    return read_hf_parquet(paths)[0]


@pytest.fixture
def made(run, tmp_path):
    """made(num_images=5, ...): all images and labels of a copy of the run with other sampling settings."""

    def make(**changes) -> tuple[np.ndarray, np.ndarray]:
        folder = tmp_path / "-".join(f"{key}{value}" for key, value in changes.items())
        shutil.copytree(run.root, folder)
        copy = Run(folder, replace(run.config, sampling=replace(run.config.sampling, **changes)))
        copy.synthetic.mkdir()
        synthesizer = Synthesizer(copy)
        counts = [synthesizer.write_shard(index) for index in range(num_shards(synthesizer.run.config.sampling))]
        images, labels = read_hf_parquet([shard_path(copy.synthetic, index) for index in range(len(counts))])
        assert sum(counts) == len(images)
        return images, labels

    return make


def test_an_image_depends_on_its_number_alone(made):
    images, labels = made(images_per_shard=8)
    assert images.shape == (20, 8, 8, 1)
    assert sorted(labels.tolist()) == sorted(2 * list(range(10)))
    assert len({image.tobytes() for image in images}) == 20
    for images_per_shard in (1, 7, 20, 1000):
        others, their_labels = made(images_per_shard=images_per_shard)
        assert (their_labels == labels).all()
        assert (others == images).all()
    fewer, _ = made(images_per_shard=9, num_images=10)
    assert (fewer == images[:10]).all()


@pytest.mark.parametrize(("num_images", "size"), [(20, 7), (20, 3), (19, 8), (3, 8)])
def test_every_batch_has_one_shape(run, tmp_path, monkeypatch, num_images, size):
    seen, original = [], synthesis.sample
    monkeypatch.setattr(synthesis, "sample", lambda *call: (seen.append(len(call[1])), original(*call))[1])
    monkeypatch.setattr(synthesis, "batch_size", lambda *call: size)
    images = made_in(run, tmp_path, num_images=num_images)
    assert set(seen) == {size}
    assert len(images) == num_images
    assert len({image.tobytes() for image in images}) == num_images  # none is the padding's


def test_images_that_do_not_fit_the_memory_are_made_in_smaller_batches(run, tmp_path, monkeypatch):
    expected, seen, original = made_in(run, tmp_path / "whole"), [], synthesis.sample

    def scarce(network, labels, *others):
        seen.append(len(labels))
        if len(labels) > 2:
            raise torch.OutOfMemoryError
        return original(network, labels, *others)

    monkeypatch.setattr(synthesis, "sample", scarce)
    assert (made_in(run, tmp_path / "scarce") == expected).all()
    assert seen == [8, 4, *10 * [2]]  # and of no shard again in batches that were too large


def test_a_failure_that_is_not_of_memory_is_raised(run, tmp_path, monkeypatch):
    def broken(*call):
        raise RuntimeError("another")

    monkeypatch.setattr(synthesis, "sample", broken)
    with pytest.raises(RuntimeError, match="another"):
        made_in(run, tmp_path)


def test_the_size_of_a_batch_follows_from_the_device_and_the_shard():
    def size(image_size=28, device="cpu", width=64, patch_size=1, **changes):
        config = Config(sampling=replace(SamplingConfig(num_images=60000, images_per_shard=500), **changes))
        config.model.base_width, config.model.patch_size, config.data.image_size = width, patch_size, image_size
        return batch_size(config, torch.device(device))

    assert size(8, width=16) == 250  # of at most 256, two equal parts of a shard
    assert (size(28), size(64, width=32), size(128, width=64)) == (10, 4, 1)
    assert size(56, patch_size=2) == 10
    assert size(28, guidance=1.0) == 5
    assert size(8, width=16, num_images=20) == 20
    assert (size(device="cuda"), size(device="cuda", images_per_shard=3000)) == (500, 1500)


def test_settings_and_labels_matter(made):
    plain, _ = made(churn=0.0)
    churned, _ = made(churn=10.0)
    coarser, _ = made(num_steps=2)
    one_class, labels = made(class_fractions=[0.0] * 9 + [1.0])
    assert set(labels.tolist()) == {9}
    for other in (churned, coarser, one_class):
        assert (other != plain).any()


def test_a_shard_is_not_made_twice(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run.root, folder)
    copy = Run(folder, run.config)
    copy.synthetic.mkdir()
    synthesizer = Synthesizer(copy)
    assert num_shards(synthesizer.run.config.sampling) == 3
    assert [synthesizer.write_shard(index) for index in (2, 0)] == [4, 8]
    before = {path.name: path.read_bytes() for path in copy.synthetic.iterdir()}
    assert sorted(before) == ["part-00000.parquet", "part-00002.parquet"]
    assert [synthesizer.write_shard(index) for index in (0, 1, 2)] == [0, 8, 0]
    for name, content in before.items():
        assert (copy.synthetic / name).read_bytes() == content


def test_no_two_images_have_one_seed_for_torch_which_reads_32_bits():
    seeds = image_seeds(0, np.arange(1_000_000))
    assert len({seed % 2**32 for seed in seeds}) == 1_000_000
    assert seeds[5:7] == image_seeds(0, np.arange(5, 7))
    assert seeds[0] != image_seeds(1, np.arange(1))[0]


def test_another_seed_gives_other_images(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run.root, folder)
    images = []
    for seed in (0, 1):
        copy = Run(folder, replace(run.config, seed=seed))
        shutil.rmtree(copy.synthetic, ignore_errors=True)
        copy.synthetic.mkdir()
        Synthesizer(copy).write_shard(0)
        images.append(read_hf_parquet([shard_path(copy.synthetic, 0)])[0])
    assert not (images[0] == images[1]).all(axis=(1, 2, 3)).any()


@pytest.mark.parametrize("test_mode", [False, True])
def test_images_and_weights_of_a_published_secret_say_so(run, tmp_path, test_mode):
    folder = tmp_path / "copy"
    shutil.copytree(run.root, folder)
    copy = Run(folder, replace(run.config, privacy=replace(run.config.privacy, test_mode=test_mode)))
    copy.synthetic.mkdir()
    synthesizer = Synthesizer(copy)
    synthesizer.write_shard(0)
    save_weights(copy.weights, synthesizer.network, stamp(copy.config))
    with safe_open(str(copy.weights), "pt") as weights:
        notes = [weights.metadata().get("not_private"), pq.read_schema(shard_path(folder / "synthetic", 0)).metadata]
    assert notes[0] == (NOT_PRIVATE if test_mode else None)
    assert notes[1].get(b"not_private") == (NOT_PRIVATE.encode() if test_mode else None)


def test_a_picture_does_not_decide_whether_a_stage_is_done(run, tmp_path, monkeypatch):
    copy = Run(tmp_path / "copy", run.config)
    shutil.copytree(run.root, copy.root)

    def refuse(*_: object) -> None:
        raise InputError("image=195006x396")

    def write_shards(run: Run, count: int, _: object) -> None:
        for index in range(count):
            Synthesizer(run).write_shard(index)

    monkeypatch.setattr(stages, "await_nodes", lambda *_: None)
    monkeypatch.setattr(stages.datasets, "synthesize", write_shards)
    monkeypatch.setattr(stages.results, "show_grid", refuse)
    with pytest.raises(InputError, match="image=195006x396"):
        stages.sample(copy)
    assert synthesized(copy)
    stages.sample(copy)  # nothing is left to do
