"""The easy stages: each pays, sums over all records, adds noise once, and leaves images to learn from first."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial

import numpy as np

from e2h.config import stamp
from e2h.curriculum.central import CentralQuery
from e2h.curriculum.frequency import FrequencyQuery
from e2h.curriculum.generator import fit_generator, generate
from e2h.curriculum.machine import machine
from e2h.curriculum.pictures import by_class, by_round, write_grid
from e2h.curriculum.run import Run
from e2h.data.exports import read_hf_parquet, write_hf_parquet
from e2h.data.filesystem import write_bytes
from e2h.data.remote import Place
from e2h.data.storage import DAMAGED_FILE, Prepared, PreparedFile, iter_batches
from e2h.errors import InputError
from e2h.privacy.keys import derive_key
from e2h.privacy.plan import PrivacyPlan

Query = CentralQuery | FrequencyQuery
Images = tuple[np.ndarray, np.ndarray]  # uint8 [M, H, W, C], and labels [M]
SumsOf = Callable[[Query, str], np.ndarray]

BLOCK_RECORDS, BLOCK_BYTES = 4096, 64 * 2**20  # of pixels, read at a time


def release_easy_stage(
    run: Run,
    prepared: Prepared,
    plan: PrivacyPlan,
    stage: str,
    sums_of: SumsOf,
    elsewhere: Callable[[Callable[[], Images]], Images] = lambda work: work(),
) -> None:
    """Makes an easy stage; after a kill the same call goes on, and pays nothing twice.

    Args:
      stage: of `curriculum`.
      sums_of: exact sums of the query over the training split, int64; called once, after the ledger was charged, as
        sums_of(query, domain).
      elsewhere: runs what takes minutes of a processor, e.g. on another machine.
    """
    if stage == "central":
        _central(run, prepared, plan, sums_of)
    else:
        _frequency(run, prepared, plan, sums_of, elsewhere)
    event = {**plan.release(stage).event.to_json(), **stamp(run.config)}
    write_bytes(run.easy(stage) / "event.json", json.dumps(event, indent=2).encode())
    run.mark_done(stage)


def _central(run: Run, prepared: Prepared, plan: PrivacyPlan, sums_of: SumsOf) -> None:
    facts, event = prepared.manifest, plan.release("central").event
    shape = facts.image_size, facts.channels, len(facts.class_names)
    query = CentralQuery(run.config.central, event, *shape, plan.num_records)
    target, conditional = run.central / "images.parquet", run.config.central.class_conditional
    if not target.exists():
        images = query.decode(_released(run, prepared, query, "central", sums_of))
        num_rounds, num_groups = images.shape[:2]
        labels = np.arange(num_groups) if conditional else np.full(num_groups, -1)
        flat, rounds = images.reshape(-1, *images.shape[2:]), np.repeat(np.arange(num_rounds), num_groups)
        columns = {"round": rounds}
        write_hf_parquet(target, flat, np.tile(labels, num_rounds), facts.class_names, columns, stamp(run.config))
    released, _ = read_hf_parquet([target])
    write_grid(run, run.central / "grid.png", *by_round(released, query.num_groups))


def _frequency(
    run: Run,
    prepared: Prepared,
    plan: PrivacyPlan,
    sums_of: SumsOf,
    elsewhere: Callable[[Callable[[], Images]], Images],
) -> None:
    facts, event, folder = prepared.manifest, plan.release("frequency").event, run.easy("frequency")
    shape = facts.image_size, facts.channels, len(facts.class_names)
    query = FrequencyQuery(run.config.frequency, event, *shape, plan.num_records, run.config.seed)
    path = folder / "embeddings.npy"  # kept, so that a fit that was killed begins without the private images
    if not path.exists():
        buffer = io.BytesIO()
        np.save(buffer, query.embeddings(_released(run, prepared, query, "frequency", sums_of)))
        write_bytes(path, buffer.getvalue())
    embeddings = _read_embeddings(path)
    images, labels = elsewhere(partial(_generated, embeddings, query, run.config.seed))
    write_hf_parquet(folder / "images.parquet", images, labels, facts.class_names, notes=stamp(run.config))
    write_grid(run, folder / "grid.png", *by_class(images, labels, len(facts.class_names)))


def _read_embeddings(path: Place) -> np.ndarray:
    try:
        return np.asarray(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise InputError(f"file={path}: {DAMAGED_FILE}") from error


def _generated(embeddings: np.ndarray, query: FrequencyQuery, seed: int) -> Images:
    """Post-processing of what was released."""
    return generate(fit_generator(embeddings, query, seed), query.frequency.num_images, seed, query.num_classes)


def _released(run: Run, prepared: Prepared, query: Query, stage: str, sums_of: SumsOf) -> np.ndarray:
    """Pays, sums over all records, and adds the noise once: int64, in the query's own shape."""
    event = query.event
    domain = run.domain(stage, event.to_json(), prepared.manifest.digest, machine())
    run.ledger.spend(stage, event, domain, 0, event.count)
    sums = sums_of(query, domain)
    run.easy(stage).mkdir(exist_ok=True, mode=0o700)
    return query.release(sums, derive_key(run.secret(), f"{stage}/noise", domain))


def mask_key(run: Run, stage: str, domain: str) -> bytes:
    """Key of the sampling of an easy stage; derived where it is used."""
    return derive_key(run.secret(), f"{stage}/sampling", domain)


def file_sums(files: list[PreparedFile], query: Query, key: bytes) -> tuple[np.ndarray, int]:
    """Sums over files, and how many records they have, in the memory of the sums and one block of records."""
    total, count = query.zero_sums(), 0
    bytes_per_image = query.channels * query.image_size**2
    for block in iter_batches(files, max(1, min(BLOCK_RECORDS, BLOCK_BYTES // bytes_per_image))):
        query.partial_sums(block.images, block.labels, block.ids, key, total)
        count += len(block)
    return total, count
