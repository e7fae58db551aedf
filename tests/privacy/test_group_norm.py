"""Two rules for one layer give the same per-example gradients: torch's own of each row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from e2h.privacy.group_norm import GroupNormRule, StridedGroupNormRule


@pytest.mark.parametrize("rule", [GroupNormRule, StridedGroupNormRule])
@pytest.mark.parametrize(("shape", "groups"), [((6, 8, 5, 5), 2), ((6, 8), 4), ((6, 8, 7), 8)])
@pytest.mark.parametrize("draws", [1, 2, 3])
def test_a_rule_gives_the_gradients_of_each_example(rule, shape, groups, draws):
    torch.manual_seed(0)
    layer = nn.GroupNorm(groups, shape[1], eps=1e-6).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(shape, dtype=torch.float64)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    examples = len(x) // draws
    taps = [torch.zeros(examples, shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    x.requires_grad_()
    y = rule.apply(x, layer.weight, layer.bias, *taps, layer, draws)
    assert torch.allclose(y, layer(x))
    of_y = torch.randn_like(y)
    of_x, *of_taps = torch.autograd.grad(y, [x, *taps], of_y)
    assert torch.allclose(of_x, torch.autograd.grad(layer(x), x, of_y)[0])
    for i in range(examples):
        rows = slice(i, None, examples)
        # torch 2.13 crashes where such rows lie channels last and want no gradient themselves.
        expected = torch.autograd.grad(layer(x[rows].detach().contiguous()), [layer.weight, layer.bias], of_y[rows])
        assert all(torch.allclose(found[i], one) for found, one in zip(of_taps, expected, strict=True))


@pytest.mark.parametrize("rule", [GroupNormRule, StridedGroupNormRule])
def test_a_layer_without_bias_and_an_input_without_gradient(rule):
    torch.manual_seed(0)
    layer = nn.GroupNorm(2, 6).double()
    nn.init.normal_(layer.weight)
    x = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    tap = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    y = rule.apply(x, layer.weight, None, tap, None, layer, 1)
    assert torch.allclose(y, layer(x))
    of_y = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, tap, of_y)
    for i in range(4):
        (expected,) = torch.autograd.grad(layer(x[i : i + 1]), layer.weight, of_y[i : i + 1])
        assert torch.allclose(found[i], expected)
