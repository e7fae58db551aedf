"""The ways to a sum of clipped per-example gradients that `engine.py` compares, each as a function of no arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor

from e2h.config import ModelConfig
from e2h.diffusion.losses import draw_noise_levels, micro_batch_loss
from e2h.diffusion.networks import UNet
from e2h.privacy.dpsgd import clip_and_sum, grad_sample_module, make_engine

PRESETS = Path(__file__).resolve().parents[2] / "e2h" / "conf" / "model"
APPROACHES = ("plain", "folded", "opacus_hooks", "opacus_ghost", "vmap", "loop")
# Noise multiplicity K: images B; a quarter of them with --quick. On a GPU as many as a run's work units have.
BATCHES = {"cpu": {1: 32, 4: 8, 32: 2}, "cuda": {1: 1024, 4: 256, 32: 32}}
CLIP_NORM = 1.0
Step = Callable[[], object]


def network_of(image_size: int, device: str) -> UNet:
    """The preset of the size, with weights that are nowhere zero, as after some training."""
    model = ModelConfig(**yaml.safe_load((PRESETS / f"px{image_size}.yaml").read_text()))
    network = UNet.from_config(model, image_size, 1 if image_size == 28 else 3, 10, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network.to(device)


def batch_of(image_size: int, num_images: int, num_draws: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (1 if image_size == 28 else 3, image_size, image_size)
    batch = {
        "images": torch.rand(num_images, *shape, generator=generator) * 2 - 1,
        "labels": torch.randint(0, 11, (num_images,), generator=generator),
        "sigma": draw_noise_levels((num_images, num_draws), generator),
        "noise": torch.randn(num_images, num_draws, *shape, generator=generator),
    }
    return {name: entry.to(device) for name, entry in batch.items()}


def loss_of(dtype: str, device: str) -> Callable[[Callable[..., Tensor], dict[str, Tensor]], Tensor]:
    def loss(network: Callable[..., Tensor], batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return micro_batch_loss(network, batch)

    return loss


def plain(network: UNet, batch: dict[str, Tensor], num_draws: int, options: argparse.Namespace) -> Step:
    """The ordinary step: mean loss, dense gradients, added up; on a GPU with channels last, where it is fastest."""
    if options.device == "cuda":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss = loss_of(options.dtype, options.device)
    run = torch.compile(network) if options.compile else network
    return lambda: loss(run, batch).mean().backward()


def e2h_engine(name: str) -> Callable[[UNet, dict[str, Tensor], int, argparse.Namespace], Step]:
    def make(network: UNet, batch: dict[str, Tensor], num_draws: int, options: argparse.Namespace) -> Step:
        engine = make_engine(
            name, network, micro_batch_loss, CLIP_NORM, num_draws, dtype=options.dtype, compiled=options.compile
        )
        weights = torch.ones(len(batch["labels"]))
        total = torch.zeros(sum(p.numel() for p in network.parameters()), dtype=torch.int64, device=options.device)
        return lambda: total.add_(engine.accumulate(batch, weights).vector)

    return make


def opacus_hooks(network: UNet, batch: dict[str, Tensor], num_draws: int, options: argparse.Namespace) -> Step:
    """Opacus' per-row gradients, averaged over an image's draws, then clipped and added up by Opacus' optimiser."""
    from opacus.optimizers import DPOptimizer

    wrapped = grad_sample_module(network.train(), "sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(network.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=1,
    )
    loss, num_images = loss_of(options.dtype, options.device), len(batch["labels"])

    def step() -> None:
        loss(wrapped, batch).sum().backward()
        for parameter in network.parameters():
            rows = parameter.grad_sample
            parameter.grad_sample = rows.view(num_draws, num_images, *rows.shape[1:]).sum(0)
        optimizer.clip_and_accumulate()
        for parameter in network.parameters():
            parameter.grad_sample = parameter.grad = None

    return step


def opacus_ghost(network: UNet, batch: dict[str, Tensor], num_draws: int, options: argparse.Namespace) -> Step:
    """Opacus' ghost clipping. It can't average an image's draws before the clip; each row is clipped, at equal cost."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        network.train(), max_grad_norm=CLIP_NORM, use_ghost_clipping=True, loss_reduction="sum"
    )
    rows = {name: batch[name].flatten(0, 1)[:, None] for name in ("sigma", "noise")}
    rows |= {name: batch[name].repeat_interleave(num_draws, 0) for name in ("images", "labels")}
    loss = loss_of(options.dtype, options.device)

    def step() -> None:
        losses = loss(wrapped, rows)
        losses.sum().backward(retain_graph=True)
        coefficients = wrapped.get_clipping_coef()
        for parameter in network.parameters():
            parameter.grad = None
        wrapped.disable_hooks()
        (coefficients * losses).sum().backward()
        wrapped.enable_hooks()

    return step


def vmap(network: UNet, batch: dict[str, Tensor], num_draws: int, options: argparse.Namespace) -> Step:
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    loss = loss_of(options.dtype, options.device)

    def one(parameters: dict[str, Tensor], example: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            return torch.func.functional_call(network, parameters, inputs)

        losses = loss(run, {name: entry[None] for name, entry in example.items()})
        return losses.sum(), losses.detach()

    gradients = torch.func.vmap(torch.func.grad(one, has_aux=True), in_dims=(None, 0))
    weights = torch.ones(len(batch["labels"]), device=options.device)

    def step() -> object:
        found, losses = gradients(parameters, batch)
        return clip_and_sum([one.flatten(1) for one in found.values()], weights, losses.flatten(), CLIP_NORM)

    return step


MAKERS = {
    "plain": plain,
    "folded": e2h_engine("folded"),
    "opacus_hooks": opacus_hooks,
    "opacus_ghost": opacus_ghost,
    "vmap": vmap,
    "loop": e2h_engine("loop"),
}


def num_images(num_draws: int, options: argparse.Namespace) -> int:
    return max(1, BATCHES[options.device][num_draws] // (4 if options.quick else 1))


def make_step(approach: str, image_size: int, num_draws: int, options: argparse.Namespace) -> Step:
    network = network_of(image_size, options.device)
    batch = batch_of(image_size, num_images(num_draws, options), num_draws, options.device)
    return MAKERS[approach](network, batch, num_draws, options)
