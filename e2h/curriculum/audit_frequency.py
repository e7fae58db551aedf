"""What an audit sees of the query of mean embeddings: the very `FrequencyQuery` of a run, on canaries.

Each canary is a random image in a class of its own, so that its features, of norm 1, are the most that a record may
add, and no other record touches its sums.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from e2h.curriculum.audit_central import NUM_BLOCKS, PUBLIC_RECORDS, coupled_distances
from e2h.curriculum.canaries import Subject
from e2h.curriculum.central import GRID_BITS
from e2h.curriculum.frequency import FrequencyQuery
from e2h.privacy.audit import Evidence
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.keys import derive_key

NUM_RELEASES = 50  # whose noise is looked at


def event_to_audit(subject: Subject) -> PoissonSampledGaussian:
    """The query is one round over all records; the noise is still to be calibrated."""
    return PoissonSampledGaussian(1.0, 1.0, 1)


def observe(subject: Subject, release: Release, secret: bytes) -> Evidence:
    """Runs the audited query.

    Args:
      release: `event_to_audit` with calibrated noise.
      secret: 32 bytes, of this audit alone.
    """
    config, count = subject.config, subject.num_canaries
    size, channels = config.data.image_size, config.data.channels
    configured = FrequencyQuery(
        config.frequency, release.event, size, channels, subject.num_classes, PUBLIC_RECORDS, config.seed
    )
    query = replace(configured, num_classes=count, num_records=count)
    rng = np.random.default_rng(list(derive_key(secret, "audit/frequency records")))
    images = rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    included = rng.random(count) < 0.5
    sums, sample = _sums(query, images, included), _noise(configured, secret)
    released = query.release(sums, derive_key(secret, "audit/frequency noise"))
    draws = (_sums(query, images, np.ones(count, bool)) != 0).any(axis=1)
    return Evidence(
        square_sums=(sample**2).sum(axis=0),
        sample=sample,
        releases_agree=True,
        distances=coupled_distances(subject, configured, secret),
        draws=draws[None],
        draws_agree=True,
        entered_as_drawn=np.array_equal((sums != 0).any(axis=1), included),
        scores=np.einsum("cf,cf->c", released.astype(np.float64), query.encode(images).astype(np.float64)),
        included=included,
    )


def _noise(query: FrequencyQuery, secret: bytes) -> np.ndarray:
    """Releases of nothing under several keys, in units of the accounted deviation: [NUM_RELEASES, all coordinates]."""
    keys = [derive_key(secret, f"audit/frequency noise {number}") for number in range(NUM_RELEASES)]
    released = np.stack([query.release(query.zero_sums(), key).ravel() for key in keys])
    return released / (query.event.noise_multiplier * 2.0**GRID_BITS)


def _sums(query: FrequencyQuery, images: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Sums over the kept canaries, in blocks: int64 [canaries, num_features]."""
    total = query.zero_sums()
    for block in np.array_split(np.flatnonzero(kept), NUM_BLOCKS):
        query.partial_sums(images[block], block, block, b"", total)
    return total
