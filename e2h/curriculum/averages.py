"""Averages of the weights whose length is chosen after training (post-hoc EMA, Karras et al. 2024, section 3).

The weights w(t) after steps t = 1..T are averaged with the power-function profile t^g: the longer the training, the
longer the average. Two such averages, kept at some steps, span averages of any other exponent g: the combination
whose profile is nearest in L2. All of it is post-processing of DP-SGD's steps, and free.

A profile is named by its width: the standard deviation of t under it, relative to T.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from e2h.data.filesystem import write_bytes
from e2h.data.remote import Place

WIDTHS = (0.05, 0.10)  # of the two averages that are kept
Weights = dict[str, Tensor]


@functools.cache  # asked for at every step
def exponent(width: float) -> float:
    """g of the profile t^g on [0, 1] with this standard deviation, in (0, 0.28]: (g+1) / ((g+2)^2 (g+3)) = width^2."""
    w2 = width**-2
    roots = np.roots([1, 7, 16 - w2, 12 - w2])
    return float(roots[np.argmax(roots.real)].real)


class PowerAverages:
    """The two running averages; snapshots of them go to files."""

    def __init__(self, network: nn.Module) -> None:
        self.step = 0
        self.weights = [{name: p.detach().clone() for name, p in network.named_parameters()} for _ in WIDTHS]

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Takes in the weights after one more step; those from before the first one drop out."""
        self.step += 1
        current = [p.detach() for _, p in network.named_parameters()]
        for width, average in zip(WIDTHS, self.weights, strict=True):
            keep = (1 - 1 / self.step) ** (exponent(width) + 1)
            torch._foreach_lerp_(list(average.values()), current, 1 - keep)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state; names and shapes must be this network's."""
        self.step = int(state["step"])
        for average, saved in zip(self.weights, state["weights"], strict=True):
            for name, tensor in average.items():
                tensor.copy_(saved[name])

    def write(self, folder: Place) -> None:
        """A snapshot of this step; the same bits whenever the step is made again."""
        tensors = {
            f"{place}/{name}": tensor.cpu() for place, kept in enumerate(self.weights) for name, tensor in kept.items()
        }
        write_bytes(_path(folder, self.step), save(tensors))


def snapshot_steps(num_steps: int, num_snapshots: int) -> list[int]:
    """Steps at which snapshots are kept: evenly spaced, the last one included; none of none."""
    return sorted({max(1, round(num_steps * i / num_snapshots)) for i in range(1, num_snapshots + 1)})


def snapshots(folder: Place) -> list[int]:
    """Steps of the snapshots that are there."""
    return sorted(int(path.name.split("-")[1].split(".")[0]) for path in folder.glob("averages-*.safetensors"))


def average(folder: Place, steps: Sequence[int], width: float) -> Weights:
    """The average of this width after the last of the steps, from the snapshots of all of them.

    Args:
      width: in (0, 0.25].
    """
    kept = [(step, exponent(one)) for step in steps for one in WIDTHS]
    target = (steps[-1], exponent(width))
    gram = np.array([[overlap(a, b) for b in kept] for a in kept])
    shares, *_ = np.linalg.lstsq(gram, np.array([overlap(one, target) for one in kept]), rcond=1e-10)
    shares /= shares.sum()  # so that equal weights average to themselves
    found: Weights = {}
    for place, step in enumerate(steps):
        for name, tensor in load(_path(folder, step).read_bytes()).items():
            which, parameter = name.split("/", 1)
            part = tensor.double() * shares[place * len(WIDTHS) + int(which)]
            found[parameter] = found[parameter] + part if parameter in found else part
    return {name: tensor.float() for name, tensor in found.items()}


def overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Inner product of two profiles, each (last step T, exponent g): (g + 1) t^g / T^(g + 1) on [0, T]."""
    (last_a, g_a), (last_b, g_b) = sorted((a, b))
    return (g_a + 1) * (g_b + 1) * (last_a / last_b) ** g_b / ((g_a + g_b + 1) * last_b)


def _path(folder: Place, step: int) -> Place:
    return folder / f"averages-{step:08d}.safetensors"
