"""Synthetic images from the released weights: post-processing, free. One public seed an image."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load

from e2h.config import SamplingConfig, expect, stamp
from e2h.curriculum.batches import addressed_seeds
from e2h.curriculum.run import Run
from e2h.curriculum.train import new_network
from e2h.data.exports import write_hf_parquet
from e2h.data.remote import Place
from e2h.data.storage import open_prepared
from e2h.diffusion.networks import UNet
from e2h.diffusion.samplers import sample, to_uint8

STAGE = "sampling"


def image_labels(sampling: SamplingConfig, num_classes: int) -> np.ndarray:
    """The label of each image, int64 [num_images]: uniform, or the public shares of `class_fractions`.

    Labels alternate, so that any run of images is nearly balanced.

    Raises:
      InputError: if there isn't one share a class.
    """
    fractions = sampling.class_fractions or [1 / num_classes] * num_classes
    expect(len(fractions) == num_classes, "sampling.class_fractions", fractions, f"{num_classes} shares, one a class")
    shares = np.asarray(fractions) / sum(fractions)
    # The place at which each class's k-th image falls due; sorting the places spreads every class evenly.
    due = [(np.arange(int(np.ceil(sampling.num_images * share))) + 0.5) / max(share, 1e-12) for share in shares]
    labels = np.repeat(np.arange(num_classes), [len(places) for places in due])
    order = np.argsort(np.concatenate(due), kind="stable")
    return labels[order][: sampling.num_images].astype(np.int64)


def num_shards(sampling: SamplingConfig) -> int:
    return -(-sampling.num_images // sampling.images_per_shard)


class Synthesizer:
    """Loads a run's weights once and makes shards of images; a shard that exists is not made again."""

    def __init__(self, run: Run, device: torch.device | str = "cpu") -> None:
        prepared = open_prepared(run.prepared)
        self.run, self.manifest = run, prepared.manifest
        self.network: UNet = new_network(run, prepared)
        self.network.load_state_dict(load(run.weights.read_bytes()))
        self.network.to(device).eval()
        self.labels = image_labels(run.config.sampling, len(self.manifest.class_names))

    def write_shard(self, index: int) -> int:
        """Makes `part-00000.parquet` of the run's synthetic images; returns the number of images made."""
        path = shard_path(self.run.synthetic, index)
        if path.exists():
            return 0
        size = self.run.config.sampling.images_per_shard
        places = np.arange(index * size, min((index + 1) * size, len(self.labels)))
        images = np.concatenate([self._images(part) for part in np.array_split(places, max(1, len(places) // 250))])
        write_hf_parquet(path, images, self.labels[places], self.manifest.class_names, notes=stamp(self.run.config))
        return len(places)

    def _images(self, places: np.ndarray) -> np.ndarray:
        seeds = addressed_seeds(self.run.config.seed, STAGE, 0, places)
        shape = (self.manifest.channels, self.manifest.image_size, self.manifest.image_size)
        labels = torch.from_numpy(self.labels[places])
        return to_uint8(sample(self.network, labels, seeds, self.run.config.sampling, shape)).numpy()


def shard_path(folder: Place, index: int) -> Place:
    return folder / f"part-{index:05d}.parquet"
