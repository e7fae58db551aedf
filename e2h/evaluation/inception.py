"""Inception-v3 as FID means it: the TensorFlow graph of 2015, with weights from a local file.

Architecture: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision"; the weights bear the
names of the port to PyTorch that pytorch-fid and torch-fidelity share. Three things differ from later versions of the
network: averages leave the padding out, the last block pools by the maximum, and images are resized by TensorFlow 1's
bilinear rule. Features of other versions give other distances, which are no FID.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from e2h.config import expect
from e2h.errors import InputError
from e2h.evaluation.networks import batches

WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_ADVICE = "the standard FID weights are pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
FEATURE_WIDTH, NUM_LOGITS = 2048, 1008
SIDE = 299  # pixels
AT_ONCE = 32  # images; half a gigabyte of activations

Kernel = int | tuple[int, int]
Step = tuple[int, *tuple[Kernel, ...]]  # channels, then the kernels that see the same input side by side
Chains = dict[str, list[Step]]

average = partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
largest = partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
halved = partial(functional.max_pool2d, kernel_size=3, stride=2)


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, width_in: int, width: int, kernel: Kernel, stride: int = 1, padded: bool = False) -> None:
        super().__init__()
        height, across = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, across // 2) if padded else 0
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Chains of convolutions side by side, joined on the channel axis; the chain `branch_pool` sees the pooled input.

    The steps of a chain are numbered, unless it has one; kernels side by side are lettered. Where `pool` halves the
    image, the last step of every chain does so too.
    """

    def __init__(self, width: int, chains: Chains, pool: partial[Tensor] = average) -> None:
        super().__init__()
        self.pool = pool
        self.names: dict[str, list[list[str]]] = {}  # by chain and step
        for chain, steps in chains.items():
            self.names[chain] = [_names(chain, steps, place) for place in range(len(steps))]
            width_in = width
            for (step_width, *kernels), names in zip(steps, self.names[chain], strict=True):
                halves = pool is halved and names is self.names[chain][-1]
                for name, kernel in zip(names, kernels, strict=True):
                    self.add_module(name, Convolution(width_in, step_width, kernel, 1 + halves, not halves))
                width_in = step_width * len(kernels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(chain, x) for chain in self.names], 1)

    def _run(self, chain: str, x: Tensor) -> Tensor:
        x = self.pool(x) if chain == "branch_pool" else x
        for names in self.names[chain]:
            x = torch.cat([self.get_submodule(name)(x) for name in names], 1)
        return x


def _names(chain: str, steps: list[Step], place: int) -> list[str]:
    name = f"{chain}_{place + 1}" if len(steps) > 1 else chain
    kernels = steps[place][1:]
    return [name + letter for letter in "ab"] if len(kernels) > 1 else [name]


# The blocks of the paper, by the side of their images in pixels.


def _block_35(width: int, pooled: int) -> Mixed:
    double: list[Step] = [(64, 1), (96, 3), (96, 3)]
    chains: Chains = {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": double}
    return Mixed(width, {**chains, "branch_pool": [(pooled, 1)]})


def _to_17() -> Mixed:
    double: list[Step] = [(64, 1), (96, 3), (96, 3)]
    return Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": double, "branch_pool": []}, halved)


def _block_17(inner: int) -> Mixed:
    single: list[Step] = [(inner, 1), (inner, (1, 7)), (192, (7, 1))]
    double: list[Step] = [(inner, 1), (inner, (7, 1)), (inner, (1, 7)), (inner, (7, 1)), (192, (1, 7))]
    chains: Chains = {"branch1x1": [(192, 1)], "branch7x7": single, "branch7x7dbl": double}
    return Mixed(768, {**chains, "branch_pool": [(192, 1)]})


def _to_8() -> Mixed:
    long: list[Step] = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]
    return Mixed(768, {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": long, "branch_pool": []}, halved)


def _block_8(width: int, pool: partial[Tensor]) -> Mixed:
    single: list[Step] = [(384, 1), (384, (1, 3), (3, 1))]
    double: list[Step] = [(448, 1), (384, 3), (384, (1, 3), (3, 1))]
    chains: Chains = {"branch1x1": [(320, 1)], "branch3x3": single, "branch3x3dbl": double}
    return Mixed(width, {**chains, "branch_pool": [(192, 1)]}, pool)


def _layers() -> Iterator[tuple[str, nn.Module]]:
    yield "Conv2d_1a_3x3", Convolution(3, 32, 3, stride=2)
    yield "Conv2d_2a_3x3", Convolution(32, 32, 3)
    yield "Conv2d_2b_3x3", Convolution(32, 64, 3, padded=True)
    yield "pool_1", nn.MaxPool2d(3, 2)
    yield "Conv2d_3b_1x1", Convolution(64, 80, 1)
    yield "Conv2d_4a_3x3", Convolution(80, 192, 3)
    yield "pool_2", nn.MaxPool2d(3, 2)
    for letter, width, pooled in zip("bcd", (192, 256, 288), (32, 64, 64), strict=True):
        yield f"Mixed_5{letter}", _block_35(width, pooled)
    yield "Mixed_6a", _to_17()
    for letter, inner in zip("bcde", (128, 160, 160, 192), strict=True):
        yield f"Mixed_6{letter}", _block_17(inner)
    yield "Mixed_7a", _to_8()
    yield "Mixed_7b", _block_8(1280, average)
    yield "Mixed_7c", _block_8(2048, largest)


class InceptionV3(nn.Module):
    """Features and logits; the names in its state are those of the published file."""

    def __init__(self) -> None:
        super().__init__()
        self.order = []
        for name, layer in _layers():
            self.add_module(name, layer)
            self.order.append(name)
        self.fc = nn.Linear(FEATURE_WIDTH, NUM_LOGITS)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, 2048] and logits without bias [N, 1008] of `images` [N, 1 or 3, H, W] in [0, 255].

        The Inception score of the original graph leaves the bias out (as torch-fidelity's `logits_unbiased`).
        """
        x = (_resized(images) - 128) / 128
        x = x.expand(-1, 3, -1, -1)
        for name in self.order:
            x = self.get_submodule(name)(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def _resized(images: Tensor) -> Tensor:
    rows, columns = (_interpolation(side).to(images) for side in images.shape[2:])
    return rows @ images @ columns.T


def _interpolation(side: int) -> Tensor:
    """Weights [299, side] of TensorFlow 1's bilinear rule: pixel i of the result lies at i * side / 299, unsmoothed."""
    place = torch.arange(SIDE) * (side / SIDE)
    low = place.long()
    share = place - low
    weights = torch.zeros(SIDE, side)
    weights[torch.arange(SIDE), low] = 1 - share
    weights[torch.arange(SIDE), (low + 1).clamp(max=side - 1)] += share
    return weights


def load_inception(path: str, sha256: str = WEIGHTS_SHA256) -> InceptionV3:
    """The network with the weights of a local file, on the GPU where there is one.

    Args:
      sha256: of the file. Callers leave it; tests have weights of their own.

    Raises:
      InputError: if the file can't be read, or is another than `sha256` says.
    """
    name = "evaluation.inception_weights"
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"{name}={path}: expected a readable file ({error.strerror}); {WEIGHTS_ADVICE}") from error
    found = hashlib.sha256(content).hexdigest()
    expect(found == sha256, name, path, f"a file of SHA-256 {sha256}, found {found}", WEIGHTS_ADVICE)
    model = InceptionV3()
    model.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.no_grad()
def inception_features(
    model: InceptionV3, images: NDArray[np.uint8]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Features [M, 2048] and logits [M, 1008] of `images` uint8 [N, H, W, 1 or 3], part by part in their order."""
    device = model.fc.weight.device
    for part in batches(images, AT_ONCE):
        pixels = torch.from_numpy(part).to(device).permute(0, 3, 1, 2).float()
        # TF32 would move the third digit of a distance.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features, logits = model(pixels)
        yield features.cpu().numpy(), logits.cpu().numpy()
