"""Canaries of the DP-SGD audit: records whose gradient is known and touches a weight of their own.

Phantom parameters: a table with one weight a canary, which no other record's loss touches. A canary's gradient is a
large multiple of its own unit vector, so that after the clip it is max_grad_norm * e_i, the most that a record may
contribute, and the released gradient of weight i tells of canary i alone. Canaries are images with a mark in the first
pixels, so that they go the way of every other record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from e2h.config import Config, FinetuneConfig
from e2h.data.storage import ImageSet
from e2h.diffusion.losses import micro_batch_loss
from e2h.diffusion.networks import UNet
from e2h.privacy.keys import derive_key

NUM_OTHERS = 200  # ordinary records
LENGTH = 8.0  # of a canary's gradient, in units of max_grad_norm: a missing clip shows
NEARLY = 0.99  # of the threshold above which clipping=global drops a gradient
MARK = 255  # first value of a canary's image; at most 127 in all others


@dataclass(frozen=True)
class Subject:
    """What is audited, with how many canaries and DP-SGD steps, and at which claim.

    A claim of epsilon 10 can't be refuted by so few canaries even without noise, and the defaults take
    half a minute on two cores for the demo's network.
    """

    config: Config
    num_canaries: int = 2000
    num_steps: int = 60
    epsilon: float = 1.0
    delta: float = 1e-5

    @property
    def num_classes(self) -> int:
        """Of `data.class_names`; ten where they are not set, because the data isn't opened."""
        return len(self.config.data.class_names or range(10))


@dataclass(frozen=True)
class CanaryLoss:
    """The training loss for ordinary records, `length` times its own phantom weight for a canary."""

    length: float

    def __call__(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        marks = (batch["images"][:, 0].flatten(1)[:, :3] * 127.5 + 127.5).round().long()
        canary = marks[:, 0] == MARK
        places = torch.where(canary, 256 * marks[:, 1] + marks[:, 2], 0)
        num_draws = batch["sigma"].shape[1]
        # One row a draw, k-major, as the network's own: the engines count them.
        weights = network.canaries(places.repeat(num_draws)).view(num_draws, -1).mean(0)  # type: ignore[operator]
        return torch.where(canary, self.length * weights, micro_batch_loss(network, batch))


def canary_loss(settings: FinetuneConfig) -> CanaryLoss:
    """With gradients that the configured clip turns into nearly the most that a record may contribute."""
    whole = settings.clipping == "global"
    return CanaryLoss(NEARLY * settings.norm_threshold if whole else LENGTH * settings.max_grad_norm)


def canary_network(subject: Subject) -> UNet:
    """The configured network; behind its parameters the phantom weights, zero."""
    config, data = subject.config, subject.config.data
    network = UNet.from_config(config.model, data.image_size, data.channels, subject.num_classes, config.seed).train()
    network.canaries = nn.Embedding(subject.num_canaries, 1)
    nn.init.zeros_(network.canaries.weight)
    return network


class CanaryRecords:
    """Canaries 0 .. m-1, then ordinary records, with random pixels, labels and ids.

    Attributes:
      all: every record that could join.
      included: bool [m], which canaries do: fair coins.
    """

    def __init__(self, subject: Subject, secret: bytes) -> None:
        size, channels = subject.config.data.image_size, subject.config.data.channels
        rng = np.random.default_rng(list(derive_key(secret, "audit/records")))
        self.num_canaries = subject.num_canaries
        count = self.num_canaries + NUM_OTHERS
        images = rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
        ids = rng.choice(2**62, count, replace=False)
        self.all = ImageSet(ids, rng.integers(0, subject.num_classes, count), mark(images, self.num_canaries))
        self.included = rng.random(self.num_canaries) < 0.5

    def subset(self, places: np.ndarray) -> ImageSet:
        return ImageSet(self.all.ids[places], self.all.labels[places], self.all.images[places])

    def joined(self) -> np.ndarray:
        """Places of the included canaries and all ordinary records, mixed, so that every worker gets both."""
        kept = np.concatenate([self.included, np.ones(NUM_OTHERS, bool)])
        order = np.random.default_rng(0).permutation(len(kept))
        return order[kept[order]]


def mark(images: np.ndarray, num_canaries: int) -> np.ndarray:
    """The images with the first `num_canaries` numbered as canaries, and no other taken for one."""
    marked = images.copy()
    values = marked[..., 0].reshape(len(images), -1)
    values[:, 0] //= 2
    places = np.arange(num_canaries)
    values[:num_canaries, :3] = np.stack([np.full(num_canaries, MARK), places // 256, places % 256], axis=1)
    marked[..., 0] = values.reshape(marked.shape[:3])
    return marked
