"""Warm-up and DP-SGD: resumable, and paid for before data is read."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import small_runs
import torch
from small_runs import (
    CLASSES,
    FINETUNE,
    NUM_RECORDS,
    RELEASE,
    STEPS,
    UNIT,
    WARMUP,
    Killed,
    Training,
    averaged,
    new_ledger,
    new_network,
    parameters,
    records,
    refused_run,
    warmed,
    watch_units,
)

from e2h.curriculum import finetune as finetune_module
from e2h.curriculum import learner as learner_module
from e2h.curriculum import warmup as warmup_module
from e2h.curriculum.batches import make_batch
from e2h.curriculum.warmup import warm_up
from e2h.curriculum.workers import Workers
from e2h.diffusion.losses import draw_noise_levels, micro_batch_loss
from e2h.errors import BudgetError
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.keys import derive_key
from e2h.privacy.sampling import poisson_mask

# Warm-up -------------------------------------------------------------------------------------------------------------


def loss_on_a_fixed_draw(network: torch.nn.Module) -> float:
    images, generator = records(), torch.Generator().manual_seed(9)
    batch = make_batch(images.images, images.labels, list(range(NUM_RECORDS)), 8, 0.0, CLASSES)
    batch["sigma"] = draw_noise_levels((NUM_RECORDS, 8), generator)
    with torch.no_grad():
        return float(micro_batch_loss(network, batch).mean())


def test_the_warm_up_learns(tmp_path):
    points: list[tuple[str, float, int]] = []
    network = warmed(tmp_path, report=lambda *point: points.append(point))
    assert loss_on_a_fixed_draw(network) < 0.8 * loss_on_a_fixed_draw(new_network())
    ((name, value, step),) = points
    # The mean loss of a step, whatever the number of units: near that of the fixed draw.
    assert (name, step) == ("warmup/loss", WARMUP.num_steps)
    assert value == pytest.approx(loss_on_a_fixed_draw(network), rel=0.5)


@pytest.mark.usefixtures("quick_store")
def test_a_resumed_warm_up_is_the_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(warmup_module, "CHECKPOINT_EVERY", 5)
    uninterrupted, images, done = warmed(tmp_path / "a"), records(), []

    def progress(step: int) -> None:
        done.append(step)
        if step == 12 and done.count(12) == 1:
            raise Killed

    def start(network):
        checkpoints = Training(tmp_path / "b").checkpoints
        warm_up(
            network, images.images, images.labels, WARMUP, 0, Workers.current(), checkpoints, lambda *_: None, progress
        )

    with pytest.raises(Killed):
        start(new_network())
    resumed = new_network()
    start(resumed)
    assert done == [*range(1, 13), *range(11, 21)]
    assert torch.equal(parameters(resumed), parameters(uninterrupted))


# DP-SGD --------------------------------------------------------------------------------------------------------------


def test_every_step_is_charged_and_made_from_its_draw(alone):
    training, images = alone["training"], records()
    assert training.progressed == list(range(1, STEPS + 1))
    assert new_ledger(alone["folder"]).charged() == (RELEASE,)
    key = derive_key(bytes(range(32)), "finetune/sampling", training.domain)
    for step in range(STEPS):
        drawn = np.flatnonzero(poisson_mask(key, step, images.ids, RELEASE.event.sampling_prob))
        assert alone["seen"].get(step, []) == drawn.tolist()
    assert len({tuple(draw) for draw in alone["seen"].values()}) == STEPS
    assert not torch.equal(parameters(training.network), alone["start"])
    names = {"loss", "clipped_fraction", "mean_norm", "batch_size"}
    assert {name for name, _, _ in training.reported} == {f"finetune/{name}" for name in names}


@pytest.mark.usefixtures("quick_store")
@pytest.mark.parametrize("killed_after", [3, 13, STEPS])
def test_a_resumed_run_is_the_uninterrupted_one(alone, tmp_path, killed_after):
    with pytest.raises(Killed):
        Training(tmp_path, network=warmed(tmp_path), stop_after=killed_after).run()
    assert len(new_ledger(tmp_path).paid("finetune", "ab" * 32)) >= killed_after
    # The second call starts from the warm-up's checkpoint, as `train` does.
    again = Training(tmp_path, network=warmed(tmp_path))
    ema = again.run()
    assert again.progressed == list(range(killed_after // 5 * 5 + 1, STEPS + 1))
    assert torch.equal(parameters(again.network), parameters(alone["training"].network))
    assert torch.equal(averaged(ema), alone["ema"])
    assert new_ledger(tmp_path).charged() == (RELEASE,)


@pytest.mark.usefixtures("quick_store")
def test_a_draw_made_ahead_is_its_own_steps_after_a_kill_too(alone, tmp_path, monkeypatch):
    """Draws come late or early, as they may: the step of each must be the one that it was made for."""
    mask = poisson_mask
    monkeypatch.setattr(
        finetune_module,
        "poisson_mask",
        lambda key, step, *rest: (time.sleep(0.02 * (step % 3)), mask(key, step, *rest))[1],
    )
    before = watch_units(monkeypatch.setattr)
    with pytest.raises(Killed):
        Training(tmp_path, network=warmed(tmp_path), stop_after=11).run()
    monkeypatch.undo()
    after = watch_units(monkeypatch.setattr)
    again = Training(tmp_path, network=warmed(tmp_path))
    again.run()
    assert (sorted(before), sorted(after)) == (list(range(11)), list(range(10, STEPS)))
    assert all(places == alone["seen"][step] for seen in (before, after) for step, places in seen.items())
    assert torch.equal(parameters(again.network), parameters(alone["training"].network))


@pytest.mark.usefixtures("quick_store")
def test_a_draw_that_fails_ahead_ends_the_run_in_its_own_step(tmp_path, monkeypatch):
    def failing(key, step, *rest):
        if step == 6:
            raise MemoryError("no room for the coins of step 6")
        return poisson_mask(key, step, *rest)

    monkeypatch.setattr(finetune_module, "poisson_mask", failing)
    training = Training(tmp_path)
    with pytest.raises(MemoryError, match="step 6"):
        training.run()
    assert training.progressed == list(range(1, 7))
    monkeypatch.undo()
    training.run()
    assert training.progressed == [*range(1, 7), *range(6, STEPS + 1)]


def test_another_domain_draws_other_records_and_noise(alone, tmp_path):
    other = Training(tmp_path, network=warmed(tmp_path), domain="cd" * 32)
    with pytest.MonkeyPatch.context() as patched:
        seen = watch_units(patched.setattr)
        other.run()
    assert seen != alone["seen"]
    assert not torch.equal(parameters(other.network), parameters(alone["training"].network))


@pytest.mark.parametrize("engine", ["loop", "opacus"])
def test_the_reference_engines_train_the_same_network(alone, tmp_path, engine):
    other = Training(tmp_path, network=warmed(tmp_path), settings=replace(FINETUNE, engine=engine))
    other.run()
    moved = parameters(alone["training"].network) - alone["start"]
    difference = parameters(other.network) - parameters(alone["training"].network)
    assert float(difference.norm() / moved.norm()) < 1e-3


class PaidOnly:
    """Images that may be read only in a step that the ledger has been charged for."""

    def __init__(self, images: np.ndarray, training: Training) -> None:
        self.images, self.training, self.reads, self.shape = images, training, 0, images.shape

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        self.reads += 1
        paid = new_ledger(self.training.folder).paid("finetune", self.training.domain)
        assert len(self.training.progressed) in paid
        return self.images[places]


def test_no_image_is_read_before_its_step_is_paid(tmp_path):
    training = Training(tmp_path)
    guarded = PaidOnly(training.records.images, training)
    training.records = replace(training.records, images=guarded)
    training.run()
    assert guarded.reads >= STEPS


def test_a_step_that_cannot_be_paid_does_not_happen(tmp_path):
    outcome = refused_run(Workers.current(), tmp_path)
    assert outcome["message"] == "step 8 is too much"
    assert len(outcome["states"]) == 8
    assert torch.equal(outcome["end"], outcome["states"][-1])
    assert new_ledger(tmp_path).paid("finetune", "ab" * 32) == set(range(8))


def test_an_empty_draw_is_a_step_like_any_other(tmp_path, monkeypatch):
    empty = Release("finetune", PoissonSampledGaussian(1e-12, 1.0, STEPS))
    monkeypatch.setattr(small_runs, "RELEASE", empty)
    training, states = Training(tmp_path), []
    training.progress = lambda step: states.append(parameters(training.network).clone())
    training.run()
    assert len({tuple(state.tolist()) for state in states}) == STEPS
    assert new_ledger(tmp_path).charged() == (empty,)
    assert training.reported == [("finetune/batch_size", 0, step) for step in range(1, STEPS + 1)]


def test_a_ledger_that_lost_entries_stops_the_resumed_run(alone, tmp_path):
    shutil.copytree(alone["folder"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    with pytest.raises(BudgetError, match="checkpoint of step 20: 8 of its steps are not in the ledger"):
        Training(tmp_path).run()
    path.unlink()
    with pytest.raises(BudgetError, match="20 of its steps are not in the ledger"):
        Training(tmp_path).run()


def test_a_checkpoint_of_another_domain_stops_the_resumed_run(alone, tmp_path):
    shutil.copytree(alone["folder"], tmp_path, dirs_exist_ok=True)
    with pytest.raises(BudgetError, match="not in the ledger under this key, data, code and machine"):
        Training(tmp_path, domain="cd" * 32).run()


def test_sampler_optimizer_and_accountant_share_q_and_noise_and_steps_and_the_normaliser(tmp_path, monkeypatch):
    sampled, built = [], []
    draw, build = finetune_module.poisson_mask, learner_module.SecureDPOptimizer

    def watched_draw(key, step, ids, sampling_prob):
        sampled.append((step, len(ids), sampling_prob))
        return draw(key, step, ids, sampling_prob)

    def watched_build(*arguments, **settings):
        built.append(settings)
        return build(*arguments, **settings)

    monkeypatch.setattr(finetune_module, "poisson_mask", watched_draw)
    monkeypatch.setattr(learner_module, "SecureDPOptimizer", watched_build)
    Training(tmp_path).run()
    (charged,) = new_ledger(tmp_path).charged()
    event, (settings,) = charged.event, built
    assert sampled == [(step, NUM_RECORDS, event.sampling_prob) for step in range(event.count)]
    assert settings["noise_multiplier"] == event.noise_multiplier
    assert settings["max_grad_norm"] == FINETUNE.max_grad_norm
    assert settings["expected_batch_size"] == pytest.approx(event.sampling_prob * NUM_RECORDS, rel=1e-12)


def test_every_micro_batch_has_one_shape_and_its_padding_weighs_nothing(tmp_path, monkeypatch):
    shapes, weighed, places = set(), [], []
    micro_batch = finetune_module._micro_batch

    def watched(network, images, chosen, *others):
        batch, weights = micro_batch(network, images, chosen, *others)
        shapes.update((name, tuple(entry.shape)) for name, entry in batch.items())
        weighed.append(weights.tolist())
        places.append(len(chosen))
        return batch, weights

    monkeypatch.setattr(finetune_module, "_micro_batch", watched)
    Training(tmp_path).run()
    draws, image = (UNIT, FINETUNE.noise_multiplicity), (1, 8, 8)
    expected = {"images": (UNIT, *image), "labels": (UNIT,), "sigma": draws, "noise": (*draws, *image)}
    assert shapes == set(expected.items())
    assert min(places) < UNIT  # some were padded
    assert weighed == [[1.0] * count + [0.0] * (UNIT - count) for count in places]


def test_a_checkpoint_holds_nothing_but_what_the_noisy_steps_made(alone):
    step, state = alone["training"].checkpoints.latest("finetune")
    assert step == STEPS
    assert set(state) == {"network", "ema", "averages", "optimizer", "start"}
    assert set(state["network"]) == set(new_network().state_dict())
    assert set(state["ema"]) == {"num_updates", "parameters"}
    # Adam's averages of noisy gradients: no clipped sum, draw or key.
    assert {name for entry in state["optimizer"]["state"].values() for name in entry} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
