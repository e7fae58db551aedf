"""One noise draw a step for any number of workers, or nothing at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from scipy import stats
from torch import Tensor, nn

from e2h.config import ModelConfig
from e2h.diffusion.networks import UNet
from e2h.privacy.dpsgd import GRID_BITS, ClippedSum
from e2h.privacy.keys import derive_key
from e2h.privacy.noise import gaussian_noise
from e2h.privacy.optimizer import SecureDPOptimizer

SECRET = bytes(range(32))
SIGMA, CLIP, BATCH = 2.0, 0.5, 10.0


class Group:
    """Workers in threads of this process; their sums meet at a barrier, as in an all-reduce."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def sum_integers(self, rank: int) -> Callable[[Tensor], None]:
        def add(values: Tensor) -> None:
            assert values.dtype == torch.int64
            self.parts[rank] = values.clone()
            self.barrier.wait()
            values.copy_(torch.stack(self.parts).sum(dim=0))
            self.barrier.wait()

        return add

    def run(self, worker: Callable[[int], object]) -> list[object]:
        """worker(rank) at once on every rank; an exception is a result."""

        def guarded(rank: int) -> object:
            try:
                return worker(rank)
            except RuntimeError as error:
                return error

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(guarded, range(self.size)))


def new_network(width: int = 6) -> nn.Module:
    network = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 3, bias=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def new_optimizer(network: nn.Module, group: Group, rank: int, inner=None, **changes) -> SecureDPOptimizer:
    settings = {
        "noise_multiplier": SIGMA,
        "max_grad_norm": CLIP,
        "expected_batch_size": BATCH,
        "noise_key": lambda step: derive_key(SECRET, "noise", step),
        "sum_integers": group.sum_integers(rank),
        "rank": rank,
        "num_workers": group.size,
    }
    return SecureDPOptimizer(inner or torch.optim.Adam(network.parameters(), lr=0.01), **{**settings, **changes})


def clipped(network: nn.Module, seed: int, count: int = 1) -> ClippedSum:
    """Some micro-batch: integers of the size that clipping leaves."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(p.numel() for p in network.parameters())
    vector = torch.randint(-(2**GRID_BITS), 2**GRID_BITS, (size,), generator=generator)
    return ClippedSum(vector, count, torch.zeros(count), torch.zeros(count).double())


def flat(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def train(size: int, num_steps: int = 4, num_shares: int = 1) -> list[Tensor]:
    """Parameters on each worker after steps of 0, 1, 4, 9, ... micro-batches: of all, then of all but one, empty."""
    group = Group(size)

    def worker(rank: int) -> Tensor:
        network = new_network()
        optimizer = new_optimizer(network, group, rank, num_shares=num_shares)
        for step in range(num_steps):
            for unit in range(rank, step**2, size):
                optimizer.accumulate(clipped(network, 100 * step + unit, count=3))
            optimizer.step_private(step, 3 * step**2)
        return flat(network)

    return group.run(worker)


@pytest.mark.parametrize("num_shares", [1, 2, 5])
def test_any_number_of_workers_gives_the_same_bits(num_shares):
    alone = train(1, num_shares=num_shares)[0]
    assert not torch.equal(alone, flat(new_network()))
    for size in (2, 3):
        for parameters in train(size, num_shares=num_shares):
            assert torch.equal(parameters, alone)


@pytest.mark.parametrize("num_shares", [1, 3])
def test_noise_that_was_prepared_is_that_of_its_own_step(num_shares):
    def trained(prepare) -> Tensor:
        network = new_network()
        optimizer = new_optimizer(network, Group(1), 0, num_shares=num_shares)
        for step in range(3):
            prepare(optimizer, step)
            optimizer.step_private(step, 0)
        return flat(network)

    plain = trained(lambda optimizer, step: None)
    assert torch.equal(trained(lambda optimizer, step: optimizer.prepare_noise(step)), plain)
    assert torch.equal(trained(lambda optimizer, step: optimizer.prepare_noise(step + 1)), plain)


def sent_by(size: int, num_shares: int) -> list[Tensor]:
    """What each worker of an empty step gives to the reduction, in units of the noise's standard deviation."""
    group, sent, num_coordinates = Group(size), [torch.empty(0)] * size, len(flat(new_network(300)))

    def worker(rank: int) -> None:
        def reduce(values: Tensor) -> None:
            sent[rank] = values[:num_coordinates].double() / (SIGMA * 2.0**GRID_BITS)
            add(values)

        add = group.sum_integers(rank)
        new_optimizer(new_network(300), group, rank, num_shares=num_shares, sum_integers=reduce).step_private(0, 0)

    assert group.run(worker) == [None] * size
    return sent


def test_with_shares_for_all_every_worker_sends_a_noisy_sum():
    """A share of four workers' has half the standard deviation; a right one fails five sigma once in a million keys."""
    for part in sent_by(4, num_shares=4):
        assert abs(float(part.std()) - 0.5) < 5 * 0.5 / np.sqrt(2 * len(part))


def test_with_one_share_each_worker_makes_the_noise_of_its_own_coordinates():
    (whole,) = sent_by(1, num_shares=1)
    for size in (2, 3, 4):
        parts = sent_by(size, num_shares=1)
        assert torch.equal(sum(parts), whole)  # whatever their number: the same bits
        assert ((torch.stack(parts) != 0).sum(0) <= 1).all()
        assert [abs(int((part != 0).sum()) - len(whole) / size) < 2 for part in parts] == [True] * size


def test_shares_are_independent_and_add_up_to_the_accounted_noise():
    first, second, third = sent_by(3, num_shares=3)
    for one, other in ((first, second), (second, third), (first, third)):
        assert abs(float((one * other).mean())) < 5 / 3 / np.sqrt(len(one))
    total = (first + second + third).numpy()
    assert stats.kstest(total, "norm").pvalue > 1e-6
    assert stats.kstest((first + 2 * second).numpy(), "norm").pvalue < 1e-6  # one share twice


def test_shares_too_small_for_the_grid_are_refused():
    with pytest.raises(ValueError, match="num_shares=0"):
        new_optimizer(new_network(), Group(1), 0, num_shares=0)
    with pytest.raises(ValueError, match="num_shares=2"):
        new_optimizer(new_network(), Group(1), 0, num_shares=2, noise_multiplier=2.0**-11)


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
