"""Folded book-keeping: per-example gradients, with the mean over noise draws inside, from one backward pass.

The backward pass computes input gradients only; at each layer the gradient of every example is made from what the layer
saw (book-keeping: Bu et al. 2023, arXiv 2210.00038; `e2h.privacy.layers` has the rules). Every gradient that is clipped
exists as a tensor; no norm is inferred.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from e2h.errors import InputError
from e2h.privacy import compiling
from e2h.privacy.group_norm import GroupNormRule, StridedGroupNormRule
from e2h.privacy.layers import Conv2dRule, EmbeddingRule, LinearRule

Losses = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def _plain_conv(module: nn.Conv2d) -> bool:
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _plain_embedding(module: nn.Embedding) -> bool:
    plain = module.padding_idx is None and module.max_norm is None
    return plain and not module.scale_grad_by_freq and not module.sparse


_RULES: dict[type[nn.Module], tuple[type[torch.autograd.Function], Callable[[Any], bool]]] = {
    nn.Conv2d: (Conv2dRule, _plain_conv),
    nn.Linear: (LinearRule, lambda module: True),
    nn.GroupNorm: (GroupNormRule, lambda module: True),
    nn.Embedding: (EmbeddingRule, _plain_embedding),
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


class Folded:
    """Per-example gradients of a network's trainable parameters, micro-batch after micro-batch.

    Args:
      network: of Conv2d, Linear, GroupNorm and Embedding layers, each used once in a forward pass.
      loss_fn: (network, batch) -> losses [B]; it runs the network once, on K * B rows in k-major order.
      num_draws: K.
      compiled: run forward and backward through `torch.compile`; one compilation for each shape of micro-batch.

    Raises:
      InputError: see `trainable_modules`.
    """

    def __init__(self, network: nn.Module, loss_fn: Losses, num_draws: int, compiled: bool = False) -> None:
        self.network, self.loss_fn, self.num_draws = network, loss_fn, num_draws
        self.names = trainable_modules(network)
        self.forwards = {module: partial(self._forward, module) for module in self.names}
        self.num_examples = 0
        self.taps: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.entered: set[str] = set()
        self.compiled = compiling.compiled(self._run) if compiled else None

    def __call__(self, batch: dict[str, Tensor], num_examples: int) -> tuple[list[Tensor], Tensor]:
        """The gradients of one micro-batch.

        Args:
          batch: each entry [B, ...].
          num_examples: B, at least 1.

        Returns:
          ([B, number of elements] for each parameter in the network's order, losses [B]).

        Raises:
          RuntimeError: on a module that is used twice, not reached, or whose weight is used outside it.
        """
        fresh = num_examples != self.num_examples
        if fresh:
            self.num_examples, self.taps = num_examples, self._new_taps(num_examples)
        try:
            for module, forward in self.forwards.items():
                module.forward = forward  # type: ignore[method-assign]
            if self.compiled is None:
                return self._gradients(self._run, batch)
            if fresh:
                self._gradients(self._run, batch)  # the checks of a forward pass see Python, a compiled one does not
            return self._gradients(self.compiled, batch)
        except BaseException:
            self.num_examples = 0
            raise
        finally:
            for module in self.forwards:
                vars(module).pop("forward", None)

    def _run(self, batch: dict[str, Tensor]) -> Tensor:
        return self.loss_fn(self.network, batch)

    def _gradients(self, run: Callable[[dict[str, Tensor]], Tensor], batch: dict[str, Tensor]) -> Any:
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        of_parameter = self._tap_of_parameter()
        if [id(parameter) for parameter in parameters] != [id(parameter) for parameter in of_parameter]:
            raise RuntimeError("the network's trainable parameters have changed: make a new engine")
        taps = list(of_parameter.values())
        self.entered.clear()
        losses = run(batch)
        if losses.shape != (self.num_examples,):
            expected = f"expected one loss an example, ({self.num_examples},)"
            raise ValueError(f"loss_fn returned {tuple(losses.shape)}: {expected}")
        found = torch.autograd.grad(losses.sum(), parameters + taps, allow_unused=True)
        # The rules return no weight gradient: what arrives here went past them.
        if any(gradient is not None for gradient in found[: len(parameters)]):
            raise RuntimeError("a trainable parameter is used outside its own module: its gradient is not per example")
        gradients = found[len(parameters) :]
        self._check_reached({id(tap): gradient for tap, gradient in zip(taps, gradients, strict=True)})
        return list(gradients), losses.detach()

    def _check_reached(self, found: dict[int, Tensor | None]) -> None:
        for name, taps in self.taps.items():
            if any(tap is not None and found[id(tap)] is None for tap in taps):
                raise RuntimeError(f"module {name} was not reached by the backward pass: its gradient is unknown")

    def _tap_of_parameter(self) -> dict[Tensor, Tensor]:
        pairs: dict[Tensor, Tensor] = {}
        for module, name in self.names.items():
            weight_tap, bias_tap = self.taps[name]
            pairs[module.weight] = weight_tap  # type: ignore[index]
            if bias_tap is not None:
                pairs[module.bias] = bias_tap  # type: ignore[index]
        if len(pairs) != sum(tap is not None for taps in self.taps.values() for tap in taps):
            raise RuntimeError("two layers came to share a parameter: make a new engine")
        return pairs

    def _new_taps(self, num_examples: int) -> dict[str, tuple[Tensor, Tensor | None]]:
        def tap(parameter: Tensor | None) -> Tensor | None:
            if parameter is None:
                return None
            return parameter.new_zeros(1).expand(num_examples, parameter.numel()).detach().requires_grad_()

        return {name: (tap(m.weight), tap(getattr(m, "bias", None))) for m, name in self.names.items()}  # type: ignore

    def _forward(self, module: Any, x: Tensor) -> Tensor:
        """Stands in for the forward of a trainable module."""
        name = self.names[module]
        if not torch.compiler.is_compiling():
            self._enter(name, x.shape[0])
        weight_tap, bias_tap = self.taps[name]
        rule = _RULES[type(module)][0]
        if type(module) is nn.GroupNorm:
            x = x.to(module.weight.dtype)
            rule = StridedGroupNormRule if x.is_cuda else rule
        elif type(module) is not nn.Embedding and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return rule.apply(x, module.weight, getattr(module, "bias", None), weight_tap, bias_tap, module, self.num_draws)

    def _enter(self, name: str, rows: int) -> None:
        """Raises on a second use (the cross terms of its gradient would be lost) or an unexpected batch."""
        if name in self.entered:
            raise RuntimeError(f"module {name} is used twice in one forward pass: per-example gradients need one use")
        if rows != self.num_draws * self.num_examples:
            expected = f"{self.num_draws} draws x {self.num_examples} examples"
            raise RuntimeError(f"module {name} got {rows} rows: expected {expected}, with the rows in dimension 0")
        self.entered.add(name)
