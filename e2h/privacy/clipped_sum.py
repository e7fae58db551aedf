"""From per-example gradients to a sum that one example changes by at most C: what the guarantee hangs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from e2h.errors import InputError
from e2h.privacy.compiling import kernels

GRID_BITS = 30
MARGIN = 2.0**-10
GAMMA = 0.01  # of the normalised clip: gradients well below this norm stay small (Bu et al. 2022)
BLOCK_ELEMENTS = 2**18  # the float64 copy of a block stays small: neither a second [B, P] nor out of the cache
GPU_BLOCKS = 2**13, 2**31  # columns: below the one, joined, as every launch takes time; above the other, split
CLIPPINGS = ("flat", "normalized", "global")


@dataclass(frozen=True)
class ClippedSum:
    """The clipped gradients of one micro-batch, summed, without noise: sensitive, all of it.

    `vector` int64 [P], all trainable parameters in the network's order, in steps of max_grad_norm * 2**-30.
    `count`: examples of weight 1, those with a non-finite gradient included.
    `losses` [B] and `norms` float64 [B] (before the clip): diagnostics computed on private data without noise.
    """

    vector: Tensor
    count: int
    losses: Tensor
    norms: Tensor


def clip_factors(norms: Tensor, max_grad_norm: float, clipping: str, norm_threshold: float) -> Tensor:
    """What each example's gradient is multiplied by. With C = max_grad_norm, n a norm and c = (1 - 2^-10) C:

    - flat: min(1, c / n) (Abadi et al. 2016);
    - normalized: c / (n + gamma), gamma = 0.01 (automatic clipping, Bu et al. 2022, arXiv 2206.07136): every gradient
      gets about the same length;
    - global: c / Z up to n = Z = norm_threshold, 0 above (Bu et al. 2021, arXiv 2106.07830; Esipova et al. 2023, arXiv
      2206.03008): directions of sums are kept, examples above Z are lost.

    Sensitivity: factor * n <= c for every n >= 0. flat: (c / n) n = c, and 1 * n <= c where 1 is the smaller;
    normalized: c n / (n + gamma) < c as gamma > 0; global: (c / Z) n <= c for n <= Z, and 0 above. A non-finite norm
    has factor 0. Computed in float64, each is off by a few parts in 2^52.

    Args:
      norms: float64 [B].
    """
    bound = (1 - MARGIN) * max_grad_norm
    if clipping == "flat":
        factors = (bound / norms).clamp(max=1.0)
    elif clipping == "normalized":
        factors = bound / (norms + GAMMA)
    else:
        factors = (norms <= norm_threshold).to(norms.dtype) * (bound / norm_threshold)
    return torch.where(torch.isfinite(norms), factors, 0.0)


def clip_and_sum(
    gradients: list[Tensor],
    weights: Tensor,
    losses: Tensor,
    max_grad_norm: float,
    clipping: str = "flat",
    norm_threshold: float = 1.0,
) -> ClippedSum:
    """Clips each example's gradient over all P parameters, rounds it to the grid and sums exactly.

    Sensitivity. Write C = max_grad_norm, n for the norm of an example's computed gradient g, f for its factor (see
    `clip_factors`), and s = f 2^30 / C for its scale. The example contributes the integers round(fl(g_j s)), and:
      1. n is taken in float64 of the very tensor that is scaled: relative error below P 2^-52; f n <= (1 - 2^-10) C;
      2. s is rounded to float32 (and cut at the largest one), and so is each product: |fl(g_j s)| is at most
         |g_j| s (1 + 2^-24)^2 (a product that underflows rounds to 0);
      3. rounding to a whole number is exact in float32 and moves a coordinate by at most 1/2, the vector by
         sqrt(P) / 2;
      so the L2 norm of the integers is at most (1 - 2^-10)(1 + 2^-22)(1 + P 2^-52) 2^30 + sqrt(P) / 2, which is below
      2^30 steps = C for P <= 2^40 (that is 2^30 - 2^20 + 2^18 + 2^8 + 2^19).
      4. Whole numbers up to 2^30 are summed in float64 and then in int64: exact, in any order, up to 2^23 examples a
         micro-batch. A sum therefore changes by exactly one example's integers, at most C, when that example comes or
         goes, however the others are cut into micro-batches, spread over workers or reordered.
    What is assumed, not proved: that the libraries compute g from the example alone, to the last bit, whatever else is
    in the micro-batch. Fixed shapes (padding with weight 0) keep them on one code path. The 2^-10 that is given up
    is room for differences in the last bits.

    An example of weight 0 or with a non-finite gradient contributes exactly 0 and changes no other.

    Args:
      gradients: [B, p] float32 or float64 for each parameter; may be overwritten.
      weights: [B] of 0 and 1, there or on the CPU.
      losses: [B].
      max_grad_norm: C, above 0.
      clipping, norm_threshold: see `clip_factors`.

    Raises:
      ValueError: on gradients of another type, for which 2. does not hold.
    """
    if any(gradient.dtype not in (torch.float32, torch.float64) for gradient in gradients):
        raise ValueError("gradients: expected float32 or float64; in half precision the bound does not hold")
    on_gpu = kernels is not None and gradients[0].is_cuda
    blocks = _blocks(gradients, *(GPU_BLOCKS if on_gpu else _cpu_blocks(len(losses))))
    if on_gpu:
        norms = torch.stack([kernels.square_norms(block) for block in blocks]).sum(dim=0).sqrt()
    else:
        partial_norms = [torch.linalg.vector_norm(block, dim=1, dtype=torch.float64) for block in blocks]
        norms = torch.linalg.vector_norm(torch.stack(partial_norms), dim=0)
    factors = clip_factors(norms, max_grad_norm, clipping, norm_threshold) * weights.to(norms.device, non_blocking=True)
    scales = (factors * (2.0**GRID_BITS / max_grad_norm)).clamp(max=torch.finfo(torch.float32).max)
    if on_gpu:
        finite = torch.isfinite(norms)
        sums = [kernels.grid_sum(block, scales.to(block.dtype), finite) for block in blocks]
    else:
        sums = _grid_sums_in_place(blocks, scales, torch.nonzero(~torch.isfinite(norms)).flatten())
    return ClippedSum(torch.cat(sums), int(weights.sum()), losses, norms)


def _grid_sums_in_place(blocks: list[Tensor], scales: Tensor, dropped: Tensor) -> list[Tensor]:
    ones, sums = torch.ones_like(scales), []
    for block in blocks:
        if len(dropped) > 0:
            block[dropped] = 0.0  # 0 * inf would be NaN
        on_grid = block.mul_(scales.to(block.dtype)[:, None]).round_()
        sums.append((ones @ on_grid.to(torch.float64)).to(torch.int64))
    return sums


def _cpu_blocks(num_examples: int) -> tuple[int, int]:
    columns = max(1, BLOCK_ELEMENTS // max(1, num_examples))
    return columns // 4, columns


def _blocks(gradients: list[Tensor], narrow_below: int, columns: int) -> list[Tensor]:
    """The gradients side by side in their order, in pieces: those of few columns joined, those of more split."""
    blocks: list[Tensor] = []
    narrow: list[Tensor] = []
    for gradient in gradients:
        if gradient.shape[1] < narrow_below:
            narrow.append(gradient)
            continue
        blocks += _joined(narrow, columns)
        blocks += gradient.split(columns, dim=1)
        narrow = []
    return blocks + _joined(narrow, columns)


def _joined(narrow: list[Tensor], columns: int) -> list[Tensor]:
    return list(torch.cat(narrow, dim=1).split(columns, dim=1)) if narrow else []


def check_clipping(clipping: str, max_grad_norm: float, norm_threshold: float) -> None:
    """Raises `InputError` unless the three make a clip with bounded contributions."""
    if clipping not in CLIPPINGS:
        raise InputError(f"finetune.clipping={clipping}: expected one of {', '.join(CLIPPINGS)}")
    for name, value in (("max_grad_norm", max_grad_norm), ("norm_threshold", norm_threshold)):
        if not 1e-30 <= value <= 1e30:
            raise InputError(f"finetune.{name}={value}: expected a number between 1e-30 and 1e30")
