"""The small CNN that serves as a classifier and, trained on real images, as a named feature extractor."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

FEATURE_WIDTH = 128
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
EMA_DECAY = 0.99


class SmallCNN(nn.Module):
    """Convolutions 32-64-128, dropout 0.5, 128 hidden units (the classifier of DPImageBench, Gong et al. 2025).

    The image is halved after a convolution while more than two pixels a side remain, and averaged down to at most
    4 x 4 before the dense layer, so that one architecture serves 4 to 128 pixels and more.
    """

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        side = image_size
        for width_in, width_out in ((channels, 32), (32, 64), (64, 128)):
            layers.append(nn.Conv2d(width_in, width_out, 3, padding=1))
            if side > 2:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
                side = -(-side // 2)
            layers.append(nn.ReLU())  # after the maximum, with which it commutes: on a quarter of the pixels
        pooled = min(side, 4)
        if side > pooled:
            layers.append(nn.AdaptiveAvgPool2d(pooled))
        self.convolutions = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5))
        self.hidden = nn.Sequential(nn.Linear(128 * pooled * pooled, FEATURE_WIDTH), nn.ReLU())
        self.classify = nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURE_WIDTH, num_classes))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations [N, 128] of `images` [N, C, H, W] in [-1, 1]."""
        return self.hidden(self.convolutions(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of `images` [N, C, H, W] in [-1, 1]."""
        return self.classify(self.features(images))


def as_tensor(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1], channels last in memory (faster convolutions)."""
    return (torch.from_numpy(images.astype(np.float32)) / 127.5 - 1).permute(0, 3, 1, 2)


def new_cnn(images: NDArray[np.uint8], num_classes: int, seed: int) -> SmallCNN:
    """An untrained network for images of this shape; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCNN(images.shape[3], images.shape[1], num_classes)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def train_cnn(
    images: NDArray[np.uint8], labels: NDArray[np.integer], num_classes: int, num_epochs: int, seed: int
) -> SmallCNN:
    """Trains by Adam and returns the moving average of the weights, in evaluation mode.

    Args:
      images: uint8 [N, H, W, C].
      labels: integers [N] in [0, num_classes).
      seed: drives initial weights, order and dropout; the same seed and thread count give the same weights.
    """
    model = new_cnn(images, num_classes, seed)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    targets = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        step = 0
        for _ in range(num_epochs):
            for rows in torch.randperm(len(images)).split(BATCH_SIZE):
                loss = nn.functional.cross_entropy(model(as_tensor(images[rows.numpy()])), targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                _update_average(average, model, step)
    return average.eval()


def _update_average(average: SmallCNN, model: SmallCNN, step: int) -> None:
    # The warm-up of the decay keeps the random initial weights out of the average of a short training.
    weight = 1 - min(EMA_DECAY, step / (step + 10))
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, weight)


@torch.no_grad()
def predict(model: SmallCNN, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Most likely class of each image, int64 [N]."""
    parts = [model(as_tensor(part)).argmax(1).numpy() for part in batches(images)]
    return np.concatenate(parts)


def batches(images: NDArray[np.uint8], size: int = 500) -> list[NDArray[np.uint8]]:
    """Views of at most `size` images each, so that activations fit in memory."""
    return [images[start : start + size] for start in range(0, len(images), size)]
