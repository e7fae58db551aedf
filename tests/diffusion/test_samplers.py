from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from e2h.config import SamplingConfig
from e2h.diffusion.networks import UNet
from e2h.diffusion.samplers import ddim, heun, noise_grid, sample, to_uint8

torch.set_num_threads(1)

SPREAD = 0.5
HEUN = SamplingConfig(sampler="heun", num_steps=6)
CHURNED = replace(HEUN, churn=3.0)
DDIM = SamplingConfig(sampler="ddim", num_steps=6)


def gaussian_denoiser(x, sigma):
    """The exact denoiser of data ~ N(0, SPREAD^2)."""
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


def no_draw():
    raise AssertionError("a deterministic sampler drew noise")


@pytest.fixture(scope="module")
def network() -> UNet:
    return moved(UNet(8, 1, 10, 8, [1, 2], [4], 1, 16))


def moved(network: UNet) -> UNet:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def test_grid_runs_from_80_to_0002_and_ends_at_0():
    grid = noise_grid(18)
    assert len(grid) == 19
    assert grid[-1] == 0
    assert math.isclose(grid[0], 80)
    assert math.isclose(grid[17], 0.002)
    assert bool((grid[:-1] > grid[1:]).all())
    ramp = grid[:18] ** (1 / 7)
    assert torch.allclose(ramp.diff(), ramp.diff()[0].expand(17))


def test_deterministic_samplers_follow_the_probability_flow():
    # For Gaussian data the flow's end is known: x(0) = x(80) * s / sqrt(s^2 + 80^2).
    start = torch.randn(100, generator=torch.Generator().manual_seed(0)).double() * 80
    exact = start * SPREAD / math.sqrt(SPREAD**2 + 80**2)

    def error(end):
        return float((end - exact).abs().max() / exact.abs().max())

    euler = [error(ddim(gaussian_denoiser, start, noise_grid(n))) for n in (20, 40, 80)]
    second = [error(heun(gaussian_denoiser, start, noise_grid(n), HEUN, no_draw)) for n in (20, 40, 80)]
    assert euler[2] < 0.05
    assert second[2] < 3e-3
    assert 1.7 < euler[0] / euler[1] < 2.5
    assert 1.7 < euler[1] / euler[2] < 2.5
    assert second[0] / second[1] > 3
    assert second[1] / second[2] > 3


def test_churn_draws_noise_and_keeps_the_distribution():
    generator = torch.Generator().manual_seed(0)
    draws = []

    def draw():
        draws.append(1)
        return torch.randn(20000, generator=generator, dtype=torch.float64)

    start = 80 * torch.randn(20000, generator=generator, dtype=torch.float64)
    settings = replace(HEUN, churn=20.0, churn_min=0.05, churn_max=50.0)
    grid = noise_grid(160)
    end = heun(gaussian_denoiser, start, grid, settings, draw)
    assert len(draws) == int(((grid >= 0.05) & (grid <= 50)).sum())
    assert abs(float(end.std()) / SPREAD - 1) < 0.02
    correlation = float(torch.corrcoef(torch.stack([start, end]))[0, 1])
    assert abs(correlation) < 0.1  # this much churn forgets the start; a deterministic sampler has 1


@pytest.mark.parametrize("settings", [HEUN, CHURNED, DDIM, replace(CHURNED, guidance=1.5)])
def test_an_image_depends_on_its_seed_and_label_alone(network, settings):
    labels, seeds = torch.tensor([3, 1, 4, 1, 5]), [11, 12, 13, 14, 2**40]
    whole = sample(network, labels, seeds, settings, (1, 8, 8))
    assert whole.shape == (5, 1, 8, 8)
    assert whole.dtype == torch.float32
    assert float(whole.abs().max()) <= 1
    order = [4, 2, 0]
    some = sample(network, labels[order], [seeds[i] for i in order], settings, (1, 8, 8))
    assert torch.allclose(some, whole[order], atol=1e-5)
    alone = sample(network, labels[1:2], seeds[1:2], settings, (1, 8, 8))
    assert torch.allclose(alone, whole[1:2], atol=1e-5)


def test_in_batches_of_one_size_an_image_is_the_same_to_the_last_bit(network):
    labels, seeds = torch.arange(8), list(range(20, 28))
    for settings in (CHURNED, replace(CHURNED, guidance=1.5), replace(DDIM, dtype="bfloat16")):
        first = sample(network, labels, seeds, settings, (1, 8, 8))
        order = [5, 2, 7, 0, 6, 1, 4, 3]
        again = sample(network, labels[order], [seeds[i] for i in order], settings, (1, 8, 8))
        assert torch.equal(again, first[order])


def test_without_guidance_the_network_runs_once_a_step(network):
    labels, seeds, rows = torch.tensor([3, 1, 4]), [1, 2, 3], []
    hook = network.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    for settings in (DDIM, HEUN, replace(DDIM, guidance=1.0)):
        sample(network, labels, seeds, settings, (1, 8, 8))
    hook.remove()
    assert rows == 6 * [3] + 11 * [3] + 6 * [6]


@pytest.mark.parametrize("settings", [DDIM, replace(CHURNED, guidance=1.5)])
def test_bfloat16_is_the_networks_alone(network, settings):
    labels, seeds, kinds = torch.arange(10), list(range(10)), set()
    plain = sample(network, labels, seeds, settings, (1, 8, 8))
    hook = network.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    rounded = sample(network, labels, seeds, replace(settings, dtype="bfloat16"), (1, 8, 8))
    hook.remove()
    assert kinds == {torch.bfloat16}
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - plain).square().mean().sqrt()) < 0.05
    # This network multiplies nothing, so what is left is the sampler's own arithmetic: float64 as before.
    both = [
        sample(LabelNetwork(), labels % 2, seeds, replace(settings, dtype=kind), (1, 2, 2))
        for kind in ("float32", "bfloat16")
    ]
    assert torch.equal(*both)


@pytest.mark.slow
def test_compiled_equals_plain():
    labels, seeds = torch.arange(5), list(range(5))
    network = moved(UNet(8, 1, 10, 8, [1], [], 1, 16))  # half as much to compile
    compiled = torch.compile(network, fullgraph=True, dynamic=False)
    plain = sample(network, labels, seeds, CHURNED, (1, 8, 8))
    assert torch.allclose(sample(compiled, labels, seeds, CHURNED, (1, 8, 8)), plain, atol=1e-4)


def test_seed_label_churn_and_guidance_change_the_image(network):
    def draw(label=3, seed=5, settings=HEUN):
        return sample(network, torch.tensor([label]), [seed], settings, (1, 8, 8))

    assert torch.equal(draw(), draw())
    for other in (draw(label=4), draw(seed=6), draw(settings=CHURNED), draw(settings=replace(HEUN, guidance=2.0))):
        assert not torch.allclose(draw(), other, atol=1e-3)


def test_sampling_leaves_the_global_generator_alone(network):
    before = torch.get_rng_state()
    sample(network, torch.tensor([3]), [5], CHURNED, (1, 8, 8))
    assert torch.equal(before, torch.get_rng_state())


class LabelNetwork(nn.Module):
    """F such that, at large sigma, the denoised image is a constant that only depends on the label."""

    num_classes = 2

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.tensor([0.1, 0.2, -0.1]))

    def forward(self, x, noise_label, labels):
        return self.values[labels][:, None, None, None].expand_as(x)


def test_guidance_extrapolates_from_no_label():
    # One Euler step from sigma 80 to 0 returns D itself, here c_out F and a trace of the start.
    def images(guidance):
        settings = replace(DDIM, num_steps=1, guidance=guidance)
        return sample(LabelNetwork(), torch.tensor([0, 1]), [1, 2], settings, (1, 2, 2)).double()

    plain, guided = images(0.0), images(1.5)
    null = torch.tensor([-0.1, -0.1]).double() / math.sqrt(3)
    conditional = torch.tensor([0.1, 0.2]).double() / math.sqrt(3)
    shift = 1.5 * (conditional - null)
    assert torch.allclose(guided - plain, shift[:, None, None, None].expand_as(plain), atol=1e-3)


def test_no_images(network):
    empty = torch.zeros(0, dtype=torch.long)
    for settings in (HEUN, replace(CHURNED, guidance=1.0), DDIM):
        assert sample(network, empty, [], settings, (1, 8, 8)).shape == (0, 1, 8, 8)


def test_to_uint8_is_channels_last_and_rounds():
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0, -1 + 2 * 100.4 / 255])
    images = to_uint8(x.view(1, 3, 1, 2))
    assert images.shape == (1, 1, 2, 3)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    assert images.permute(0, 3, 1, 2).flatten().tolist() == [0, 0, 128, 255, 255, 100]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(every.float() / 127.5 - 1).permute(0, 3, 1, 2), every)
