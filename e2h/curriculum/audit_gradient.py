"""What an audit sees of DP-SGD: the very functions that `finetune` calls, on random records and canaries.

The weights stay as they are: a step hands its release to the auditor where training has Adam. Every worker of a group
calls `observe`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from e2h.config import FinetuneConfig
from e2h.curriculum.canaries import NUM_OTHERS, CanaryRecords, Subject, canary_loss, canary_network, mark
from e2h.curriculum.finetune import draw, private_engine, sum_units
from e2h.curriculum.learner import PrivateRun, private_optimizer
from e2h.curriculum.workers import Workers
from e2h.data.storage import ImageSet
from e2h.diffusion.networks import UNet
from e2h.privacy.audit import Evidence
from e2h.privacy.dpsgd import GRID_BITS, ClippedSum, Engine
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.ledger import Ledger

SAMPLING_PROB = 0.1
NUM_DRAWS = 400  # steps whose draws alone are looked at
SAMPLE_SIZE = 2**16  # coordinates whose noise is kept for each step; of the others, sums of squares
MAX_DRAWS = 2  # of noise a record; they are averaged before the clip, and more take longer
MAX_UNIT = 16  # records: small, so that every worker has some in every step
# Noise cancels between coupled steps. Little of it keeps float32 from rounding the difference.
COUPLED_NOISE = 0.01


def event_to_audit(subject: Subject) -> PoissonSampledGaussian:
    """The audit's own q and T, the noise still to be calibrated; q N is a whole number, as in a plan."""
    num_records = subject.num_canaries + NUM_OTHERS
    return PoissonSampledGaussian(round(SAMPLING_PROB * num_records) / num_records, 1.0, subject.num_steps)


class Recorder(torch.optim.Optimizer):
    """Stands where training has Adam: keeps the released gradient [P] and leaves the weights as they are."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__(network.parameters(), {})
        self.released = np.zeros(0)

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        self.released = torch.cat(gradients).double().numpy()


@dataclass(frozen=True)
class Mechanism:
    """DP-SGD as configured, with the audit's own event, on one worker of a group."""

    subject: Subject
    network: UNet
    release: Release
    num_records: int
    secret: bytes
    workers: Workers

    @property
    def private(self) -> PrivateRun:
        no_ledger = cast(Ledger, None)  # an audit reads no private record and spends nothing
        shares = self.subject.config.privacy.noise_shares
        return PrivateRun(self.release, no_ledger, self.secret, "audit", noise_shares=shares)

    @cached_property
    def engine(self) -> Engine:
        return private_engine(self.network, canary_loss(self.settings), self.settings)

    @property
    def settings(self) -> FinetuneConfig:
        """As configured, with the audit's public q N and at most `MAX_DRAWS` draws a record."""
        configured = self.subject.config.finetune
        return replace(
            configured,
            expected_batch_size=round(self.release.event.sampling_prob * self.num_records),
            noise_multiplicity=min(MAX_DRAWS, configured.noise_multiplicity),
        )

    def draw(self, step: int, records: ImageSet) -> np.ndarray:
        """bool [N]: who joins a step."""
        joins = np.zeros(len(records), bool)
        joins[draw(self.private, step, records)] = True
        return joins

    def step(self, step: int, records: ImageSet) -> tuple[np.ndarray, np.ndarray]:
        """One step of the group: its release and the sum without noise, both [P] in units of max_grad_norm."""
        settings, recorder = self.settings, Recorder(self.network)
        optimizer = private_optimizer(recorder, settings, self.private, self.workers)
        selected = draw(self.private, step, records)
        config = self.subject.config
        unit, seed = min(MAX_UNIT, config.scaling.physical_batch_size or MAX_UNIT), config.seed
        total = torch.zeros(num_coordinates(self.network), dtype=torch.int64)

        def add(clipped: ClippedSum) -> None:
            optimizer.accumulate(clipped)
            total.add_(clipped.vector)

        sum_units(self.engine, add, self.network, records, selected, settings, seed, step, unit, self.workers)
        self.workers.sum_integers(total)
        optimizer.step_private(step, len(selected))
        return recorder.released * (
            settings.expected_batch_size / settings.max_grad_norm
        ), total.double().numpy() * 2.0**-GRID_BITS


def num_coordinates(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def observe(subject: Subject, release: Release, secret: bytes, workers: Workers) -> Evidence:
    """Runs the audited mechanism; call it on every worker, with the same arguments. Complete on each.

    Args:
      release: `event_to_audit` with calibrated noise.
      secret: 32 bytes, of this audit alone.
    """
    torch.set_num_threads(1)
    records = CanaryRecords(subject, secret)
    mechanism = Mechanism(subject, canary_network(subject), release, len(records.all), secret, workers)
    draws = np.stack([mechanism.draw(step, records.all) for step in range(NUM_DRAWS)])
    return Evidence(
        draws=draws,
        draws_agree=_same_everywhere(draws.tobytes(), workers),
        distances=coupled_distances(mechanism, records),
        included=records.included,
        **_watch(mechanism, records),
    )


def _watch(mechanism: Mechanism, records: CanaryRecords) -> dict[str, Any]:
    """Runs all steps on the included canaries and the ordinary records."""
    event, joined, count = mechanism.release.event, records.joined(), records.num_canaries
    present, size = records.subset(joined), num_coordinates(mechanism.network)
    kept = np.unique(np.linspace(0, size - 1, min(size, SAMPLE_SIZE)).astype(np.int64))
    square_sums, sample, scores = np.zeros(size), [], np.zeros(count)
    entered_as_drawn, releases = True, hashlib.sha256()
    for step in range(event.count):
        released, total = mechanism.step(step, present)
        noise = (released - total) / event.noise_multiplier
        square_sums += noise**2
        sample.append(noise[kept])
        scores += released[-count:]
        drawn = joined[mechanism.draw(step, present)]
        entered = np.flatnonzero(total[-count:])
        entered_as_drawn &= np.array_equal(entered, np.sort(drawn[drawn < count]))
        releases.update(released.tobytes())
    return {
        "square_sums": square_sums,
        "sample": np.stack(sample),
        "scores": scores,
        "entered_as_drawn": entered_as_drawn,
        "releases_agree": _same_everywhere(releases.digest(), mechanism.workers),
    }


def _same_everywhere(content: bytes, workers: Workers) -> bool:
    return len(workers.distinct(hashlib.sha256(content).hexdigest())) == 1


def coupled_distances(mechanism: Mechanism, records: CanaryRecords) -> dict[str, float]:
    """How far a step's release moves when one record is replaced by nothing, by kind of record; same key."""
    event = replace(mechanism.release.event, noise_multiplier=COUPLED_NOISE)
    quiet = replace(mechanism, release=replace(mechanism.release, event=event))
    others = records.subset(np.arange(records.num_canaries, len(records.all)))
    distances = {}
    for kind, image in _extreme_images(records):
        # A step at which the record joins, whatever a draw goes by.
        whole_at = ((step, _insert(others, _one(step, image))) for step in range(10_000))
        step, whole = next((step, whole) for step, whole in whole_at if quiet.draw(step, whole)[len(others) // 2])
        moved = quiet.step(step, whole)[0] - quiet.step(step, others)[0]
        distances[kind] = float(np.linalg.norm(moved))
    return distances


def _extreme_images(records: CanaryRecords) -> Iterator[tuple[str, np.ndarray]]:
    one = records.all.images[-1:]
    yield "canary", records.all.images[:1]
    yield "black image", mark(np.zeros_like(one), 0)
    yield "white image", mark(np.full_like(one, 255), 0)
    yield "random image", one


def _one(identity: int, image: np.ndarray) -> ImageSet:
    return ImageSet(np.array([identity]), np.array([0]), image)


def _insert(others: ImageSet, one: ImageSet) -> ImageSet:
    """In the middle: coins and random numbers that follow a place instead of a record would move, too."""
    middle = len(others) // 2
    pairs = ((others.ids, one.ids), (others.labels, one.labels), (others.images, one.images))
    return ImageSet(*(np.concatenate([rows[:middle], row, rows[middle:]]) for rows, row in pairs))
