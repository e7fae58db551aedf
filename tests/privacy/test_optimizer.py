"""One noise draw a step for any number of workers, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from optimizer_cases import BATCH, CLIP, SECRET, SIGMA, Group, clipped, flat, new_network, new_optimizer, train
from scipy import stats
from torch import Tensor, nn

from e2h.config import ModelConfig
from e2h.diffusion.networks import UNet
from e2h.privacy.dpsgd import GRID_BITS
from e2h.privacy.keys import derive_key
from e2h.privacy.noise import gaussian_noise
from e2h.privacy.optimizer import SecureDPOptimizer


@pytest.mark.parametrize("num_shares", [1, 2, 5])
def test_any_number_of_workers_gives_the_same_bits(num_shares):
    alone = train(1, num_shares=num_shares)[0]
    assert not torch.equal(alone, flat(new_network()))
    for size in (2, 3):
        for parameters in train(size, num_shares=num_shares):
            assert torch.equal(parameters, alone)


def test_a_step_is_the_clipped_sum_and_one_noise_over_the_expected_batch():
    network, group = new_network(), Group(1)
    optimizer = new_optimizer(network, group, 0, torch.optim.SGD(network.parameters(), lr=1.0))
    before, parts = flat(network), [clipped(network, 1), clipped(network, 2)]
    for part in parts:
        optimizer.accumulate(part)
    optimizer.step_private(7, 2)
    noise = gaussian_noise(derive_key(SECRET, "noise", 7), 0, len(before), SIGMA * 2.0**GRID_BITS)
    total = parts[0].vector + parts[1].vector + torch.from_numpy(noise)
    expected = total.double() * CLIP * 2.0**-GRID_BITS / BATCH
    assert torch.allclose((before - flat(network)).double(), expected, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_the_noise_of_a_step_has_the_accounted_size(size):
    """Kolmogorov and Smirnov on 250,000 coordinates; a right optimiser fails once in a million keys."""
    group = Group(size)

    def worker(rank: int) -> Tensor:
        network = new_network(500)
        before = flat(network).double()
        network.double()
        optimizer = new_optimizer(network, group, rank, torch.optim.SGD(network.parameters(), lr=1.0))
        optimizer.step_private(0, 0)
        return before - flat(network)

    noise = group.run(worker)[0].numpy() / (SIGMA * CLIP / BATCH)
    assert stats.kstest(noise, "norm").pvalue > 1e-6
    assert abs(noise.std() - 1) < 5 / np.sqrt(2 * len(noise))
    for wrong in (np.sqrt(size + 1), 0.98):  # noise of another worker added, or a little of it missing
        assert stats.kstest(wrong * noise, "norm").pvalue < 1e-6


def test_an_empty_draw_still_makes_a_noisy_step():
    network = new_network()
    before = flat(network)
    new_optimizer(network, Group(1), 0).step_private(0, 0)
    assert (flat(network) != before).all()


def test_steps_draw_different_noise_and_a_replay_the_same():
    def moved(step: int) -> Tensor:
        network = new_network()
        optimizer = new_optimizer(network, Group(1), 0, torch.optim.SGD(network.parameters(), lr=1.0))
        optimizer.step_private(step, 0)
        return flat(network)

    assert torch.equal(moved(3), moved(3))
    assert not (moved(3) == moved(4)).any()


def failing_step(size: int, spoil: Callable[[SecureDPOptimizer, int], None], step_of=lambda rank: 5):
    """What each worker answers, and whether its parameters stayed, when something is wrong with a step."""
    group = Group(size)
    networks = [new_network() for _ in range(size)]

    def worker(rank: int) -> None:
        optimizer = new_optimizer(networks[rank], group, rank)
        optimizer.accumulate(clipped(networks[rank], rank, count=2))
        spoil(optimizer, rank)
        optimizer.step_private(step_of(rank), 2 * size)

    answers = group.run(worker)
    unchanged = [torch.equal(flat(network), flat(new_network())) for network in networks]
    return answers, unchanged


def lose_one(optimizer: SecureDPOptimizer, rank: int) -> None:
    if rank == 0:
        optimizer.zero_grad()
        optimizer.accumulate(clipped(new_network(), 0, count=1))


def double_one(optimizer: SecureDPOptimizer, rank: int) -> None:
    if rank == 0:
        optimizer.accumulate(clipped(new_network(), 0, count=1))


def noise_everywhere(optimizer: SecureDPOptimizer, rank: int) -> None:
    optimizer._rank = 0


def noise_nowhere(optimizer: SecureDPOptimizer, rank: int) -> None:
    optimizer._rank = 1


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("spoil", [lose_one, double_one, noise_everywhere, noise_nowhere])
def test_a_step_that_does_not_add_up_releases_nothing(size, spoil):
    answers, unchanged = failing_step(size, spoil)
    assert [str(answer)[:17] for answer in answers] == ["step 5: counters "] * size
    assert all("nothing was released" in str(answer) for answer in answers)
    assert all(unchanged)


def test_workers_that_disagree_on_the_step_release_nothing():
    for steps in ((5, 6), (4, 5, 6)):  # the sum of the second is that of agreement on 5
        answers, unchanged = failing_step(len(steps), lambda optimizer, rank: None, step_of=steps.__getitem__)
        assert [type(answer) for answer in answers] == [RuntimeError] * len(steps)
        assert all(unchanged)


def test_a_step_that_adds_up_releases():
    answers, unchanged = failing_step(3, lambda optimizer, rank: None)
    assert answers == [None] * 3
    assert not any(unchanged)


def test_a_failed_step_is_forgotten_whole():
    network, group = new_network(), Group(1)
    optimizer = new_optimizer(network, group, 0)
    optimizer.accumulate(clipped(network, 1))
    with pytest.raises(RuntimeError):
        optimizer.step_private(0, 2)
    optimizer.accumulate(clipped(network, 1))
    optimizer.step_private(0, 1)
    other = new_network()
    again = new_optimizer(other, group, 0)
    again.accumulate(clipped(other, 1))
    again.step_private(0, 1)
    assert torch.equal(flat(network), flat(other))


def test_it_is_opacus_dp_optimizer():
    network = new_network()
    optimizer = new_optimizer(network, Group(1), 0)
    assert isinstance(optimizer, DPOptimizer)
    assert (optimizer.noise_multiplier, optimizer.max_grad_norm, optimizer.expected_batch_size) == (SIGMA, CLIP, BATCH)
    # Schedulers and checkpoints see the optimiser inside.
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert optimizer.original_optimizer.param_groups[0]["lr"] == 0.005
    optimizer.step_private(0, 0)
    assert len(optimizer.original_optimizer.state_dict()["state"]) == len(list(network.parameters()))


def test_opacus_accepts_the_network():
    network = UNet.from_config(ModelConfig(8, [1, 2], [4], 1, 16), 8, 1, 10, 0)
    assert ModuleValidator.validate(network, strict=True) == []
    assert ModuleValidator.validate(nn.Sequential(nn.BatchNorm2d(3)), strict=False) != []
