"""From central images to private weights: warm up, then DP-SGD, as one resumable function for each worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from e2h.curriculum.checkpoint import Checkpoints
from e2h.curriculum.finetune import PrivateRun, finetune, fingerprint
from e2h.curriculum.run import Run
from e2h.curriculum.warmup import Report, warm_up
from e2h.curriculum.workers import Workers
from e2h.data.exports import read_hf_parquet
from e2h.data.filesystem import write_bytes
from e2h.data.storage import Prepared, map_split, open_prepared
from e2h.diffusion.networks import UNet
from e2h.privacy.events import Release


def train(run: Run, release: Release, workers: Workers, report: Report, progress: Callable[[str, int], None]) -> None:
    """Trains the diffusion model of a run; call it on every worker. The same call resumes.

    Args:
      run: with a prepared set and, where the easy stage is on, its central images.
      release: the accounted DP-SGD event.
      report: called on rank 0 as report(metric, value, step).
      progress: called on every worker as progress(stage, finished steps).
    """
    # One thread a worker: sums inside a kernel then have one order, and a replay is bit-identical.
    torch.set_num_threads(1)
    prepared = open_prepared(run.prepared)
    network = new_network(run, prepared)
    checkpoints = Checkpoints(run.checkpoints, run.training_binding)
    config = run.config
    if config.central.enabled and checkpoints.latest("finetune") is None:
        warm_up(
            network,
            *central_images(run),
            config.warmup,
            config.seed,
            workers,
            checkpoints,
            report,
            lambda step: progress("warmup", step),
        )
    ema = finetune(
        network,
        map_split(prepared, "train", run.prepared),
        config.finetune,
        private_run(run, release, prepared, workers),
        config.seed,
        config.scaling.physical_batch_size,
        workers,
        checkpoints,
        report,
        lambda step: progress("finetune", step),
    )
    if workers.rank == 0:
        ema.copy_to(network)
        save_weights(run.weights, network)


def new_network(run: Run, prepared: Prepared) -> UNet:
    """A fresh network of the run, on the CPU; its initial weights follow from the public seed."""
    manifest = prepared.manifest
    return UNet.from_config(
        run.config.model, manifest.image_size, manifest.channels, len(manifest.class_names), run.config.seed
    )


def central_images(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Released central images uint8 [M, H, W, C] and labels [M] (-1: no label)."""
    return read_hf_parquet([run.central / "images.parquet"])


def private_run(run: Run, release: Release, prepared: Prepared, workers: Workers) -> PrivateRun:
    place = fingerprint(workers.device, run.config.scaling.physical_batch_size)
    domain = run.domain(release.event.to_json(), prepared.manifest.digest, place)
    return PrivateRun(release, run.ledger, run.secret(), domain)


def save_weights(path: Path, network: UNet) -> None:
    tensors = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
    write_bytes(path, save(tensors, metadata={"format": "pt"}))
