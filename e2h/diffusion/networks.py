"""Class-conditional U-Net: blocks of DDPM++ (Song et al. 2021, App. H; Karras et al. 2022, Table 1), whose embedding
scales and shifts what the second normalisation gives (adaptive group normalisation, Dhariwal & Nichol 2021, 4.3).

Made for per-example gradients: GroupNorm only, every parameter used exactly once in a forward pass, activations
contiguous behind attention (Opacus' convolution rule is silently wrong on strided ones).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from e2h.config import ModelConfig
from e2h.diffusion.losses import LOG_SIGMA

SKIP_SCALE = math.sqrt(0.5)
# Angular frequencies of the noise-level waves. ln(sigma)/4 stays within [-1.6, 1.1]: with the usual range of 1 to 1e-4
# most waves would be constant.
MAX_FREQUENCY, MIN_FREQUENCY = 4.0, 0.04


def _group_norm(width: int) -> nn.GroupNorm:
    num_groups = max(1, min(32, width // 4))
    while width % num_groups:
        num_groups -= 1
    return nn.GroupNorm(num_groups, width, eps=1e-6)


def _doubled(x: Tensor) -> Tensor:
    """`interpolate` by 2 to the nearest; its gradient is a sum in one order, torch's compiled one adds in any."""
    return x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).flatten(4).flatten(2, 3)


def _patches(x: Tensor, size: int) -> Tensor:
    """[N, C, H, W] -> [N, C * size^2, H / size, W / size], as `pixel_unshuffle`, which fails for N = 0."""
    return x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def _pixels(x: Tensor, size: int) -> Tensor:
    """The inverse of `_patches`."""
    return x.unflatten(1, (-1, size, size)).permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the embedding scales and shifts between them; `resample` is "up", "down" or None."""

    def __init__(self, in_width: int, out_width: int, embedding_width: int, resample: str | None = None) -> None:
        super().__init__()
        self.resample = resample
        self.norm0 = _group_norm(in_width)
        self.conv0 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.embed = nn.Linear(embedding_width, 2 * out_width)
        self.norm1 = _group_norm(out_width)
        self.conv1 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.skip = nn.Conv2d(in_width, out_width, 1) if in_width != out_width or resample else None

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return _doubled(x) if x.is_cuda else functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return functional.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.conv0(self._resampled(functional.silu(self.norm0(x))))
        scale, shift = self.embed(embedding)[:, :, None, None].chunk(2, dim=1)
        hidden = self.conv1(functional.silu(self.norm1(hidden) * (1 + scale) + shift))
        x = self._resampled(x)
        skip = x if self.skip is None else self.skip(x)
        return (skip + hidden) * SKIP_SCALE


class Attention(nn.Module):
    """Self-attention over pixels, one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _group_norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # each [N, C, H*W]
        weights = torch.softmax(query.transpose(1, 2) @ key / math.sqrt(x.shape[1]), dim=-1)
        mixed = (value @ weights.transpose(1, 2)).reshape(x.shape).contiguous()
        return (x + self.out(mixed)) * SKIP_SCALE


class Block(nn.Module):
    """A residual block, with or without attention behind it."""

    def __init__(
        self, in_width: int, out_width: int, embedding_width: int, attention: bool = False, resample: str | None = None
    ) -> None:
        super().__init__()
        self.block = ResidualBlock(in_width, out_width, embedding_width, resample)
        self.attention = Attention(out_width) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """The raw network F of EDM; `precond.denoise` makes the denoiser of it.

    Args:
      image_size: pixels; divisible by patch_size * 2 ** (levels - 1).
      channels: image channels.
      num_classes: labels 0 .. num_classes-1; label num_classes means "no label".
      base_width: channels of the first level, which has image_size / patch_size places a side.
      width_multipliers: one a level, each level at half the resolution of the one before.
      attention_resolutions: places a side at which a block is followed by attention (the middle always has it).
      blocks_per_level: residual blocks a level on the way down (one more on the way up).
      embedding_width: width of the noise-level and label embedding.
      patch_size: pixels a side that are one place, with a channel for each (Luhman & Luhman 2022, arXiv 2207.04316).
      log_sigma: mean and standard deviation of ln(sigma) in training.
      seed: public seed of the initial weights; the caller's random state is not touched.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        num_classes: int,
        base_width: int,
        width_multipliers: Sequence[int],
        attention_resolutions: Sequence[int],
        blocks_per_level: int,
        embedding_width: int,
        patch_size: int = 1,
        log_sigma: tuple[float, float] = LOG_SIGMA,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.base_width = base_width
        self.patch_size = patch_size
        self.log_sigma = log_sigma
        # Built on "meta", so that torch's default initialisers draw nothing from the global generator.
        with torch.device("meta"):
            self.label_embedding = nn.Embedding(num_classes + 1, base_width)
            self.embed0 = nn.Linear(base_width, embedding_width)
            self.embed1 = nn.Linear(embedding_width, embedding_width)
            self.conv_in = nn.Conv2d(channels * patch_size**2, base_width, 3, padding=1)
            widths = [base_width * multiplier for multiplier in width_multipliers]
            side = image_size // patch_size
            self._build_blocks(side, widths, set(attention_resolutions), blocks_per_level, embedding_width)
            self.norm_out = _group_norm(widths[0])
            self.conv_out = nn.Conv2d(widths[0], channels * patch_size**2, 3, padding=1)
        self.to_empty(device="cpu")
        self._initialise(torch.Generator().manual_seed(seed))

    @classmethod
    def from_config(cls, model: ModelConfig, image_size: int, channels: int, num_classes: int, seed: int) -> UNet:
        return cls(
            image_size,
            channels,
            num_classes,
            model.base_width,
            model.width_multipliers,
            model.attention_resolutions,
            model.blocks_per_level,
            model.embedding_width,
            model.patch_size,
            (model.log_sigma_mean, model.log_sigma_std),
            seed,
        )

    def _build_blocks(
        self, side: int, widths: list[int], attention_resolutions: set[int], num_blocks: int, embedding_width: int
    ) -> None:
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width, resolution, skips = self.base_width, side, [self.base_width]
        for level, level_width in enumerate(widths):
            if level > 0:
                self.down.append(Block(width, width, embedding_width, resample="down"))
                skips.append(width)
                resolution //= 2
            for _ in range(num_blocks):
                self.down.append(Block(width, level_width, embedding_width, resolution in attention_resolutions))
                width = level_width
                skips.append(width)
        self.middle.append(Block(width, width, embedding_width, attention=True))
        self.middle.append(Block(width, width, embedding_width))
        for level, level_width in reversed(list(enumerate(widths))):
            for block in range(num_blocks + 1):
                attention = resolution in attention_resolutions and block == num_blocks
                self.up.append(Block(width + skips.pop(), level_width, embedding_width, attention))
                width = level_width
            if level > 0:
                self.up.append(Block(width, width, embedding_width, resample="up"))
                resolution *= 2

    def _initialise(self, generator: torch.Generator) -> None:
        """Xavier-uniform weights, zero biases; the last layer of each residual branch and of the network is zero."""
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
        for module in self.modules():
            last = {ResidualBlock: "conv1", Attention: "out", UNet: "conv_out"}.get(type(module))
            if last is not None:
                nn.init.zeros_(getattr(module, last).weight)

    def _embedding(self, noise_label: Tensor, labels: Tensor) -> Tensor:
        half = self.base_width // 2
        ramp = torch.arange(half, device=noise_label.device, dtype=noise_label.dtype) / max(half - 1, 1)
        angles = noise_label[:, None] * MAX_FREQUENCY * (MIN_FREQUENCY / MAX_FREQUENCY) ** ramp
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        waves = functional.pad(waves, (0, self.base_width - 2 * half))
        return functional.silu(self.embed1(functional.silu(self.embed0(waves + self.label_embedding(labels)))))

    def forward(self, x: Tensor, noise_label: Tensor, labels: Tensor) -> Tensor:
        """Maps scaled noisy images to the raw output F.

        Args:
          x: [N, C, H, W] float, c_in times the noisy images; N may be 0.
          noise_label: [N] float, ln(sigma) / 4.
          labels: [N] int64 in [0, num_classes].

        Returns:
          [N, C, H, W] float.
        """
        embedding = self._embedding(noise_label, labels)
        hidden = self.conv_in(_patches(x, self.patch_size))
        skips = [hidden]
        for block in self.down:
            hidden = block(hidden, embedding)
            skips.append(hidden)
        for block in self.middle:
            hidden = block(hidden, embedding)
        for block in cast(Iterable[Block], self.up):
            if block.block.resample is None:
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = block(hidden, embedding)
        return _pixels(self.conv_out(functional.silu(self.norm_out(hidden))), self.patch_size)
