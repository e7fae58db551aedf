"""A tiny network, set and plan; also what a spawned worker runs."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from e2h.config import Config, FinetuneConfig, ModelConfig, RunConfig, SamplingConfig, WarmupConfig
from e2h.curriculum import finetune as finetune_module
from e2h.curriculum.checkpoint import Checkpoints
from e2h.curriculum.finetune import finetune
from e2h.curriculum.learner import PrivateRun
from e2h.curriculum.run import Run
from e2h.curriculum.warmup import warm_up
from e2h.curriculum.workers import Workers
from e2h.data.exports import write_hf_parquet
from e2h.data.prepare import finish_prepared, prepare_shard
from e2h.data.sources import open_source
from e2h.data.storage import ImageSet
from e2h.diffusion.ema import EMA
from e2h.diffusion.networks import UNet
from e2h.errors import BudgetError
from e2h.privacy.accounting import NEIGHBOURING_RELATION
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.ledger import Budget, Ledger
from e2h.privacy.logs import FileLog

MODEL = ModelConfig(base_width=8, width_multipliers=[1], attention_resolutions=[], embedding_width=16)
CLASSES, NUM_RECORDS, STEPS, UNIT = 3, 60, 20, 4
WARMUP = WarmupConfig(num_steps=20, batch_size=16, max_shift=1)
FINETUNE = FinetuneConfig(
    num_steps=STEPS, expected_batch_size=12, noise_multiplicity=2, ledger_block=4, checkpoint_every=5
)
RELEASE = Release("finetune", PoissonSampledGaussian(FINETUNE.expected_batch_size / NUM_RECORDS, 1.0, STEPS))


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def new_network() -> UNet:
    return UNet.from_config(MODEL, 8, 1, CLASSES, 0)


def records() -> ImageSet:
    """One bright bar a class, with noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(NUM_RECORDS) % CLASSES
    images = rng.integers(0, 60, (NUM_RECORDS, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 2] += 190
    return ImageSet(rng.choice(2**62, NUM_RECORDS, replace=False), labels, images)


def new_ledger(folder: Path) -> Ledger:
    ledger = Ledger(FileLog(folder / "ledger.jsonl"))
    ledger.open(Budget(1.0, 1e-5, "REPLACE_SPECIAL", (RELEASE,)), lambda releases, delta: 1.0)
    return ledger


@dataclass
class Training:
    """One call of `finetune` and what can be seen of it."""

    folder: Path
    network: UNet = field(default_factory=new_network)
    records: ImageSet = field(default_factory=records)
    domain: str = "ab" * 32
    binding: str = "binding"
    settings: FinetuneConfig = field(default_factory=lambda: FINETUNE)
    stop_after: int | None = None
    leaving: Callable[[int], bool] = lambda step: False
    progressed: list[int] = field(default_factory=list)
    reported: list[tuple[str, float, int]] = field(default_factory=list)

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints", self.binding, self.leaving)

    def progress(self, step: int) -> None:
        self.progressed.append(step)
        if step == self.stop_after:
            raise Killed

    def run(self, workers: Workers | None = None, ledger: Ledger | None = None) -> EMA:
        private = PrivateRun(RELEASE, ledger or new_ledger(self.folder), bytes(range(32)), self.domain)
        return finetune(
            self.network,
            self.records,
            self.settings,
            private,
            0,
            UNIT,
            workers or Workers.current(),
            self.checkpoints,
            lambda *point: self.reported.append(point),
            self.progress,
        )


def flat(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


def parameters(network: UNet) -> torch.Tensor:
    return flat(list(network.parameters()))


def averaged(ema: EMA) -> torch.Tensor:
    return flat(list(ema.parameters.values()))


def warmed(folder: Path, workers: Workers | None = None, report=lambda *point: None) -> UNet:
    """A network after the warm-up on the records themselves, as if they had been released."""
    network, images = new_network(), records()
    checkpoints = Checkpoints(folder / "checkpoints", "binding")
    warm_up(
        network,
        images.images,
        images.labels,
        WARMUP,
        0,
        workers or Workers.current(),
        checkpoints,
        report,
        lambda step: None,
    )
    return network


def watch_units(monkeypatched: Callable[[object, str, object], None]) -> dict[int, list[int]]:
    """Places of the records that this process puts into micro-batches, by step."""
    seen: dict[int, list[int]] = {}
    original = finetune_module._micro_batch

    def watched(network, images, places, settings, seed, step, size):
        seen.setdefault(step, []).extend(places.tolist())
        return original(network, images, places, settings, seed, step, size)

    monkeypatched(finetune_module, "_micro_batch", watched)
    return seen


class Refusing(Ledger):
    """Refuses the block of step 8."""

    def spend(self, name, event, domain, start, stop):
        if start == 8:
            raise BudgetError("step 8 is too much")
        return super().spend(name, event, domain, start, stop)


def refused_run(workers: Workers, folder: Path) -> dict:
    """What is left where the third block can't be paid."""
    folder.mkdir(exist_ok=True)
    ledger = new_ledger(folder)
    training, states = Training(folder), []
    training.progress = lambda step: states.append(parameters(training.network).clone())
    with pytest.raises(BudgetError if workers.rank == 0 else RuntimeError) as refused:
        training.run(workers, Refusing(ledger.chain.log))
    return {"message": str(refused.value), "states": states, "end": parameters(training.network).clone()}


def spawn(size: int, scenario: Callable[[Workers, Path], object], folder: Path) -> list:
    """What `scenario(workers, folder)` returns on each of `size` real processes with gloo between them."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_worker, args=(size, scenario, folder), nprocs=size)
    return [torch.load(folder / f"answer-{rank}.pt", weights_only=False) for rank in range(size)]


def _worker(rank: int, size: int, scenario: Callable[[Workers, Path], object], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder / 'meeting'}", world_size=size, rank=rank, timeout=timedelta(seconds=120)
    )
    try:
        torch.save(scenario(Workers.current(), folder), folder / f"answer-{rank}.pt")
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def small_config(storage: Path) -> Config:
    """A run on the real digits, of seconds."""
    config = Config(
        model=MODEL,
        warmup=WarmupConfig(num_steps=6, batch_size=8),
        finetune=FinetuneConfig(
            num_steps=6, expected_batch_size=20, noise_multiplicity=2, ledger_block=2, checkpoint_every=2
        ),
        sampling=SamplingConfig(num_images=20, num_steps=3, images_per_shard=8),
        run=RunConfig(storage=str(storage)),
    )
    config.privacy.secret = "env:E2H_TEST_SECRET"
    config.scaling.physical_batch_size = 8
    return config


def prepare(run: Run) -> Release:
    """Prepared digits, some central images and an open ledger: what `train` expects. Returns the accounted event."""
    data = run.config.data
    source = open_source(data)
    stats = [prepare_shard(shard, data, run.prepared, index) for index, shard in enumerate(source.shards)]
    facts = finish_prepared(run.prepared, source, data, stats)
    run.central.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
    write_hf_parquet(run.central / "images.parquet", images, np.arange(10), facts.class_names)
    step = PoissonSampledGaussian(run.config.finetune.expected_batch_size / facts.num_train, 1.0, 6)
    planned = (Release("finetune", step),)
    run.open_budget(Budget(10.0, 1e-4, NEIGHBOURING_RELATION.name, planned))
    return planned[0]
