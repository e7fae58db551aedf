"""Per-example gradients -> clip -> sum on an integer grid (Abadi et al. 2016).

The noise draws of an example are averaged before the clip (noise multiplicity: Dockhorn et al. 2023).

Three engines make the same per-example gradients: `folded` (fast), `opacus` (reference), `loop` (oracle). One function,
`clip_and_sum`, ends all three, and the guarantee hangs on it alone.

In bfloat16 the network runs under autocast: weights stay float32, activations and their gradients are rounded, and what
is clipped and summed is float32 as always. The bound on a contribution doesn't depend on how a gradient was computed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from e2h.errors import InputError
from e2h.privacy.clipped_sum import GRID_BITS, ClippedSum, check_clipping, clip_and_sum
from e2h.privacy.folded import Folded

__all__ = ["GRID_BITS", "ClippedSum", "Engine", "clip_and_sum", "make_engine"]

Batch = dict[str, Tensor]  # every entry [B, ...]
LossFunction = Callable[[nn.Module, Batch], Tensor]  # -> losses [B]; K-mean inside, the network's rows k-major
Gradients = tuple[list[Tensor], Tensor]  # ([B, p] for each trainable parameter in order, losses [B])


def _loop(network: nn.Module, loss_fn: LossFunction, num_draws: int, batch: Batch, num_examples: int) -> Gradients:
    """One ordinary backward pass an example."""
    parameters = _trainable(network)
    losses, rows = [], []
    for i in range(num_examples):
        loss = loss_fn(network, {name: entry[i : i + 1] for name, entry in batch.items()})
        _expect_losses(loss, 1)
        rows.append(torch.autograd.grad(loss.sum(), parameters))
        losses.append(loss.detach())
    return [torch.stack(column).flatten(1) for column in zip(*rows, strict=True)], torch.cat(losses)


def grad_sample_module(network: nn.Module, loss_reduction: str = "mean") -> Any:
    """Opacus' `GradSampleModule` of a network that its `ModuleValidator` accepts.

    Raises:
      InputError: if it does not: a layer mixes examples, or is unknown.
    """
    from opacus.grad_sample import GradSampleModule
    from opacus.validators import ModuleValidator

    if problems := ModuleValidator.validate(network, strict=False):
        raise InputError(f"network={type(network).__name__}: expected layers that Opacus accepts ({problems[0]})")
    wrapped = GradSampleModule(network, loss_reduction=loss_reduction)
    for module in wrapped.modules():
        if isinstance(module, nn.Conv2d):
            # Opacus 1.6 unfolds strided activations wrongly: gradients that are not the example's, so no clip at all.
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return wrapped


def _opacus(network: nn.Module, loss_fn: LossFunction, num_draws: int, batch: Batch, num_examples: int) -> Gradients:
    """Opacus' per-row gradients, summed over the draws of an example (the loss holds the 1/K of the mean)."""
    # On a copy: an interrupted pass leaves no hooks, activations or gradients behind.
    wrapped = grad_sample_module(copy.deepcopy(network).train(), "sum")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        losses = loss_fn(wrapped, batch)
        _expect_losses(losses, num_examples)
        losses.sum().backward()
    gradients = []
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            rows = getattr(parameter, "grad_sample", None)
            if not isinstance(rows, Tensor) or rows.shape[0] != num_draws * num_examples:
                raise RuntimeError(f"parameter {name}: expected one gradient a row, {num_draws} x {num_examples}")
            rows = rows.to(parameter.dtype)  # half precision is summed in float32
            gradients.append(rows.reshape(num_draws, num_examples, -1).sum(0))
    return gradients, losses.detach()


_REFERENCES = {"opacus": _opacus, "loop": _loop}
ENGINES = ("folded", *_REFERENCES)


@dataclass(frozen=True)
class Engine:
    """Clipped gradient sums of a network, by one of three ways; see `make_engine`.

    `per_example`: (batch, B) -> gradients and losses of each example.
    """

    network: nn.Module
    per_example: Callable[[Batch, int], Gradients] = field(repr=False)
    max_grad_norm: float
    clipping: str = "flat"
    norm_threshold: float = 1.0

    def accumulate(self, batch: Batch, weights: Tensor) -> ClippedSum:
        """Sums the clipped gradients of one micro-batch; keeps no gradients and leaves the network as it was.

        Args:
          batch: each entry [B, ...] with the example leading; B may be 0. All draws of an example are in it.
          weights: [B] of 0 (padding) and 1; on the CPU, so that nobody waits for a GPU, or on the network's device.

        Raises:
          ValueError: if an entry does not lead with B, or a weight is neither 0 nor 1.
          InputError, RuntimeError: on a network whose per-example gradients can't be made.
        """
        num_examples = len(weights)
        for name, entry in batch.items():
            if len(entry) != num_examples:
                raise ValueError(f"batch[{name!r}] has {len(entry)} examples: expected {num_examples}, one a weight")
        if not bool(((weights == 0) | (weights == 1)).all()):
            raise ValueError("weights: expected 0 or 1 for each example")
        parameters = _trainable(self.network)
        if num_examples == 0:
            empty = parameters[0].new_zeros(0)
            vector = empty.new_zeros(sum(p.numel() for p in parameters), dtype=torch.int64)
            return ClippedSum(vector, 0, empty, empty.double())
        gradients, losses = self.per_example(batch, num_examples)
        return clip_and_sum(gradients, weights, losses, self.max_grad_norm, self.clipping, self.norm_threshold)


def make_engine(
    name: str,
    network: nn.Module,
    loss_fn: LossFunction,
    max_grad_norm: float,
    noise_multiplicity: int,
    *,
    clipping: str = "flat",
    norm_threshold: float = 1.0,
    dtype: str = "float32",
    compiled: bool = False,
) -> Engine:
    """Chooses how per-example gradients are made; the results agree to floating-point precision.

    Args:
      name: folded (one backward pass, see `e2h.privacy.folded`), opacus (reference; needs the package) or loop (one
        backward pass an example; works for every network without cross-example layers).
      network: its parameters with requires_grad are trained, float32 or float64.
      loss_fn: (network, batch) -> losses [B], each the mean over the example's K draws; it runs the network once on
        K * B rows in k-major order (row k * B + b).
      max_grad_norm: C, the L2 bound of one example's contribution over all parameters.
      noise_multiplicity: K.
      clipping: flat, normalized or global; see `e2h.privacy.clipped_sum.clip_factors`.
      norm_threshold: Z of clipping=global.
      dtype: float32 (the parameters' own type) or bfloat16 (autocast).
      compiled: `torch.compile` for folded; the references run as they are.

    Raises:
      InputError: on an unknown name, a layer that mixes examples, a parameter that is shared, of another type, or
        (folded) in an unsupported layer.
    """
    if name not in ENGINES:
        raise InputError(f"finetune.engine={name}: expected one of {', '.join(ENGINES)}")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"finetune.dtype={dtype}: expected float32 or bfloat16")
    check_clipping(clipping, max_grad_norm, norm_threshold)
    _check_network(network)
    loss = in_type(loss_fn, dtype)
    if name == "folded":
        per_example: Callable[[Batch, int], Gradients] = Folded(network, loss, noise_multiplicity, compiled)
    else:
        per_example = partial(_REFERENCES[name], network, loss, noise_multiplicity)
    return Engine(network, per_example, max_grad_norm, clipping, norm_threshold)


def _check_network(network: nn.Module) -> None:
    for module_name, module in network.named_modules():
        tracked = getattr(module, "track_running_stats", False)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or tracked:
            layer = f"{module_name or 'network'}={type(module).__name__}"
            raise InputError(f"{layer}: expected layers that keep the examples of a batch apart; use GroupNorm")
    for parameter_name, parameter in network.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise InputError(f"{parameter_name}={parameter.dtype}: expected float32 or float64 parameters")


def in_type(loss_fn: LossFunction, dtype: str) -> LossFunction:
    """`loss_fn` itself, or for dtype=bfloat16 under autocast."""
    return partial(_autocast_loss, loss_fn) if dtype == "bfloat16" else loss_fn


def _autocast_loss(loss_fn: LossFunction, network: nn.Module, batch: Batch) -> Tensor:
    device = next(iter(batch.values())).device.type
    with torch.autocast(device, torch.bfloat16):
        return loss_fn(network, batch)


def _trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _expect_losses(losses: Tensor, num_examples: int) -> None:
    if losses.shape != (num_examples,):
        raise ValueError(f"loss_fn returned {tuple(losses.shape)}: expected one loss an example, ({num_examples},)")
