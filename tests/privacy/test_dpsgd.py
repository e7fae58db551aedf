from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from gradient_cases import ENGINES, LayerNetwork, length, median_norm, reference, relative, row_batch, row_loss
from torch import nn

from e2h.diffusion.losses import draw_noise_levels, micro_batch_loss
from e2h.diffusion.networks import UNet
from e2h.errors import InputError
from e2h.privacy.dpsgd import make_engine


@pytest.fixture(scope="module")
def unet() -> UNet:
    network = UNet(8, 1, 10, 16, [1, 2], [4], 1, 64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def diffusion_batch(num_examples: int, num_draws: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.rand(num_examples, 1, 8, 8, generator=generator) * 2 - 1,
        "labels": torch.randint(0, 11, (num_examples,), generator=generator),
        "sigma": draw_noise_levels((num_examples, num_draws), generator),
        "noise": torch.randn(num_examples, num_draws, 1, 8, 8, generator=generator),
    }


@pytest.mark.parametrize("num_draws", [1, 3])
def test_the_engines_agree_on_the_diffusion_network(unet, num_draws):
    batch, weights = diffusion_batch(5, num_draws), torch.ones(5)
    max_grad_norm = median_norm(unet, micro_batch_loss, batch)
    expected = reference(unet, micro_batch_loss, batch, max_grad_norm)
    for name, tolerance in (("folded", 1e-5), ("loop", 1e-5), ("opacus", 1e-4)):
        result = make_engine(name, unet, micro_batch_loss, max_grad_norm, num_draws).accumulate(batch, weights)
        assert relative(result, expected) < tolerance
        assert torch.allclose(result.norms, expected.norms, rtol=1e-5)
        assert torch.allclose(result.losses.double(), expected.losses, rtol=1e-4)
        assert result.vector.dtype == torch.int64
        assert result.count == 5


@pytest.mark.parametrize("name", ENGINES)
def test_one_example_contributes_at_most_the_clip_norm(unet, name):
    batch, norms = diffusion_batch(4, 2), []
    for max_grad_norm in (1e-3, 1.0, 1e3):
        engine = make_engine(name, unet, micro_batch_loss, max_grad_norm, 2)
        for i in range(4):
            result = engine.accumulate({key: entry[i : i + 1] for key, entry in batch.items()}, torch.ones(1))
            clipped = min(1.0, float(result.norms) / max_grad_norm)
            assert length(result.vector) <= 1.0
            assert length(result.vector) == pytest.approx(clipped, rel=2e-3)
            norms.append(clipped)
    assert min(norms) < 1
    assert max(norms) == 1


def test_an_example_that_comes_or_goes_moves_the_sum_by_at_most_the_clip_norm(unet):
    # The neighbour's micro-batches are packed anew: every example behind the missing one changes its place.
    engine, batch = make_engine("folded", unet, micro_batch_loss, 0.5, 2), diffusion_batch(12, 2)

    def total(examples, size):
        parts = [examples[i : i + size] for i in range(0, len(examples), size)]
        sums = [engine.accumulate({k: v[p] for k, v in batch.items()}, torch.ones(len(p))) for p in parts]
        return sum(part.vector for part in sums)

    everyone = list(range(12))
    whole = total(everyone, 5)
    for missing in (0, 4, 11):
        rest = [i for i in everyone if i != missing]
        for size in (3, 5):
            assert 0.99 < length(whole - total(rest, size)) <= 1.0


def test_weight_zero_contributes_nothing(unet):
    engine = make_engine("folded", unet, micro_batch_loss, 1.0, 2)
    batch, weights = diffusion_batch(6, 2), torch.tensor([1, 0, 1, 1, 0, 0])
    result = engine.accumulate(batch, weights)
    assert result.count == 3
    kept = {name: entry[weights == 1] for name, entry in batch.items()}
    assert relative(result, engine.accumulate(kept, torch.ones(3))) < 1e-5
    assert not engine.accumulate(batch, torch.zeros(6)).vector.any()


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_a_broken_example_contributes_nothing_and_changes_nobody(unet, name, poison):
    engine = make_engine(name, unet, micro_batch_loss, 1.0, 2)
    batch = diffusion_batch(4, 2)
    batch["images"][2, 0, 3, 3] = poison
    result = engine.accumulate(batch, torch.ones(4))
    finite = bool(torch.isfinite(result.norms[2]))
    assert result.count == 4
    assert not finite
    kept = {key: entry[[0, 1, 3]] for key, entry in batch.items()}
    assert relative(result, reference(unet, micro_batch_loss, kept, 1.0)) < 1e-5


def test_a_huge_but_finite_example_is_clipped(unet):
    engine = make_engine("folded", unet, micro_batch_loss, 1.0, 2)
    batch = diffusion_batch(1, 2)
    batch["images"] *= 1e6
    result = engine.accumulate(batch, torch.ones(1))
    assert float(result.norms) > 1e4
    assert 0.998 < length(result.vector) <= 1


@pytest.mark.parametrize("name", ENGINES)
def test_an_empty_micro_batch_is_zero(unet, name):
    result = make_engine(name, unet, micro_batch_loss, 1.0, 2).accumulate(diffusion_batch(0, 2), torch.ones(0))
    assert result.vector.shape == (sum(parameter.numel() for parameter in unet.parameters()),)
    assert result.vector.dtype == torch.int64
    assert not result.vector.any()
    assert result.count == 0
    assert len(result.losses) == len(result.norms) == 0


def test_accumulate_leaves_no_trace(unet):
    batch = diffusion_batch(3, 2)
    before = [parameter.clone() for parameter in unet.parameters()]
    for name in ENGINES:
        engine = make_engine(name, unet, micro_batch_loss, 1.0, 2)
        first, second = engine.accumulate(batch, torch.ones(3)), engine.accumulate(batch, torch.ones(3))
        assert torch.equal(first.vector, second.vector)
    assert all(parameter.grad is None and not hasattr(parameter, "grad_sample") for parameter in unet.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, unet.parameters(), strict=True))
    assert not any("forward" in vars(module) or module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize("name", ENGINES)
def test_an_interrupted_micro_batch_leaves_the_network_usable(unet, name):
    batch, calls = diffusion_batch(3, 2), []

    def interrupted(network, batch):
        losses = micro_batch_loss(network, batch)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return losses

    rows = (torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    before = unet(*rows)
    engine = make_engine(name, unet, interrupted, 1.0, 2)
    with pytest.raises(KeyboardInterrupt):
        engine.accumulate(batch, torch.ones(3))
    assert torch.equal(unet(*rows), before)
    unet(*rows).sum().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())
    unet.zero_grad(set_to_none=True)
    fresh = make_engine(name, unet, micro_batch_loss, 1.0, 2).accumulate(batch, torch.ones(3))
    assert torch.equal(engine.accumulate(batch, torch.ones(3)).vector, fresh.vector)


def test_frozen_modules_are_left_out_of_the_vector():
    network = LayerNetwork("conv3", "contiguous")
    network.first.requires_grad_(False)
    batch = row_batch(3, 2)
    for name in ENGINES:
        result = make_engine(name, network, row_loss, 1.0, 2).accumulate(batch, torch.ones(3))
        assert len(result.vector) == sum(parameter.numel() for parameter in network.layer.parameters())
        assert relative(result, reference(network, row_loss, batch, 1.0)) < 1e-5


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4, track_running_stats=True)]
)
def test_layers_that_mix_examples_are_refused(name, layer):
    with pytest.raises(InputError, match=f"1={type(layer).__name__}: expected layers that keep the examples"):
        make_engine(name, nn.Sequential(nn.Conv2d(2, 4, 1), layer), row_loss, 1.0, 1)


def test_unknown_engine_and_half_precision_are_refused():
    with pytest.raises(InputError, match=r"finetune\.engine=fast: expected one of folded, opacus, loop"):
        make_engine("fast", nn.Linear(2, 2), row_loss, 1.0, 1)
    with pytest.raises(InputError, match=r"weight=torch\.bfloat16: expected float32"):
        make_engine("folded", nn.Linear(2, 2).bfloat16(), row_loss, 1.0, 1)


@pytest.mark.parametrize("name", ENGINES)
def test_bad_micro_batches_are_refused(name):
    network, batch = LayerNetwork("conv3", "contiguous"), row_batch(3, 2)
    engine = make_engine(name, network, row_loss, 1.0, 2)
    with pytest.raises(ValueError, match="has 3 examples: expected 2"):
        engine.accumulate(batch, torch.ones(2))
    with pytest.raises(ValueError, match="weights: expected 0 or 1"):
        engine.accumulate(batch, torch.tensor([1.0, 0.5, 1.0]))
    with pytest.raises(ValueError, match="weights: expected 0 or 1"):
        engine.accumulate(batch, torch.tensor([1.0, 2.0, 1.0]))
    summed = make_engine(name, network, lambda net, entries: row_loss(net, entries).sum(), 1.0, 2)
    with pytest.raises(ValueError, match="expected one loss an example"):
        summed.accumulate(batch, torch.ones(3))


def test_only_the_reference_engine_needs_opacus(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    network, batch = LayerNetwork("conv3", "contiguous"), row_batch(2, 1)
    assert make_engine("folded", network, row_loss, 1.0, 1).accumulate(batch, torch.ones(2)).count == 2
    with pytest.raises(ImportError):
        make_engine("opacus", network, row_loss, 1.0, 1).accumulate(batch, torch.ones(2))


@pytest.mark.parametrize("clipping", ["flat", "normalized", "global"])
def test_the_engines_agree_under_every_clip(unet, clipping):
    batch, weights = diffusion_batch(5, 2), torch.ones(5)
    middle = median_norm(unet, micro_batch_loss, batch)
    clip = {"clipping": clipping, "norm_threshold": 1.01 * middle}
    expected = reference(unet, micro_batch_loss, batch, middle, **clip)
    for name, tolerance in (("folded", 1e-5), ("loop", 1e-5), ("opacus", 1e-4)):
        result = make_engine(name, unet, micro_batch_loss, middle, 2, **clip).accumulate(batch, weights)
        assert relative(result, expected) < tolerance


@pytest.mark.parametrize("name", ENGINES)
def test_bfloat16_is_close_and_as_bounded(unet, name):
    batch = diffusion_batch(5, 3)
    middle = median_norm(unet, micro_batch_loss, batch)
    expected = reference(unet, micro_batch_loss, batch, middle)
    engine = make_engine(name, unet, micro_batch_loss, middle, 3, dtype="bfloat16")
    result = engine.accumulate(batch, torch.ones(5))
    assert 1e-4 < relative(result, expected) < 0.06  # activations have 8 significant bits; float32 would be below 1e-5
    assert torch.allclose(result.norms, expected.norms, rtol=0.03)
    for i in range(5):
        one = engine.accumulate({key: entry[i : i + 1] for key, entry in batch.items()}, torch.ones(1))
        assert length(one.vector) <= 1
        assert length(one.vector) == pytest.approx(min(1, float(one.norms) / middle), rel=2e-3)


def test_the_draws_of_an_example_are_summed_in_float32():
    # 1024 equal draws: a running sum with 8 significant bits would stop growing on the way.
    for layer in (nn.Conv2d(2, 3, 1), nn.GroupNorm(1, 2), nn.Conv2d(2, 3, 3), nn.Linear(5, 3)):
        batch = row_batch(2, 1, (5, 5))
        expected = reference(layer, row_loss, batch, 1e3)
        many = {"x": batch["x"].expand(-1, 1024, -1, -1, -1), "scale": batch["scale"]}
        result = make_engine("folded", layer, row_loss, 1e3, 1024, dtype="bfloat16").accumulate(many, torch.ones(2))
        assert relative(result, expected) < 0.02


def test_a_network_in_channels_last_gives_the_same(unet):
    batch = diffusion_batch(4, 2)
    expected = reference(unet, micro_batch_loss, batch, 1.0)
    turned = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    batch["images"] = batch["images"].contiguous(memory_format=torch.channels_last)
    for name, tolerance in (("folded", 1e-5), ("loop", 1e-5), ("opacus", 1e-4)):
        result = make_engine(name, turned, micro_batch_loss, 1.0, 2).accumulate(batch, torch.ones(4))
        assert relative(result, expected) < tolerance


def test_unknown_choices_are_refused():
    with pytest.raises(InputError, match=r"finetune\.dtype=float16: expected float32 or bfloat16"):
        make_engine("folded", nn.Linear(2, 2), row_loss, 1.0, 1, dtype="float16")
    with pytest.raises(InputError, match=r"finetune\.clipping=soft: expected one of flat, normalized, global"):
        make_engine("folded", nn.Linear(2, 2), row_loss, 1.0, 1, clipping="soft")
    for value in (0.0, -1.0, 1e-31, math.inf, math.nan):
        with pytest.raises(InputError, match=r"finetune\.max_grad_norm=.*: expected a number between 1e-30 and 1e30"):
            make_engine("folded", nn.Linear(2, 2), row_loss, value, 1)
        with pytest.raises(InputError, match=r"finetune\.norm_threshold=.*: expected a number between 1e-30 and 1e30"):
            make_engine("folded", nn.Linear(2, 2), row_loss, 1.0, 1, clipping="global", norm_threshold=value)
