"""Both easy stages in one process: paid once, resumed after a kill, and what the network then learns from."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from small_runs import Killed, small_config

from e2h.config import Config, FrequencyConfig, WarmupConfig
from e2h.curriculum import easy, stages
from e2h.curriculum.averages import snapshots
from e2h.curriculum.run import Run, open_run
from e2h.curriculum.train import easy_images
from e2h.validation import validate


def settings(storage: Path) -> Config:
    config = small_config(storage)
    config.curriculum, config.privacy.epsilon = ["central", "frequency"], 1.0  # the smaller, the faster PLD
    warmup = WarmupConfig(num_steps=4, batch_size=8)
    config.frequency = FrequencyConfig(num_features=40, generator_steps=3, num_images=30, warmup=warmup)
    config.finetune.ema_snapshots, config.sampling.ema_widths = 2, [0.1, 0.2]
    return validate(config)


def released(run: Run) -> dict[str, np.ndarray]:
    return {stage: easy_images(run, stage)[0] for stage in ("central", "frequency")}


@pytest.fixture(scope="module", autouse=True)
def secret():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("E2H_TEST_SECRET", hashlib.sha256(b"easy stages").hexdigest())
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """An undisturbed run up to its images, and what its easy stages gave."""
    storage = tmp_path_factory.mktemp("whole")
    with open_run(settings(storage)) as run:
        prepared = stages.prepare(run)
        plan = stages.calibrate(run, prepared)
        stages.release_easy_stages(run, prepared, plan)
        stages.train(run, plan)
        stages.sample(run)
        return run.root, released(run)


def test_each_stage_is_an_event_of_its_own_and_all_meet_the_target(whole):
    root, _ = whole
    with open_run(settings(root.parent)) as run:
        plan = stages.calibrate(run, stages.prepare(run))
        assert [release.name for release in plan.releases] == ["central", "frequency", "finetune"]
        assert (plan.release("frequency").event.sampling_prob, plan.release("frequency").event.count) == (1.0, 1)
        assert 0.999 < plan.bound.epsilon / run.config.privacy.epsilon <= 1
        assert set(run.ledger.charged()) == set(plan.releases)
        before = (root / "ledger.jsonl").read_bytes()
        stages.release_easy_stages(run, stages.prepare(run), plan)
        assert (root / "ledger.jsonl").read_bytes() == before


def test_the_network_learns_from_both_and_the_chosen_average_is_what_is_sampled(whole):
    root, images = whole
    assert images["central"].shape == (50, 8, 8, 1)
    assert images["frequency"].shape == (30, 8, 8, 1)
    names = {path.name for path in (root / "checkpoints").iterdir()}
    assert {"warmup-00000006.pt", "warmup2-00000004.pt", "average.json"} <= names
    assert snapshots(root / "checkpoints") == [3, 6]
    assert len(list((root / "synthetic").glob("part-*.parquet"))) == 3


@pytest.mark.parametrize("kill", ["after the payment", "in the fit"])
def test_a_killed_stage_goes_on_with_the_same_noise_and_pays_nothing_twice(whole, tmp_path, monkeypatch, kill):
    _, images = whole
    counted: list[str] = []

    def dying(*arguments: object) -> object:
        raise Killed

    sums = stages._sums
    monkeypatch.setattr(stages, "_sums", lambda *call: (counted.append(call[2]), sums(*call))[1])
    with open_run(settings(tmp_path)) as run:
        prepared = stages.prepare(run)
        plan = stages.calibrate(run, prepared)
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            if kill == "in the fit":
                patch.setattr(easy, "fit_generator", dying)
            else:
                patch.setattr(easy.FrequencyQuery, "release", dying)
            stages.release_easy_stages(run, prepared, plan)
        assert not run.done("frequency")
    with open_run(settings(tmp_path)) as run:
        stages.release_easy_stages(run, prepared, plan)
        found = released(run)
        assert set(run.ledger.charged()) == set(plan.releases[:2])
        # After the release the private images are not needed any more.
        assert counted == ["central", "frequency", *(["frequency"] if kill == "after the payment" else [])]
    for stage, undisturbed in images.items():
        np.testing.assert_array_equal(found[stage], undisturbed)
