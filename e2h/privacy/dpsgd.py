"""Per-example gradients -> flat clip -> sum on an integer grid (Abadi et al. 2016).

The noise draws of an example are averaged before the clip (noise multiplicity: Dockhorn et al. 2023).

Three engines make the same per-example gradients: `folded` (fast), `opacus` (reference), `loop` (oracle). One function,
`clip_and_sum`, ends all three, and the guarantee hangs on it alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e2h.errors import InputError
from e2h.privacy.folded import folded_gradients, trainable_modules

GRID_BITS = 30
MARGIN = 2.0**-10
BLOCK_COLUMNS = 4096  # the float64 copy of a block stays small: neither a second [B, P] nor out of the cache

Batch = dict[str, Tensor]  # every entry [B, ...]
LossFunction = Callable[[nn.Module, Batch], Tensor]  # -> losses [B]; K-mean inside, the network's rows k-major
Gradients = tuple[list[Tensor], Tensor]  # ([B, p] for each trainable parameter in order, losses [B])


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


def clip_and_sum(gradients: list[Tensor], weights: Tensor, losses: Tensor, max_grad_norm: float) -> ClippedSum:
    """Clips each example's gradient over all P parameters, rounds it to the grid and sums exactly.

    Sensitivity. Write C = max_grad_norm, n for the norm of an example's computed gradient g, and
    s = min(1, (1 - 2^-10) C / n) 2^30 / C for its scale. The example contributes the integers round(fl(g_j s)), and:
      1. n is taken in float64 of the very tensor that is scaled: relative error below P 2^-52;
      2. s is rounded to float32 and so is each product: |fl(g_j s)| <= |g_j| s (1 + 2^-24)^2 (a product that underflows
         rounds to 0);
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
      gradients: [B, p] float32 or float64 for each parameter; overwritten.
      weights: [B] of 0 and 1.
      losses: [B].
      max_grad_norm: C, above 0.
    """
    blocks = [block for gradient in gradients for block in gradient.split(BLOCK_COLUMNS, dim=1)]
    partial_norms = [torch.linalg.vector_norm(block, dim=1, dtype=torch.float64) for block in blocks]
    norms = torch.linalg.vector_norm(torch.stack(partial_norms), dim=0)
    finite = torch.isfinite(norms)
    coefficients = torch.where(finite, ((1 - MARGIN) * max_grad_norm / norms).clamp(max=1.0), 0.0) * weights
    scales = coefficients * (2.0**GRID_BITS / max_grad_norm)
    dropped = torch.nonzero(~finite).flatten()
    ones, sums = torch.ones_like(norms), []
    for block in blocks:
        if len(dropped) > 0:
            block[dropped] = 0.0  # 0 * inf would be NaN
        on_grid = block.mul_(scales.to(block.dtype)[:, None]).round_()
        sums.append((ones @ on_grid.to(torch.float64)).to(torch.int64))
    return ClippedSum(torch.cat(sums), int(weights.sum()), losses, norms)


def _folded(network: nn.Module, loss_fn: LossFunction, batch: Batch, num_examples: int, num_draws: int) -> Gradients:
    return folded_gradients(network, lambda net: _losses(net, loss_fn, batch, num_examples), num_examples, num_draws)


def _loop(network: nn.Module, loss_fn: LossFunction, batch: Batch, num_examples: int, num_draws: int) -> Gradients:
    """One ordinary backward pass an example."""
    parameters = _trainable(network)
    losses, rows = [], []
    for i in range(num_examples):
        loss = _losses(network, loss_fn, {name: entry[i : i + 1] for name, entry in batch.items()}, 1)
        rows.append(torch.autograd.grad(loss.sum(), parameters))
        losses.append(loss.detach())
    return [torch.stack(column).flatten(1) for column in zip(*rows, strict=True)], torch.cat(losses)


def _opacus(network: nn.Module, loss_fn: LossFunction, batch: Batch, num_examples: int, num_draws: int) -> Gradients:
    """Opacus' per-row gradients, summed over the draws of an example (the loss holds the 1/K of the mean)."""
    from opacus.grad_sample import GradSampleModule

    # On a copy: an interrupted pass leaves no hooks, activations or gradients behind.
    wrapped = GradSampleModule(copy.deepcopy(network).train(), loss_reduction="sum")
    for module in wrapped.modules():
        if isinstance(module, nn.Conv2d):
            # Opacus 1.6 unfolds strided activations wrongly: gradients that are not the example's, so no clip at all.
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        losses = _losses(wrapped, loss_fn, batch, num_examples)
        losses.sum().backward()
    gradients = []
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            rows = getattr(parameter, "grad_sample", None)
            if not isinstance(rows, Tensor) or rows.shape[0] != num_draws * num_examples:
                raise RuntimeError(f"parameter {name}: expected one gradient a row, {num_draws} x {num_examples}")
            gradients.append(rows.reshape(num_draws, num_examples, -1).sum(0))
    return gradients, losses.detach()


_ENGINES = {"folded": _folded, "opacus": _opacus, "loop": _loop}


@dataclass(frozen=True)
class Engine:
    """Clipped gradient sums of a network, by one of three ways; see `make_engine`."""

    name: str
    network: nn.Module
    loss_fn: LossFunction
    max_grad_norm: float
    noise_multiplicity: int

    def accumulate(self, batch: Batch, weights: Tensor) -> ClippedSum:
        """Sums the clipped gradients of one micro-batch; keeps no state and leaves the network as it was.

        Args:
          batch: each entry [B, ...] with the example leading; B may be 0. All draws of an example are in it.
          weights: [B] of 0 (padding) and 1, on the network's device.

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
        compute = _ENGINES[self.name]
        gradients, losses = compute(self.network, self.loss_fn, batch, num_examples, self.noise_multiplicity)
        return clip_and_sum(gradients, weights, losses, self.max_grad_norm)


def make_engine(
    name: str, network: nn.Module, loss_fn: LossFunction, max_grad_norm: float, noise_multiplicity: int
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

    Raises:
      InputError: on an unknown name, a layer that mixes examples, a parameter that is shared, of another type, or
        (folded) in an unsupported layer.
    """
    if name not in _ENGINES:
        raise InputError(f"finetune.engine={name}: expected one of {', '.join(_ENGINES)}")
    for module_name, module in network.named_modules():
        tracked = getattr(module, "track_running_stats", False)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or tracked:
            layer = f"{module_name or 'network'}={type(module).__name__}"
            raise InputError(f"{layer}: expected layers that keep the examples of a batch apart; use GroupNorm")
    for parameter_name, parameter in network.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise InputError(f"{parameter_name}={parameter.dtype}: expected float32 or float64 parameters")
    if name == "folded":
        trainable_modules(network)
    return Engine(name, network, loss_fn, max_grad_norm, noise_multiplicity)


def _trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _losses(network: nn.Module, loss_fn: LossFunction, batch: Batch, num_examples: int) -> Tensor:
    losses = loss_fn(network, batch)
    if losses.shape != (num_examples,):
        raise ValueError(f"loss_fn returned {tuple(losses.shape)}: expected one loss an example, ({num_examples},)")
    return losses
