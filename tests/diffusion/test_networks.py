from __future__ import annotations

import pytest
import torch
from opacus.validators import ModuleValidator
from torch.nn import functional

from e2h.config import ModelConfig
from e2h.diffusion.losses import draw_noise_levels, edm_loss
from e2h.diffusion.networks import Attention, UNet, _doubled

torch.set_num_threads(1)

TINY = dict(image_size=8, channels=1, num_classes=10, base_width=8, width_multipliers=[1, 2])
TINY |= dict(attention_resolutions=[4], blocks_per_level=1, embedding_width=16)


def perturbed(seed: int = 0, **changes) -> UNet:
    """A network whose zero-initialised layers are not zero any more."""
    network = UNet(**(TINY | changes), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def inputs(count: int, channels: int = 1, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, channels, size, size, generator=generator)
    return x, torch.linspace(-1.5, 1.1, max(count, 1))[:count], torch.arange(count) % 11


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((28, 1, 10, 32, [2, 2], [14], 2, 128), 1.49e6),
        ((32, 3, 2, 32, [2, 4], [16], 2, 128), 3.84e6),
        ((64, 3, 2, 32, [1, 2, 4], [32, 16], 2, 128), 4.15e6),
    ],
)
def test_parameter_counts_of_the_published_presets(arguments, expected):
    named = dict(UNet(*arguments).named_parameters())
    count = sum(parameter.numel() for parameter in named.values())
    scales = sum(parameter.numel() // 2 for name, parameter in named.items() if ".embed." in name)  # theirs only shifts
    assert abs((count - scales) / expected - 1) < 0.05


@pytest.mark.parametrize(("size", "channels", "multipliers"), [(8, 1, [1, 2]), (28, 1, [2, 2]), (16, 3, [1, 2, 4])])
def test_output_has_the_shape_of_the_input(size, channels, multipliers):
    network = perturbed(image_size=size, channels=channels, width_multipliers=multipliers)
    patched = perturbed(image_size=2 * size, channels=channels, width_multipliers=multipliers, patch_size=2)
    for count in (0, 1, 3):
        for side, one in ((size, network), (2 * size, patched)):
            x, noise_label, labels = inputs(count, channels, side)
            assert one(x, noise_label, labels).shape == x.shape


def test_patches_are_channels_of_a_smaller_image():
    patched = perturbed(image_size=16, channels=3, patch_size=2)
    smaller = perturbed(image_size=8, channels=12)
    x, noise_label, labels = inputs(3, 3, 16)
    expected = functional.pixel_shuffle(smaller(functional.pixel_unshuffle(x, 2), noise_label, labels), 2)
    assert torch.equal(patched(x, noise_label, labels), expected)


def test_odd_width_works():
    x, noise_label, labels = inputs(2)
    assert perturbed(base_width=9)(x, noise_label, labels).shape == x.shape


def test_from_config_follows_the_model_config():
    network = UNet.from_config(ModelConfig(8, [1, 2], [4], 1, 16, patch_size=2), 16, 1, 10, seed=7)
    same = UNet(**(TINY | dict(image_size=16, patch_size=2)), seed=7)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), same.parameters(), strict=True))


def test_seed_alone_decides_the_weights_and_the_callers_generator_is_untouched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = UNet(**TINY, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    second, other = UNet(**TINY, seed=1), UNet(**TINY, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)


def test_initial_output_is_zero():
    assert not UNet(**TINY)(*inputs(3)).any()


def test_a_row_does_not_depend_on_the_batch_around_it():
    network = perturbed()
    x, noise_label, labels = inputs(6)
    whole = network(x, noise_label, labels)
    alone = torch.cat([network(x[i : i + 1], noise_label[i : i + 1], labels[i : i + 1]) for i in range(6)])
    assert torch.allclose(whole, alone, atol=1e-5)


def test_noise_level_label_and_no_label_matter():
    network = perturbed()
    x, noise_label, labels = inputs(4)
    output = network(x, noise_label, labels)
    assert not torch.allclose(output, network(x, noise_label + 0.2, labels), atol=1e-3)
    assert not torch.allclose(output, network(x, noise_label, labels + 1), atol=1e-3)
    assert not torch.allclose(output, network(x, noise_label, torch.full_like(labels, 10)), atol=1e-3)


def test_opacus_accepts_the_network():
    assert ModuleValidator.validate(perturbed().train(), strict=False) == []


def test_activations_behind_attention_are_contiguous():
    network, seen = perturbed(), []
    for module in network.modules():
        if isinstance(module, Attention):
            module.out.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    network(*inputs(2))
    assert len(seen) == 3
    assert all(seen)


def test_a_gpu_doubles_images_as_a_cpu_does():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    expected = functional.interpolate(x, scale_factor=2.0, mode="nearest")
    assert torch.equal(_doubled(x), expected)
    of_y = torch.randn_like(expected)
    found, exact = (torch.autograd.grad(y, x, of_y)[0] for y in (_doubled(x), expected))
    assert torch.allclose(found, exact)


def test_it_learns():
    network = UNet(**TINY)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 1, 8, 8, generator=generator).round() * 2 - 1
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(80):
        sigma, noise = draw_noise_levels((4, 8), generator), torch.randn(4, 8, 1, 8, 8, generator=generator)
        loss = edm_loss(network, images, torch.arange(8), sigma, noise).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
