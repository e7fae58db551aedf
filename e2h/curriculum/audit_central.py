"""What an audit sees of the central query: the very `CentralQuery` of a run, on random records and canaries.

Phantom pixels: each canary has a coordinate of the sums (a pixel or bin of a class) that no other record touches. In
the mean query a canary is the public centre but for one pixel, and the audited clip norm is small, so that its clipped
contribution is the most that a record may add. In the mode query it is an image of one pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from e2h.curriculum.canaries import Subject
from e2h.curriculum.central import GRID_BITS, CentralQuery
from e2h.curriculum.easy import Query
from e2h.privacy.audit import Evidence
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.keys import derive_key
from e2h.privacy.sampling import poisson_mask

NUM_ROUNDS = 200  # whose sampling and noise are looked at
NUM_BLOCKS = 2  # in which the records are summed, as by two workers
NUM_OTHERS = 60  # ordinary records beside the one that comes and goes
# Public N of that pair: most of its records contribute nothing, so a realised count is far from the expected one.
PUBLIC_RECORDS = 10_000
# One pixel differs from the centre by at least a half: canaries are clipped.
CANARY_NORM = 0.25


def event_to_audit(subject: Subject) -> PoissonSampledGaussian:
    """The configured sampling and rounds, the noise still to be calibrated."""
    return PoissonSampledGaussian(subject.config.central.sampling_prob, 1.0, subject.config.central.num_rounds)


@dataclass(frozen=True)
class Canaries:
    """m canaries and a query for them: canary i alone touches coordinate `places[i]` of group `labels[i]`."""

    query: CentralQuery
    images: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    ids: np.ndarray
    included: np.ndarray

    def of_each(self, sums: np.ndarray) -> np.ndarray:
        """[T, m]: each canary's own coordinate of sums [T, groups, dimension]."""
        return sums[:, self.labels, self.places]

    def sums(self, query: CentralQuery, kept: np.ndarray, key: bytes) -> np.ndarray:
        """Sums over the kept canaries, in blocks."""
        total = np.zeros((query.event.count, query.num_groups, query.dimension), np.int64)
        for block in np.array_split(np.flatnonzero(kept), NUM_BLOCKS):
            total += query.partial_sums(self.images[block], self.labels[block], self.ids[block], key)
        return total


def canaries(subject: Subject, event: PoissonSampledGaussian, secret: bytes) -> Canaries:
    count = subject.num_canaries
    make = _mode_canaries if subject.config.central.query == "mode" else _mean_canaries
    query, images, labels, places = make(subject, event)
    rng = np.random.default_rng(list(derive_key(secret, "audit/central records")))
    return Canaries(query, images, labels, places, rng.choice(2**62, count, replace=False), rng.random(count) < 0.5)


def _mean_canaries(
    subject: Subject, event: PoissonSampledGaussian
) -> tuple[CentralQuery, np.ndarray, np.ndarray, np.ndarray]:
    """One pixel each, over all groups, in square grey images as large as need be."""
    central, count = subject.config.central, subject.num_canaries
    factor, num_groups = central.pool_factor, subject.num_classes if central.class_conditional else 1
    side = int(np.ceil(np.sqrt(count / num_groups)))
    grey = round(255 * central.centre)
    labels, places = np.arange(count) % num_groups, np.arange(count) // num_groups
    small = np.full((count, side * side), grey, np.uint8)
    small[np.arange(count), places] = 255 if grey < 128 else 0
    images = small.reshape(count, side, side, 1).repeat(factor, axis=1).repeat(factor, axis=2)
    central = replace(central, max_norm=CANARY_NORM, centre=grey / 255)
    query = CentralQuery(central, event, side * factor, 1, subject.num_classes, count)
    return query, images, labels, places


def _mode_canaries(
    subject: Subject, event: PoissonSampledGaussian
) -> tuple[CentralQuery, np.ndarray, np.ndarray, np.ndarray]:
    """One bin each, over as many classes as need be."""
    central, count = replace(subject.config.central, class_conditional=True), subject.num_canaries
    factor = central.pool_factor
    greys = np.arange(256, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(factor, axis=1).repeat(factor, axis=2)
    one = CentralQuery(central, event, factor, 1, 1, count)
    bins, first = np.unique(one.encode(greys).argmax(axis=1), return_index=True)
    labels, which = np.arange(count) // len(bins), np.arange(count) % len(bins)
    return replace(one, num_classes=int(labels[-1]) + 1), greys[first[which]], labels, bins[which]


def observe(subject: Subject, release: Release, secret: bytes) -> Evidence:
    """Runs the audited query.

    Args:
      release: `event_to_audit` with calibrated noise.
      secret: 32 bytes, of this audit alone.
    """
    found = canaries(subject, release.event, secret)
    masks, noise = (derive_key(secret, f"audit/central {purpose}") for purpose in ("masks", "noise"))
    sums = found.sums(found.query, found.included, masks)
    signs = np.sign(found.query.encode(found.images)[np.arange(len(found.ids)), found.places])
    many = replace(found.query, event=replace(release.event, count=NUM_ROUNDS))
    many_sums = found.sums(many, np.ones(len(found.ids), bool), masks)
    residual = (many.release(many_sums, noise) - many_sums).reshape(NUM_ROUNDS, -1)
    sample = residual / (release.event.noise_multiplier * 2.0**GRID_BITS)
    q = release.event.sampling_prob
    drawn = np.stack([poisson_mask(masks, t, found.ids, q) for t in range(NUM_ROUNDS)])
    draws = found.of_each(many_sums) != 0
    return Evidence(
        square_sums=(sample**2).sum(axis=0),
        sample=sample,
        releases_agree=True,
        distances=coupled_distances(subject, _configured(subject, release.event), secret),
        draws=draws,
        draws_agree=True,
        entered_as_drawn=np.array_equal(draws, drawn),
        scores=found.of_each(found.query.release(sums, noise)).sum(axis=0) * signs,
        included=found.included,
    )


def _configured(subject: Subject, event: PoissonSampledGaussian) -> CentralQuery:
    """A round of the configured query."""
    data, once = subject.config.data, replace(event, count=1)
    shape = data.image_size, data.channels, subject.num_classes
    return CentralQuery(subject.config.central, once, *shape, PUBLIC_RECORDS)


def coupled_distances(subject: Subject, query: Query, secret: bytes) -> dict[str, float]:
    """How far a round of the query moves when one record is replaced by nothing, by kind of record; same keys."""
    data, num_classes, q = subject.config.data, subject.num_classes, query.event.sampling_prob
    masks, noise = (derive_key(secret, f"audit/coupled {purpose}") for purpose in ("masks", "noise"))
    rng = np.random.default_rng(list(derive_key(secret, "audit/coupled records")))
    images = rng.integers(0, 256, (NUM_OTHERS + 1, data.image_size, data.image_size, data.channels), dtype=np.uint8)
    labels = rng.integers(0, num_classes, NUM_OTHERS + 1)
    ids = rng.choice(2**62, NUM_OTHERS + 1, replace=False)
    # The record that comes and goes is in the middle, and among those that join.
    middle = NUM_OTHERS // 2
    ids[middle] = next(one for one in range(10**6) if poisson_mask(masks, 0, np.array([one]), q)[0])
    others, distances = np.arange(NUM_OTHERS + 1) != middle, {}
    for kind, image in {"black image": 0, "white image": 255, "random image": images[middle]}.items():
        images[middle] = image
        whole = query.release(query.partial_sums(images, labels, ids, masks), noise)
        rest = query.release(query.partial_sums(images[others], labels[others], ids[others], masks), noise)
        distances[kind] = float(np.linalg.norm((whole - rest).astype(np.float64))) * 2.0**-GRID_BITS
    return distances
