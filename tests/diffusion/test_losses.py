from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from e2h.diffusion.losses import draw_noise_levels, edm_loss, micro_batch_loss
from e2h.diffusion.precond import SIGMA_DATA, denoise, run_network

torch.set_num_threads(1)


def network(x, noise_label, labels):
    """Any function of all three arguments, row by row."""
    return torch.sin(x * (1 + labels[:, None, None, None])) + noise_label[:, None, None, None]


def case(num_examples: int = 5, num_draws: int = 3):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(num_examples, 2, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    sigma = draw_noise_levels((num_draws, num_examples), generator).double()
    noise = torch.randn(num_draws, num_examples, 2, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.arange(num_examples), sigma, noise


def test_loss_is_the_weighted_denoising_error_of_the_paper():
    images, labels, sigma, noise = case()
    expected = torch.zeros(5, dtype=torch.float64)
    for k in range(3):
        denoised = denoise(network, images + sigma[k, :, None, None, None] * noise[k], sigma[k], labels)
        weight = (sigma[k] ** 2 + SIGMA_DATA**2) / (sigma[k] * SIGMA_DATA) ** 2
        expected += weight * (denoised - images).square().mean(dim=(1, 2, 3)) / 3
    assert torch.allclose(edm_loss(network, images, labels, sigma, noise), expected, rtol=1e-10)


def test_micro_batch_leads_with_the_example():
    images, labels, sigma, noise = case()
    batch = dict(images=images, labels=labels, sigma=sigma.T, noise=noise.transpose(0, 1))
    whole = micro_batch_loss(network, batch)
    assert torch.allclose(whole, edm_loss(network, images, labels, sigma, noise))
    single = micro_batch_loss(network, {name: entry[2:3] for name, entry in batch.items()})
    assert torch.allclose(single, whole[2:3])


def test_rows_are_k_major():
    images, labels, sigma, noise = case()
    seen = []
    edm_loss(lambda x, level, y: seen.append((level, y)) or x, images, labels, sigma, noise)
    level, rows = seen[0]
    assert torch.equal(rows, labels.repeat(3))
    assert torch.allclose(level.view(3, 5), sigma.log() / 4)


def test_the_network_sees_and_predicts_unit_variance():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2000, 1, 4, 4, generator=generator) * 2 - 1
    for level in (0.01, 0.5, 20.0):
        sigma, noise = torch.full((1, 2000), level), torch.randn(1, 2000, 1, 4, 4, generator=generator)
        seen = []
        loss = edm_loss(lambda x, *_: seen.append(x) or torch.zeros_like(x), images, torch.zeros(2000), sigma, noise)  # noqa: B023
        assert abs(float(seen[0].std()) - 1) < 0.02
        assert abs(float(loss.mean()) - 1) < 0.03


def test_denoiser_keeps_clean_images_and_leaves_noise_to_the_network():
    x = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    labels = torch.zeros(1, dtype=torch.long)
    assert torch.allclose(denoise(network, x, torch.tensor([1e-5]), labels), x, atol=1e-4)
    noisy, sigma = 80 * x, torch.tensor([80.0])
    expected = SIGMA_DATA * run_network(network, noisy, sigma, labels)
    assert torch.allclose(denoise(network, noisy, sigma, labels), expected, atol=1e-2)


@pytest.mark.parametrize(("factor", "accepted"), [(1.0, True), (1.05, False)])
def test_noise_levels_are_log_normal(factor, accepted):
    draws = factor * draw_noise_levels((40000, 1), torch.Generator().manual_seed(0)).log().double()
    z_mean = (float(draws.mean()) + 1.2) / (1.2 / math.sqrt(draws.numel()))
    z_std = (float(draws.std()) - 1.2) / (1.2 / math.sqrt(2 * draws.numel()))
    assert (abs(z_mean) < 4 and abs(z_std) < 4) == accepted


def test_noise_levels_have_the_mean_and_deviation_asked_for():
    levels = draw_noise_levels((4000, 1), torch.Generator().manual_seed(0), log_sigma=(0.5, 0.3)).log().double()
    assert float(levels.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(levels.std()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("num_draws", [1, 3, 32])
def test_noise_levels_of_a_record_lie_one_in_each_range(num_draws):
    draws = draw_noise_levels((2000, num_draws), torch.Generator().manual_seed(0)).double()
    ranks = torch.special.ndtr((draws.log() + 1.2) / 1.2) * num_draws
    assert torch.equal(ranks.floor(), torch.arange(num_draws).double().expand(2000, -1))
    inside = (ranks - ranks.floor()).flatten()
    assert stats.kstest(inside.numpy(), "uniform").pvalue > 1e-6


def test_noise_levels_come_from_the_given_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draw_noise_levels((3, 2), torch.Generator().manual_seed(1))
    assert torch.equal(first, draw_noise_levels((3, 2), torch.Generator().manual_seed(1)))
    assert torch.equal(before, torch.get_rng_state())
