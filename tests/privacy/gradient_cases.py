"""Small networks, losses and the float64 reference that the tests of per-example gradients share."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional

from e2h.diffusion.networks import Attention
from e2h.privacy.dpsgd import GRID_BITS, make_engine

torch.set_num_threads(1)

ENGINES = ["folded", "opacus", "loop"]

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: functional.pad(x, (1, 2, 2, 1))[:, :, 2:-1, 1:-2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


class LinearOverPixels(nn.Module):
    """A linear layer on the sequence of pixels."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2)


class EmbeddingOfPixels(nn.Module):
    """An embedding of the rounded pixels, several of them the same."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(5, 3)

    def forward(self, x):
        return self.layer((x.detach() * 2).long().abs().clamp(max=4).flatten(1)) * x.flatten(1).mean(1)[:, None, None]


class LinearOfMean(nn.Module):
    """A linear layer on one vector a row."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x.mean(dim=(2, 3)))


def without_bias(layer: nn.Module) -> nn.Module:
    layer.bias = None
    return layer


LAYERS = {
    "conv3": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "conv3_stride2": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "conv3_unpadded": lambda: nn.Conv2d(4, 6, 3),
    "conv3_dilated": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "conv5": lambda: nn.Conv2d(4, 3, 5, padding=2),
    "conv3x1": lambda: nn.Conv2d(4, 3, (3, 1), padding=(1, 0), stride=(2, 1)),
    "conv1": lambda: nn.Conv2d(4, 6, 1),
    "conv1_stride2": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "conv1_padded": lambda: nn.Conv2d(4, 6, 1, stride=2, padding=3),
    "conv_without_bias": lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False),
    "group_norm": lambda: nn.GroupNorm(2, 4),
    "group_norm_without_bias": lambda: without_bias(nn.GroupNorm(2, 4)),
    "linear": LinearOfMean,
    "linear_sequence": lambda: LinearOverPixels(nn.Linear(4, 3)),
    "linear_without_bias": lambda: LinearOverPixels(nn.Linear(4, 3, bias=False)),
    "embedding": EmbeddingOfPixels,
    "attention": lambda: Attention(4),
}


class LayerNetwork(nn.Module):
    """A convolution, so that the layer has an input gradient to give, then the layer in a memory layout."""

    def __init__(self, kind: str, layout: str):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.layer = LAYERS[kind]()
        self.layout = LAYOUTS[layout]
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def forward(self, x):
        return self.layer(self.layout(self.first(x)))


def row_loss(network, batch):
    """A loss of each example, the mean over its draws; the network's rows are k-major."""
    num_examples, num_draws = batch["x"].shape[:2]
    output = network(batch["x"].transpose(0, 1).flatten(0, 1))
    rows = (output + output.square()).mean(dim=tuple(range(1, output.dim())))
    return rows.view(num_draws, num_examples).mean(0) * batch["scale"]


def linear_loss(network, batch):
    """The same with a gradient that is an expanded tensor (stride 0)."""
    num_examples, num_draws = batch["x"].shape[:2]
    output = network(batch["x"].transpose(0, 1).flatten(0, 1))
    return output.sum(dim=tuple(range(1, output.dim()))).view(num_draws, num_examples).mean(0)


def row_batch(num_examples: int, num_draws: int, size: tuple[int, int] = (7, 7)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_examples, num_draws, 2, *size, generator=generator)
    return {"x": x, "scale": torch.logspace(-2, 1, num_examples)}


def double(batch):
    return {name: entry.double() if entry.is_floating_point() else entry for name, entry in batch.items()}


def reference(network, loss_fn, batch, max_grad_norm, weights=None, **clip):
    """The sum in float64, example by example."""
    num_examples = len(next(iter(batch.values())))
    weights = torch.ones(num_examples) if weights is None else weights
    wide = copy.deepcopy(network).double()
    return make_engine("loop", wide, loss_fn, max_grad_norm, 1, **clip).accumulate(double(batch), weights)


def relative(result, expected):
    return float((result.vector - expected.vector).double().norm() / expected.vector.double().norm())


def length(vector: torch.Tensor) -> float:
    """L2 norm of an integer vector, without rounding, in units of max_grad_norm."""
    return math.sqrt(sum(value * value for value in vector.tolist())) / 2.0**GRID_BITS


def median_norm(network, loss_fn, batch) -> float:
    return float(reference(network, loss_fn, batch, 1.0).norms.median())
