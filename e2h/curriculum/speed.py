"""How fast one worker makes private gradients on this machine: for planning, never for what is computed."""

from __future__ import annotations

import time

import torch

from e2h.config import Config, expect, warmups
from e2h.curriculum.units import largest_that_fits, private_micro_batch
from e2h.curriculum.workers import Workers
from e2h.diffusion.networks import UNet

MEASURED_S = 5.0
GRADIENT_IN_PASSES = 3  # a forward and a backward pass of a network, in forward passes


def gradients_per_second(config: Config, num_classes: int) -> float:
    """Per-record gradients of one worker, in micro-batches as a run would choose them.

    Raises:
      InputError: if the workers have GPUs and this machine has none.
    """
    timed = torch.cuda.is_available() or not config.scaling.use_gpu
    advice = "plan on a machine like the workers', or for its cores with scaling=local"
    expect(timed, "scaling.use_gpu", True, "a GPU on this machine, where the speed is measured", advice)
    device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
    data, settings = config.data, config.finetune
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every worker
    try:
        network = UNet.from_config(config.model, data.image_size, data.channels, num_classes, config.seed)
        network.to(device).train()
        group = Workers(0, config.scaling.num_workers, device)
        size = config.scaling.physical_batch_size or largest_that_fits(
            network, settings, data.image_size, data.channels, group
        )
        begun, made = time.monotonic(), 0
        while made == 0 or time.monotonic() - begun < MEASURED_S:
            private_micro_batch(network, settings, size, data.image_size, data.channels)
            if device.type == "cuda":
                torch.cuda.synchronize()
            made += size
        return made / (time.monotonic() - begun)
    finally:
        torch.set_num_threads(threads)


def forecast(config: Config, gradients_per_second: float) -> dict[str, float]:
    """Roughly the minutes of each stage that computes, from the speed of private gradients alone.

    A noise draw costs warm-up what it costs DP-SGD, and sampling makes a forward pass where those take a gradient.
    """
    draws_per_second = gradients_per_second * config.finetune.noise_multiplicity
    seen = sum(settings.num_steps * settings.batch_size for _, settings in warmups(config).values())
    sampling, gradients = config.sampling, config.finetune.num_steps * config.finetune.expected_batch_size
    passes = 2 * sampling.num_steps - 1 if sampling.sampler == "heun" else sampling.num_steps
    passes *= sampling.num_images * (2 if sampling.guidance > 0 else 1)
    seconds = {
        "warm-up": seen / draws_per_second,
        "DP-SGD": gradients / gradients_per_second,
        "sampling": passes / (GRADIENT_IN_PASSES * draws_per_second),
    }
    return {stage: found / 60 for stage, found in seconds.items()}
