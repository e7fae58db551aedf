"""Every experiment file runs to a release: its own networks and stages, on made-up data, made short."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from e2h.api import run
from e2h.config import Config
from e2h.data.exports import write_image_folder
from e2h.data.images import encode_png
from e2h.reporting.check import check
from e2h.settings import compose

LARGEST = "celeba128"  # takes two minutes
EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parents[1] / "e2h/conf/experiment").glob("*.yaml"))
NUM_TRAIN, NUM_TEST = 48, 8
SHORT = {
    "privacy.epsilon": 4.0,
    "warmup.num_steps": 2,
    "warmup.batch_size": 4,
    "finetune.num_steps": 2,
    "finetune.expected_batch_size": 6,
    "finetune.noise_multiplicity": 1,
    "finetune.compile": False,
    "frequency.generator_steps": 2,
    "frequency.warmup.num_steps": 2,
    "frequency.warmup.batch_size": 4,
    "sampling.num_images": 4,
    "sampling.images_per_shard": 4,
    "sampling.num_steps": 2,
    "sampling.compile": False,
    "evaluation.classifiers": ["logistic_regression"],
    "evaluation.memorisation_images": 4,
}


def make_data(config: Config, folder: Path) -> None:
    """Random images in the layout that the experiment reads."""
    size, names, rng = config.data.image_size, config.data.class_names or list("0123456789"), np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_TRAIN + NUM_TEST, size, size, config.data.channels), dtype=np.uint8)
    labels = np.arange(len(images)) % len(names)
    folder.mkdir()
    if config.data.source == "idx":
        for name, part in (("train", slice(NUM_TRAIN)), ("t10k", slice(NUM_TRAIN, None))):
            pixels, marks = images[part, :, :, 0].tobytes(), labels[part].astype(np.uint8).tobytes()
            count = len(labels[part])
            _pack(folder / f"{name}-images-idx3-ubyte.gz", struct.pack(">IIII", 0x803, count, size, size) + pixels)
            _pack(folder / f"{name}-labels-idx1-ubyte.gz", struct.pack(">II", 0x801, count) + marks)
    elif config.data.source == "parquet":
        cells = [{"bytes": encode_png(image), "path": None} for image in images]
        pq.write_table(pa.table({"image": cells, config.data.label_column: labels}), folder / "train.parquet")
    elif config.data.source == "image_folder":
        folder.rmdir()
        write_image_folder(folder, images, labels, names)


def _pack(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content))


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.chaos if one == LARGEST else pytest.mark.long) for one in EXPERIMENTS]
)
def test_an_experiment_made_short_ends_in_a_release(name, tmp_path):
    where = {"experiment": name, "data.path": str(tmp_path / "data")}
    if name == "gpu":  # for any data, so it has none of its own
        where["data"] = "mnist"
    config = compose({**where, **SHORT, "run.storage": str(tmp_path / "runs")})
    make_data(config, tmp_path / "data")
    release = run(config)
    assert check(release) == []
    assert (release / "data" / "part-00000.parquet").is_file()
