"""Per-example gradients of GroupNorm: the sums over pixels that make them are those of one row each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from e2h.privacy.layers import Gradient, sum_draws


class GroupNormRule(torch.autograd.Function):
    """GroupNorm in the type of its weight, by torch's own kernels: with rows as channels they give a gradient a row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_tap: Tensor,
        bias_tap: Tensor | None,
        module: nn.GroupNorm,
        num_draws: int,
    ) -> Tensor:
        x = x.contiguous()
        num_rows, width = x.shape[:2]
        pixels, groups = x.shape[2:].numel(), module.num_groups
        y, mean, rstd = torch.native_group_norm(x, weight, bias, num_rows, width, pixels, groups, module.eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups, ctx.num_draws, ctx.has_bias = groups, num_draws, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradient:  # type: ignore[override]
        x, weight, mean, rstd = ctx.saved_tensors
        num_rows, width = x.shape[:2]
        folded = (1, num_rows * width, x.shape[2:].numel())
        of_x, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
            grad.contiguous().view(folded),
            x.view(folded),
            mean.view(1, -1),
            rstd.view(1, -1),
            weight.repeat(num_rows),
            *folded,
            num_rows * ctx.groups,
            [ctx.needs_input_grad[0], True, True],
        )
        of_x = of_x.view(x.shape) if ctx.needs_input_grad[0] else None
        return _gradients(ctx, of_x, of_weight.view(num_rows, width), of_bias.view(num_rows, width))


class StridedGroupNormRule(torch.autograd.Function):
    """The same from plain operations, in any memory format: a compiler makes a few passes of them.

    For GPUs, where torch's own kernels want another memory format than its convolutions: two copies a layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_tap: Tensor,
        bias_tap: Tensor | None,
        module: nn.GroupNorm,
        num_draws: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups, ctx.eps = module.num_groups, module.eps
        ctx.num_draws, ctx.has_bias = num_draws, bias is not None
        y = _normalised(x, module.num_groups, module.eps)[0] * _per_channel(weight, x)
        return y if bias is None else y + _per_channel(bias, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradient:  # type: ignore[override]
        (x, weight), width = ctx.saved_tensors, grad.shape[1]
        normal, rstd = _normalised(x, ctx.groups, ctx.eps)
        of_weight, of_bias = _over_pixels(grad * normal), _over_pixels(grad)
        if not ctx.needs_input_grad[0]:
            return _gradients(ctx, None, of_weight, of_bias)

        def of_group(values: Tensor) -> Tensor:
            """[N, groups] for every channel of the group."""
            return _per_channel(values.repeat_interleave(width // ctx.groups, dim=1), x)

        def mean(of_channel: Tensor) -> Tensor:
            sums = (of_channel * weight).unflatten(1, (ctx.groups, -1)).sum(2)
            return of_group(sums / (width // ctx.groups * x.shape[2:].numel()))

        inner = grad * _per_channel(weight, x) - mean(of_bias) - normal * mean(of_weight)
        return _gradients(ctx, inner * of_group(rstd), of_weight, of_bias)


def _gradients(ctx: Any, of_x: Tensor | None, of_weight: Tensor, of_bias: Tensor) -> Gradient:
    """As autograd wants them, from one gradient a row [K*B, C]."""
    bias = sum_draws(of_bias, ctx.num_draws) if ctx.has_bias else None
    return of_x, None, None, sum_draws(of_weight, ctx.num_draws), bias, None, None


def _normalised(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """`x` [N, C, ...] with mean 0 and variance 1 in each group, and what it was multiplied by [N, groups]."""
    grouped = x.unflatten(1, (groups, -1))
    inner = tuple(range(2, grouped.dim()))
    variance, mean = torch.var_mean(grouped, dim=inner, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    return ((grouped - mean) * rstd).flatten(1, 2), rstd.flatten(1)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C] or [N, C] as factors of x [N, C, ...]."""
    return values.reshape(*values.shape, *[1] * (x.dim() - 2))


def _over_pixels(x: Tensor) -> Tensor:
    return x.flatten(2).sum(2) if x.dim() > 2 else x
