"""Kernels for a GPU: per-example weight gradients of convolutions in half precision, and the two passes of the clip.

cuDNN's grouped convolutions, which serve a CPU well, are the slow way there (docs/LOG.md, 2026-11-29). In each kernel
the order of a sum is written down, and nothing is chosen by the clock: one program makes one tile of one example's
gradient, over all of its draws, so a record's bits hang on nothing but the record.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

ROWS, COLUMNS, PIXELS = 64, 128, 64  # of a tile at most: channels out, taps times channels in; pixels summed at a time


@triton.jit
def _tile_of_gradient(
    x, grad, out, num_examples, out_width, height, width,
    x_row, x_channel, x_line, x_pixel, g_row, g_channel, g_line, g_pixel, pad_line, pad_pixel,
    NUM_DRAWS: tl.constexpr, IN_WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_COLUMNS: tl.constexpr,
    TAP_LINES: tl.constexpr, TAP_PIXELS: tl.constexpr, STRIDE_LINE: tl.constexpr, STRIDE_PIXEL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """out[b, o, tap, c] = sum over draws k and pixels of grad[k B + b, o, pixel] x[k B + b, c, pixel moved by tap]."""
    taps: tl.constexpr = TAP_LINES * TAP_PIXELS
    num_pixels: tl.constexpr = OUT_HEIGHT * OUT_COLUMNS
    num_tiles: tl.constexpr = (taps * IN_WIDTH + COLUMNS - 1) // COLUMNS
    example = tl.program_id(0) // num_tiles
    outs = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % num_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    taken, tap, channel = columns < taps * IN_WIDTH, columns // IN_WIDTH, columns % IN_WIDTH
    down, right = tap // TAP_PIXELS - pad_line, tap % TAP_PIXELS - pad_pixel
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for draw in range(NUM_DRAWS):
        row = (draw * num_examples + example).to(tl.int64)
        for start in range(0, num_pixels, PIXELS):
            pixels = start + tl.arange(0, PIXELS)
            line, pixel, there = pixels // OUT_COLUMNS, pixels % OUT_COLUMNS, pixels < num_pixels
            g_at = grad + row * g_row + outs[:, None] * g_channel + (line * g_line + pixel * g_pixel)[None, :]
            gs = tl.load(g_at, mask=(outs < out_width)[:, None] & there[None, :], other=0.0)
            lines, rights = line[:, None] * STRIDE_LINE + down[None, :], pixel[:, None] * STRIDE_PIXEL + right[None, :]
            inside = (lines >= 0) & (lines < height) & (rights >= 0) & (rights < width)
            x_at = x + row * x_row + lines * x_line + rights * x_pixel + channel[None, :] * x_channel
            xs = tl.load(x_at, mask=inside & there[:, None] & taken[None, :], other=0.0)
            total = tl.dot(gs, xs, total)
    places = outs[:, None] * (taps * IN_WIDTH) + columns[None, :]
    kept = (outs < out_width)[:, None] & taken[None, :]
    tl.store(out + example.to(tl.int64) * (out_width * IN_WIDTH * taps) + places, total, mask=kept)


def _tile(width: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(width)))


@triton_op("e2h::conv_weight_gradient", mutates_args={})
def conv_weight_gradient(
    x: Tensor, grad: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], num_draws: int
) -> Tensor:
    """Each example's gradient of a convolution's weight, summed over its draws.

    Args:
      x: half precision [K * B, C, H, W], k-major, in any memory format.
      grad: of the output, [K * B, O, H', W'], likewise.
      kernel_size, stride, padding: two numbers each; no dilation, no groups.
      num_draws: K.

    Returns:
      float32 [B, O * C * kernel lines * kernel columns].
    """
    # Channels last, every load is 16 bytes wide; otherwise 2.
    x, grad = (one.contiguous(memory_format=torch.channels_last) for one in (x, grad))
    num_examples, (in_width, height, width) = x.shape[0] // num_draws, x.shape[1:]
    out_width, out_height, out_columns = grad.shape[1:]
    taps = kernel_size[0] * kernel_size[1]
    out = torch.empty(num_examples, out_width, taps, in_width, dtype=torch.float32, device=x.device)
    rows, columns = _tile(out_width, ROWS), _tile(in_width * taps, COLUMNS)
    grid = (num_examples * triton.cdiv(in_width * taps, columns), triton.cdiv(out_width, rows))
    wrap_triton(_tile_of_gradient)[grid](
        x, grad, out, num_examples, out_width, height, width,
        x.stride(0), x.stride(1), x.stride(2), x.stride(3),
        grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3), padding[0], padding[1],
        num_draws, in_width, out_height, out_columns, kernel_size[0], kernel_size[1], stride[0], stride[1],
        rows, columns, PIXELS,
    )  # fmt: skip
    return out.transpose(2, 3).flatten(1)  # a copy, which is faster than a kernel that writes numbers far apart


NORM_COLUMNS, SUM_ROWS, SUM_COLUMNS = 1024, 16, 128  # numbers that a program has in hand
ROWS_OF_A_PROGRAM = 256


@triton.jit
def _square_norm_of_row(block, out, row_stride, columns, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((COLUMNS,), dtype=tl.float64)
    for start in range(0, columns, COLUMNS):
        places = start + tl.arange(0, COLUMNS)
        values = tl.load(block + row * row_stride + places, mask=places < columns, other=0.0).to(tl.float64)
        total += values * values
    tl.store(out + row, tl.sum(total, axis=0))


def square_norms(block: Tensor) -> Tensor:
    """Squared L2 norm of each row of float [B, p], summed in float64: float64 [B]."""
    block = block.contiguous()
    out = torch.empty(len(block), dtype=torch.float64, device=block.device)
    _square_norm_of_row[(len(block),)](block, out, block.stride(0), block.shape[1], NORM_COLUMNS)
    return out


@triton.jit
def _grid_sum_of_columns(
    block, scales, finite, out, rows, columns, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALL: tl.constexpr
):
    """out[part, column] = sum over the part's rows of round(block * scale), whole numbers in float64: exact."""
    places = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float64)
    for start in range(0, ALL, ROWS):
        row = tl.program_id(1) * ALL + start + tl.arange(0, ROWS)
        taken = row < rows
        kept = taken & (tl.load(finite + row, mask=taken, other=0) != 0)
        scale = tl.load(scales + row, mask=taken, other=0.0)
        at = block + row[:, None].to(tl.int64) * row_stride + places[None, :]
        values = tl.load(at, mask=kept[:, None] & (places < columns)[None, :], other=0.0) * scale[:, None]
        # To the nearest whole number, ties to even: beyond 2^52 float64 has no fractions.
        total += (values.to(tl.float64) + 6755399441055744.0) - 6755399441055744.0
    tl.store(out + tl.program_id(1) * columns + places, tl.sum(total, axis=0), mask=places < columns)


def grid_sum(block: Tensor, scales: Tensor, finite: Tensor) -> Tensor:
    """Sum over rows of round(block * scales), the product in the type of `block`; int64 [p].

    Args:
      block: float [B, p] in grid steps once scaled: below 2^31.
      scales: [B], in the type of `block`.
      finite: bool [B]; a row that is not is left out.
    """
    block, num_parts = block.contiguous(), triton.cdiv(len(block), ROWS_OF_A_PROGRAM)
    out = torch.empty(num_parts, block.shape[1], dtype=torch.float64, device=block.device)
    _grid_sum_of_columns[(triton.cdiv(block.shape[1], SUM_COLUMNS), num_parts)](
        block, scales, finite.to(torch.int8), out, len(block), block.shape[1], block.stride(0),
        SUM_ROWS, SUM_COLUMNS, ROWS_OF_A_PROGRAM,
    )  # fmt: skip
    return out.sum(dim=0).to(torch.int64)
