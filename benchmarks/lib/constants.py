"""The constants of the cost model, measured on this machine: each the shortest of several repetitions.

What computes is measured in processor time, on one thread, which other programs disturb little; what waits (a disk, the
other process of a collective, Ray) by the clock.
"""

from __future__ import annotations

import copy
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scaling import NUM_DRAWS, batch_of, engine_of, network_of
from torch.utils.flop_counter import FlopCounterMode

from e2h.config import CentralConfig
from e2h.curriculum.batches import make_batch
from e2h.curriculum.central import CentralQuery, add_product, add_selected
from e2h.data.storage import PreparedFile, iter_batches, row_writer
from e2h.diffusion.ema import EMA
from e2h.diffusion.networks import UNet
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.ledger import Budget, Ledger
from e2h.privacy.logs import FileLog
from e2h.privacy.noise import gaussian_noise
from e2h.privacy.optimizer import SecureDPOptimizer
from e2h.privacy.sampling import poisson_mask

from .cost_model import STATE_BYTES, TRAINING_PASSES, Hardware, Host

KEY = bytes(range(32))
MASK_RECORDS = 10_000_000
NORMALS = (3_136, 49_152)  # of an image: 4 draws of 28x28x1 and of 64x64x3
CENTRAL_RECORDS, CENTRAL_ROUNDS = 512, 100
GROUPS = (2, 8, 64)  # workers that ask Ray at once


def shortest(work: Callable[[], object], repetitions: int = 5, clock: Callable[[], float] = time.process_time) -> float:
    """Seconds, after one call that warms up."""
    work()
    taken = []
    for _ in range(repetitions):
        start = clock()
        work()
        taken.append(clock() - start)
    return min(taken)


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of a least-squares line, neither below 0."""
    slope = max(0.0, float(np.polyfit(x, y, 1)[0]))
    return max(0.0, float(np.mean(y) - slope * np.mean(x))), slope


def forward_flops(network: UNet, image_size: int, channels: int) -> float:
    """Of one image; torch counts products in convolutions and matrix products alone. Nothing is computed."""
    shapes = copy.deepcopy(network).to("meta")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        image = torch.zeros(1, channels, image_size, image_size)
        shapes(image, torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    return float(counter.get_total_flops())


def measure_hardware(preset: str, image_size: int, unit: int, folder: Path) -> Hardware:
    """This machine's cores as workers with gloo between them, on one network."""
    network = network_of(preset).train()
    engine, sizes = engine_of(network), (max(1, unit // 4), unit)
    units = [partial(engine.accumulate, batch_of(preset, size), torch.ones(size)) for size in sizes]
    seconds = [shortest(one, 4) for one in units]
    fixed, an_image = line(sizes, seconds)
    an_image_flops = TRAINING_PASSES * NUM_DRAWS * forward_flops(network, image_size, 1)
    hop, link = gloo(sum(p.numel() for p in network.parameters()), folder)
    return Hardware(
        "this machine", an_image_flops / an_image, fixed, update_seconds(network), math.inf, hop, link, hop, link,
        workers_per_node=1_000, cores_per_node=1, spare_core=False, request=0.0, node_start=0.0,
    )  # fmt: skip


def update_seconds(network: UNet) -> float:
    """A parameter's share of totals, Adam and the moving average, the noise's own making left out."""
    adam, average, steps = torch.optim.Adam(network.parameters()), EMA(network, 0.999), iter(range(100))
    optimizer = SecureDPOptimizer(
        adam, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1, noise_key=lambda step: KEY
    )

    def one() -> float:
        step = next(steps)
        optimizer.prepare_noise(step)
        start = time.thread_time()  # of this thread: another makes the noise
        optimizer.step_private(step, 0)
        average.update(network)
        return time.thread_time() - start

    return min(one() for _ in range(6)) / sum(p.numel() for p in network.parameters())


def gloo(length: int, folder: Path) -> tuple[float, float]:
    """Seconds a message and bytes a second between two processes of this machine, from two sizes of a reduction."""
    mp.start_processes(_reduce, (length, str(folder)), 2, start_method="spawn")
    small, large = json.loads((folder / "gloo.json").read_text())
    return small / 2, 8 * length / max(large - small, 1e-9)  # ring of two: 2 messages of half the bytes


def _reduce(rank: int, length: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/gloo", timedelta(seconds=60), 2, rank)
    values = [torch.zeros(size, dtype=torch.int64) for size in (1, length)]
    found = [shortest(lambda v=value: dist.all_reduce(v), 20, time.perf_counter) for value in values]
    if rank == 0:
        (Path(folder) / "gloo.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure_host(network: UNet, folder: Path) -> Host:
    image, normal = line(NORMALS, [_batch_seconds(28, 1), _batch_seconds(64, 3)])
    ids = np.arange(MASK_RECORDS)
    coordinates = 1_000_000
    payment, payment_record = _payments(folder)
    encode, product, select = _central()
    start, barriers = ray_seconds(folder)
    barrier, barrier_worker = line(GROUPS, barriers)
    generator, state = torch.Generator().manual_seed(0), _state(network)
    return Host(
        image=image,
        normal=normal,
        mask=shortest(lambda: np.flatnonzero(poisson_mask(KEY, 1, ids, 0.001)), 3) / MASK_RECORDS,
        noise=shortest(lambda: gaussian_noise(KEY, 0, coordinates, 2.0**30)) / coordinates,
        save=shortest(lambda: torch.save(state, io.BytesIO())) / (STATE_BYTES * len(state["weights"])),
        payment=payment,
        payment_record=payment_record,
        unpack=_unpack(folder),
        encode=encode,
        product=product,
        select=select,
        normal64=shortest(lambda: torch.randn(1, 28, 28, generator=generator, dtype=torch.float64), 200) / 784,
        barrier=barrier,
        barrier_worker=barrier_worker,
        start=start,
    )


def _batch_seconds(size: int, channels: int) -> float:
    """Of one image of a micro-batch of 16."""
    images, labels = np.zeros((16, size, size, channels), np.uint8), np.zeros(16, np.int64)
    return shortest(lambda: make_batch(images, labels, list(range(16)), NUM_DRAWS, 0.1, 10)) / 16


def _state(network: UNet) -> dict[str, torch.Tensor]:
    length = sum(p.numel() for p in network.parameters())
    return {name: torch.zeros(length) for name in ("weights", "average", "first", "second")}


def _payments(folder: Path) -> tuple[float, float]:
    """Seconds of a payment for a block of 16 steps, and what each record before it adds."""
    event, release = PoissonSampledGaussian(0.01, 1.0, 16_000), "finetune"
    ledger = Ledger(FileLog(folder / "paid.jsonl"), witness=folder / "paid.head")
    ledger.open(Budget(10.0, 1e-5, "ADD_OR_REMOVE_ONE", (Release(release, event),)), lambda *_: 1.0)
    taken = []
    for start in range(0, 16_000, 16):
        begin = time.perf_counter()
        ledger.spend(release, event, "ab" * 32, start, start + 16)
        taken.append(time.perf_counter() - begin)
        if len(taken) == 400:
            break
    parts = [float(np.quantile(part, 0.1)) for part in np.array_split(taken, 8)]
    return line([25 + 50 * i for i in range(8)], parts)


def _central() -> tuple[float, float, float]:
    """Seconds of the central pass for a pixel's encoding, a number of a product, a number looked up (64x64x3)."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (CENTRAL_RECORDS, 64, 64, 3), dtype=np.uint8)
    event = PoissonSampledGaussian(0.1, 10.0, CENTRAL_ROUNDS)
    config = CentralConfig(pool_factor=2, max_norm=14.0, centre=0.5, count_weight=0.2)
    query = CentralQuery(config, event, 64, 3, 2, CENTRAL_RECORDS)
    rows, masks = query.encode(images)[:, :-1], rng.random((CENTRAL_ROUNDS, CENTRAL_RECORDS)) < 0.04
    total = np.zeros((CENTRAL_ROUNDS, rows.shape[1]), np.int64)
    singles, integers = rows.astype(np.float32), rows.astype(np.int32)
    encode = shortest(lambda: [query.encode(images[start : start + 16]) for start in range(0, 512, 16)], 3)
    product = shortest(lambda: add_product(total, masks, singles), 3)
    select = shortest(lambda: add_selected(total, masks, integers), 3)
    return encode / images.size, product / masks.size / rows.shape[1], select / masks.sum() / rows.shape[1]


def _unpack(folder: Path) -> float:
    """Seconds a byte of images from a prepared shard to the file that workers map."""
    rng, path = np.random.default_rng(0), folder / "shard.parquet"
    coarse = rng.integers(20, 235, (2048, 8, 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    images = np.clip(coarse + rng.normal(0, 8, coarse.shape), 0, 255).astype(np.uint8)
    with row_writer(path, (64, 3), ["one"]) as rows:
        for identity, image in enumerate(images):
            rows.add((identity, 0, image.tobytes()))
    written = PreparedFile(str(path), len(images), rows.digest())

    def unpack() -> None:
        with open(folder / "mapped", "wb") as file:
            for batch in iter_batches([written], 1024):
                file.write(batch.images.tobytes())

    return shortest(unpack, 3) / images.size


def ray_seconds(folder: Path) -> tuple[float, list[float]]:
    """Seconds from nothing to a running group of two workers, and of Ray's question to groups of GROUPS workers.

    In a process of its own: nothing else here imports Ray. The question is an actor's; one process asks for all.
    """
    mp.start_processes(_with_ray, (str(folder),), 1, start_method="spawn")
    found = json.loads((folder / "ray.json").read_text())
    return found["start"], found["barriers"]


def _with_ray(_: int, folder: str) -> None:
    from e2h.config import ScalingConfig
    from e2h.distributed.session import session

    start, mark = time.time(), Path(folder) / "started"
    with session(ScalingConfig(), Path(folder) / "ray.log"):
        from ray.train.v2.api.config import RunConfig
        from ray.train.v2.api.config import ScalingConfig as Workers
        from ray.train.v2.torch.torch_trainer import TorchTrainer

        def note() -> None:  # nested, so that it travels whole: workers don't have this file on their path
            import ray.train

            import e2h.curriculum.train  # noqa: F401  what a worker imports

            if ray.train.get_context().get_world_rank() == 0:
                mark.write_text(str(time.time()))

        storage = RunConfig(storage_path=folder, name="start")
        TorchTrainer(note, scaling_config=Workers(num_workers=2), run_config=storage).fit()
        found = {"start": float(mark.read_text()) - start, "barriers": [_barrier(size) for size in GROUPS]}
    (Path(folder) / "ray.json").write_text(json.dumps(found))


def _barrier(size: int) -> float:
    import ray
    from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor

    actor, turns = SynchronizationActor.remote(), iter(range(1_000))

    def ask() -> None:
        turn, words = next(turns), {"world_size": size, "data": None, "caller_method_name": "barrier"}
        asked = [
            actor.broadcast_from_rank_zero.remote(world_rank=rank, collective_seq=turn, **words) for rank in range(size)
        ]
        ray.get(asked)

    seconds = shortest(ask, 50, time.perf_counter)
    ray.kill(actor)
    return seconds


def in_scratch(measure: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder))
