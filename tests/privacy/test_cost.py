"""What a private micro-batch costs beside the plain one, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from e2h.diffusion.losses import draw_noise_levels, micro_batch_loss
from e2h.diffusion.networks import UNet
from e2h.privacy.dpsgd import make_engine


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this thread alone: what else runs on the machine doesn't count."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


@pytest.mark.slow
def test_per_example_gradients_cost_one_backward_pass_and_little_more():
    """About 1.1; Opacus' hooks need twice the plain step. The median of five pairs, each in turn."""
    torch.set_num_threads(1)
    num_examples, num_draws = 8, 4
    network, generator = UNet(28, 1, 10, 24, [1], [], 1, 64), torch.Generator().manual_seed(0)
    batch = {
        "images": torch.rand(num_examples, 1, 28, 28, generator=generator),
        "labels": torch.arange(num_examples),
        "sigma": draw_noise_levels((num_examples, num_draws), generator),
        "noise": torch.randn(num_examples, num_draws, 1, 28, 28, generator=generator),
    }
    engine, weights = make_engine("folded", network, micro_batch_loss, 1.0, num_draws), torch.ones(num_examples)

    def plain() -> None:
        torch.autograd.grad(micro_batch_loss(network, batch).mean(), list(network.parameters()))

    def private() -> None:
        engine.accumulate(batch, weights)

    private()
    plain()
    ratios = [cpu_seconds(private) / cpu_seconds(plain) for _ in range(5)]
    assert statistics.median(ratios) < 1.4
