"""A record's gradient is the same to the last bit wherever it lies in a unit, and whoever lies beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from e2h.config import FinetuneConfig, ModelConfig
from e2h.curriculum.batches import make_batch
from e2h.curriculum.finetune import micro_batch_loss, private_engine
from e2h.curriculum.slots import check_places, contributions, largest_move
from e2h.curriculum.workers import Workers
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


@dataclass(frozen=True)
class Misplacing:
    """An engine whose last place gives other last bits, as kernels with a tail do; a contribution has length 2^30."""

    network: UNet
    move: int
    clipping: str = "normalized"
    error: Exception | None = None

    def accumulate(self, batch, weights):
        assert self.clipping == "flat"
        assert all(p.abs().max() > 0 for p in self.network.parameters())  # else no bit comes through
        if self.error is not None:
            raise self.error
        return SimpleNamespace(vector=torch.tensor([2**30, self.move * int(weights[-1])]))


@dataclass(frozen=True)
class Beside(Workers):
    """One of two workers, whose other adds `other` to every sum."""

    other: tuple[int, int] = (2**30, 0)

    def sum_integers(self, values):
        if values.shape == (2,):
            values += torch.tensor(self.other)


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
    call = partial(check_places, Misplacing(network, move), network, settings, 4, (8, 8, 1), Workers.current())
    if covered:
        call()
    else:
        with pytest.raises(InputError, match="physical_batch_size=4: expected a size with the same bits"):
            call()
    assert all(map(torch.equal, network.parameters(), before))


@pytest.mark.parametrize(("move", "batch", "covered"), [(0, 10**6, True), (500, 256, True), (500, 4096, False)])
def test_a_worker_that_gives_other_bits_counts_as_a_place_that_does(move, batch, covered):
    network, settings = new_network(), FinetuneConfig(expected_batch_size=batch, noise_multiplicity=1)
    workers = Beside(0, 2, torch.device("cpu"), (2**30, 2 * move))
    call = partial(check_places, Misplacing(network, 0), network, settings, 4, (8, 8, 1), workers)
    if covered:
        call()
    else:
        with pytest.raises(InputError, match="place or worker"):
            call()


def test_weights_are_as_before_when_the_trial_fails():
    network = new_network()
    before = [parameter.clone() for parameter in network.parameters()]
    full = Misplacing(network, 0, error=MemoryError("full"))
    with pytest.raises(MemoryError, match="full"):
        check_places(full, network, FinetuneConfig(), 4, (8, 8, 1), Workers.current())
    assert all(map(torch.equal, network.parameters(), before))


def test_a_unit_of_one_has_one_place():
    network = new_network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    assert len(contributions(Misplacing(network, 9, "flat"), network, FinetuneConfig(), 1, (8, 8, 1))) == 1


def test_moves_are_bounded_over_places_and_workers():
    own = [torch.tensor([100, 0]), torch.tensor([100, 3])]
    assert largest_move(own[:1], own[0], 1) == 0
    assert largest_move(own, own[0], 1) == pytest.approx(0.06)
    assert largest_move(own, own[0] + torch.tensor([100, 8]), 2) == pytest.approx(2 * (3 + 4) / 100)
    silent = [torch.zeros(3, dtype=torch.int64)]  # says nothing of the places, and is refused
    assert largest_move(silent, silent[0], 1) == np.inf


def test_the_networks_of_the_presets_have_the_same_bits_in_every_place():
    for name in ("px8", "px28_small"):
        config = compose({"model": name, "data.image_size": 8 if name == "px8" else 28})
        network = UNet.from_config(config.model, config.data.image_size, 1, 10, 0)
        engine = private_engine(network, micro_batch_loss, config.finetune)
        strict = replace(config.finetune, clipping="global")
        check_places(engine, network, strict, 8, (config.data.image_size,) * 2 + (1,), Workers.current())
