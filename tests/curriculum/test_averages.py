"""Averages of chosen length, Adam without the noise's bias, and learning rates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import FINETUNE, STEPS, Killed, Training, new_network, parameters, warmed
from torch import nn

from e2h.config import FinetuneConfig
from e2h.curriculum.adam import LEAST, NoiseCorrectedAdam, learning_rate
from e2h.curriculum.averages import PowerAverages, average, exponent, snapshot_steps, snapshots

WALK, KEPT = 60, 8


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A random walk of weights, [steps, weights], and the folder of its snapshots."""
    torch.manual_seed(0)
    folder, network, seen = tmp_path_factory.mktemp("walk"), nn.Linear(3, 2), []
    averages = PowerAverages(network)
    for step in range(1, WALK + 1):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        seen.append(parameters(network).clone())
        averages.update(network)
        if step in snapshot_steps(WALK, KEPT):
            averages.write(folder)
    return torch.stack(seen).double(), folder


@pytest.mark.parametrize(("width", "tolerance"), [(0.03, 0.1), (0.05, 1e-5), (0.08, 0.03), (0.1, 1e-5), (0.2, 0.05)])
def test_an_average_of_any_width_is_made_of_the_snapshots(walk, width, tolerance):
    weights, folder = walk
    steps = np.arange(1, WALK + 1)
    power = exponent(width) + 1
    profile = torch.from_numpy((steps**power - (steps - 1) ** power) / float(WALK) ** power)
    expected, last = profile @ weights, weights[-1]
    found = average(folder, snapshots(folder), width)
    got = torch.cat([found[name].flatten() for name in ("weight", "bias")])
    assert (got - expected).abs().max() < tolerance * (last - expected).abs().max()
    assert (got - last).abs().max() > 0.2 * (last - expected).abs().max()


def test_widths_are_standard_deviations_of_the_profile():
    t = (np.arange(100_000) + 0.5) / 100_000
    for width in (0.03, 0.1, 0.25):
        profile = t ** exponent(width)
        mean = (t * profile).sum() / profile.sum()
        assert np.sqrt(((t - mean) ** 2 * profile).sum() / profile.sum()) == pytest.approx(width, rel=1e-3)


def test_snapshot_steps_are_even_and_end_with_the_last_step():
    assert snapshot_steps(60, 4) == [15, 30, 45, 60]
    assert snapshot_steps(3, 8) == [1, 2, 3]
    assert snapshot_steps(60, 0) == []


@pytest.mark.usefixtures("quick_store")
def test_snapshots_of_a_resumed_run_are_those_of_the_uninterrupted(tmp_path):
    options = {"schedule": "cosine", "correct_noise_bias": True, "max_shift": 1, "flip": True}
    settings = replace(FINETUNE, ema_snapshots=4, **options)
    whole = Training(tmp_path / "a", network=warmed(tmp_path / "a"), settings=settings)
    whole.run()
    with pytest.raises(Killed):
        Training(tmp_path / "b", network=warmed(tmp_path / "b"), settings=settings, stop_after=STEPS - 4).run()
    resumed = Training(tmp_path / "b", network=warmed(tmp_path / "b"), settings=settings)
    resumed.run()
    assert torch.equal(parameters(resumed.network), parameters(whole.network))
    files = [sorted((tmp_path / one / "checkpoints").glob("averages-*")) for one in "ab"]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert len(files[0]) == 4
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_taking_out_the_noise_restores_the_steps_of_small_gradients():
    """Coordinates of gradient g under noise of deviation 1: Adam's steps shrink to g / sqrt(g^2 + 1), these don't."""
    moved = {}
    for name in ("adam", "corrected"):
        network = nn.Linear(2000, 1, bias=False)
        nn.init.zeros_(network.weight)
        plain = torch.optim.Adam(network.parameters(), lr=1e-3)
        optimizer = plain if name == "adam" else NoiseCorrectedAdam(network, 1e-3, 1.0)
        generator = torch.Generator().manual_seed(0)
        gradient = torch.cat([torch.full((1, 1000), 0.5), torch.full((1, 1000), 2.0)], dim=1)
        for _ in range(400):
            network.weight.grad = gradient + torch.randn(1, 2000, generator=generator)
            optimizer.step()
        moved[name] = [-float(part.mean()) / 0.4 for part in network.weight.detach().split(1000, dim=1)]
    assert moved["adam"] == pytest.approx([0.5 / 1.25**0.5, 2 / 5**0.5], rel=0.05)
    # The second moment is itself noisy, and no smaller than LEAST of the noise's variance.
    assert moved["corrected"][0] == pytest.approx(0.5 / max(0.25, LEAST) ** 0.5, rel=0.15)
    assert moved["corrected"][1] == pytest.approx(1.0, rel=0.05)


def test_without_noise_the_corrected_adam_is_adam():
    networks = [new_network(), new_network()]
    optimizers = [torch.optim.Adam(networks[0].parameters(), lr=1e-3), NoiseCorrectedAdam(networks[1], 1e-3, 0.0)]
    for step in range(5):
        for network, optimizer in zip(networks, optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for parameter in network.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    assert torch.allclose(parameters(networks[0]), parameters(networks[1]), atol=1e-6)


def test_learning_rates_fall_to_nothing_after_the_last_step():
    for schedule, half in (("constant", 2.0), ("linear", 1.0), ("cosine", 1.0)):
        settings = FinetuneConfig(learning_rate=2.0, schedule=schedule)
        assert learning_rate(settings, 0, 10) == 2.0
        assert learning_rate(settings, 5, 10) == pytest.approx(half)
    assert learning_rate(settings, 10, 10) == 0.0
