"""What a run takes, foretold from one measured speed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from e2h.config import Config, FinetuneConfig, SamplingConfig, WarmupConfig
from e2h.curriculum.speed import forecast, gradients_per_second
from e2h.errors import InputError

CONFIG = Config(
    warmup=WarmupConfig(num_steps=60, batch_size=100),
    finetune=FinetuneConfig(num_steps=30, expected_batch_size=200, noise_multiplicity=4),
    sampling=SamplingConfig(num_images=100, num_steps=8),
)


def test_a_draw_costs_all_stages_the_same_and_a_pass_a_third_of_it():
    # 50 records of 4 draws a second: 200 draws, 600 passes.
    assert forecast(CONFIG, 50.0) == pytest.approx(
        {"warm-up": 60 * 100 / 200 / 60, "DP-SGD": 30 * 200 / 50 / 60, "sampling": 100 * 15 / 600 / 60}
    )


def test_each_easy_stage_warms_up_and_guidance_doubles_the_passes():
    slower = replace(
        CONFIG,
        curriculum=["central", "frequency"],
        sampling=replace(CONFIG.sampling, sampler="ddim", guidance=0.5),
    )
    slower.frequency.warmup = WarmupConfig(num_steps=30, batch_size=100)
    found = forecast(slower, 50.0)
    assert found["warm-up"] == pytest.approx(90 * 100 / 200 / 60)
    assert found["sampling"] == pytest.approx(100 * 8 * 2 / 600 / 60)
    assert forecast(replace(CONFIG, curriculum=[]), 50.0)["warm-up"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_plan_for_gpus_is_not_timed_on_cores():
    with pytest.raises(InputError, match=r"scaling\.use_gpu=True: expected a GPU on this machine"):
        gradients_per_second(replace(CONFIG, scaling=replace(CONFIG.scaling, use_gpu=True)), 10)
