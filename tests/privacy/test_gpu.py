"""Private gradients on a GPU: the same as the references', in every place of a unit."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gradient_cases import LAYOUTS
from torch import nn
from torch.nn.grad import conv2d_weight

from e2h.config import FinetuneConfig, ModelConfig
from e2h.curriculum.batches import make_batch
from e2h.curriculum.finetune import private_engine
from e2h.curriculum.machine import fixed_kernels
from e2h.curriculum.slots import check_places
from e2h.curriculum.workers import Workers
from e2h.diffusion.losses import micro_batch_loss
from e2h.diffusion.networks import UNet
from e2h.privacy import clipped_sum
from e2h.privacy.clipped_sum import clip_and_sum
from e2h.privacy.dpsgd import make_engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(
    ("widths", "side", "kernel_size", "stride", "padding"),
    [
        ((1, 32), 28, 3, 1, 1),
        ((70, 65), 7, 3, 2, 1),
        ((64, 3), 14, 3, 1, 1),
        ((8, 20), 9, 5, 1, 0),
        ((16, 24), 8, 1, 2, 0),
    ],
)
@pytest.mark.parametrize("draws", [1, 3])
def test_a_weight_gradient_in_half_precision_equals_float64(draws, widths, side, kernel_size, stride, padding, layout):
    from e2h.privacy.kernels import conv_weight_gradient

    torch.manual_seed(0)
    examples, (width_in, width_out) = 5, widths
    conv = nn.Conv2d(width_in, width_out, kernel_size, stride, padding, device="cuda", dtype=torch.bfloat16)
    x = LAYOUTS[layout](torch.randn(draws * examples, width_in, side, side, device="cuda").bfloat16())
    grad = LAYOUTS[layout](torch.randn_like(conv(x)))
    shape = [kernel_size] * 2, [stride] * 2, [padding] * 2
    found = conv_weight_gradient(x, grad, *shape, draws)
    for i in range(examples):
        rows = range(i, draws * examples, examples)
        exact = sum(
            conv2d_weight(x[k : k + 1].double(), conv.weight.shape, grad[k : k + 1].double(), stride, padding)
            for k in rows
        )
        assert (found[i].double() - exact.flatten()).norm() < 1e-5 * exact.norm()


def network_and_batch(draws: int, size: int = 6) -> tuple[UNet, dict[str, torch.Tensor]]:
    network = UNet.from_config(ModelConfig(base_width=16, width_multipliers=[1, 2], embedding_width=64), 8, 1, 10, 0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=random))
    images = torch.randint(0, 256, (size, 8, 8, 1), generator=random).to(torch.uint8).numpy()
    batch = make_batch(images, torch.arange(size).numpy() % 10, list(range(size)), draws, 0.1, 10)
    return network.cuda(), {name: value.cuda() for name, value in batch.items()}


@pytest.mark.parametrize(("dtype", "error"), [("float32", 2e-5), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("compiled", [False, True])
@fixed_kernels()
def test_the_engine_equals_the_loop(compiled, dtype, error):
    network, batch = network_and_batch(draws=2)
    weights = torch.tensor([1.0, 1, 0, 1, 1, 0])
    fast = make_engine("folded", network, micro_batch_loss, 0.3, 2, dtype=dtype, compiled=compiled)
    found = fast.accumulate(batch, weights)
    exact = make_engine("loop", network, micro_batch_loss, 0.3, 2).accumulate(batch, weights)
    assert found.count == exact.count == 4
    assert (found.vector - exact.vector).double().norm() < error * exact.vector.double().norm()
    assert torch.equal(found.vector, fast.accumulate(batch, weights).vector)


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("clipping", ["flat", "normalized", "global"])
def test_the_sum_on_a_gpu_is_the_sum_on_a_cpu(clipping, triton, monkeypatch):
    if not triton:
        monkeypatch.setattr(clipped_sum, "kernels", None)
    random = torch.Generator().manual_seed(0)
    gradients = [torch.randn(9, size, generator=random) for size in (3, 700, 9000)]
    gradients[1][2], gradients[2][4, 5] = float("inf"), float("nan")
    weights, losses = torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 0, 1]), torch.zeros(9)
    rule = 1.5, clipping, 100.0
    there = clip_and_sum([one.cuda() for one in gradients], weights, losses.cuda(), *rule)
    here = clip_and_sum([one.clone() for one in gradients], weights, losses, *rule)
    assert there.count == here.count == 7
    assert (there.vector.cpu() - here.vector).abs().max() <= 9  # a norm's last bit may round a coordinate elsewhere
    assert here.vector.abs().max() > 2**20


@fixed_kernels()
def test_opacus_and_the_loop_agree_on_a_gpu():
    network, batch = network_and_batch(draws=2)
    found, exact = (
        make_engine(name, network, micro_batch_loss, 0.3, 2).accumulate(batch, torch.ones(6)).vector.double()
        for name in ("opacus", "loop")
    )
    assert (found - exact).norm() < 2e-5 * exact.norm()


FRESH = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_gpu import fixed_kernels, make_engine, micro_batch_loss, network_and_batch
network, batch = network_and_batch(draws=2)
with fixed_kernels():
    engine = make_engine("folded", network, micro_batch_loss, 0.3, 2, dtype="bfloat16", compiled=True)
    print(hash(engine.accumulate(batch, torch.ones(6)).vector.cpu().numpy().tobytes()))
"""


def test_two_processes_compile_the_same_bits(tmp_path):
    """A step that is made again elsewhere has the noise of the first: it must have the bits, too."""
    printed = set()
    for folder in ("one", "other"):
        caches = {name: str(tmp_path / folder) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        called = subprocess.run(
            [sys.executable, "-c", FRESH, str(Path(__file__).parent)],
            env={**os.environ, **caches, "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        printed.add(called.stdout)
    assert len(printed) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True])
@fixed_kernels()
def test_a_record_has_the_same_bits_in_every_place_of_a_unit(compiled, dtype):
    network, _ = network_and_batch(draws=1)
    settings = FinetuneConfig(noise_multiplicity=2, dtype=dtype, compile=compiled)
    engine = private_engine(network, micro_batch_loss, settings)
    check_places(engine, network, replace(settings, clipping="global"), 64, (8, 8, 1), Workers.current("cuda"))
