"""A record's gradient is the same to the last bit wherever it lies in a unit, and whoever lies beside it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from e2h.config import FinetuneConfig, ModelConfig
from e2h.curriculum.batches import make_batch
from e2h.curriculum.finetune import micro_batch_loss, private_engine
from e2h.curriculum.slots import check_places, largest_move
from e2h.diffusion.networks import UNet
from e2h.errors import InputError
from e2h.settings import compose

SIZE, DRAWS = 16, 2
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_neither_the_place_nor_the_neighbours_of_a_record_change_its_gradient(device, dtype):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    network = UNet.from_config(ModelConfig(base_width=16, width_multipliers=[1, 1], embedding_width=32), 8, 1, 10, 0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine = private_engine(network.to(device), micro_batch_loss, FinetuneConfig(dtype=dtype, noise_multiplicity=DRAWS))
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (SIZE, 8, 8, 1), dtype=np.uint8), np.arange(SIZE) % 10

    def contribution(order: np.ndarray) -> torch.Tensor:
        """Of record 0, in its place in a unit of this order."""
        batch = make_batch(images[order], labels[order], order.tolist(), DRAWS, 0.0, 10)
        batch = {name: value.to(device) for name, value in batch.items()}
        return engine.accumulate(batch, torch.from_numpy(order == 0).float().to(device)).vector

    found = contribution(np.arange(SIZE))
    assert found.abs().max() > 0
    for slot in (1, 5, 8, SIZE - 1):
        assert torch.equal(contribution(np.roll(np.arange(SIZE), slot)), found), slot
    others = np.concatenate([[0], rng.permutation(np.arange(1, SIZE))])
    assert torch.equal(contribution(others), found)
    torch.set_num_threads(threads)


class Misplacing:
    """An engine whose last place gives other last bits, as kernels with a tail do; a contribution has length 2^30."""

    def __init__(self, network: UNet, move: int) -> None:
        self.network, self.move = network, move

    def accumulate(self, batch, weights):
        assert all(p.abs().max() > 0 for p in self.network.parameters())  # else no bit comes through
        return SimpleNamespace(vector=torch.tensor([2**30, self.move * int(weights[-1])]))


def new_network() -> UNet:
    return UNet.from_config(ModelConfig(base_width=16, width_multipliers=[1, 1], embedding_width=32), 8, 1, 10, 0)


@pytest.mark.parametrize(
    ("move", "batch", "clipping", "covered"),
    [
        (0, 10**6, "flat", True),
        (500, 256, "flat", True),
        (500, 256, "normalized", True),
        (500, 4096, "flat", False),
        (0, 4096, "global", True),
        (1, 256, "global", False),  # a norm may cross Z
    ],
)
def test_training_begins_where_the_clip_covers_all_moves_of_a_draw(move, batch, clipping, covered):
    network = new_network()
    before = [parameter.clone() for parameter in network.parameters()]
    settings = FinetuneConfig(expected_batch_size=batch, noise_multiplicity=1, clipping=clipping)
    call = partial(check_places, Misplacing(network, move), network, settings, 4, (8, 8, 1))
    if covered:
        call()
    else:
        with pytest.raises(InputError, match="physical_batch_size=4: expected a size with the same bits"):
            call()
    assert all(map(torch.equal, network.parameters(), before))


def test_a_unit_of_one_has_one_place():
    network = new_network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    assert largest_move(Misplacing(network, 9), network, FinetuneConfig(), 1, (8, 8, 1)) == 0


def test_a_gradient_that_says_nothing_is_refused():
    silent = SimpleNamespace(
        accumulate=lambda batch, weights: SimpleNamespace(vector=torch.zeros(3, dtype=torch.int64))
    )
    assert largest_move(silent, new_network(), FinetuneConfig(), 4, (8, 8, 1)) == np.inf


def test_the_networks_of_the_presets_have_the_same_bits_in_every_place():
    for name in ("px8", "px28_small"):
        config = compose({"model": name, "data.image_size": 8 if name == "px8" else 28})
        network = UNet.from_config(config.model, config.data.image_size, 1, 10, 0)
        engine = private_engine(network, micro_batch_loss, config.finetune)
        strict = replace(config.finetune, clipping="global")
        check_places(engine, network, strict, 8, (config.data.image_size,) * 2 + (1,))
