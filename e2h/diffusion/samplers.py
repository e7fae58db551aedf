"""Samplers of Karras et al. 2022 on their noise grid, with classifier-free guidance and one seed an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from e2h.config import SamplingConfig
from e2h.diffusion.networks import UNet
from e2h.diffusion.precond import denoise

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, H, W] float64, sigma scalar float64) -> D, like x
Draw = Callable[[], Tensor]  # a fresh standard normal [N, C, H, W] float64


def noise_grid(num_steps: int) -> Tensor:
    """Noise levels from 80 down to 0.002 and then 0: float64 [num_steps + 1] (Eq. 5)."""
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return torch.cat([(high + ramp * (low - high)) ** RHO, torch.zeros(1, dtype=torch.float64)])


def ddim(denoiser: Denoiser, x: Tensor, grid: Tensor) -> Tensor:
    """Deterministic Euler steps of the probability flow (Alg. 1 without the correction; DDIM in these coordinates)."""
    for sigma, sigma_next in pairwise(grid):
        denoised = denoiser(x, sigma)
        x = denoised + (sigma_next / sigma) * (x - denoised)
    return x


def heun(denoiser: Denoiser, x: Tensor, grid: Tensor, settings: SamplingConfig, draw: Draw) -> Tensor:
    """Heun's second-order steps with churn (Alg. 2, S_noise = 1)."""
    most = min(settings.churn / (len(grid) - 1), math.sqrt(2) - 1)
    for sigma, sigma_next in pairwise(grid):
        gamma = most if settings.churn_min <= sigma <= settings.churn_max else 0.0
        raised = sigma * (1 + gamma)
        if gamma > 0:
            x = x + (raised.square() - sigma.square()).sqrt() * draw()
        slope = (x - denoiser(x, raised)) / raised
        ahead = x + (sigma_next - raised) * slope
        if sigma_next > 0:
            slope = (slope + (ahead - denoiser(ahead, sigma_next)) / sigma_next) / 2
            ahead = x + (sigma_next - raised) * slope
        x = ahead
    return x


def _guided(network: UNet, labels: Tensor, guidance: float) -> Denoiser:
    """(1 + w) D(x; y) - w D(x; no label), both in one pass of the network."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        copies = 2 if guidance > 0 else 1
        rows = torch.cat([labels, torch.full_like(labels, network.num_classes)]) if guidance > 0 else labels
        # As a number and not as a tensor of the CPU, whose copy would wait for all that the device has in hand.
        level = torch.full((len(rows),), float(sigma), device=x.device)
        denoised = denoise(network, x.to(torch.float32).repeat(copies, 1, 1, 1), level, rows).to(torch.float64)
        if guidance == 0:
            return denoised
        conditional, unconditional = denoised.chunk(2)
        return (1 + guidance) * conditional - guidance * unconditional

    return denoiser


@torch.no_grad()
def sample(
    network: UNet, labels: Tensor, seeds: Sequence[int], settings: SamplingConfig, image_shape: Sequence[int]
) -> Tensor:
    """Draws images; image i depends on its own seed and label alone, whatever batch it is in.

    To the last bit that holds among batches of one size: kernels of other sizes add in another order.

    Args:
      network: the weights to sample from, on any device; it may be compiled.
      labels: [N] int64 in [0, num_classes].
      seeds: N public integers, one an image; both its start noise and its churn come from its own generator.
      settings: sampler (heun | ddim), num_steps, guidance, churn, churn_min, churn_max; dtype of the network's
        evaluations, while the steps between them are float64.
      image_shape: (C, H, W).

    Returns:
      [N, C, H, W] float32 in [-1, 1], on the network's device.
    """
    device = next(network.parameters()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # CPU: the same noise on every device

    def draw() -> Tensor:
        noise = torch.empty(len(generators), *image_shape)  # float32: a quarter of float64's time
        for image, generator in zip(noise, generators, strict=True):
            image.normal_(generator=generator)
        return noise.to(device).double()

    grid = noise_grid(settings.num_steps)
    denoiser = _guided(network, labels.to(device), settings.guidance)
    start = draw() * grid[0]
    # Around all steps, so that the weights are rounded once; what is float64 stays so.
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        x = heun(denoiser, start, grid, settings, draw) if settings.sampler == "heun" else ddim(denoiser, start, grid)
    return x.clamp(-1, 1).to(torch.float32)


def to_uint8(x: Tensor) -> Tensor:
    """[N, C, H, W] float in [-1, 1] -> [N, H, W, C] uint8 on the CPU, contiguous (`.numpy()` is free)."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
