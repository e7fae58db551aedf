"""Per-example gradients of single layers, with the sum over an example's noise draws inside.

Rows are k-major (row = k * B + b), so that a view folds the examples into channel groups: the weight gradient of a
grouped convolution (Rochette et al. 2019, arXiv 1912.06015) is then the gradient of all B examples with their K draws
already summed.

A layer hands its per-example gradients to autograd as the gradients of *taps*: dummy inputs [B, number of elements]
that take no memory (stride 0) and part in no arithmetic. The backward pass has no side effects, so it can be compiled.

One rule by the kind of layer, no measured choice: 1x1 convolutions are one batched product a draw, all others one
grouped convolution, or a kernel of ours where a GPU computes in half precision (`e2h.privacy.kernels`). On a CPU that
costs a step 1 to 3 % beside the best of four kernels for each shape (docs/LOG.md), and it is one thing less that a
replay depends on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from e2h.privacy.compiling import kernels

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
