"""How fast one worker makes private gradients on this machine: for planning, never for what is computed."""

from __future__ import annotations

import time

import torch

from e2h.config import Config
from e2h.curriculum.units import largest_that_fits, private_micro_batch
from e2h.curriculum.workers import Workers
from e2h.diffusion.networks import UNet

MEASURED_S = 5.0


def gradients_per_second(config: Config, num_classes: int) -> float:
    """Per-record gradients of one worker, in micro-batches as a run would choose them."""
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
