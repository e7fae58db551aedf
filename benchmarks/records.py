"""What large sets cost: preparing, the central pass beside numpy's own rate, the mapped split, and memory.

    python benchmarks/records.py            # 200,000 images of 64x64x3, 500 rounds; some ten minutes on two cores
    python benchmarks/records.py --quick    # 16,384 images, 100 rounds, under two minutes

The set is synthetic: PNG files in Parquet, a few hundred different images over and over, each row a record of its own.

numpy's rate is the obvious loop on one core, with the images and the drawn masks in memory: `masks @ pixels` in blocks
that float32 holds, no clipping, sums that float32 rounds. The central pass reads Parquet, draws masks, clips, and adds
up exactly; it runs on all cores, with Ray warm. Both are timed on the same records, masks and rounds in the same run.

Per core means per second of processor time, which a busy machine disturbs less: of all processes for the pass, Ray's
own included. Rows a second are those of the clock.

Slopes: the processor time of all records over that of half of them, and of all rounds over that of half, as an
exponent: 1 is linear, 0 is constant. Below 1 in rounds is what reading and clipping cost, once for all rounds;
numpy has no such cost, so with few rounds (--quick) the pass is further from its rate.

Memory is the proportional set size of all processes, Ray's included, looked at twice a second. Mapped files are counted
apart: they are the system's page cache, and it takes those pages back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from e2h.config import CentralConfig, Config, DataConfig, PrivacyConfig, ScalingConfig
from e2h.curriculum.central import CentralQuery
from e2h.curriculum.run import Run
from e2h.data.images import encode_png
from e2h.data.mapping import map_split
from e2h.data.prepare import finish_prepared
from e2h.data.sources import open_source
from e2h.data.storage import Prepared, iter_batches, open_prepared
from e2h.privacy.events import PoissonSampledGaussian
from e2h.privacy.keys import derive_key
from e2h.privacy.sampling import poisson_mask

SIDE, CHANNELS = 64, 3
DIFFERENT = 512  # images
FILE_ROWS = 20_000
BATCH = 4096
NUMPY_BLOCK, NUMPY_RECORDS = 2048, 16_384
DOMAIN = "benchmark"


def write_source(folder: Path, options: argparse.Namespace) -> None:
    """Blurred blobs with grain: PNG files of a photograph's size."""
    rng, kind = np.random.default_rng(0), pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    coarse = rng.integers(20, 235, (DIFFERENT, 8, 8, CHANNELS)).repeat(8, axis=1).repeat(8, axis=2)
    images = np.clip(coarse + rng.normal(0, 8, coarse.shape), 0, 255).astype(np.uint8)
    files = [encode_png(image) for image in images]
    folder.mkdir()
    for number, start in enumerate(range(0, options.records, FILE_ROWS)):
        rows = range(start, min(start + FILE_ROWS, options.records))
        column = pa.array([{"bytes": files[row % DIFFERENT], "path": None} for row in rows], kind)
        table = pa.table({"image": column, "label": pa.array([row % options.classes for row in rows])})
        pq.write_table(table, folder / f"part-{number:03}.parquet", row_group_size=1000, compression="none")


def processes() -> list[int]:
    """This process and all below it."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents.setdefault(parent, []).append(int(stat.parent.name))
    found = [os.getpid()]
    for one in found:
        found += parents.get(one, [])
    return found


def memory() -> tuple[int, int]:
    """Bytes of all processes: what is theirs (anonymous and shared), and mapped files."""
    own = mapped = 0
    for process in processes():
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
        mapped += sizes["Pss_File:"]
        own += sizes["Pss_Anon:"] + sizes["Pss_Shmem:"]
    return own, mapped


def processor_seconds() -> float:
    """That all processes have had so far."""
    ticks = 0
    for process in processes():
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Stages:
    """Seconds by the clock, of the processors, and peak memory, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}
        self.peaks: dict[str, tuple[int, int]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        peak, over, own = [memory()], threading.Event(), [0.0]

        def watch() -> None:
            while not over.wait(0.5):
                peak.append(memory())
            own[0] = time.thread_time()

        watcher = threading.Thread(target=watch)
        watcher.start()
        start, before = time.perf_counter(), processor_seconds()
        try:
            yield
        finally:
            self.seconds[name], used = time.perf_counter() - start, processor_seconds() - before
            over.set()
            watcher.join()
            self.processor[name], self.peaks[name] = used - own[0], max(peak, key=sum)


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    return clock() - start


def numpy_rates(prepared: Prepared, query: CentralQuery, key: bytes) -> dict[str, float]:
    """Records a second of the obvious loop, on one core, by floating-point type."""
    blocks, ids = [], []
    for block in iter_batches(prepared.files("train"), NUMPY_BLOCK):
        blocks.append(block.images.reshape(len(block), -1).copy())
        ids.append(block.ids)
        if sum(map(len, blocks)) >= NUMPY_RECORDS:
            break
    images = np.concatenate(blocks)
    rounds, q = range(query.event.count), query.event.sampling_prob
    masks = np.stack([poisson_mask(key, t, np.concatenate(ids), q) for t in rounds])

    def sums(kind: type) -> None:
        total = np.zeros((len(masks), images.shape[1]), kind)
        for start in range(0, len(images), NUMPY_BLOCK):
            stop = start + NUMPY_BLOCK
            total += masks[:, start:stop].astype(kind) @ images[start:stop].astype(kind)

    def rate(kind: type) -> float:
        return len(images) / min(timed(lambda: sums(kind), time.process_time) for _ in range(2))

    return {"numpy float32": rate(np.float32), "numpy float64": rate(np.float64)}


def part_of(prepared: Prepared, share: float) -> Prepared:
    """The first files of the training split."""
    files = prepared.manifest.files["train"]
    kept = files[: max(1, round(len(files) * share))]
    manifest = replace(prepared.manifest, files={"train": kept, "test": ()}, num_train=sum(file.rows for file in kept))
    return Prepared(prepared.folder, manifest)


def exponent(large: tuple[float, float], small: tuple[float, float]) -> float:
    """Of seconds in size, from two pairs (size, seconds)."""
    return float(np.log(large[1] / small[1]) / np.log(large[0] / small[0]))


def central(run: Run, prepared: Prepared, options: argparse.Namespace, stages: Stages) -> dict[str, float]:
    from e2h.distributed.datasets import query_sums

    def query(rounds: int) -> CentralQuery:
        event = PoissonSampledGaussian(options.sampling_prob, 5.0, rounds)
        return CentralQuery(run.config.central, event, SIDE, CHANNELS, options.classes, options.records)

    def seconds(part: Prepared, rounds: int) -> float:
        return timed(lambda: query_sums(run, part, query(rounds), "central", DOMAIN), processor_seconds)

    whole, half = query(options.rounds), part_of(prepared, 0.5)
    seconds(half, 1)  # the workers start and import
    with stages.stage("central pass"):
        sums = query_sums(run, prepared, whole, "central", DOMAIN)
    taken = stages.processor["central pass"]
    with stages.stage("noise and images"):
        whole.decode(whole.release(sums, derive_key(run.secret(), "central/noise", DOMAIN)))
    in_half, rounds = (half.manifest.num_train, seconds(half, options.rounds)), options.rounds // 2
    return {
        **numpy_rates(prepared, whole, derive_key(run.secret(), "central/sampling", DOMAIN)),
        "central pass": options.records / stages.seconds["central pass"],
        "central pass, one core": options.records / taken,
        "exponent in records": exponent((options.records, taken), in_half),
        "exponent in rounds": exponent((options.rounds, taken), (rounds, seconds(prepared, rounds))),
    }


def batch_milliseconds(images: np.ndarray) -> float:
    rng = np.random.default_rng(1)
    draws = [np.sort(rng.choice(len(images), BATCH, replace=False)) for _ in range(10)]
    return 1000 * float(np.median([timed(lambda draw=draw: images[draw]) for draw in draws]))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from e2h.distributed.datasets import prepare_shards
    from e2h.distributed.session import session

    data = DataConfig("benchmark", "parquet", str(folder / "source"), SIDE, CHANNELS, test_fraction=0.0)
    config = Config(data=data, privacy=PrivacyConfig(test_mode=True), central=CentralConfig(max_norm=20.0))
    run, stages = Run(folder / "run", config), Stages()
    write_source(folder / "source", options)
    with session(ScalingConfig(), folder / "ray.log"):
        with stages.stage("prepare"):
            source = open_source(data)
            finish_prepared(run.prepared, source, data, prepare_shards(source, data, str(run.prepared)))
        prepared = open_prepared(run.prepared)
        rates = central(run, prepared, options, stages)
    with stages.stage("map"):
        mapped = map_split(prepared, "train", folder / "cache")
    with stages.stage("batches"):
        milliseconds = batch_milliseconds(mapped.images)
    for name in ("prepare", "map"):
        rates[name] = options.records / stages.seconds[name]
    return summary(rates, stages, milliseconds, options)


def summary(rates: dict[str, float], stages: Stages, batch: float, options: argparse.Namespace) -> dict[str, Any]:
    best = max(rates["numpy float32"], rates["numpy float64"])
    names = ("prepare", "map", "central pass", "central pass, one core", "numpy float32", "numpy float64")
    return {
        "records": options.records,
        "rounds": options.rounds,
        "sampling_prob": options.sampling_prob,
        "cores": os.cpu_count(),
        "rows_per_second": {name: round(rates[name]) for name in names},
        "central_per_core_over_numpy": round(rates["central pass, one core"] / best, 3),
        "exponent_in_records": round(rates["exponent in records"], 3),
        "exponent_in_rounds": round(rates["exponent in rounds"], 3),
        "batch_milliseconds": round(batch, 1),
        "seconds": {name: round(value, 1) for name, value in stages.seconds.items()},
        "peak_mib": {name: [size >> 20 for size in peak] for name, peak in stages.peaks.items()},
    }


def print_table(found: dict[str, Any]) -> None:
    print(f"{found['records']} records of {SIDE}x{SIDE}x{CHANNELS}, {found['rounds']} rounds, {found['cores']} cores")
    for name, rate in found["rows_per_second"].items():
        print(f"{name:24}{rate:10} rows/s")
    print(f"{'central pass':24}{found['central_per_core_over_numpy']:10.2f} of numpy's rate, per core")
    print(
        f"{'exponents':24}{found['exponent_in_records']:10.2f} in records, {found['exponent_in_rounds']:.2f} in rounds"
    )
    print(f"{'random batch':24}{found['batch_milliseconds']:10.1f} ms for {BATCH} mapped images")
    for name, (own, mapped) in found["peak_mib"].items():
        print(f"{name:24}{own + mapped:10} MiB at most, {mapped} of them mapped files; {found['seconds'][name]:.1f} s")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Cost of large sets: prepare, central pass, mapped split, memory.")
    parser.add_argument("--quick", action="store_true", help="16,384 records, 100 rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--records", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--classes", type=int, default=1, help="rounds x classes images are released")
    parser.add_argument("--sampling-prob", type=float, default=0.5)
    options = parser.parse_args(arguments)
    options.records = options.records or (16_384 if options.quick else 200_000)
    options.rounds = options.rounds or (100 if options.quick else 500)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options)
    print_table(found)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
