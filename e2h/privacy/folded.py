"""Folded book-keeping: per-example gradients, with the mean over noise draws inside, from one backward pass.

The backward pass computes input gradients only; at each layer the gradient of every example is made from what the layer
saw (book-keeping: Bu et al. 2023, arXiv 2210.00038). Rows are k-major (row = k * B + b), so that a view folds the
examples into channel groups: the weight gradient of a grouped convolution (Rochette et al. 2019, arXiv 1912.06015) is
then the gradient of all B examples with their K draws already summed. Every gradient that is clipped exists as a
tensor; no norm is inferred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

from e2h.errors import InputError


class Recorder:
    """The per-example gradients of one backward pass, by parameter.

    Args:
      modules: name of each trainable module.
      num_examples: B.
      num_draws: K; the network sees K * B rows, k-major.
    """

    def __init__(self, modules: dict[nn.Module, str], num_examples: int, num_draws: int) -> None:
        self.modules = modules
        self.num_examples = num_examples
        self.num_draws = num_draws
        self.entered: set[nn.Module] = set()
        self.gradients: dict[Tensor, Tensor] = {}  # each [B, number of elements]

    def enter(self, module: nn.Module, rows: int) -> None:
        """Called once by each trainable module on the way forward.

        Raises:
          RuntimeError: on a second use (the cross terms of its gradient would be lost) or an unexpected batch.
        """
        name = self.modules[module]
        if module in self.entered:
            raise RuntimeError(f"module {name} is used twice in one forward pass: per-example gradients need one use")
        if rows != self.num_draws * self.num_examples:
            expected = f"{self.num_draws} draws x {self.num_examples} examples"
            raise RuntimeError(f"module {name} got {rows} rows: expected {expected}, with the rows in dimension 0")
        self.entered.add(module)

    def by_example(self, x: Tensor) -> Tensor:
        """[K*B, ..., D] -> [B, K * ..., D]: everything that belongs to one example in one row of matrices."""
        draws = x.reshape(self.num_draws, self.num_examples, -1, x.shape[-1])
        return draws.transpose(0, 1).reshape(self.num_examples, -1, x.shape[-1])

    def outer_products(self, x: Tensor, grad: Tensor) -> Tensor:
        """x [K*B, ..., I], grad [K*B, ..., O] -> [B, O * I], summed over all that belongs to an example."""
        products = torch.bmm(self.by_example(grad).transpose(1, 2), self.by_example(x))
        return products.reshape(self.num_examples, -1)

    def sum_draws(self, x: Tensor) -> Tensor:
        """[K*B, D] -> [B, D]."""
        return x.view(self.num_draws, self.num_examples, -1).sum(0) if self.num_draws > 1 else x

    def ordered(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """The gradients in the order of the parameters.

        Raises:
          RuntimeError: if the loss did not reach a parameter.
        """
        missing = [name for module, name in self.modules.items() if module.weight not in self.gradients]
        if missing:
            raise RuntimeError(f"module {missing[0]} was not reached by the backward pass: its gradient is unknown")
        return [self.gradients[parameter] for parameter in parameters]


def _grouped_weight_gradient(
    x: Tensor, weight: Tensor, grad: Tensor, geometry: tuple[Any, ...], recorder: Recorder
) -> Tensor:
    draws, examples = recorder.num_draws, recorder.num_examples
    shape = (examples * weight.shape[0], *weight.shape[1:])
    folded_x = x.reshape(draws, examples * x.shape[1], *x.shape[2:])
    folded_grad = grad.reshape(draws, examples * grad.shape[1], *grad.shape[2:])
    stride, padding, dilation = geometry
    return conv2d_weight(folded_x, shape, folded_grad, stride, padding, dilation, examples).reshape(examples, -1)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Conv2d, recorder: Recorder
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.geometry, ctx.recorder = (module.stride, module.padding, module.dilation), recorder
        return functional.conv2d(x, weight, bias, *ctx.geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        recorder: Recorder = ctx.recorder
        if weight.shape[2:] == (1, 1) and ctx.geometry[:2] == ((1, 1), (0, 0)):  # a linear layer on pixels
            gradient = recorder.outer_products(x.flatten(2).transpose(1, 2), grad.flatten(2).transpose(1, 2))
        else:
            gradient = _grouped_weight_gradient(x, weight, grad, ctx.geometry, recorder)
        recorder.gradients[weight] = gradient
        if bias is not None:
            recorder.gradients[bias] = recorder.sum_draws(grad.flatten(2).sum(2))
        grad_x = conv2d_input(x.shape, weight, grad, *ctx.geometry) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Linear, recorder: Recorder
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.recorder = recorder
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        recorder: Recorder = ctx.recorder
        recorder.gradients[weight] = recorder.outer_products(x, grad)
        if bias is not None:
            recorder.gradients[bias] = recorder.by_example(grad).sum(1)
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.GroupNorm, recorder: Recorder
    ) -> Tensor:
        x = x.contiguous()
        num_rows, width = x.shape[:2]
        pixels = x.shape[2:].numel()
        groups = module.num_groups
        y, mean, rstd = torch.native_group_norm(x, weight, bias, num_rows, width, pixels, groups, module.eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.recorder = groups, recorder
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        recorder: Recorder = ctx.recorder
        num_rows, width = x.shape[:2]
        pixels = x.shape[2:].numel()
        folded = (1, num_rows * width, pixels)  # rows become channels: the affine gradients come out one a row
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
            grad.contiguous().view(folded),
            x.view(folded),
            mean.view(1, -1),
            rstd.view(1, -1),
            weight.repeat(num_rows),
            *folded,
            num_rows * ctx.groups,
            [ctx.needs_input_grad[0], True, True],
        )
        recorder.gradients[weight] = recorder.sum_draws(grad_weight.view(num_rows, width))
        if bias is not None:
            recorder.gradients[bias] = recorder.sum_draws(grad_bias.view(num_rows, width))
        return (grad_x.view(x.shape) if ctx.needs_input_grad[0] else None), None, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: None, module: nn.Embedding, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recorder = recorder
        return functional.embedding(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        recorder: Recorder = ctx.recorder
        # One-hot rows instead of a scatter: deterministic on every device, and tables are small here.
        one_hot = functional.one_hot(x, weight.shape[0]).to(grad.dtype)
        recorder.gradients[weight] = recorder.outer_products(grad, one_hot)
        return None, None, None, None, None


def _forward(function: type[torch.autograd.Function], module: Any, recorder: Recorder, x: Tensor) -> Tensor:
    recorder.enter(module, x.shape[0])
    return function.apply(x, module.weight, getattr(module, "bias", None), module, recorder)


def _plain_conv(module: nn.Conv2d) -> bool:
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _plain_embedding(module: nn.Embedding) -> bool:
    plain = module.padding_idx is None and module.max_norm is None
    return plain and not module.scale_grad_by_freq and not module.sparse


_RULES: dict[type[nn.Module], tuple[type[torch.autograd.Function], Callable[[Any], bool]]] = {
    nn.Conv2d: (_Conv2d, _plain_conv),
    nn.Linear: (_Linear, lambda module: True),
    nn.GroupNorm: (_GroupNorm, lambda module: True),
    nn.Embedding: (_Embedding, _plain_embedding),
}


def _objection(module: nn.Module, parameters: list[nn.Parameter]) -> str | None:
    """What was expected of a trainable module, where it is something else."""
    if type(module) not in _RULES or not _RULES[type(module)][1](module):
        plain = "plain Conv2d (groups=1, zero padding in numbers), Linear, GroupNorm or Embedding"
        return f"{plain}; use finetune.engine=opacus for other layers"
    if not all(parameter.requires_grad for parameter in parameters):
        return "all of its parameters trainable, or none; freeze the whole module"
    if "forward" in vars(module):
        return "the layer's own forward; undo what replaced it"
    return None


def trainable_modules(network: nn.Module) -> dict[nn.Module, str]:
    """The modules that own trainable parameters, with their names.

    Raises:
      InputError: on a parameter whose per-example gradient this engine can't make: owned by an unsupported layer,
        shared by two, or in a module that is frozen in part. Nothing is skipped silently.
    """
    owners: dict[nn.Module, str] = {}
    seen: dict[Tensor, str] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(prefix=name, recurse=False, remove_duplicate=False))
        if not any(parameter.requires_grad for parameter in own.values()):
            continue
        for full_name, parameter in own.items():
            if parameter in seen:
                raise InputError(f"{full_name}={seen[parameter]}: expected a parameter of its own; untie the two")
            seen[parameter] = full_name
        owners[module] = name or "network"
        objection = _objection(module, list(own.values()))
        if objection is not None:
            raise InputError(f"{owners[module]}={type(module).__name__}: expected {objection}")
    return owners


@contextmanager
def recording(network: nn.Module, num_examples: int, num_draws: int) -> Iterator[Recorder]:
    """Patches the forwards of the trainable modules for the length of the block, and restores them whatever happens."""
    modules = trainable_modules(network)
    recorder = Recorder(modules, num_examples, num_draws)
    try:
        for module in modules:
            module.forward = partial(_forward, _RULES[type(module)][0], module, recorder)  # type: ignore[method-assign]
        yield recorder
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def folded_gradients(
    network: nn.Module, loss_fn: Callable[[nn.Module], Tensor], num_examples: int, num_draws: int
) -> tuple[list[Tensor], Tensor]:
    """Per-example gradients of the trainable parameters.

    Args:
      network: of Conv2d, Linear, GroupNorm and Embedding layers, each used once in a forward pass.
      loss_fn: network -> losses [B]; it runs the network once, on K * B rows in k-major order.
      num_examples: B, at least 1.
      num_draws: K.

    Returns:
      ([B, number of elements] for each parameter in the network's order, losses [B]).

    Raises:
      InputError: see `trainable_modules`.
      RuntimeError: on a module that is used twice, not reached, or whose weight is used outside it.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with recording(network, num_examples, num_draws) as recorder:
        losses = loss_fn(network)
        ordinary = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    # The patched layers return no weight gradient: what arrives here went past them.
    if any(gradient is not None for gradient in ordinary):
        raise RuntimeError("a trainable parameter is used outside its own module: its gradient is not per example")
    return recorder.ordered(parameters), losses.detach()
