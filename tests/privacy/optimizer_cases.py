"""Workers in threads, and a small network whose steps they make."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from e2h.privacy.dpsgd import GRID_BITS, ClippedSum
from e2h.privacy.keys import derive_key
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
