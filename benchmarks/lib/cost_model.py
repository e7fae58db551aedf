"""What a step of DP-SGD and a whole run cost, as a sum of named terms: seconds from counts and constants.

A step is bulk-synchronous: every worker evaluates its work units, and one collective ends it. What rank 0 does alone
(ledger, checkpoint) all others wait for. So the terms add up; but this step's noise and the next one's mask, each made
in a thread of its own, hide behind the gradients where there are cores for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binom

from e2h.config import expect
from e2h.curriculum.central import DENSE
from e2h.curriculum.checkpoint import EVERY_S
from e2h.curriculum.warmup import UNITS_PER_STEP

TRAINING_PASSES = 3  # forward, gradients of inputs, gradients of weights: each a forward pass's arithmetic
TOTAL_BYTES = 8  # of a coordinate in the collective: int64
STATE_BYTES = 16  # of a parameter in a checkpoint: weights, their average, Adam's two moments
UNITS = tuple(2**i for i in range(9))


@dataclass(frozen=True)
class Work:
    """A run's counts, all of them public. See `e2h.config` for the meaning of most.

    Attributes:
      forward_flops: of one image in one forward pass; a multiplication and an addition are two.
      evaluations: forward passes for one synthetic image.
      sampling_draws: normal images for one synthetic image.
      central_dimension: numbers that a record contributes to a round of the central query.
    """

    name: str
    records: int
    batch: int
    draws: int
    steps: int
    pixels: int
    parameters: int
    forward_flops: float
    ledger_block: int = 16
    checkpoint_every: int = 20
    warmup_steps: int = 0
    warmup_batch: int = 64
    central_rounds: int = 0
    central_prob: float = 0.1
    central_dimension: int = 0
    synthetic_images: int = 0
    evaluations: int = 0
    sampling_draws: int = 1

    def __post_init__(self) -> None:
        for name in ("records", "batch", "draws", "steps", "pixels", "parameters", "forward_flops", "ledger_block"):
            expect(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        expect(self.batch <= self.records, "batch", self.batch, f"at most the {self.records} records")

    @property
    def training_flops(self) -> float:
        """Of one image with its K draws."""
        return TRAINING_PASSES * self.draws * self.forward_flops


@dataclass(frozen=True)
class Host:
    """Constants of one processor core, its disk, and Ray; measured. Seconds a ... unless named otherwise."""

    image: float  # image of a micro-batch: reading it, its generator
    normal: float  # normal number of a micro-batch
    mask: float  # record and draw
    noise: float  # coordinate and step
    save: float  # byte of a checkpoint, serialised
    payment: float  # payment into a ledger in a file
    payment_record: float  # payment and record that the ledger already has
    unpack: float  # byte of images, Parquet to mapped file
    encode: float  # pixel of the central pass
    product: float  # record, round and number of the central pass, as a matrix product
    select: float  # the same for a record that the round drew, looked up
    normal64: float  # normal number of a sampler
    barrier: float  # Ray's question whether a machine must leave
    barrier_worker: float  # the same, for each worker
    start: float  # start of Ray and a group of workers


@dataclass(frozen=True)
class Hardware:
    """What the workers compute on and how they are joined. For the machine at hand measured, for GPUs assumed.

    Attributes:
      flops: a worker's sustained rate in a private step, a second.
      unit: fixed cost of a work unit (kernel launches), seconds.
      update: seconds a parameter for totals, Adam and average.
      copy: bytes a second from host to device; infinite where there is none.
      hop, link: seconds a message, and bytes a second, between neighbours of the ring on one node.
      far_hop, far_link: the same where the ring leaves the node.
      spare_core: whether a worker has cores for the threads that make noise and mask.
      request: seconds a request to the store where the ledger lies; 0 for a file.
    """

    name: str
    flops: float
    unit: float
    update: float
    copy: float
    hop: float
    link: float
    far_hop: float
    far_link: float
    workers_per_node: int
    cores_per_node: int
    spare_core: bool
    request: float
    node_start: float

    def __post_init__(self) -> None:
        for name in ("flops", "copy", "link", "far_link", "workers_per_node", "cores_per_node"):
            expect(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        for name in ("unit", "update", "hop", "far_hop", "request", "node_start"):
            expect(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "a number of at least 0")


# Ray's question is asked once in so many seconds, or steps (e2h.distributed.training, which would load Ray).
ASK_EVERY_S, ASK_EVERY_STEPS = 1.0, 16
# One payment into a ledger in a bucket, its witness included; tests/test_cost_model.py counts them.
PAYMENT_REQUESTS = 4

_CLOUD = {"unit": 0.01, "copy": 2e10, "hop": 1e-5, "far_hop": 5e-5, "spare_core": True, "request": 0.1}
HARDWARE = {
    "a100": Hardware("A100", 31.2e12, update=4e-11, link=2e11, far_link=1.25e10, workers_per_node=8,
                     cores_per_node=96, node_start=180.0, **_CLOUD),
    "l4": Hardware("L4", 12.1e12, update=2e-10, link=1.25e9, far_link=1.25e9, workers_per_node=1,
                   cores_per_node=8, node_start=180.0, **_CLOUD),
}  # fmt: skip


def busiest_units(work: Work, unit: int, workers: int) -> float:
    """Expected number of units of the busiest worker, over the Poisson draws of a step; units are dealt in turn."""
    expect(unit >= 1 and workers >= 1, "unit, workers", (unit, workers), "numbers of at least 1")
    law = binom(work.records, work.batch / work.records)
    drawn = np.arange(max(0, int(law.mean() - 9 * law.std()) - 1), int(law.mean() + 9 * law.std()) + 2)
    return float(law.pmf(drawn) @ dealt(drawn, unit, workers))


def dealt(drawn: np.ndarray, unit: int, workers: int) -> np.ndarray:
    """Units of the busiest worker for each number of drawn records."""
    return np.ceil(np.ceil(drawn / unit) / workers)


def ring(num_bytes: float, workers: int, hardware: Hardware) -> float:
    """Seconds of a ring all-reduce: 2 (W - 1) messages in a row, each of a W-th of the bytes."""
    near = workers <= hardware.workers_per_node
    hop, link = (hardware.hop, hardware.link) if near else (hardware.far_hop, hardware.far_link)
    return 2 * (workers - 1) * (hop + num_bytes / workers / link)


def payment(work: Work, host: Host, hardware: Hardware) -> float:
    """Seconds of one payment when half of them are made: the ledger is replayed for each."""
    at_store = PAYMENT_REQUESTS * hardware.request if hardware.request else host.payment
    return at_store + host.payment_record * work.steps / work.ledger_block / 2


def behind(seconds: float, gradients: float, hardware: Hardware) -> float:
    """What a thread leaves to wait for that works beside the gradients."""
    return max(0.0, seconds - gradients) if hardware.spare_core else seconds


def barrier(host: Host, workers: int, step: float) -> float:
    """Seconds a step of `step` seconds for Ray's question."""
    return (host.barrier + workers * host.barrier_worker) / min(ASK_EVERY_STEPS, max(1.0, ASK_EVERY_S / step))


def step_terms(
    work: Work, host: Host, hardware: Hardware, workers: int, unit: int, units: float | None = None
) -> dict[str, float]:
    """Seconds of one step by term.

    Args:
      units: of the busiest worker; None: the expectation over draws.
    """
    units = busiest_units(work, unit, workers) if units is None else units
    normals = work.draws * work.pixels
    ideal = work.batch / workers * work.training_flops / hardware.flops
    padded = units * unit * work.training_flops / hardware.flops
    terms = {
        "gradients": ideal,
        "idle, padding": padded - ideal,
        "launches": units * hardware.unit,
        "micro-batches": units * unit * (host.image + normals * (host.normal + 4 / hardware.copy)),
        "mask": behind(work.records * host.mask, padded, hardware),
        "noise": behind(work.parameters / workers * host.noise, padded, hardware),
        "collective": ring(TOTAL_BYTES * work.parameters, workers, hardware),
        "update": work.parameters * hardware.update,
        "ledger": payment(work, host, hardware) / work.ledger_block,
    }
    terms["barrier"] = barrier(host, workers, sum(terms.values()))
    # Saved after so many steps or seconds, whichever is sooner.
    distance = min(work.checkpoint_every, max(1.0, EVERY_S / sum(terms.values())))
    return {**terms, "checkpoint": STATE_BYTES * work.parameters * host.save / distance}


def best_unit(work: Work, host: Host, hardware: Hardware, workers: int) -> int:
    """The work unit, a power of two up to 256, with the shortest expected step."""
    return min(UNITS, key=lambda unit: sum(step_terms(work, host, hardware, workers, unit).values()))


def efficiency(terms: dict[str, float]) -> float:
    """The share of a step in which every worker computes gradients of drawn records."""
    return terms["gradients"] / sum(terms.values())


def run_terms(work: Work, host: Host, hardware: Hardware, workers: int, unit: int) -> dict[str, float]:
    """Seconds of a run's stages, preparing and evaluating left out."""
    nodes = math.ceil(workers / hardware.workers_per_node)
    return {
        "start": hardware.node_start + host.start,
        "central": central_seconds(work, host, nodes * hardware.cores_per_node),
        "unpack": work.records * work.pixels * host.unpack,
        "warm-up": warmup_seconds(work, host, hardware, workers),
        "DP-SGD": work.steps * sum(step_terms(work, host, hardware, workers, unit).values()),
        "sampling": sampling_seconds(work, host, hardware, workers),
    }


def central_seconds(work: Work, host: Host, cores: int) -> float:
    """The central pass: every record read and encoded once, drawn and added for each round."""
    sums = host.product if work.central_prob >= DENSE else work.central_prob * host.select
    a_round = host.mask + work.central_dimension * sums
    a_record = work.pixels * (host.unpack + host.encode) + work.central_rounds * a_round
    return work.records * a_record / cores if work.central_rounds else 0.0


def warmup_seconds(work: Work, host: Host, hardware: Hardware, workers: int) -> float:
    """Ordinary training; its batch is in so few units that more workers than that are idle."""
    one = replace(work, draws=1, batch=min(work.warmup_batch, work.records))
    size, units = math.ceil(one.batch / UNITS_PER_STEP), math.ceil(UNITS_PER_STEP / workers)
    a_unit = size * (one.training_flops / hardware.flops + host.image + one.pixels * host.normal) + hardware.unit
    ends = ring(TOTAL_BYTES * one.parameters, workers, hardware) + one.parameters * hardware.update
    a_step = units * a_unit + ends
    return work.warmup_steps * (a_step + barrier(host, workers, a_step))


def sampling_seconds(work: Work, host: Host, hardware: Hardware, workers: int) -> float:
    an_image = work.evaluations * work.forward_flops / hardware.flops
    an_image += work.sampling_draws * work.pixels * (host.normal64 + 8 / hardware.copy)
    return work.synthetic_images * an_image / workers
