"""Images from noisy mean embeddings: a small generator fitted to them (DP-MERF, Harder et al. 2021; FETA-Pro).

Post-processing of one release, so it costs no privacy, however long it takes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from e2h.curriculum.frequency import TURN_BITS, FrequencyQuery

LATENT_WIDTH = 16
WIDTH, WIDEST = 16, 64  # channels at full resolution; twice as many at half of it, and so on
LEARNING_RATE, WARMING_STEPS = 0.01, 20
BATCH_SIZE, MOST_CLASSES = 100, 10  # images and classes of a step
AT_ONCE = 500  # images that are generated at a time


class Generator(nn.Module):
    """Noise and a class to an image in [0, 1]; transposed convolutions double the side, 4 to 7 pixels at first."""

    def __init__(self, num_classes: int, image_size: int, channels: int) -> None:
        super().__init__()
        doublings = max(0, math.floor(math.log2(image_size / 4)))
        self.image_size, self.side = image_size, -(-image_size // 2**doublings)
        widths = [min(WIDTH * 2**level, WIDEST) for level in reversed(range(doublings + 1))]
        self.embed = nn.Embedding(num_classes, LATENT_WIDTH)
        self.spread = nn.Linear(2 * LATENT_WIDTH, widths[0] * self.side**2)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.GroupNorm(before // 8, before), nn.SiLU(), nn.ConvTranspose2d(before, after, 4, 2, 1)]
        self.out = nn.Conv2d(WIDTH, channels, 3, padding=1)
        self.layers = nn.Sequential(*layers, nn.GroupNorm(WIDTH // 8, WIDTH), nn.SiLU(), self.out)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] of `latents` [B, LATENT_WIDTH], standard normal, and `labels` [B]."""
        hidden = self.spread(torch.cat([latents, self.embed(labels)], dim=1))
        images = self.layers(hidden.view(len(latents), -1, self.side, self.side))
        return torch.sigmoid(images[:, :, : self.image_size, : self.image_size])


def fit_generator(embeddings: np.ndarray, query: FrequencyQuery, seed: int) -> Generator:
    """A generator whose images have these mean embeddings, class by class.

    Adam, on a GPU where there is one, on the squared distance between the released embedding and that of a batch. The
    distance is unbiased: the spread of a batch's own mean is taken out, or the generator would save on variety.

    Args:
      embeddings: float64 [num_classes, num_features], `FrequencyQuery.embeddings`.
      query: the query they are of; `query.frequency.generator_steps` steps are made.
      seed: public; on a CPU the same seed and thread count give the same generator.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps, features = query.frequency.generator_steps, feature_map(query, device)
    target = torch.from_numpy(embeddings.astype(np.float32)).to(device)
    random = torch.Generator().manual_seed(seed)
    generator = _new_generator(query, target, features, seed)
    optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * _rate(step, steps)
        classes = torch.randperm(query.num_classes, generator=random)[:MOST_CLASSES]
        each = BATCH_SIZE // len(classes)
        latents = torch.randn(len(classes) * each, LATENT_WIDTH, generator=random)
        images = generator(latents.to(device), classes.repeat_interleave(each).to(device))
        means = features(images).view(len(classes), each, -1).mean(dim=1)
        loss = squared_distances(means, target[classes], each).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return generator.eval().cpu()


def squared_distances(means: Tensor, target: Tensor, count: int) -> Tensor:
    """Unbiased squared distance of each class [K], up to |target|^2, from the means [K, D] of `count` feature vectors.

    Feature vectors have norm 1, so that E |mean|^2 = |E mean|^2 + (1 - |E mean|^2) / count.
    """
    squares = (count * means.square().sum(dim=1) - 1) / (count - 1)
    return squares - 2 * (means * target).sum(dim=1)


def feature_map(query: FrequencyQuery, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """`query.encode` for float32 images [B, C, H, W] in [0, 1], differentiable: [B, num_features] of norm 1."""
    radians = query.frequencies() * (2 * math.pi * 255 * 2.0**-TURN_BITS)
    weights, scale = torch.from_numpy(radians.astype(np.float32)).to(device), math.sqrt(2 / query.dimension)

    def features(images: Tensor) -> Tensor:
        phases = functional.linear(images.permute(0, 2, 3, 1).flatten(1), weights)
        return torch.cat([phases.cos(), phases.sin()], dim=1) * scale

    return features


def _rate(step: int, num_steps: int) -> float:
    """The learning rate over its largest: it rises for some steps, then falls along a cosine."""
    return min(1.0, (step + 1) / WARMING_STEPS) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _new_generator(query: FrequencyQuery, target: Tensor, features: Callable[[Tensor], Tensor], seed: int) -> Generator:
    """Untrained: images near the uniform grey that the release is nearest to, for far from it all gradients vanish."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Generator(query.num_classes, query.image_size, query.channels).to(target.device)
    greys = torch.linspace(0.1, 0.9, 9, device=target.device)
    images = greys[:, None, None, None].expand(-1, query.channels, query.image_size, query.image_size)
    nearest = greys[(features(images) @ target.mean(dim=0)).argmax()]
    nn.init.constant_(cast(Tensor, generator.out.bias), float(torch.logit(nearest)))
    return generator


@torch.no_grad()
def generate(generator: Generator, num_images: int, seed: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of all classes in turn: uint8 [num_images, H, W, C] and labels int64 [num_images]."""
    labels = torch.arange(num_images) % num_classes
    latents = torch.randn(num_images, LATENT_WIDTH, generator=torch.Generator().manual_seed(seed))
    parts = zip(latents.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
    images = torch.cat([(generator(*part) * 255).round().to(torch.uint8) for part in parts])
    return images.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy()
