"""From the easy stages' images to private weights: warm up, then DP-SGD, as one resumable function for each worker."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import save

from e2h.binding import digest
from e2h.config import stamp, warmups
from e2h.curriculum.checkpoint import Checkpoints
from e2h.curriculum.finetune import finetune
from e2h.curriculum.learner import PrivateRun
from e2h.curriculum.machine import fixed_kernels, machine
from e2h.curriculum.run import Run
from e2h.curriculum.units import largest_that_fits, unit_size
from e2h.curriculum.warmup import Report, warm_up
from e2h.curriculum.workers import Workers, is_out_of_memory
from e2h.data.exports import read_hf_parquet
from e2h.data.filesystem import write_bytes
from e2h.data.mapping import map_split
from e2h.data.remote import Place
from e2h.data.storage import Prepared, open_prepared
from e2h.diffusion.networks import UNet
from e2h.errors import InputError
from e2h.privacy.events import Release


@fixed_kernels()
def train(
    run: Run,
    release: Release,
    workers: Workers,
    report: Report,
    progress: Callable[[str, int], None],
    leaving: Callable[[int], bool] = lambda step: False,
    until: int | None = None,
) -> None:
    """Trains the diffusion model of a run; call it on every worker. The same call resumes.

    Args:
      run: with a prepared set and the images of its easy stages.
      release: the accounted DP-SGD event.
      report: called on rank 0 as report(metric, value, step).
      progress: called on every worker as progress(stage, finished steps).
      leaving: called on every worker as leaving(finished steps): whether a machine of the group was given notice.
      until: DP-SGD steps after which to stop, with the weights of that step; none: all.
    """
    if workers.device.type == "cuda":
        torch.cuda.set_device(workers.device)  # where kernels of our own are started
    prepared = open_prepared(run.prepared)
    network = new_network(run, prepared)
    checkpoints = Checkpoints(run.checkpoints, run.training_binding, leaving)
    config = run.config
    saved = checkpoints.latest("finetune")
    workers.agree(digest([saved is None]), "checkpoints")
    for name, (stage, settings) in warmups(config).items() if saved is None else ():
        images, labels = easy_images(run, stage)
        told = functools.partial(progress, name)
        warm_up(network, images, labels, settings, config.seed, workers, checkpoints, report, told, name)
    start = saved[1]["start"] if saved else weights_digest(network)
    unit = config.scaling.physical_batch_size or fitting_unit(run, network, workers)
    try:
        ema = finetune(
            network,
            map_split(prepared, "train", run.mapped),
            config.finetune,
            private_run(run, release, prepared, workers, start, unit),
            config.seed,
            unit,
            workers,
            checkpoints,
            report,
            lambda step: progress("finetune", step),
            until,
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"scaling.physical_batch_size={unit}: expected so many images to fit the memory, which others may use; "
            "run the same command where more is free, or begin another run.name with a smaller size"
        ) from error
    forget_mapped(run)
    if workers.rank == 0:
        (run.checkpoints / "average.json").unlink(missing_ok=True)  # of weights that are overwritten here
        ema.copy_to(network)
        save_weights(run.weights, network, stamp(config))


def forget_mapped(run: Run) -> None:
    """Of private images, nothing stays on a machine that was lent. Several workers may do so at the same moment."""
    if run.scratch != run.root:
        shutil.rmtree(run.mapped, ignore_errors=True)


def new_network(run: Run, prepared: Prepared) -> UNet:
    """A fresh network of the run, on the CPU; its initial weights follow from the public seed."""
    manifest = prepared.manifest
    return UNet.from_config(
        run.config.model, manifest.image_size, manifest.channels, len(manifest.class_names), run.config.seed
    )


def easy_images(run: Run, stage: str) -> tuple[np.ndarray, np.ndarray]:
    """Images of an easy stage uint8 [M, H, W, C] and labels [M] (-1: no label)."""
    return read_hf_parquet([run.easy(stage) / "images.parquet"])


def fitting_unit(run: Run, network: UNet, workers: Workers) -> int:
    """The size of a work unit, chosen before the first private step and kept in the run (`e2h.curriculum.units`)."""
    data, settings = run.config.data, run.config.finetune
    # An elastic group shares a machine's memory among more workers when it has grown.
    grown = replace(workers, size=max(workers.size, run.config.scaling.num_workers))
    network.to(workers.device).train()
    return unit_size(
        run.root / "units.json",
        workers,
        lambda: largest_that_fits(network, settings, data.image_size, data.channels, grown),
    )


def private_run(run: Run, release: Release, prepared: Prepared, workers: Workers, start: str, unit: int) -> PrivateRun:
    """Binds the stage to its secret, ledger and domain, the same on every worker.

    Args:
      start: digest of the weights before the first private step.
      unit: size of a work unit, in images.
    """
    device = torch.cuda.get_device_name(workers.device) if workers.device.type == "cuda" else workers.device.type
    one = machine(device, torch.get_num_threads(), unit)
    # The kinds of machine in the group, not their number: a unit's result depends on where it is computed.
    place = digest([start, workers.distinct(one)])
    domain = run.domain(release.name, release.event.to_json(), prepared.manifest.digest, place)
    return PrivateRun(release, run.ledger, run.secret(), domain, start, run.config.privacy.noise_shares)


def weights_digest(network: UNet) -> str:
    """SHA-256 over all parameters in order."""
    total = hashlib.sha256()
    for parameter in network.parameters():
        total.update(parameter.detach().cpu().numpy().tobytes())
    return total.hexdigest()


def save_weights(path: Place, network: UNet, notes: Mapping[str, str]) -> None:
    tensors = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
    write_bytes(path, save(tensors, metadata={"format": "pt", **notes}))
