"""The hard stage: DP-SGD on the full set (Abadi et al. 2016), each image's gradient averaged over K noise draws.

A step: every worker evaluates the same addressed Poisson draw, computes the clipped sum of its units, and the optimiser
adds the noise once. Steps are paid for in blocks, before their data is read; the step after the last paid one can't
happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from e2h.binding import digest
from e2h.config import FinetuneConfig
from e2h.curriculum.batches import addressed_seeds, make_batch, one_ahead, work_units
from e2h.curriculum.checkpoint import Checkpoints
from e2h.curriculum.learner import STAGE, Learner, PrivateRun
from e2h.curriculum.slots import check_places
from e2h.curriculum.warmup import Report
from e2h.curriculum.workers import Workers
from e2h.data.storage import ImageSet
from e2h.diffusion.ema import EMA
from e2h.diffusion.losses import micro_batch_loss
from e2h.diffusion.networks import UNet
from e2h.errors import BudgetError
from e2h.privacy.dpsgd import ClippedSum, Engine, LossFunction, make_engine
from e2h.privacy.sampling import poisson_mask

Told = tuple[torch.Tensor, torch.Tensor]  # losses and norms of the records of a unit: sensitive


def finetune(
    network: UNet,
    records: ImageSet,
    settings: FinetuneConfig,
    private: PrivateRun,
    seed: int,
    physical_batch_size: int,
    workers: Workers,
    checkpoints: Checkpoints,
    report: Report,
    progress: Callable[[int], None],
    until: int | None = None,
) -> EMA:
    """Trains `network` in place and returns the average of its weights.

    Args:
      network: weights after the warm-up (or fresh); overwritten by the newest checkpoint of this stage.
      records: the whole training split, memory-mapped; each worker reads only its own units.
      report: report(metric, value, step) on rank 0; sensitive metrics are declared so.
      progress: called with the number of finished steps, on every worker, after each step.
      until: stops after so many of the release's steps, with a checkpoint; none: after all.

    Raises:
      BudgetError: if a step can't be paid.
      InputError: if a record's gradient hangs on its place in a unit.
    """
    network.to(workers.device).train()
    learner = Learner(network, settings, private, workers)
    first = _resume(learner, private, checkpoints)
    # Contributions to two draws in one sum would be noised and paid for as one step of one draw.
    workers.agree(digest([private.domain, first]), "checkpoints or domains")
    engine = private_engine(network, micro_batch_loss, settings)
    shape = records.images.shape[1:]
    check_places(engine, network, settings, physical_batch_size, shape, workers)
    last, paid_until = min(until or private.release.event.count, private.release.event.count), first
    for step, selected in draws(private, range(first, last), records):
        if step >= paid_until:
            paid_until = pay(private, step, settings.ledger_block, workers)
        optimizer = learner.optimizer
        optimizer.prepare_noise(step)
        told = sum_units(
            engine, optimizer.accumulate, network, records, selected, settings, seed, step, physical_batch_size, workers
        )
        learner.step(step, len(selected))
        due = checkpoints.due(step + 1, settings.checkpoint_every, last)
        if workers.rank == 0:
            _finish_step(step + 1, due, learner, len(selected), told, checkpoints, report)
        progress(step + 1)
    checkpoints.wait()
    return learner.ema


def pay(private: PrivateRun, step: int, block: int, workers: Workers) -> int:
    """Charges the block of steps from `step` on; returns the first step that is not paid.

    Rank 0 writes the ledger; the others learn what is paid from it, so no one computes an unpaid step.
    """
    stop = min(step + block, private.release.event.count)
    paid = torch.zeros(1, dtype=torch.int64, device=workers.device)
    failure: Exception | None = None
    if workers.rank == 0:
        try:
            private.ledger.spend(STAGE, private.release.event, private.domain, step, stop)
            paid[0] = stop
        except Exception as error:
            failure = error
    workers.sum_integers(paid)
    if failure is not None:
        raise failure
    if int(paid) <= step:
        raise RuntimeError(f"step {step} was not paid for; the ledger's writer says why")
    return int(paid)


def draws(private: PrivateRun, steps: range, records: ImageSet) -> Iterator[tuple[int, np.ndarray]]:
    """Each step with its draw, which a thread makes while the step before computes: of ten million records in 60 ms.

    A draw may precede its payment: it follows from key and ids, and without its step nobody learns of it.
    """
    yield from one_ahead(lambda step: (step, draw(private, step, records)), steps)


def draw(private: PrivateRun, step: int, records: ImageSet) -> np.ndarray:
    """Places of the records that join a step: one draw over the whole set, the same on every worker."""
    event = private.release.event
    return np.flatnonzero(poisson_mask(private.key("sampling"), step, records.ids, event.sampling_prob))


def sum_units(
    engine: Engine,
    add: Callable[[ClippedSum], None],
    network: UNet,
    records: ImageSet,
    selected: np.ndarray,
    settings: FinetuneConfig,
    seed: int,
    step: int,
    physical_batch_size: int,
    workers: Workers,
) -> list[Told]:
    """Hands the clipped sum of each of this worker's units of a draw to `add`; returns the losses and norms of each.

    Nothing else of a unit is kept: a sum over all parameters for every unit would outgrow, by gigabytes, the memory
    that one unit was measured to need.
    """
    told, on_gpu = [], workers.device.type == "cuda"

    def made(unit: slice) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        batch, weights = _micro_batch(network, records, selected[unit], settings, seed, step, physical_batch_size)
        return {name: value.pin_memory() if on_gpu else value for name, value in batch.items()}, weights

    for batch, weights in one_ahead(made, work_units(len(selected), physical_batch_size, workers.rank, workers.size)):
        batch = {name: value.to(workers.device, non_blocking=True) for name, value in batch.items()}
        told.append(_added(engine.accumulate(batch, weights), add))
    return told


def _added(clipped: ClippedSum, add: Callable[[ClippedSum], None]) -> Told:
    add(clipped)
    return clipped.losses[: clipped.count], clipped.norms[: clipped.count]  # a unit's padding comes last


def private_engine(network: UNet, loss_fn: LossFunction, settings: FinetuneConfig) -> Engine:
    """Clipped gradient sums as configured."""
    return make_engine(
        settings.engine,
        network,
        loss_fn,
        settings.max_grad_norm,
        settings.noise_multiplicity,
        clipping=settings.clipping,
        norm_threshold=settings.norm_threshold,
        dtype=settings.dtype,
        compiled=settings.compile,
    )


def _resume(learner: Learner, private: PrivateRun, checkpoints: Checkpoints) -> int:
    saved = checkpoints.latest(STAGE)
    if saved is None:
        return 0
    step, state = saved
    unpaid = set(range(step)) - private.ledger.paid(STAGE, private.domain)
    if unpaid:
        raise BudgetError(
            f"checkpoint of step {step}: {len(unpaid)} of its steps are not in the ledger under this key, data, code "
            "and machine; the ledger lost entries or the run moved, so it can't be continued"
        )
    learner.load_state_dict(state)
    return step


def _micro_batch(
    network: UNet,
    records: ImageSet,
    places: np.ndarray,
    settings: FinetuneConfig,
    seed: int,
    step: int,
    size: int,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A unit padded to its fixed shape with copies of its first record, which weigh 0."""
    padded = np.concatenate([places, np.full(size - len(places), places[0])])
    seeds = addressed_seeds(seed, STAGE, step, records.ids[padded])
    batch = make_batch(
        np.asarray(records.images[padded]),
        np.asarray(records.labels[padded]),
        seeds,
        settings.noise_multiplicity,
        settings.label_dropout,
        network.num_classes,
        network.log_sigma,
        settings.max_shift,
        settings.flip,
    )
    weights = torch.zeros(size)
    weights[: len(places)] = 1.0
    return batch, weights


def _finish_step(
    done: int,
    due: bool,
    learner: Learner,
    drawn: int,
    told: list[Told],
    checkpoints: Checkpoints,
    report: Report,
) -> None:
    # Computed on private data without noise, so these are sensitive; all but the first are of this worker's share.
    report("finetune/batch_size", drawn, done)
    if told:
        losses, norms = (torch.cat(one) for one in zip(*told, strict=True))
        report("finetune/loss", float(losses.mean()), done)
        settings = learner.settings
        limit = settings.norm_threshold if settings.clipping == "global" else settings.max_grad_norm
        report("finetune/clipped_fraction", float((norms > limit).float().mean()), done)
        report("finetune/mean_norm", float(norms.mean()), done)
    if learner.averages is not None and done in learner.snapshot_steps:
        learner.averages.write(checkpoints.folder)
    if due:
        checkpoints.save(STAGE, done, learner.state_dict())
