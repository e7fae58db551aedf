"""The EDM training loss (Karras et al. 2022, Eq. 8 and Table 1), per example and averaged over K noise draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from e2h.diffusion.precond import SIGMA_DATA, run_network

LOG_SIGMA = (-1.2, 1.2)  # mean and standard deviation of ln(sigma) in the paper


def draw_noise_levels(
    shape: Sequence[int], generator: torch.Generator, log_sigma: tuple[float, float] = LOG_SIGMA
) -> Tensor:
    """Noise levels with ln(sigma) ~ N(mean, std^2): float32 of the given shape, on the generator's device.

    Stratified: of the K in the last dimension one lies in each of K equally likely ranges, in rising order. Their mean
    loss keeps its expectation and varies less, so that a record's clipped gradient holds more signal.
    """
    inside = torch.rand(tuple(shape), generator=generator, device=generator.device, dtype=torch.float64)
    return noise_levels(inside, log_sigma)


def noise_levels(inside: Tensor, log_sigma: tuple[float, float] = LOG_SIGMA) -> Tensor:
    """The levels of `draw_noise_levels` from the places within their ranges: float64 in [0, 1), [..., K]."""
    num_draws = inside.shape[-1]
    ranks = (torch.arange(num_draws, device=inside.device) + inside) / num_draws
    normal = torch.special.ndtri(ranks.clamp(1e-9, 1 - 1e-9))  # at 0 it is infinite
    mean, std = log_sigma
    return (mean + std * normal).exp().float()


def edm_loss(network: Callable[..., Tensor], images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Weighted denoising error of each image, mean over its K draws, channels and pixels.

    With D = c_skip x + c_out F the weight (sigma^2 + sd^2) / (sigma sd)^2 equals 1 / c_out^2, so the loss is
    |F - target|^2 with target = (image - c_skip x) / c_out = (sigma image / sd - sd noise) / sqrt(sigma^2 + sd^2): the
    same number without the cancellation at small sigma. The network's batch is k-major: row k * B + b.

    Args:
      network: called as network(x [K*B, C, H, W], noise_label [K*B], labels [K*B]).
      images: [B, C, H, W] float in [-1, 1]; or [K, B, C, H, W], where each draw has its own augmentation.
      labels: [B] int64 in [0, num_classes].
      sigma: [K, B] float above 0.
      noise: [K, B, C, H, W] standard normal.

    Returns:
      [B] float, at least 0.
    """
    num_draws = sigma.shape[0]
    level = sigma[:, :, None, None, None]
    noisy = (images + level * noise).flatten(0, 1)
    target = (level * images / SIGMA_DATA - SIGMA_DATA * noise) * torch.rsqrt(level.square() + SIGMA_DATA**2)
    output = run_network(network, noisy, sigma.flatten(), labels.repeat(num_draws))
    return (output.view(target.shape) - target).square().mean(dim=(0, 2, 3, 4))


def micro_batch_loss(network: Callable[..., Tensor], batch: dict[str, Tensor]) -> Tensor:
    """`edm_loss` of a micro-batch whose entries all lead with the example, as the DP-SGD engines slice it.

    Args:
      network: as in `edm_loss`.
      batch: images [B, C, H, W] or [B, K, C, H, W], labels [B], sigma [B, K], noise [B, K, C, H, W].

    Returns:
      [B] float.
    """
    sigma, noise = batch["sigma"].transpose(0, 1), batch["noise"].transpose(0, 1)
    images = batch["images"].transpose(0, 1) if batch["images"].dim() == 5 else batch["images"]
    return edm_loss(network, images, batch["labels"], sigma, noise)
