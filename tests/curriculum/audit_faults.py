"""Faults that the audit must find, planted in the real functions by monkeypatching."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from e2h.curriculum import central as central_module
from e2h.curriculum import finetune as finetune_module
from e2h.curriculum import frequency as frequency_module
from e2h.curriculum.central import GRID_BITS, CentralQuery, pool
from e2h.curriculum.frequency import FrequencyQuery
from e2h.curriculum.learner import PrivateRun
from e2h.privacy import dpsgd
from e2h.privacy import optimizer as optimizer_module
from e2h.privacy.dpsgd import ClippedSum
from e2h.privacy.noise import gaussian_noise
from e2h.privacy.optimizer import SecureDPOptimizer
from e2h.privacy.sampling import poisson_mask

Patch = pytest.MonkeyPatch


def no_noise(patch: Patch) -> None:
    for module in (optimizer_module, central_module, frequency_module):
        patch.setattr(module, "gaussian_noise", lambda key, start, stop, deviation: np.zeros(stop - start, np.int64))


def noise_over_workers(patch: Patch) -> None:
    """Of two."""
    patch.setattr(optimizer_module, "gaussian_noise", lambda *arguments: gaussian_noise(*arguments) // 2)


def noise_over_root_of_workers(patch: Patch) -> None:
    """Of two, each of which adds half the variance, where one is lost."""

    def smaller(key, start, stop, deviation):
        return gaussian_noise(key, start, stop, deviation / 2**0.5)

    patch.setattr(optimizer_module, "gaussian_noise", smaller)


def no_noise_in_a_layer(patch: Patch) -> None:
    def without(key, start, stop, deviation):
        noise = gaussian_noise(key, start, stop, deviation)
        noise[:40] = 0
        return noise

    patch.setattr(optimizer_module, "gaussian_noise", without)


def reused_noise(patch: Patch) -> None:
    """The key forgets the step."""
    real = PrivateRun.key
    patch.setattr(PrivateRun, "key", lambda self, purpose, *address: real(self, purpose))


def noise_of_each_worker(patch: Patch) -> None:
    """Each worker adds its own noise to its own copy."""
    real = SecureDPOptimizer._write_gradients

    def write(self, *arguments):
        self._totals[: self._num_coordinates] += self._rank * 1000
        real(self, *arguments)

    patch.setattr(SecureDPOptimizer, "_write_gradients", write)


def no_clipping(patch: Patch) -> None:
    def summed(gradients, weights, losses, max_grad_norm, *others):
        rows = torch.cat(gradients, dim=1).double() * weights[:, None]
        steps = (rows.sum(0) * (2.0**dpsgd.GRID_BITS / max_grad_norm)).round().to(torch.int64)
        return ClippedSum(steps, int(weights.sum()), losses, rows.norm(dim=1))

    patch.setattr(dpsgd, "clip_and_sum", summed)


def clipped_by_micro_batch(patch: Patch) -> None:
    """The sum of a micro-batch is clipped to as many norms as it has records."""

    def summed(gradients, weights, losses, max_grad_norm, *others):
        rows = torch.cat(gradients, dim=1).double() * weights[:, None]
        total, bound = rows.sum(0), float(weights.sum()) * max_grad_norm
        total *= min(1.0, bound / max(float(total.norm()), 1e-12))
        steps = (total * (2.0**dpsgd.GRID_BITS / max_grad_norm)).round().to(torch.int64)
        return ClippedSum(steps, int(weights.sum()), losses, rows.norm(dim=1))

    patch.setattr(dpsgd, "clip_and_sum", summed)


def normalised_by_micro_batch(patch: Patch) -> None:
    """Gradients are scaled by their mean length over a micro-batch, then clipped: one record scales the others."""
    real = dpsgd.clip_and_sum

    def summed(gradients, weights, losses, max_grad_norm, *others):
        mean = torch.cat(gradients, dim=1).norm(dim=1).mean()
        return real([rows * (max_grad_norm / mean) for rows in gradients], weights, losses, max_grad_norm, *others)

    patch.setattr(dpsgd, "clip_and_sum", summed)


def realised_count(patch: Patch) -> None:
    real = SecureDPOptimizer.step_private

    def step(self, step, num_examples):
        self.expected_batch_size = max(num_examples, 1)
        real(self, step, num_examples)

    patch.setattr(SecureDPOptimizer, "step_private", step)


def same_masks(patch: Patch) -> None:
    """Each of two workers draws among its own half by place, under one key."""

    def by_place(key, step, record_ids, sampling_prob):
        half = (len(record_ids) + 1) // 2
        return poisson_mask(key, step, np.arange(len(record_ids)) % half, sampling_prob)

    patch.setattr(finetune_module, "poisson_mask", by_place)


def shuffled(patch: Patch) -> None:
    """Each record once an epoch, instead of by a coin in each step."""

    def epochs(key, step, record_ids, sampling_prob):
        parts = round(1 / sampling_prob)
        order = np.random.default_rng([*key, step // parts]).permutation(len(record_ids))
        return order % parts == step % parts

    patch.setattr(finetune_module, "poisson_mask", epochs)


def by_place(key, step, record_ids, sampling_prob):
    return poisson_mask(key, step, np.arange(len(record_ids)), sampling_prob)


def masks_by_place(patch: Patch) -> None:
    """A record's coin follows its place: without it, the others' coins move up."""
    patch.setattr(finetune_module, "poisson_mask", by_place)


def no_clipping_of_images(patch: Patch) -> None:
    def encode(self, images):
        pooled = pool(images, self.central.pool_factor).reshape(len(images), -1)
        pixels = pooled / (255 * self.central.pool_factor**2) - self.central.centre
        count = np.full((len(images), 1), self.central.count_weight * self.central.max_norm)
        return np.rint(np.concatenate([pixels, count], axis=1) * (2.0**GRID_BITS / self.sensitivity))

    patch.setattr(CentralQuery, "encode", encode)


def realised_count_of_images(patch: Patch) -> None:
    """Each class's sum over the records that it drew, as the references do, scaled to the expected number."""
    real = CentralQuery.partial_sums

    def sums(self, images, labels, record_ids, key):
        total = real(self, images, labels, record_ids, key).astype(np.float64)
        for t in range(self.event.count):
            joins = poisson_mask(key, t, record_ids, self.event.sampling_prob)
            counts = np.bincount(labels[joins], minlength=self.num_groups)[: self.num_groups, None]
            total[t] *= self.expected_count / np.maximum(counts, 1)
        return np.rint(total).astype(np.int64)

    patch.setattr(CentralQuery, "partial_sums", sums)


def same_masks_of_images(patch: Patch) -> None:
    """Coins by the place in a block."""
    patch.setattr(central_module, "poisson_mask", by_place)


def reused_noise_of_images(patch: Patch) -> None:
    def release(self, sums, key):
        noise = gaussian_noise(key, 0, sums[0].size, self.event.noise_multiplier * 2.0**GRID_BITS)
        return sums + noise.reshape(sums.shape[1:])

    patch.setattr(CentralQuery, "release", release)


def unbounded_features(patch: Patch) -> None:
    """Cosines and sines without the factor that makes a row's norm 1."""
    real = FrequencyQuery.encode
    patch.setattr(FrequencyQuery, "encode", lambda self, images: real(self, images) * 3)


def realised_count_of_embeddings(patch: Patch) -> None:
    """Each class's mean over the records that it has, scaled to the expected number."""
    real = FrequencyQuery.partial_sums

    def sums(self, images, labels, *others):
        scale = self.expected_count / np.maximum(np.bincount(labels, minlength=self.num_classes), 1)
        total = real(self, images, labels, *others)
        total[:] = np.rint(total * scale[:, None])
        return total

    patch.setattr(FrequencyQuery, "partial_sums", sums)


def last_record_of_a_block_left_out(patch: Patch) -> None:
    real = FrequencyQuery.partial_sums

    def sums(self, images, labels, *others):
        return real(self, images[:-1], labels[:-1], *others)

    patch.setattr(FrequencyQuery, "partial_sums", sums)


# Which tier must find it.
GRADIENT_FAULTS = {
    "noise": [
        no_noise,
        noise_over_workers,
        noise_over_root_of_workers,
        no_noise_in_a_layer,
        reused_noise,
        noise_of_each_worker,
    ],
    "coupled": [no_clipping, clipped_by_micro_batch, normalised_by_micro_batch, realised_count, masks_by_place],
    "sampler": [same_masks, shuffled],
    "one_run": [no_noise],
}
CENTRAL_FAULTS = {
    "noise": [no_noise, reused_noise_of_images],
    "coupled": [no_clipping_of_images, realised_count_of_images],
    "sampler": [same_masks_of_images],
    "one_run": [no_noise],
}
FREQUENCY_FAULTS = {
    "noise": [no_noise],
    "coupled": [unbounded_features, realised_count_of_embeddings],
    "sampler": [last_record_of_a_block_left_out],
    "one_run": [no_noise],
}
