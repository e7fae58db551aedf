"""Per-example gradients of single layers, with the sum over an example's noise draws inside.

Rows are k-major (row = k * B + b), so that a view folds the examples into channel groups: the weight gradient of a
grouped convolution (Rochette et al. 2019, arXiv 1912.06015) is then the gradient of all B examples with their K draws
already summed.

A layer hands its per-example gradients to autograd as the gradients of *taps*: dummy inputs [B, number of elements]
that take no memory (stride 0) and part in no arithmetic. The backward pass has no side effects, so it can be compiled.

One rule by the kind of layer, no measured choice: 1x1 convolutions are one batched product a draw, all others one
grouped convolution. On a CPU that costs a step 1 to 3 % beside the best of four kernels for each shape (docs/LOG.md),
and it is one thing less that a replay depends on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

try:
    from e2h.privacy import kernels
except ImportError:  # torch without Triton, as its builds for CPUs are
    kernels = None  # type: ignore[assignment]

Gradient = tuple[Tensor | None, ...]


def sum_draws(x: Tensor, num_draws: int) -> Tensor:
    """[K*B, D] -> float [B, D]; half precision is summed in float32."""
    x = _wide(x)
    return x.reshape(num_draws, -1, x.shape[-1]).sum(0) if num_draws > 1 else x


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _by_example(x: Tensor, num_draws: int) -> Tensor:
    """[K*B, ..., D] -> [B, K * ..., D]: everything that belongs to one example in one matrix."""
    num_examples = x.shape[0] // num_draws
    draws = x.reshape(num_draws, num_examples, -1, x.shape[-1])
    return draws.transpose(0, 1).reshape(num_examples, -1, x.shape[-1])


def _outer_products(x: Tensor, grad: Tensor, num_draws: int) -> Tensor:
    """x [K*B, ..., I], grad [K*B, ..., O] -> float [B, O * I], summed over all that belongs to an example."""
    products = torch.bmm(_by_example(grad, num_draws).transpose(1, 2), _by_example(x, num_draws))
    return _wide(products.flatten(1))


def _pointwise_weight_gradient(x: Tensor, grad: Tensor, num_draws: int) -> Tensor:
    """A 1x1 convolution is a linear layer on pixels. Draw by draw, which needs no copy in another order."""
    xs, grads = (t.flatten(2).unflatten(0, (num_draws, -1)) for t in (x, grad))  # each [K, B, channels, pixels]
    total = _wide(torch.bmm(grads[0], xs[0].transpose(1, 2)))
    for k in range(1, num_draws):
        total += torch.bmm(grads[k], xs[k].transpose(1, 2))
    return total.flatten(1)


def _window_weight_gradient(
    x: Tensor, weight: Tensor, grad: Tensor, geometry: tuple[Any, ...], num_draws: int
) -> Tensor:
    stride, padding, dilation = geometry
    if kernels is not None and x.is_cuda and x.dtype == grad.dtype and x.dtype.itemsize == 2 and dilation == (1, 1):
        kernel_size = list(weight.shape[2:])
        return kernels.conv_weight_gradient(x, grad, kernel_size, list(stride), list(padding), num_draws)
    num_examples = x.shape[0] // num_draws
    shape = (num_examples * weight.shape[0], *weight.shape[1:])
    folded_x = x.reshape(num_draws, num_examples * x.shape[1], *x.shape[2:])
    folded_grad = grad.reshape(num_draws, num_examples * grad.shape[1], *grad.shape[2:])
    gradient = conv2d_weight(folded_x, shape, folded_grad, stride, padding, dilation, num_examples)
    return _wide(gradient.reshape(num_examples, -1))


def _like(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the type of `x` and, on a GPU, in the memory format that is fast there."""
    weight = weight.to(x.dtype)
    return weight.contiguous(memory_format=torch.channels_last) if x.is_cuda else weight


def _input_gradient(x: Tensor, weight: Tensor, grad: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    """As `torch.nn.grad.conv2d_input`, which makes up an `x`, and in torch's GPU code a copy of it."""
    stride, padding, dilation = geometry
    rest = None, stride, padding, dilation, False, [0, 0], 1, [True, False, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, *rest)[0]


class Conv2dRule(torch.autograd.Function):
    """Conv2d without groups, zero padding in numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_tap: Tensor,
        bias_tap: Tensor | None,
        module: nn.Conv2d,
        num_draws: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.num_draws = (module.stride, module.padding, module.dilation), num_draws
        ctx.has_bias = bias is not None
        return functional.conv2d(x, _like(weight, x), None if bias is None else bias.to(x.dtype), *ctx.geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradient:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        num_draws = ctx.num_draws
        if weight.shape[2:] == (1, 1) and ctx.geometry[:2] == ((1, 1), (0, 0)):
            of_weight = _pointwise_weight_gradient(x, grad, num_draws)
        else:
            of_weight = _window_weight_gradient(x, weight, grad, ctx.geometry, num_draws)
        of_bias = sum_draws(grad.flatten(2).sum(2), num_draws) if ctx.has_bias else None
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = _input_gradient(x, _like(weight, grad), grad, ctx.geometry)
        return of_x, None, None, of_weight, of_bias, None, None


class LinearRule(torch.autograd.Function):
    """Linear, on vectors or on sequences."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_tap: Tensor,
        bias_tap: Tensor | None,
        module: nn.Linear,
        num_draws: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.num_draws, ctx.has_bias = num_draws, bias is not None
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradient:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_weight = _outer_products(x, grad, ctx.num_draws)
        of_bias = _wide(_by_example(grad, ctx.num_draws)).sum(1) if ctx.has_bias else None
        of_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_weight, of_bias, None, None


def _normalised(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """`x` with mean 0 and variance 1 in each group, and what it was multiplied by [N, groups]."""
    grouped = x.unflatten(1, (groups, -1))
    inner = tuple(range(2, grouped.dim()))
    variance, mean = torch.var_mean(grouped, dim=inner, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    return ((grouped - mean) * rstd).flatten(1, 2), rstd.flatten(1)


def _of_channels(values: Tensor, x: Tensor) -> Tensor:
    """[C] or [N, C] as factors of x [N, C, ...]."""
    return values.reshape(*values.shape, *[1] * (x.dim() - 2))


def _group_norm_gradients(ctx: Any, grad: Tensor) -> Gradient:
    """In steps that a compiler makes a few passes of, in any memory format: torch's own would copy twice."""
    (x, weight), groups = ctx.saved_tensors, ctx.groups
    normal, rstd = _normalised(x, groups, ctx.eps)
    pixels = x.shape[2:].numel()
    of_weight, of_bias = ((t.flatten(2).sum(2) if pixels > 1 else t.flatten(1)) for t in (grad * normal, grad))
    of_x = None
    if ctx.needs_input_grad[0]:

        def mean_of_group(of_channel: Tensor) -> Tensor:
            means = (of_channel * weight).unflatten(1, (groups, -1)).sum(2) / (x.shape[1] // groups * pixels)
            return _of_channels(means.repeat_interleave(x.shape[1] // groups, dim=1), x)

        inner = grad * _of_channels(weight, x) - mean_of_group(of_bias) - normal * mean_of_group(of_weight)
        of_x = inner * _of_channels(rstd.repeat_interleave(x.shape[1] // groups, dim=1), x)
    sums = (sum_draws(one, ctx.num_draws) for one in (of_weight, of_bias))
    return of_x, None, None, next(sums), next(sums) if ctx.has_bias else None, None, None


class GroupNormRule(torch.autograd.Function):
    """GroupNorm, in the type of its weight."""

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
        ctx.groups, ctx.num_draws, ctx.has_bias = module.num_groups, num_draws, bias is not None
        if x.is_cuda:
            normal, rstd = _normalised(x, module.num_groups, module.eps)
            ctx.save_for_backward(x, weight)
            ctx.eps = module.eps
            y = normal * _of_channels(weight, x)
            return y if bias is None else y + _of_channels(bias, x)
        x = x.contiguous()
        num_rows, width = x.shape[:2]
        pixels, groups = x.shape[2:].numel(), module.num_groups
        y, mean, rstd = torch.native_group_norm(x, weight, bias, num_rows, width, pixels, groups, module.eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradient:  # type: ignore[override]
        if len(ctx.saved_tensors) == 2:
            return _group_norm_gradients(ctx, grad)
        x, weight, mean, rstd = ctx.saved_tensors
        num_rows, width = x.shape[:2]
        folded = (1, num_rows * width, x.shape[2:].numel())  # rows become channels: affine gradients, one a row
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
        return (
            of_x.view(x.shape) if ctx.needs_input_grad[0] else None,
            None,
            None,
            sum_draws(of_weight.view(num_rows, width), ctx.num_draws),
            sum_draws(of_bias.view(num_rows, width), ctx.num_draws) if ctx.has_bias else None,
            None,
            None,
        )


class EmbeddingRule(torch.autograd.Function):
    """Embedding: a plain table."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: None,
        weight_tap: Tensor,
        bias_tap: None,
        module: nn.Embedding,
        num_draws: int,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.num_draws, ctx.num_entries = num_draws, weight.shape[0]
        return functional.embedding(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradient:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        # One-hot rows instead of a scatter: deterministic on every device, and tables are small here.
        one_hot = functional.one_hot(x, ctx.num_entries).to(grad.dtype)
        return None, None, None, _outer_products(grad, one_hot, ctx.num_draws), None, None, None
