"""Who makes which part of a step's noise, and what leaves a machine of several."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from optimizer_cases import SIGMA, Group, flat, new_network, new_optimizer
from scipy import stats
from torch import Tensor

from e2h.privacy.dpsgd import GRID_BITS


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
