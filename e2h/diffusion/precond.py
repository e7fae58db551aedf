"""EDM preconditioning (Karras et al. 2022, Eq. 7 and Table 1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SIGMA_DATA = math.sqrt(1 / 3)  # standard deviation of a uniform variable on [-1, 1]


def run_network(network: Callable[..., Tensor], x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """The raw output F(c_in x; ln(sigma)/4, y).

    Args:
      network: called as network(x, noise_label, labels).
      x: [N, C, H, W] float, noisy images.
      sigma: [N] float above 0, noise standard deviation in units of [-1, 1] pixels.
      labels: [N] int64 in [0, num_classes]; num_classes means "no label".

    Returns:
      [N, C, H, W] float.
    """
    c_in = torch.rsqrt(sigma.square() + SIGMA_DATA**2)
    return network(c_in[:, None, None, None] * x, sigma.log() / 4, labels)


def denoise(network: Callable[..., Tensor], x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """The denoiser D(x; sigma, y) = c_skip x + c_out F(c_in x; ln(sigma)/4, y); arguments as in `run_network`."""
    column = sigma[:, None, None, None]
    total = column.square() + SIGMA_DATA**2
    c_skip = SIGMA_DATA**2 / total
    c_out = column * SIGMA_DATA * torch.rsqrt(total)
    return c_skip * x + c_out * run_network(network, x, sigma, labels)
