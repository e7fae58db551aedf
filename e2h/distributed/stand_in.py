"""Public or synthetic images in place of the private ones, for a search that costs nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from e2h.config import Config, DataConfig, expect
from e2h.curriculum.run import Run
from e2h.data.filesystem import remove
from e2h.data.prepare import finish_prepared
from e2h.data.records import Source, make_source
from e2h.data.sources import open_source
from e2h.data.storage import Prepared, open_prepared
from e2h.distributed import datasets
from e2h.privacy.events import Release
from e2h.privacy.plan import PrivacyPlan, plan_of
from e2h.results import some_images

SAMPLED, MOST_SHARED = 1000, 0.01  # private images that are looked for in the stand-in; the share that may be there
REPEATABLE = ("digits", "idx", "parquet")  # sources whose shards have names of our own


def stand_in_data(run: Run) -> DataConfig:
    """Where the stand-in lies and how it is read: images of the private ones' size and channels."""
    proxy = run.config.search.proxy
    source, path = str(proxy.source), proxy.path
    if source == "central":
        source, path = "parquet", str(run.central / "images.parquet")
    elif source == "release":
        source, path = "parquet", f"{str(path).rstrip('/')}/data"
    data = replace(run.config.data, source=source, path=path, class_names=None, num_records=None, resize="any")
    return replace(data, image_column=proxy.image_column, label_column=proxy.label_column)


def prepare_stand_in(run: Run, private: Prepared) -> Prepared:
    """The stand-in as a prepared set of its own, below `stand-in/` of the search's directory.

    Raises:
      InputError: if it can't be read, or is the private set: trials on that are not free.
    """
    folder, data = run.root / "stand-in" / "prepared", stand_in_data(run)
    if not (folder / "meta.json").exists():
        source = repeated(open_source(data), data, private.manifest.num_listed_train)
        remove(folder)
        stats = datasets.prepare_shards(source, data, str(folder))
        finish_prepared(str(folder), source, data, stats)
    found = open_prepared(folder)
    share, path = shared_images(private, found), run.config.search.proxy.path
    advice = f"{share:.0%} of the private images are among these; trials on them are charged by selection or compose"
    expect(share <= MOST_SHARED, "search.proxy.path", path, "public or synthetic images", advice)
    return found


def shared_images(private: Prepared, stand_in: Prepared) -> float:
    """Share of `SAMPLED` private images that are among the stand-in's, pixel by pixel; empty ones don't count."""
    images, _ = some_images(private, SAMPLED)
    own = {_digest(image) for image in images if image.min() < image.max()}
    seen: set[bytes] = set()
    for block, _ in stand_in.blocks("train"):
        seen |= own & {_digest(image) for image in block}
    return len(seen) / max(1, len(own))


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def repeated(source: Source, data: DataConfig, num_records: int) -> Source:
    """The source, its training images as often as it takes to be as many as the private ones.

    So that a few images, the central ones for example, can fill a private run's batches. Image folders and CIFAR's
    batches stay as they are: their records are known by their files.
    """
    if not 0 < source.num_train < num_records or data.source not in REPEATABLE:
        return source
    found, copies = source, num_records // max(1, source.num_train)
    while found.num_train < num_records:
        copies += 1 + copies // 20  # a copy's records may fall on the test side, by their names
        shards = [shard for shard in source.shards if shard.split == "test"]
        for copy in range(copies):
            shards += [replace(one, name=f"{one.name}/{copy}") for one in source.shards if one.split != "test"]
        found = make_source(shards, source.class_names, data)
    return found


def as_on(plan: PrivacyPlan, num_records: int, class_names: Sequence[str], config: Config) -> PrivacyPlan:
    """The plan of a private run, carried over to a set of another size.

    Noise, expected numbers of records and steps stay, so that a trial sees what the private run would see; only the
    sampling probabilities follow the size.

    Raises:
      InputError: if the set is smaller than an expected batch.
    """
    batch = config.finetune.expected_batch_size
    advice = "search on a larger set, or on smaller batches"
    expect(batch <= num_records, "finetune.expected_batch_size", batch, f"at most {num_records} stand-ins", advice)
    share = plan.num_records / num_records
    releases = [_scaled(one, share) for one in plan.releases if isinstance(one, Release)]
    return plan_of(releases, config, num_records, class_names, part=True)


def _scaled(release: Release, share: float) -> Release:
    """For a set `1 / share` times as large; mean embeddings are of all its records, so their noise grows with it."""
    event = release.event
    if release.name == "frequency":
        return replace(release, event=replace(event, noise_multiplier=event.noise_multiplier / share))
    return replace(release, event=replace(event, sampling_prob=min(1.0, event.sampling_prob * share)))
