from __future__ import annotations

import pytest
import torch
from gradient_cases import (
    LAYERS,
    LAYOUTS,
    LayerNetwork,
    LinearOverPixels,
    linear_loss,
    median_norm,
    reference,
    relative,
    row_batch,
    row_loss,
)
from torch import nn
from torch.nn import functional

from e2h.errors import InputError
from e2h.privacy.dpsgd import make_engine


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_equals_the_float64_loop(kind, layout):
    network = LayerNetwork(kind, layout)
    for num_draws in (1, 3):
        for size in ((7, 7), (6, 9)):
            batch, weights = row_batch(4, num_draws, size), torch.ones(4)
            max_grad_norm = median_norm(network, row_loss, batch)  # about half are clipped
            expected = reference(network, row_loss, batch, max_grad_norm)
            folded = make_engine("folded", network, row_loss, max_grad_norm, num_draws).accumulate(batch, weights)
            opacus = make_engine("opacus", network, row_loss, max_grad_norm, num_draws).accumulate(batch, weights)
            assert relative(folded, expected) < 1e-5
            assert relative(opacus, expected) < 1e-4
            assert torch.allclose(folded.norms, expected.norms, rtol=1e-5)
            assert torch.allclose(folded.losses.double(), expected.losses, rtol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_each_parameter_equals_the_float64_loop(kind):
    network, batch = LayerNetwork(kind, "channels_last"), row_batch(4, 3)
    folded = make_engine("folded", network, row_loss, 1.0, 3).accumulate(batch, torch.ones(4)).vector.double()
    expected = reference(network, row_loss, batch, 1.0).vector.double()
    sizes = [parameter.numel() for parameter in network.parameters()]
    for ours, true in zip(folded.split(sizes), expected.split(sizes), strict=True):
        assert float((ours - true).norm() / true.norm()) < 2e-5


def test_a_layer_that_receives_images_directly_needs_no_input_gradient():
    torch.manual_seed(0)
    for layer in (nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 1), nn.GroupNorm(1, 2), LinearOverPixels(nn.Linear(2, 3))):
        batch = row_batch(4, 3)
        for loss_fn in (row_loss, linear_loss):
            result = make_engine("folded", layer, loss_fn, 1.0, 3).accumulate(batch, torch.ones(4))
            assert relative(result, reference(layer, loss_fn, batch, 1.0)) < 1e-5


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x.flatten(1)[:, :4]))


class Listed(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x):
        return self.a(x.flatten(1)[:, :4])


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.scale * self.a(x.flatten(1)[:, :4])


class Derived(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Pair(nn.Module):
    """Two linear layers, joined by a given function of (a, b, x)."""

    def __init__(self, join):
        super().__init__()
        self.a, self.b, self.join = nn.Linear(4, 4), nn.Linear(4, 4), join

    def forward(self, x):
        return self.join(self.a, self.b, x.flatten(1)[:, :4])


def single(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 1), layer)


def partly_frozen() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(2, 4, 1))
    network[0].bias.requires_grad_(False)
    return network


def replaced_forward() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(2, 4, 1))
    network[0].forward = lambda x: x
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Shared(), "b.weight=a.weight: expected a parameter of its own"),
        (Listed(), "b.weight=a.weight: expected a parameter of its own"),
        (Raw(), "network=Raw: expected plain"),
        (nn.Sequential(Derived(4, 4)), "0=Derived: expected plain"),
        (single(nn.Conv2d(4, 4, 3, groups=2)), "1=Conv2d: expected plain"),
        (single(nn.Conv2d(4, 4, 3, padding="same")), "1=Conv2d: expected plain"),
        (single(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), "1=Conv2d: expected plain"),
        (single(nn.ConvTranspose2d(4, 4, 3)), "1=ConvTranspose2d: expected plain"),
        (single(nn.LayerNorm(7)), "1=LayerNorm: expected plain"),
        (nn.Sequential(nn.Embedding(4, 3, max_norm=1.0)), "0=Embedding: expected plain"),
        (nn.Sequential(nn.Embedding(4, 3, padding_idx=0)), "0=Embedding: expected plain"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "expected plain"),
        (partly_frozen(), "all of its parameters trainable"),
        (replaced_forward(), "the layer's own forward"),
    ],
)
def test_folded_refuses_what_it_cannot_follow(network, message):
    with pytest.raises(InputError, match=message):
        make_engine("folded", network, row_loss, 1.0, 1)


@pytest.mark.parametrize(
    ("join", "message"),
    [
        (lambda a, b, x: b(a(a(x))), "module a is used twice"),
        (lambda a, b, x: a(x), "module b was not reached"),
        (lambda a, b, x: a(x) + 0 * b(x).detach(), "module b was not reached"),
        (lambda a, b, x: functional.linear(a(x), b.weight) + b(x), "used outside its own module"),
        (lambda a, b, x: b(a(x).repeat(2, 1))[: len(x)], "module b got 12 rows"),
        (lambda a, b, x: a(x) + b(x[:1]), "module b got 1 rows"),
    ],
)
def test_folded_fails_closed_on_what_only_the_forward_pass_shows(join, message):
    network = Pair(join)
    engine = make_engine("folded", network, row_loss, 1.0, 2)
    with pytest.raises(RuntimeError, match=message):
        engine.accumulate(row_batch(3, 2), torch.ones(3))
    assert not any("forward" in vars(module) for module in network.modules())


def test_all_draws_of_an_example_must_be_in_the_micro_batch():
    engine = make_engine("folded", LayerNetwork("conv3", "contiguous"), row_loss, 1.0, 4)
    with pytest.raises(RuntimeError, match="got 9 rows: expected 4 draws x 3 examples"):
        engine.accumulate(row_batch(3, 3), torch.ones(3))


def test_layers_that_come_to_share_a_weight_are_refused():
    network = Pair(lambda a, b, x: b(a(x)))
    engine = make_engine("folded", network, row_loss, 1.0, 2)
    engine.accumulate(row_batch(3, 2), torch.ones(3))
    network.b.weight = network.a.weight
    with pytest.raises(RuntimeError, match="came to share a parameter"):
        engine.accumulate(row_batch(3, 2), torch.ones(3))


def test_parameters_that_come_to_be_frozen_or_replaced_are_refused():
    for change in (
        lambda network: network.a.requires_grad_(False),
        lambda network: setattr(network, "b", nn.Linear(4, 4)),
        lambda network: setattr(network, "c", nn.Linear(4, 4)),
    ):
        network = Pair(lambda a, b, x: b(a(x)))
        engine = make_engine("folded", network, row_loss, 1.0, 2)
        change(network)
        with pytest.raises(RuntimeError, match="make a new engine"):
            engine.accumulate(row_batch(3, 2), torch.ones(3))


@pytest.mark.slow
def test_compiled_equals_the_float64_loop_and_repeats_itself():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 1))
    batch, weights = row_batch(4, 3), torch.ones(4)
    middle = median_norm(network, row_loss, batch)
    engine = make_engine("folded", network, row_loss, middle, 3, compiled=True)
    first, second = engine.accumulate(batch, weights), engine.accumulate(batch, weights)
    assert relative(first, reference(network, row_loss, batch, middle)) < 1e-5
    assert torch.equal(first.vector, second.vector)
    assert not any("forward" in vars(module) for module in network.modules())
