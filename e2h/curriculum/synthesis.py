"""Synthetic images from the released weights: post-processing, free. One public seed an image."""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from e2h.config import Config, SamplingConfig, stamp
from e2h.curriculum.averages import average, snapshots
from e2h.curriculum.batches import addressed_seeds
from e2h.curriculum.labels import image_labels
from e2h.curriculum.pictures import by_class, write_grid
from e2h.curriculum.run import Run
from e2h.curriculum.train import easy_images, new_network, save_weights
from e2h.curriculum.workers import is_out_of_memory
from e2h.data.exports import read_hf_parquet, write_hf_parquet
from e2h.data.filesystem import write_bytes
from e2h.data.remote import Place
from e2h.data.storage import DAMAGED_FILE, open_prepared
from e2h.diffusion.networks import UNet
from e2h.diffusion.samplers import sample, to_uint8
from e2h.errors import InputError
from e2h.privacy.scores import central_distance

STAGE = "sampling"
# Rows of the network at a time: beyond, a GPU gets no faster by much; a CPU gets slower when a layer leaves its cache.
MOST_ROWS = {"cpu": 256, "cuda": 2048}
TRIED = 20  # images of a class that an average is judged by
CPU_ACTIVATIONS = 2**19  # of one layer at full resolution


def image_seeds(seed: int, places: np.ndarray) -> list[int]:
    """A seed for the image at each place, different ones: torch's generator on the CPU reads 32 bits and no more.

    Random ones would be equal for a pair of 93,000 images, and images of one seed and label are copies.
    """
    [start] = addressed_seeds(seed, STAGE, 0, np.zeros(1, np.int64))
    return ((start + places) % 2**32).tolist()


def choose_average(run: Run) -> None:
    """Makes the average of `sampling.ema_widths` the run's weights: post-processing, free.

    Of several widths the one whose images lie nearest to the central images, which are released.
    """
    widths, steps = run.config.sampling.ema_widths, snapshots(run.checkpoints)
    path = run.checkpoints / "average.json"
    if not widths or not steps or (path.exists() and json.loads(path.read_text())["step"] == steps[-1]):
        return
    network, found = new_network(run, open_prepared(run.prepared)), {}
    for width in widths:
        network.load_state_dict(average(run.checkpoints, steps, width))
        save_weights(run.weights, network, stamp(run.config))
        found[width] = Synthesizer(run).central_score() if len(widths) > 1 else 0.0
    best = max(found, key=lambda width: found[width])
    network.load_state_dict(average(run.checkpoints, steps, best))
    save_weights(run.weights, network, stamp(run.config))
    told = {"step": steps[-1], "width": best, "scores": [[width, score] for width, score in found.items()]}
    write_bytes(path, json.dumps(told).encode())


def num_shards(sampling: SamplingConfig) -> int:
    return -(-sampling.num_images // sampling.images_per_shard)


def batch_size(config: Config, device: torch.device) -> int:
    """How many images are made at a time: what the device does fastest, in equal parts of a shard.

    Every batch of a run has this size, so that a compiled network sees one shape and an image doesn't depend, not even
    in its last bit, on its place in a batch or on what was made before.
    """
    sampling, model = config.sampling, config.model
    rows = MOST_ROWS[device.type]
    if device.type == "cpu":
        side = config.data.image_size // model.patch_size
        activations = model.base_width * model.width_multipliers[0] * side**2
        rows = min(rows, CPU_ACTIVATIONS // activations)
    most = max(1, rows // (2 if sampling.guidance > 0 else 1))
    shard = min(sampling.images_per_shard, sampling.num_images)
    return -(-shard // -(-shard // most))


class Synthesizer:
    """Loads a run's weights once and makes shards of images; a shard that exists is not made again.

    Attributes:
      network: the run's weights, in float32.
      batch_size: images made at a time; halved whenever they don't fit the memory.
    """

    def __init__(self, run: Run, device: torch.device | str = "cpu") -> None:
        prepared = open_prepared(run.prepared)
        self.run, self.manifest = run, prepared.manifest
        self.network: UNet = new_network(run, prepared)
        self.network.load_state_dict(_weights(run))
        self.network.to(device).eval()
        self.evaluate = self.network
        if run.config.sampling.compile:
            self.evaluate = torch.compile(self.network, fullgraph=True, dynamic=False)  # type: ignore[assignment]
        self.batch_size = batch_size(run.config, torch.device(device))
        self.labels = image_labels(run.config.sampling, len(self.manifest.class_names))

    def central_score(self) -> float:
        """How near a few images come to the central images (`e2h.privacy.scores.central_distance`)."""
        places = np.arange(min(len(self.labels), TRIED * len(self.manifest.class_names)))
        made = self._images(places), self.labels[places]
        return central_distance(made, easy_images(self.run, "central")).value

    def write_shard(self, index: int) -> int:
        """Makes `part-00000.parquet` of the run's synthetic images; returns the number of images made."""
        path = shard_path(self.run.synthetic, index)
        if path.exists():
            return 0
        size = self.run.config.sampling.images_per_shard
        places = np.arange(index * size, min((index + 1) * size, len(self.labels)))
        images = self._images(places)
        write_hf_parquet(path, images, self.labels[places], self.manifest.class_names, notes=stamp(self.run.config))
        return len(places)

    def _images(self, places: np.ndarray) -> np.ndarray:
        made: list[np.ndarray] = []
        while len(places):
            try:
                made.append(self._batch(places[: self.batch_size]))
            except (RuntimeError, MemoryError) as error:
                if self.batch_size == 1 or not is_out_of_memory(error):
                    raise
                self.batch_size //= 2
            else:
                places = places[self.batch_size :]
        return np.concatenate(made)

    def _batch(self, places: np.ndarray) -> np.ndarray:
        """The images of at most `batch_size` places, which are padded to as many with copies of the first."""
        padded = np.concatenate([places, np.full(self.batch_size - len(places), places[0])])
        seeds = image_seeds(self.run.config.seed, padded)
        shape = (self.manifest.channels, self.manifest.image_size, self.manifest.image_size)
        labels = torch.from_numpy(self.labels[padded])
        images = sample(self.evaluate, labels, seeds, self.run.config.sampling, shape)
        return to_uint8(images[: len(places)]).numpy()


def synthesized(run: Run) -> bool:
    """Whether all images are there."""
    if not run.done("sample"):
        return False
    return sum(1 for _ in run.synthetic.glob("part-*.parquet")) == num_shards(run.config.sampling)


def _weights(run: Run) -> dict[str, torch.Tensor]:
    try:
        return load(run.weights.read_bytes())
    except SafetensorError as error:
        raise InputError(f"file={run.weights}: {DAMAGED_FILE}") from error


def write_synthetic_grid(run: Run, num_classes: int) -> None:
    """`grid.png`: the first images of each class."""
    images, labels = read_hf_parquet([shard_path(run.synthetic, 0)])
    write_grid(run, run.synthetic / "grid.png", *by_class(images, labels, num_classes))


def shard_path(folder: Place, index: int) -> Place:
    return folder / f"part-{index:05d}.parquet"
